"""How exported models answer and how fast, beside the models they come from:

    python -m experiments.benchmarks.export

GPT-2 of 124M random weights, its matrices at four bits, or at two, three and four by lot, as every target of
``nashswarm export`` writes it; one thread.  Prompts and greedy decoding in turns, medians with 95 % intervals over
rounds.  Writes a JSON file and a Markdown table.
"""

import argparse
import copy
import dataclasses
import datetime
import pathlib
import statistics
import sys
import tempfile
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nashswarm import errors
from nashswarm.data import corpus
from nashswarm.measures import timing
from nashswarm.models import matrices, sources
from nashswarm.packed import checkpoint
from nashswarm.packed.modules import set_activations
from nashswarm.progress import show_progress
from nashswarm.quant.grid import Scheme, quantize, row_blocks
from nashswarm.quant.pack import pack
from nashswarm.records.files import write_report
from nashswarm.records.provenance import provenance, told
from nashswarm.runtime import export
from nashswarm.runtime.machine import read_machine

GROUP_SIZE = 64
WIDTHS = {"4": (4,), "2, 3, 4": (2, 3, 4)}
FLOATS = "32-bit floats"
PACKED = "itself"
CASES = (
    ("4", "onnx", "float32"),
    ("4", "onnx", "float16"),
    ("4", "onnx", "bfloat16"),
    ("4", "onnx-qdq", "float32"),
    ("4", "torch-export", "float32"),
    ("2, 3, 4", "onnx", "float32"),
    ("2, 3, 4", "torch-export", "float32"),
)
PROMPT, CONTEXT, NEW_TOKENS = 128, 32, 16


@dataclasses.dataclass(frozen=True)
class Exported:
    """An exported graph, called as a model of transformers is."""

    run: export.Run
    empty: Sequence[Tensor]

    def __call__(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = True) -> types.SimpleNamespace:
        logits, cache = self.run(input_ids, list(past_key_values or self.empty))
        return types.SimpleNamespace(logits=logits, past_key_values=cache)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/benchmarks/export"))
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(arguments)
    origin = provenance(datetime.datetime.now(datetime.UTC))
    errors.require("experiments.benchmarks.export", export.PACKAGES, "onnx")
    torch.set_num_threads(1)
    loaded = sources.load(sources.RandomModel(), "cpu", torch.float32)
    full = loaded.model
    tokens = corpus.cut_windows(corpus.StdlibDocs().text("test"), loaded.tokenizer, PROMPT, "test")[:1]
    models = {widths: packed(full, drawn) for widths, drawn in WIDTHS.items()}
    contestants: dict[tuple[str, str, str], Any] = {("32", FLOATS, ""): full}
    contestants |= {(widths, PACKED, "float32"): model for widths, model in models.items()}
    metrics: dict[tuple[str, str, str], dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in show_progress(CASES, "exporting"):
            widths, target, dtype = case
            path = pathlib.Path(folder, f"{len(metrics)}{export.TARGETS[target]}")
            metrics[case] = export.export(models[widths], target, path, tokens, "float32", dtype)
            run = torch.export.load(path).module() if target == "torch-export" else export.load_onnx(path)
            contestants[case] = Exported(run, export.empty_cache(full))
        named = {" | ".join(case): model for case, model in contestants.items()}
        times = timing.decoding(named, tokens, CONTEXT, NEW_TOKENS, options.rounds, lambda name: None, show_progress)
    first = next(iter(times.values()))
    rows = []
    for case, each in zip(contestants, times.values(), strict=True):
        row: dict[str, Any] = dict(zip(("widths", "target", "dtype"), case, strict=True)) | metrics.get(case, {})
        rows.append(row | {"decode_ms": statistics.median(each["decode"])} | timing.ratios(first, each, ""))
    content = {"rows": rows, "machine": str(read_machine()), "provenance": origin}
    text = markdown(content)
    write_report(options.out, content, text)
    print(text)
    return 0


def packed(full: Any, widths: Sequence[int]) -> Any:
    """A copy of the model that computes on tiles whose widths are drawn by lot, without rounded activations."""
    model, rng = copy.deepcopy(full), torch.Generator().manual_seed(0)
    layers = matrices.find_layers(model)
    stored = {}
    for layer in layers:
        rows, columns = layer.weight.shape
        drawn = torch.randint(len(widths), (row_blocks(rows), columns // GROUP_SIZE), generator=rng)
        stored[layer.name] = pack(quantize(layer.weight, torch.tensor(widths)[drawn], Scheme(GROUP_SIZE)))
    checkpoint.adopt(model, layers, stored)
    set_activations(model, "float32")
    return model


def markdown(content: dict[str, Any]) -> str:
    """A row a file, under the models that they come from."""
    origin = content["provenance"]
    lines = [
        "# Exported models",
        "",
        f"{told(origin)}; {content['machine']}; one thread.",
        "Parity: the largest difference of logits on real text, relative to the largest, from the packed model and, "
        "where other parts are stored in 16 bits, from that model with them rounded alike. Ratios: times faster than "
        "32-bit floats in torch; no activation is rounded, by the packed model itself neither.",
        "",
        "| bits | run as | other parts | MB | parity | rounded alike | decode ms | × decode | × prefill |",
        "| :-- | :-- | :-- | --: | --: | --: | --: | --: | --: |",
    ]
    for row in content["rows"]:
        size = f"{row['bytes_file'] / 1e6:.1f}" if "bytes_file" in row else ""
        apart = [f"{row[name]:.0e}" if name in row else "" for name in ("parity", "parity_rounded")]
        ratios = [
            f"{row[f'{phase}_ratio']:.2f} [{row[f'{phase}_ratio_low']:.2f}, {row[f'{phase}_ratio_high']:.2f}]"
            for phase in ("decode", "prefill")
            if row["target"] != FLOATS
        ] or ["", ""]
        cells = [row["widths"], row["target"], row["dtype"], size, *apart, f"{row['decode_ms']:.2f}", *ratios]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
