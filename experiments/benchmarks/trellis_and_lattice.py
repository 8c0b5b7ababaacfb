"""What do trellis tiles lose against the entropy-coded lattice, at equal bytes of the file and equal sensitivities?

    python -m experiments.benchmarks.trellis_and_lattice model=smollm2_135m dataset=wikitext2 --bits 3

Both methods are given the moments that ``nash_swarm`` takes by default, with the same floor under the sensitivities of
rows, and neither looks at held-out text: what is left is the form of the weights.  A loaded trellis takes the bytes of
its file; the lattice takes more.
"""

import argparse
import dataclasses
import datetime
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
from nashswarm.methods.nash_lattice.settings import NashLattice
from nashswarm.methods.nash_swarm.settings import NashSwarm
from nashswarm.models import evaluation
from nashswarm.records import files, statistics
from nashswarm.records.provenance import provenance


def main(arguments: Sequence[str] | None = None) -> None:
    """Compress the model by both methods, measure both on the test windows, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="overrides of the configuration, as for experiments.run")
    parser.add_argument("--bits", type=float, default=3.0, help="per parameter, everything counted")
    parser.add_argument("--sweeps", type=int, default=4, help="of the lattice's codes, at most")
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
        "nash_lattice": NashLattice(bits=options.bits, sweeps=options.sweeps, strength=(0.0,), swarm=None),
    }
    rows = [measure(name, method, loaded, context) for name, method in methods.items()]
    ratio, low, high = statistics.ratio(rows[0]["kl_windows"], rows[1]["kl_windows"])
    content = {"rows": rows, "bits": options.bits, "ratio": ratio, "ratio_low": low, "ratio_high": high}
    files.write_report(options.out, content | {"provenance": provenance(started)}, table(content))
    print(table(content))


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
        "regret_max": result.metrics["regret_max"],
        **evaluation.summarise(windows),
        "kl_windows": windows["kl"],
    }


def table(content: dict[str, Any]) -> str:
    """Return the rows as a table in Markdown, and the ratio of the divergences below it."""
    lines = ["| method | bytes | bits per weight in memory | KL (nats per token) | top-1 |", "|:--|--:|--:|--:|--:|"]
    for row in content["rows"]:
        lines.append(
            f"| `{row['method']}` | {row['bytes_file']:,} | {row['bits_in_memory']:.2f} | {row['kl']:.4f} | "
            f"{row['top1_agreement']:.3f} |"
        )
    ratio = f"{content['ratio']:.3f} [{content['ratio_low']:.3f}, {content['ratio_high']:.3f}]"
    return "\n".join([*lines, "", f"KL of the trellis over that of the lattice, in the same windows: {ratio}", ""])


if __name__ == "__main__":
    main()
