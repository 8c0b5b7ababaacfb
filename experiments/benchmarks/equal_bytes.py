"""nash_lattice against GPTQ at the exact size of GPTQ's file.

    python -m experiments.benchmarks.equal_bytes model=local model.path=<folder> dataset=wikitext2

At 2, 3 and 4 bits GPTQ runs with groups of 64 and of 128, entropy-coded, embeddings included; the better of them sets
the size.  GPTQ with one step a tensor, nash_lattice and its ablation without a flock then get exactly that many bits
per parameter.  Every run leaves a record under ``--records``; the table is made of records alone.
"""

import argparse
import datetime
import pathlib
from collections.abc import Sequence

import numpy as np

from experiments.config import compose
from nashswarm.experiment.run import run
from nashswarm.records import files
from nashswarm.records.provenance import provenance
from nashswarm.records.record import Record
from nashswarm.records.statistics import interval

RIVALS = ("gptq_one_step", "lattice_no_swarm", "nash_lattice")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="overrides of the configuration, as for experiments.run")
    parser.add_argument("--widths", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--records", default="results/benchmarks/records")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/benchmarks/equal_bytes"))
    options = parser.parse_args(arguments)
    started = datetime.datetime.now(datetime.UTC)
    rows = []
    for width in options.widths:
        grouped = [
            measured("gptq", [f"method.bits={width}", f"method.group_size={size}"], options) for size in (64, 128)
        ]
        best = min(grouped, key=lambda record: record.metrics["kl"] * 4 ** record.metrics["bits_per_weight_model"])
        rows += [row(record, best, width) for record in grouped]
        size = best.metrics["bits_per_weight_model"]
        rows += [row(measured(name, [f"method.bits={size!r}"], options), best, width) for name in RIVALS]
    content = {"rows": rows, "provenance": provenance(started)}
    files.write_report(options.out, content, table(rows))
    print(table(rows))


def measured(method: str, overrides: Sequence[str], options: argparse.Namespace) -> Record:
    """Return the record of one run; a run that has one is not repeated."""
    config = compose(f"method={method}", "wandb=disabled", f"records={options.records}", *options.overrides, *overrides)
    labels = {
        "model": pathlib.Path(config.model.path).name if config.model.path else "default",
        "method": f"{method}[{','.join(text.removeprefix('method.') for text in overrides)}]",
        "dataset": next(
            (text.split("=")[1] for text in options.overrides if text.startswith("dataset=")), "stdlib_docs"
        ),
        "measure": "quality",
        "experiment": "equal_bytes",
    }
    return run(config, labels).record


def row(record: Record, reference: Record, width: int) -> dict[str, float | str]:
    """What the table says of one run; ``ratio`` is its KL over GPTQ's, with the interval of the paired difference."""
    kl, other = np.array(record.series["kl"]), np.array(reference.series["kl"])
    low, high = interval(list(kl - other))
    metrics = record.metrics
    return {
        "width": width,
        "method": record.labels["method"],
        "bits": metrics["bits_per_weight_model"],
        "kl": metrics["kl"],
        "kl_low": metrics["kl_low"],
        "kl_high": metrics["kl_high"],
        "nll_delta_percent": 100 * metrics["nll_delta"] / (metrics["nll"] - metrics["nll_delta"]),
        "ratio": float(kl.mean() / other.mean()),
        "difference_low": low,
        "difference_high": high,
    }


def table(rows: Sequence[dict[str, float | str]]) -> str:
    """Return the rows as a Markdown table."""
    head = "| method | bits/param | KL (nats/token) | ΔNLL % | KL over GPTQ's | paired difference of KL |"
    lines = [head, "| :-- | --: | --: | --: | --: | --: |"]
    for row in rows:
        lines.append(
            f"| {row['method']} | {row['bits']:.3f} | {row['kl']:.4g} [{row['kl_low']:.4g}, "
            f"{row['kl_high']:.4g}] | {row['nll_delta_percent']:+.2f} | {row['ratio']:.3f} "
            f"| [{row['difference_low']:+.4g}, {row['difference_high']:+.4g}] |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
