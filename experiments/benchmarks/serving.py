"""What clients of a compressed model's server see, natively and by modules, beside full precision:

    python -m experiments.benchmarks.serving full_folder compressed_folder

Short requests of different lengths, each with text of its own, come from 1, 4 and 16 clients: in a closed loop, where a
client asks again once it is answered, and in an open one, where requests come at random times at ``--load`` of the rate
of the closed loop.  Every answer is compared with that to the same request alone: ``mixed`` counts those that differ.
Tokens per CPU second count all threads of the process, which holds the clients too; percentiles of latency are by the
wall, and wait for whatever else the machine does.

A long answer of one text is timed in parts, with the memory of the process after each.  ``once`` is how far the logits
of its last token are, relative to the largest, from those of the whole text read at once.
"""

import argparse
import contextlib
import datetime
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers

from nashswarm import memory
from nashswarm.data import corpus
from nashswarm.errors import require
from nashswarm.kernels import native
from nashswarm.measures.load import Load
from nashswarm.packed.native_forward import by_modules, natively
from nashswarm.progress import show_progress
from nashswarm.records import files
from nashswarm.records.provenance import provenance
from nashswarm.runtime import load
from nashswarm.runtime.serving import host, server
from nashswarm.runtime.serving.engine import Limits
from nashswarm.runtime.serving.steps import ModuleStepper

OUT = pathlib.Path("results/benchmarks/serving")
CLIENTS = (1, 4, 16)
LONGEST = 20  # tokens of a prompt
PARTS = 8  # of the long answer


def main() -> None:
    """Measure, save and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("full", type=pathlib.Path, help="folder of the full model")
    parser.add_argument("compressed", type=pathlib.Path, help="folder of the compressed model")
    parser.add_argument("--requests", type=int, default=1000, help="for each number of clients and each kind of loop")
    parser.add_argument("--others", type=int, default=16, help="requests by modules and in full precision, closed loop")
    parser.add_argument("--texts", type=int, default=200, help="different requests, which take turns")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--load", type=float, default=0.7, help="share of the closed loop's rate that the open one has")
    parser.add_argument("--long", type=int, default=2000, help="tokens of the long answer")
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    options = parser.parse_args()
    require("serving", Load.NEEDS, Load.EXTRA)
    started = datetime.datetime.now(datetime.UTC)
    torch.set_num_threads(1)
    full, compressed = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (options.full, options.compressed)
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.full)
    window = corpus.cut_windows(corpus.StdlibDocs().text("test"), tokenizer, options.texts + LONGEST, "test")[0]
    prompts = [window[place : place + 1 + place % LONGEST].tolist() for place in range(options.texts)]
    rows: list[dict[str, Any]] = []
    contestants: dict[str, tuple[Any, Callable[[Any], Any], int]] = {
        "native": (compressed, natively, options.requests),
        "modules": (compressed, by_modules, options.others),
        "float32": (full, by_modules, options.others),
    }
    for name, (model, prepare, requests) in contestants.items():
        rows += load_rows(name, prepare(model), tokenizer, prompts, requests, options)
    parts = long_rows(natively(compressed), prompts[-1], options.long)
    content = {"path": native.path(), "load": rows, "long": parts, "provenance": provenance(started)}
    table = f"{as_table(rows)}\n{as_table(parts)}\nKernels: {native.path()}.\n"
    files.write_report(options.out, content, table)
    print(table)


def load_rows(
    name: str, model: Any, tokenizer: Any, prompts: Sequence[list[int]], requests: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Serve a model; return a row for each number of clients and each kind of loop."""
    rows = []
    with contextlib.ExitStack() as stack:
        app = server.build_app(model, tokenizer, "model", Limits(batch=max(CLIENTS)))
        url = stack.enter_context(host.serve_in_thread(app))
        asked = prompts[:requests]
        alone, _ = load.send_requests(url, asked, options.new_tokens, len(asked), 1)
        for clients in show_progress(CLIENTS, name):
            rate = None
            for loop in ("closed", "open") if name == "native" else ("closed",):
                before = time.process_time()
                answers, seconds = load.send_requests(
                    url, asked, options.new_tokens, requests, clients, rate, seed=clients
                )
                spent = time.process_time() - before
                summary = load.summarise(answers, seconds)
                texts = zip(answers, (alone[number % len(asked)] for number in range(requests)), strict=True)
                rows.append({
                    "model": name, "loop": loop, "clients": clients, "requests": requests,
                    "tokens per CPU second": sum(answer.tokens for answer in answers) / spent,
                    "tokens per second": summary["tokens_per_second"],
                    "P50 ms": summary["latency_p50_ms"], "P95 ms": summary["latency_p95_ms"],
                    "errors": sum(answer.status != 200 for answer in answers),
                    "mixed": sum(answer.text != own.text for answer, own in texts),
                })  # fmt: skip
                rate = options.load * requests / seconds
    return rows


def long_rows(model: Any, prompt: list[int], tokens: int) -> list[dict[str, Any]]:
    """Write a long answer; return a row for each part of it."""
    stepper = ModuleStepper(model)
    cache, text, rows = stepper.start(), list(prompt), []
    logits = stepper.read(cache, prompt, False)
    for part in show_progress(range(PARTS), "long answer"):
        started, count = time.thread_time(), tokens * (part + 1) // PARTS - tokens * part // PARTS
        for _ in range(count):
            text.append(int(logits.argmax()))
            logits = stepper.step([cache], text[-1:])
        row = {"tokens": len(text), "ms per token": 1000 * (time.thread_time() - started) / max(count, 1)}
        rows.append(row | {"resident MB": 1e-6 * memory.resident_bytes(), "once": None})
    whole = stepper.read(stepper.start(), text, False)
    rows[-1]["once"] = float((logits - whole).abs().max() / whole.abs().max())
    return rows


def as_table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    cells = [[f"{part:.3g}" if isinstance(part, float) else str(part) for part in row.values()] for row in rows]
    lines = [list(rows[0]), [":--", *["--:"] * (len(rows[0]) - 1)], *cells]
    return "".join(f"| {' | '.join('' if cell == 'None' else cell for cell in line)} |\n" for line in lines)


if __name__ == "__main__":
    main()
