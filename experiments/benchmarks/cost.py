"""What does compressing cost for each parameter, and does that grow with the model?

    python -m experiments.benchmarks.cost folder --calibration text.txt

Runs ``nashswarm compress`` on the model in ``folder`` and on random LLaMAs of several sizes with its tokenizer, each in
a process of its own.  Seconds are those of the processors: what else runs at the same time counts little.  Every model
reads the same number of windows, so that all parts of the work are linear in the parameters.
"""

import argparse
import dataclasses
import datetime
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import transformers

from nashswarm.progress import show_progress
from nashswarm.records import files
from nashswarm.records.provenance import provenance

COMMAND = [sys.executable, "-c", "import sys; from nashswarm.cli import main; sys.exit(main())"]


@dataclasses.dataclass(frozen=True)
class Shape:
    """A LLaMA with tied embeddings and a third as many heads of keys as of queries."""

    hidden: int
    inner: int
    blocks: int
    heads: int


SHAPES = {"7M": Shape(96, 256, 18, 3), "22M": Shape(288, 768, 9, 9), "360M": Shape(960, 2560, 32, 15)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Compress every model, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="of a model in Hugging Face layout")
    parser.add_argument("--calibration", type=pathlib.Path, required=True, help="a text file")
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES), help="of random models")
    parser.add_argument("--windows", type=int, default=16, help="of calibration text")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--bits", type=float, default=3.0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/benchmarks/cost"))
    options = parser.parse_args(arguments)
    started = datetime.datetime.now(datetime.UTC)
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for name in show_progress([*options.shapes, None], "compressing models of several sizes"):
            folder = options.folder if name is None else random_model(SHAPES[name], options.folder, f"{place}/{name}")
            rows.append({"model": name or folder.name} | cost(folder, pathlib.Path(place), options))
    start, _ = seconds_and_bytes([*COMMAND, "compress", "--help"])
    rows.sort(key=lambda row: row["parameters"])
    content = {"rows": rows, "windows": options.windows, "length": options.length, "bits": options.bits}
    content["start_seconds"] = start
    text = table(rows, start)
    files.write_report(options.out, content | {"provenance": provenance(started)}, text)
    print(text)


def random_model(shape: Shape, like: pathlib.Path, folder: str) -> pathlib.Path:
    """Write a model of this shape with random weights, and the tokenizer of another, to ``folder``."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(like)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads // 3,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    transformers.set_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return pathlib.Path(folder)


def cost(folder: pathlib.Path, place: pathlib.Path, options: argparse.Namespace) -> dict[str, Any]:
    """Compress a model, and return its parameters, the seconds of the processors and the peak bytes."""
    out, cache = place / "out" / folder.name, place / "cache" / folder.name
    command = [*COMMAND, "compress", str(folder), "--out", str(out), "--cache", str(cache), "--no-verify", "--quiet"]
    command += ["--calibration", str(options.calibration), "--bits", str(options.bits)]
    command += ["--windows", str(options.windows), "--length", str(options.length)]
    seconds, peak = seconds_and_bytes(command)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "cpu_seconds": seconds,
        "peak_bytes": peak,
    }


def seconds_and_bytes(command: Sequence[str]) -> tuple[float, int]:
    """Run a command, and return the seconds of the processors that it took, and its peak bytes.

    Raises SystemExit if it fails.
    """
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(running.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with status {os.waitstatus_to_exitcode(status)}")
    return usage.ru_utime + usage.ru_stime, 1024 * usage.ru_maxrss


def table(rows: Sequence[dict[str, Any]], start: float) -> str:
    """Return the rows as a table in Markdown, and how unlike the costs of a parameter are without those of starting."""
    lines = ["| model | parameters | processor seconds | µs per parameter | peak GB |", "|:--|--:|--:|--:|--:|"]
    each = [1e6 * (row["cpu_seconds"] - start) / row["parameters"] for row in rows]
    for row, micros in zip(rows, each, strict=True):
        lines.append(
            f"| {row['model']} | {row['parameters']:,} | {row['cpu_seconds']:.0f} | {micros:.2f} | "
            f"{row['peak_bytes'] / 1e9:.2f} |"
        )
    lines += ["", f"Every process takes {start:.1f} s to start, which the cost of a parameter leaves out.  The dearest"]
    lines[-1] += f" parameter costs {max(each) / min(each):.2f} times the cheapest."
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
