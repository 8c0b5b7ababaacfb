"""Compress the embedded model to three bits, by error feedback alone and by the game.

    python examples/quantize.py

Both files hold everything that the model needs; KL is measured on text that neither method has seen.
"""

import transformers

import nashswarm
from nashswarm.data import corpus, stdlib_docs
from nashswarm.models import evaluation, sources

LENGTH = 128  # tokens of a window
WINDOWS = 12


def main() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(sources.EMBEDDED)
    full = transformers.AutoModelForCausalLM.from_pretrained(sources.EMBEDDED).float().eval()
    calibration, test = (
        corpus.cut_windows(stdlib_docs.text(part), tokenizer, LENGTH, part)[:WINDOWS]
        for part in ("calibration", "test")
    )
    reference = evaluation.compute_reference(full, test, 8)
    for method in ("gptq", "nash_swarm"):
        small, report = nashswarm.compress(full, tokenizer, method, calibration, bits=3)
        metrics = evaluation.summarise(evaluation.evaluate(small, test, 8, reference))
        regret = "-" if report.regret_max is None else f"{report.regret_max:.1e}"
        print(
            f"{method:10}  {report.bits_per_weight_model:.2f} bits per parameter, {report.bytes_file:,} bytes, "
            f"KL {metrics['kl']:.4f} nats per token, largest regret {regret}"
        )


if __name__ == "__main__":
    main()
