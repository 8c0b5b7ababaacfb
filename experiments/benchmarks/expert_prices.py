"""What do traffic, and then routing, add to the rates of experts, at equal bytes of a trained mixture?

    python -m experiments.benchmarks.expert_prices folder

A mixture that was trained (``task=train_moe save=folder``) is compressed three times to the same bytes by
``method=nash_mixture``: blind to the traffic of experts, with traffic as a weight, and as one game in which prices of
experts answer to what their errors cost.  The columns are means over the test windows, and the load of all of them.
Ratios of KL are paired by window, with their 95 % intervals.
"""

import argparse
import datetime
import pathlib
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np

from experiments.config import compose
from nashswarm.experiment import compression
from nashswarm.experiment.plan import plan
from nashswarm.measures.moe import routed
from nashswarm.methods.nash_mixture import NashMixture, Traffic
from nashswarm.models import evaluation
from nashswarm.moe.model import MoeForCausalLM
from nashswarm.progress import no_track
from nashswarm.records import files, statistics
from nashswarm.records.provenance import provenance


def main(arguments: Sequence[str] | None = None) -> None:
    """Compress every model three times, measure it on the test windows, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="of trained mixtures")
    parser.add_argument("--bits", type=float, nargs="+", default=[3.0], help="per parameter, everything counted")
    parser.add_argument(
        "--dataset", default="wikitext2", help="whose validation text calibrates, and whose test judges"
    )
    parser.add_argument("--windows", type=int, default=512, help="of test text, at most")
    parser.add_argument("--overrides", nargs="*", default=[], help="of the configuration, as for experiments.run")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/benchmarks/expert_prices"))
    options = parser.parse_args(arguments)
    started = datetime.datetime.now(datetime.UTC)
    rows = []
    for folder in options.folders:
        config = compose(
            "wandb=disabled", "model=local", f"model.path={folder}", f"dataset={options.dataset}",
            f"dataset.test_windows={options.windows}", "cache=results/cache/expert_prices", *options.overrides,
        )  # fmt: skip
        for bits in options.bits:
            loaded = compression.load(config, plan(config))
            model = loaded.session.full
            if not isinstance(model, MoeForCausalLM) or not model.routers():
                raise SystemExit(f"{folder} holds no mixture of experts that was trained here: give such a folder")
            group = [measure(NashMixture(bits=bits, traffic=traffic), loaded) for traffic in get_args(Traffic)]
            for row in group:
                ratio, low, high = statistics.ratio(row["kl_windows"], group[0]["kl_windows"])
                rows.append({"model": name_of(model), "bits": bits, **row} | {"ratio": ratio, "low": low, "high": high})
    files.write_report(options.out, {"rows": rows, "provenance": provenance(started)}, table(rows))
    print(table(rows))


def name_of(model: MoeForCausalLM) -> str:
    """Return the number of experts and the router of a model."""
    return f"{model.config.num_experts} experts, {model.config.router['kind']}"


def measure(method: NashMixture, loaded: compression.LoadedRun) -> dict[str, Any]:
    """Compress the model; return bytes, KL and NLL by test window in nats per token, and load of the test text."""
    session = loaded.session
    result = method.compress(session.context(), np.random.default_rng(loaded.seed))
    _, sizes = session.store(result.packed, result.weights, result.float_bits, prices=result.prices)
    full, model = loaded.reference(evaluation.BATCH), session.candidate_model
    windows = evaluation.evaluate(model, loaded.test, evaluation.BATCH, full, session.track)
    load, _ = routed.evaluate(model, loaded.test, evaluation.BATCH, no_track)
    print(method.traffic, int(sizes["bytes_file"]), evaluation.summarise(windows)["kl"], flush=True)
    return {
        "traffic": method.traffic,
        "bytes_file": int(sizes["bytes_file"]),
        "damage": result.metrics["damage"],
        "replies": result.metrics.get("replies", 0.0),
        "price_moved": result.metrics.get("price_moved", 0.0),
        "heldout_kl_of_reply": result.series.get("heldout_kl_of_reply", []),
        "max_violation": load["max_violation"],
        **evaluation.summarise(windows),
        "kl_windows": windows["kl"],
        "nll_windows": windows["nll"],
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a table in Markdown."""
    lines = [
        "| model | bits | traffic | bytes | KL (nats per token) | KL over blind's | NLL | MaxVio | replies |",
        "|:--|--:|:--|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['model']} | {row['bits']:g} | `{row['traffic']}` | {row['bytes_file']:,} | {row['kl']:.4g} | "
            f"{row['ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}] | {row['nll']:.4f} | "
            f"{row['max_violation']:.3f} | {row['replies']:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
