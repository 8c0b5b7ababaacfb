"""Does it pay that tokens prefer experts in memory, where memory holds a part of them and every other read misses?

    python -m experiments.benchmarks.residency folder

A trained mixture reads test text one token at a time. Its experts lie in a file that is read around the system's cache
of files, and memory holds ``--resident`` of their bytes. Routers make an expert in memory cheaper by each of
``--residency``, in units of affinity. The models take turns, window by window; ratios of throughput and differences of
NLL are paired with the first model, and have 95 % intervals over windows.
"""

import argparse
import datetime
import functools
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from torch import Tensor

from experiments.config import compose
from nashswarm.experiment.plan import build
from nashswarm.measures.moe.routed import one_by_one
from nashswarm.measures.timing import timed
from nashswarm.moe import store, training
from nashswarm.moe.model import MoeForCausalLM, MoeSource
from nashswarm.records import files, statistics
from nashswarm.records.provenance import provenance


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve the model once for every preference, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="of a trained mixture whose router knows residency")
    parser.add_argument("--residency", type=float, nargs="+", default=[0.0, 0.1, 0.3, 0.5, 1.0])
    parser.add_argument("--resident", type=float, default=0.25, help="share of the expert bytes that memory holds")
    parser.add_argument("--windows", type=int, default=25, help="of test text")
    parser.add_argument("--dataset", default="wikitext2")
    parser.add_argument("--scratch", type=pathlib.Path, default=pathlib.Path("."), help="a folder on a disk")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/benchmarks/residency"))
    options = parser.parse_args(arguments)
    started = datetime.datetime.now(datetime.UTC)
    text = build(compose(f"dataset={options.dataset}").dataset).text("test")
    model: Any = MoeForCausalLM.from_pretrained(options.folder)
    model.eval()
    source = MoeSource(context=model.config.max_position_embeddings)
    windows = training.cut_windows(source, text, None, "test")[: options.windows]
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        path = pathlib.Path(scratch) / "experts.safetensors"
        store.save(model, path)
        rows = serve(model, path, windows, options.residency, options.resident)
    content = {"rows": rows, "resident": options.resident, "provenance": provenance(started)}
    files.write_report(options.out, content, table(rows))
    print(table(rows))


def serve(
    model: MoeForCausalLM,
    path: pathlib.Path,
    windows: Int[Tensor, "windows length"],
    preferences: Sequence[float],
    resident: float,
) -> list[dict[str, Any]]:
    """Read the windows with every preference in turn; return one row for each."""
    stores, models = [], []
    for preference in preferences:
        served: Any = MoeForCausalLM(model.config)
        served.eval()
        served.load_state_dict(model.state_dict())
        for router in served.routers():
            router.residency = preference
        held = sum(part.nbytes for name, part in served.named_parameters() if ".experts." in name)
        stores.append(store.ExpertStore(path, int(resident * held), direct=True))
        store.serve(served, stores[-1])
        models.append(served)
    for served in models:  # fills the memory
        one_by_one(served, windows[0], windows.shape[1])
    for part in stores:
        part.hits = part.misses = part.bytes_read = 0
        part.read_seconds = 0.0
    seconds: list[list[float]] = [[] for _ in preferences]
    nll: list[list[float]] = [[] for _ in preferences]
    for number, window in enumerate(windows[1:]):
        turns = range(len(models))
        for turn in reversed(turns) if number % 2 else turns:
            read = functools.partial(one_by_one, models[turn], window, len(window))
            values, spent = timed(read, window.device)
            nll[turn].append(float(np.mean(values)))
            seconds[turn].append(spent)
    rows = []
    for turn, part in enumerate(stores):
        ratio, low, high = statistics.ratio(seconds[0], seconds[turn])
        lost = [own - first for own, first in zip(nll[turn], nll[0], strict=True)]
        lost_low, lost_high = statistics.interval(lost)
        rows.append(
            {
                "residency": preferences[turn],
                "hits": part.hits / (part.hits + part.misses),
                "bytes_per_token": part.bytes_read / (len(lost) * (windows.shape[1] - 1)),
                "read_share": part.read_seconds / sum(seconds[turn]),
                "tokens_per_second": len(lost) * (windows.shape[1] - 1) / sum(seconds[turn]),
                "speed": ratio, "speed_low": low, "speed_high": high,
                "nll": float(np.mean(nll[turn])),
                "nll_lost": float(np.mean(lost)), "nll_lost_low": lost_low, "nll_lost_high": lost_high,
            }
        )  # fmt: skip
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a table in Markdown."""
    lines = [
        "| residency | in memory | bytes read a token | time that reads take | tokens/s | speed | NLL | NLL lost |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['residency']:g} | {row['hits']:.1%} | {row['bytes_per_token']:,.0f} | {row['read_share']:.1%} | "
            f"{row['tokens_per_second']:.0f} | {row['speed']:.3f} [{row['speed_low']:.3f}, {row['speed_high']:.3f}] | "
            f"{row['nll']:.4f} | {row['nll_lost']:+.4f} [{row['nll_lost_low']:+.4f}, {row['nll_lost_high']:+.4f}] |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
