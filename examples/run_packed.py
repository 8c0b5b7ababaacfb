"""Time a packed model on the CPU against the same weights as 32-bit floats.

    python examples/run_packed.py

The packed model holds integers in memory and multiplies by them; both take turns in one process.  The embedded model is
small: much of a step is not matrix products, and larger models gain more.
"""

import copy
import functools

import torch
import transformers

import nashswarm
from nashswarm.data import corpus, stdlib_docs
from nashswarm.measures import measure
from nashswarm.measures.speed import Speed
from nashswarm.models import evaluation, sources
from nashswarm.progress import no_track

LENGTH = 128  # tokens of a window


def main() -> None:
    torch.set_num_threads(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(sources.EMBEDDED)
    full = transformers.AutoModelForCausalLM.from_pretrained(sources.EMBEDDED)
    calibration, test = (
        corpus.cut_windows(stdlib_docs.text(part), tokenizer, LENGTH, part)[:16] for part in ("calibration", "test")
    )
    packed, report = nashswarm.compress(full, tokenizer, "gptq", calibration, bits=4)
    floats = copy.deepcopy(packed)
    floats.dequantize()
    reference = functools.partial(evaluation.compute_reference, floats, test[:4])
    subject = measure.EvaluationTarget(floats, floats, lambda: packed, test, reference, no_track)
    speed = Speed(prompt_tokens=64, context_tokens=32, new_tokens=16, repeats=10, quality_windows=4)
    metrics, _ = speed.measure(subject)

    print(f"file         {report.bytes_file:>12,} bytes")
    for name, suffix in (("floats", "_full"), ("packed", "")):
        print(
            f"{name:12} {metrics[f'bytes_resident{suffix}']:>12,} bytes in memory, "
            f"{metrics[f'decode_ms{suffix}']:.2f} ms per token, "
            f"{metrics[f'prefill_tokens_per_second{suffix}']:,.0f} prompt tokens per second"
        )
    low, high = metrics["decode_ratio_low"], metrics["decode_ratio_high"]
    print(f"decoding     {metrics['decode_ratio']:.2f} times as fast, 95 % interval {low:.2f} to {high:.2f}")
    print(f"int8 costs   {metrics['kl_int8']:.1e} nats per token, against the same weights as floats")


if __name__ == "__main__":
    main()
