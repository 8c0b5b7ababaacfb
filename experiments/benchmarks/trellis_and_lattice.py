"""What do trellis tiles lose against the entropy-coded lattice, and what do lattice paths gain, at equal bytes?

    python -m experiments.benchmarks.trellis_and_lattice model=smollm2_135m dataset=wikitext2 --bits 3

All methods are given the moments that ``nash_swarm`` takes by default, with the same floor under the sensitivities of
rows, and none looks at held-out text: what is left is the form of the weights.  A loaded trellis takes the bytes of its
file; the lattice takes more, and the paths of ``nash_archive`` take more still.

``--methods`` measures some of them again.  The rows of the others stay those of the report that is there already, of
the commit that each names, if it was on the same test windows.
"""

import argparse
import dataclasses
import datetime
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.config import compose
from nashswarm.calibration.context import CalibrationContext
from nashswarm.experiment import compression
from nashswarm.experiment.plan import plan
from nashswarm.layers import Moments
from nashswarm.methods.method import Method
from nashswarm.methods.nash_archive.settings import NashArchive
from nashswarm.methods.nash_lattice.settings import NashLattice
from nashswarm.methods.nash_swarm.settings import NashSwarm
from nashswarm.models import evaluation
from nashswarm.records import files, statistics
from nashswarm.records.provenance import provenance

NAMES = ("nash_swarm", "nash_lattice", "nash_archive")


def main(arguments: Sequence[str] | None = None) -> None:
    """Compress the model by each method, measure all on the test windows, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="overrides of the configuration, as for experiments.run")
    parser.add_argument("--bits", type=float, default=3.0, help="per parameter, everything counted")
    parser.add_argument("--sweeps", type=int, default=4, help="of the lattice's codes, at most")
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=NAMES, help="to measure; default: all")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/benchmarks/trellis_and_lattice"))
    options = parser.parse_args(arguments)
    started = datetime.datetime.now(datetime.UTC)
    config = compose("wandb=disabled", *options.overrides)
    loaded = compression.load(config, plan(config))
    own = NashSwarm(bits=options.bits)
    taken = own.game(loaded.session.context(), np.random.default_rng(loaded.seed)).moments
    moments = {name: with_floor(taken[name], own.floor) for name in taken}
    context = dataclasses.replace(
        loaded.session.context(),
        moments=lambda: moments,
        zipf_moments=lambda share=1: moments,
    )
    methods: dict[str, Method] = {
        "nash_swarm": dataclasses.replace(own, floor=0.0),
        "nash_lattice": NashLattice(bits=options.bits, sweeps=options.sweeps, floor=0.0, swarm=None),
        "nash_archive": NashArchive(bits=options.bits, floor=0.0),
    }
    kept = {} if set(options.methods) == set(NAMES) else earlier_rows(options.out.with_suffix(".json"), options.bits)
    about = provenance(started)
    measured = {
        name: measure(name, methods[name], loaded, context) | {"commit": about["commit"]} for name in options.methods
    }
    by_name = {name: measured.get(name) or kept[name] for name in NAMES if name in measured or name in kept}
    check_windows(list(by_name.values()))
    rows, ratios = list(by_name.values()), {}
    for name in ("nash_swarm", "nash_archive"):
        if {name, "nash_lattice"} <= set(by_name):
            ratios[name] = statistics.ratio(by_name[name]["kl_windows"], by_name["nash_lattice"]["kl_windows"])
    content = {"rows": rows, "bits": options.bits, "ratios": ratios}
    files.write_report(options.out, content | {"provenance": about}, table(content))
    print(table(content))


def earlier_rows(path: pathlib.Path, bits: float) -> dict[str, dict[str, Any]]:
    """Return the rows of the report at ``path`` by method, each with its commit, or none if there is no report.

    Raises ValueError if they are of other bits.
    """
    if not path.exists():
        return {}
    report = json.loads(path.read_text())
    if report["bits"] != bits:
        raise ValueError(f"{path} is of {report['bits']} bits, not of {bits}: name another --out")
    return {row["method"]: {"commit": report["provenance"]["commit"]} | row for row in report["rows"]}


def check_windows(rows: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError unless all rows are of the same test windows: the full model's NLL tells."""
    full = [row["nll"] - row["nll_delta"] for row in rows]
    if len({len(row["kl_windows"]) for row in rows}) > 1 or not all(
        math.isclose(one, full[0], rel_tol=1e-5) for one in full
    ):
        raise ValueError("the report at --out is of other test windows: name another --out, or measure all methods")


def with_floor(moments: Moments, share: float) -> Moments:
    """Return the moments with ``share`` times the mean over outputs added to the sensitivity of every output."""
    outputs, coupled = (part + share * part.mean() for part in (moments.outputs, moments.coupled))
    return dataclasses.replace(moments, outputs=outputs, coupled=coupled)


def measure(name: str, method: Method, loaded: compression.LoadedRun, context: CalibrationContext) -> dict[str, Any]:
    """Compress the model, and return its bytes and its KL on each test window, in nats per token."""
    result = method.compress(context, np.random.default_rng(loaded.seed))
    session = loaded.session
    _, sizes = session.store(result.packed, result.weights, result.float_bits)
    full = loaded.reference(evaluation.BATCH)
    windows = evaluation.evaluate(session.candidate_model, loaded.test, evaluation.BATCH, full, session.track)
    print(name, sizes["bytes_file"], evaluation.summarise(windows)["kl"], flush=True)
    return {
        "method": name,
        "bytes_file": int(sizes["bytes_file"]),
        "bits_in_memory": result.metrics["bits_per_weight_resident"],
        "regret_max": result.metrics.get("regret_max"),  # of nash_archive there is none
        **evaluation.summarise(windows),
        "kl_windows": windows["kl"],
    }


def table(content: dict[str, Any]) -> str:
    """Return the rows as a table in Markdown, and the ratios of the divergences below it."""
    lines = ["| method | bytes | bits per weight in memory | KL (nats per token) | top-1 |", "|:--|--:|--:|--:|--:|"]
    for row in content["rows"]:
        lines.append(
            f"| `{row['method']}` | {row['bytes_file']:,} | {row['bits_in_memory']:.2f} | {row['kl']:.4f} | "
            f"{row['top1_agreement']:.3f} |"
        )
    words = {"nash_swarm": "the trellis", "nash_archive": "the paths"}
    for name, (ratio, low, high) in content["ratios"].items():
        lines += [
            "",
            f"KL of {words[name]} over that of the lattice, in the same windows: {ratio:.3f} [{low:.3f}, {high:.3f}]",
        ]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
