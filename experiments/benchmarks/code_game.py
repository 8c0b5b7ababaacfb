"""The code game of single layers: how much of GPTQ's error an equilibrium removes at equal bits, and how long it takes.

    python -m experiments.benchmarks.code_game model=local model.path=<folder> dataset=wikitext2

Errors are those of real layers, ``tr(E H Eᵀ) / tr(W H Wᵀ)``, groups of 64 with the best range of every group,
embeddings left out; GPTQ and the best replies that go on from it have the same scales and the same bytes.  Times are
of layers as large as GPT-2 small's, random weights and correlated inputs, at 3 bits.
"""

import argparse
import datetime
import functools
import pathlib
import resource
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from experiments.config import compose
from nashswarm.experiment.compression import LoadedRun, load
from nashswarm.experiment.plan import plan
from nashswarm.layers import curvature
from nashswarm.measures import timing
from nashswarm.progress import show_progress
from nashswarm.quant.coordinate_descent import quantize_layer
from nashswarm.quant.curvature import Curvature
from nashswarm.quant.grid import Scheme
from nashswarm.records import files
from nashswarm.records.provenance import provenance

SCHEME = Scheme(64, search=True)
SHAPES = ((768, 3072), (3072, 768))
ENOUGH = 10_000  # sweeps: to the end


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="overrides of the configuration, as for experiments.run")
    parser.add_argument("--widths", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/benchmarks/code_game"))
    options = parser.parse_args(arguments)
    started = datetime.datetime.now(datetime.UTC)
    times = [row for shape in SHAPES for row in timed(shape)]
    errors = ratios(job_of(options.overrides), options.widths)
    content = {"errors": errors, "times": times, "threads": torch.get_num_threads(), "provenance": provenance(started)}
    text = as_table(errors) + "\n" + as_table(times)
    files.write_report(options.out, content, text)
    print(text)


def job_of(overrides: Sequence[str]) -> LoadedRun:
    """A run under way, its model loaded and its windows drawn."""
    config = compose("wandb=disabled", *overrides)
    return load(config, plan(config))


def ratios(job: LoadedRun, widths: Sequence[int]) -> list[dict[str, Any]]:
    """Mean relative errors over the layers that multiply, of GPTQ and of the equilibrium, for every width."""
    moments = job.session.moments()
    layers = [layer for layer in job.session.layers if not any(moments[module].lookup for module in layer.modules)]
    rows = []
    for width in widths:
        errors = []
        for layer in show_progress(layers, f"{width} bits"):
            curved = curvature(layer, moments)
            whole = float(curved.damage_by_row(layer.weight).double().sum())
            errors.append(
                [
                    float(
                        curved.damage_by_row(
                            layer.weight - quantize_layer(layer.weight, width, SCHEME, curved, sweeps).dequantize()
                        )
                        .double()
                        .sum()
                    )
                    / whole
                    for sweeps in (0, ENOUGH)
                ]
            )
        gptq, equilibrium = np.mean(errors, 0)
        worst = float((np.array(errors)[:, 1] / np.array(errors)[:, 0]).max())
        rows.append(
            {
                "width": width,
                "layers": len(layers),
                "gptq": gptq,
                "equilibrium": equilibrium,
                "ratio": equilibrium / gptq,
            }
            | {"worst layer's ratio": worst}
        )
    return rows


def timed(shape: tuple[int, int]) -> list[dict[str, Any]]:
    """Seconds of the pass alone, of sweeps to a gain of 1e-3 of the damage, and to no move at all."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    spread = torch.exp(torch.randn(shape[1], generator=generator))
    inputs = torch.randn(4 * shape[1], shape[1], generator=generator) * spread
    inputs += torch.randn(4 * shape[1], 8, generator=generator) @ torch.randn(8, shape[1], generator=generator)
    curved = Curvature(torch.ones(shape[0]), inputs.T @ inputs / len(inputs), None)
    rows: list[dict[str, Any]] = []
    for name, sweeps, tolerance in (("pass", 0, 0.0), ("to 1e-3", ENOUGH, 1e-3), ("to no move", ENOUGH, 0.0)):
        quantize = functools.partial(quantize_layer, weight, 3, SCHEME, curved, sweeps, tolerance=tolerance)
        quantized, seconds = timing.timed(quantize)
        damage = float(curved.damage_by_row(weight - quantized.dequantize()).double().sum())
        rows.append(
            {"shape": f"{shape[0]}x{shape[1]}", "until": name, "seconds": seconds, "damage": damage}
            | {"peak MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
        )
    return rows


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "| " + " | ".join("--:" for _ in names) + " |"]
    for row in rows:
        cells = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
