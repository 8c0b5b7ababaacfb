"""How good is a model on one kind of text when it was calibrated on another?

    python -m experiments.benchmarks.calibration_text folder

Compresses the model in ``folder`` once for each calibration text, as ``nashswarm.compress`` does, and measures the KL
to the full model on four kinds of text: Wikipedia (WikiText-2), Python's documentation, source code of its standard
library, and sentences of SST-2 and CoLA, each read alone.  A calibration text is the calibration part of one of the
kinds, or a source that ``nashswarm.compress`` knows; several numbers of ``--windows`` show how much of it is needed.
The report is written after every row; the same command goes on where it was interrupted.
"""

import argparse
import datetime
import functools
import itertools
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

import nashswarm
from experiments.config import compose
from nashswarm.calibration import texts
from nashswarm.data import corpus, glue, stdlib_docs, stdlib_source
from nashswarm.experiment.plan import build
from nashswarm.models import sources
from nashswarm.progress import show_progress
from nashswarm.records import files
from nashswarm.records.provenance import code_digest, provenance
from nashswarm.records.statistics import interval

KINDS = ("wikipedia", "documentation", "code", "sentences")
TASKS = ("sst2", "cola")
MOST_SENTENCES = 40  # test sentences for each test window of the other kinds
SHORTEST = 4  # tokens of a sentence


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder in Hugging Face layout")
    parser.add_argument("--calibration", nargs="+", default=[*KINDS, "own", texts.OFFLINE], help="kinds or sources")
    parser.add_argument("--wikipedia", metavar="PATH", help="a text file or folder in place of the hub's WikiText-2")
    parser.add_argument("--method", default="nash_swarm", help="a name that nashswarm.compress knows")
    parser.add_argument("--bits", type=float, default=3.0)
    parser.add_argument(
        "--windows",
        nargs="+",
        type=int,
        default=[64],
        help="of calibration text, a quarter held out; each number a row",
    )
    parser.add_argument("--length", type=int, default=512, help="tokens of a window, the model's maximum at most")
    parser.add_argument("--test-windows", type=int, default=12, help="of each kind, evenly spread over its test text")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/benchmarks/calibration_text"))
    options = parser.parse_args(arguments)
    try:
        report = measure(options)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(table(report["rows"]))
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Compress for every calibration text and measure on every kind: the report, written after each row."""
    started = datetime.datetime.now(datetime.UTC)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    length = min(options.length, sources.max_tokens(model.config) or options.length)
    kinds = {kind: (text_of(kind, "calibration", options), text_of(kind, "test", options)) for kind in KINDS}
    count = options.test_windows
    tests = {kind: windows_of(kind, both[1], tokenizer, length, count) for kind, both in kinds.items()}
    identity = {
        "model": sources.content_digest(sources.ModelSource(options.model)),
        "code": code_digest(),
        "threads": torch.get_num_threads(),
        "length": length,
        "texts": {kind: [corpus.sha256(text) for text in both] for kind, both in kinds.items()},
    } | {name: getattr(options, name) for name in ("method", "bits", "test_windows")}
    rows = rows_before(options.out, identity)
    report = {"identity": identity, "rows": rows, "provenance": provenance(started)}

    @functools.cache
    def read(name: str) -> str:
        own = texts.own_of(model, tokenizer)
        return kinds[name][0] if name in kinds else texts.read(texts.checked(name, "--calibration "), own)

    for name, windows in show_progress(list(itertools.product(options.calibration, options.windows)), "calibrations"):
        if (row := f"{name}, {windows} windows") not in rows:
            pool = corpus.begun_windows(read(name), tokenizer, length, "calibration")
            chosen = pool[torch.linspace(0, len(pool) - 1, min(windows, len(pool))).long()]
            small, made = nashswarm.compress(model, tokenizer, options.method, calibration=chosen, bits=options.bits)
            rows[row] = {"bytes": made.bytes_file, "seconds": made.seconds, "positions": chosen.numel()}
            kl = {kind: divergences(model, small, tests[kind]) for kind in KINDS}
            rows[row] |= {"sha256": corpus.sha256(read(name)), "kl": kl}
            files.write_report(options.out, report, table(rows))
    return report


def rows_before(out: pathlib.Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rows of an earlier report of the same identity."""
    path = out.with_suffix(".json")
    before = json.loads(path.read_text()) if path.exists() else {}
    return dict(before["rows"]) if before.get("identity") == json.loads(json.dumps(identity)) else {}


def text_of(kind: str, purpose: corpus.Purpose, options: argparse.Namespace) -> str:
    """Return the text of a kind for ``purpose``; sentences are lines."""
    if kind == "documentation":
        return stdlib_docs.text(purpose)
    if kind == "code":
        return stdlib_source.text(purpose)
    if kind == "wikipedia":
        dataset = build(compose("dataset=wikitext2_raw").dataset)
        return (dataset if options.wikipedia is None else corpus.HubText(options.wikipedia)).text(purpose)
    found = [sentences(build(compose(f"dataset={task}").dataset), purpose) for task in TASKS]
    return "\n".join(line for both in zip(*found, strict=False) for line in both)


def sentences(dataset: glue.Glue, purpose: corpus.Purpose) -> list[str]:
    """Return the sentences of a task, without their labels."""
    return [str(json.loads(line)[0]).strip() for line in dataset.text(purpose).split("\n")]


def windows_of(kind: str, text: str, tokenizer: Any, length: int, count: int) -> list[Tensor]:
    """Return windows evenly spread over a text, or the first of its sentences."""
    if kind == "sentences":
        lines = text.split("\n")[: MOST_SENTENCES * count]
        tokens = [torch.tensor(tokenizer(line)["input_ids"][:length]) for line in lines]
        return [line for line in tokens if len(line) >= SHORTEST]
    windows = corpus.begun_windows(text, tokenizer, length, "test")
    return list(windows[torch.linspace(0, len(windows) - 1, min(count, len(windows))).long()])


@torch.no_grad()
def divergences(full: Any, small: Any, windows: Sequence[Tensor]) -> list[float]:
    """Return the KL of each window in nats per token."""
    found = []
    for window in windows:
        before, after = (model(input_ids=window[None]).logits[0, :-1].log_softmax(-1) for model in (full, small))
        found.append(float((before.exp() * (before - after)).sum(-1).mean()))
    return found


def table(rows: Mapping[str, Any]) -> str:
    """Return the KL of every calibration text on every kind, and how often the best one's it is at worst."""
    means = {name: {kind: float(np.mean(row["kl"][kind])) for kind in KINDS} for name, row in rows.items()}
    best = {kind: min(each[kind] for each in means.values()) for kind in KINDS}
    lines = [f"| calibration | {' | '.join(KINDS)} | worst / best |", f"| :-- |{' --: |' * (len(KINDS) + 1)}"]
    for name, each in means.items():
        cells = []
        for kind in KINDS:
            low, high = interval(rows[name]["kl"][kind]) if len(rows[name]["kl"][kind]) > 1 else (np.nan, np.nan)
            cells.append(f"{each[kind]:.4f} [{low:.4f}, {high:.4f}]")
        worst = max(each[kind] / best[kind] for kind in KINDS)
        lines.append(f"| {name} | {' | '.join(cells)} | {worst:.2f} |")
    return "\n".join([*lines, "", "KL to the full model in nats per token, 95 % intervals over windows."]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
