"""Which sensitivities predict the harm of rounding?  One pass at equal bytes for each way to take them.

    python -m experiments.benchmarks.sensitivities model=smollm2_135m dataset=wikitext2

Every row quantizes the model once, at one price of a byte, without sweeps and further rounds of the game.  The first
row is the method's default.  Each other row changes one thing of it: the model at which gradients or inputs are taken,
the floor under the sensitivities of rows, and whether gradients at different positions of a window count as
independent, for the sensitivities of rows and for those of inputs.
"""

import argparse
import dataclasses
import datetime
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from experiments.config import compose
from nashswarm.calibration.moments import calibrate
from nashswarm.experiment import compression
from nashswarm.experiment.plan import plan
from nashswarm.layers import Moments
from nashswarm.methods.nash_swarm.settings import FIRST_BITS, NashSwarm, moments_after_first_pass
from nashswarm.models import evaluation, matrices
from nashswarm.records import files, statistics
from nashswarm.records.provenance import provenance

Table = Mapping[str, Moments]


def main(arguments: Sequence[str] | None = None) -> None:
    """Quantize the model once for each row, measure it on the test windows, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="overrides of the configuration, as for experiments.run")
    parser.add_argument("--bits", type=float, default=3.0, help="per parameter, everything counted")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/benchmarks/sensitivities"))
    options = parser.parse_args(arguments)
    started = datetime.datetime.now(datetime.UTC)
    config = compose("wandb=disabled", *options.overrides)
    loaded = compression.load(config, plan(config))
    method = NashSwarm(bits=options.bits)
    full = loaded.session.zipf_moments()
    compressed = moments_after_first_pass(loaded.session.context())
    errors = moments_with_errors(loaded, full)
    rows: list[dict[str, Any]] = []
    for name, changed, moments, change in (
        ("as they are", method, full, None),
        ("gradients at the compressed model", method, compressed, None),
        ("inputs at the compressed model too", method, errors, None),
        ("floor 0", dataclasses.replace(method, floor=0.0), full, None),
        ("floor 0.5", dataclasses.replace(method, floor=0.5), full, None),
        ("rows by independent positions", method, full, independent_rows),
        ("inputs by independent positions", method, full, independent_inputs),
        ("inputs by gradients alone", method, full, inputs_by_gradients),
    ):
        rows.append({"sensitivities": name, **measure(loaded, changed, changed_by(moments, change))})
        rows[-1]["ratio"], rows[-1]["low"], rows[-1]["high"] = statistics.ratio(
            rows[-1]["kl_windows"], rows[0]["kl_windows"]
        )
        print(table(rows[-1:]), flush=True)
    files.write_report(
        options.out, {"rows": rows, "bits": options.bits, "provenance": provenance(started)}, table(rows)
    )


def moments_with_errors(loaded: compression.LoadedRun, full: Table) -> Table:
    """Return the moments of the model that the first pass has compressed, those of its inputs too."""
    session, first = loaded.session, NashSwarm(bits=FIRST_BITS)
    matrices.set_weights(session.candidate_model, first.first_weights(session.context(), full))
    names = [module for layer in session.layers for module in layer.modules]
    generator = torch.Generator().manual_seed(session.seed)
    return calibrate(
        session.candidate_model,
        names,
        session.calibration,
        generator,
        track=session.track,
        expected="zipf",
        rounded=True,
    )


def independent_rows(part: Moments) -> Moments:
    """Return the moments with f = E[g²] in place of what accounts for coupled positions."""
    return Moments(part.inputs, part.outputs, part.outputs, part.coupled_inputs)


def independent_inputs(part: Moments) -> Moments:
    """Return the moments with H = E[x xᵀ] alone."""
    return Moments(part.inputs, part.outputs, part.coupled, part.inputs)


def inputs_by_gradients(part: Moments) -> Moments:
    """Return the moments with H from the gradients of the weight alone."""
    return Moments(part.coupled_inputs, part.outputs, part.coupled, part.coupled_inputs)


def changed_by(moments: Table, change: Callable[[Moments], Moments] | None) -> Table:
    """Return the moments, each of them changed."""
    return moments if change is None else {name: change(moments[name]) for name in moments}


def measure(loaded: compression.LoadedRun, method: NashSwarm, moments: Table) -> dict[str, Any]:
    """Return the KL on each test window after one pass with these moments, in nats per token."""
    session = loaded.session
    weights = method.first_weights(session.context(), moments)
    matrices.set_weights(session.candidate_model, weights)
    full = loaded.reference(evaluation.BATCH)
    windows = evaluation.evaluate(session.candidate_model, loaded.test, evaluation.BATCH, full, session.track)
    return {**evaluation.summarise(windows), "kl_windows": windows["kl"]}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a table in Markdown."""
    lines = ["| sensitivities | KL (nats per token) | over that of the first row | top-1 |", "|:--|--:|--:|--:|"]
    for row in rows:
        lines.append(
            f"| {row['sensitivities']} | {row['kl']:.4f} | {row['ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}] | "
            f"{row['top1_agreement']:.3f} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
