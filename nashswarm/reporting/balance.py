"""The table of what even load costs: every router, with prices frozen, moved by a rate, or solved on a window."""

import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from nashswarm.records.record import Record
from nashswarm.reporting.frame import by_cell, ordered, origin
from nashswarm.reporting.labels import CELL
from nashswarm.reporting.typeset import Column

BALANCE = (
    Column("rate of prices", "price_rate"),
    Column("window of prices, tokens", "price_window"),
    Column("MaxVio", "max_violation"),
    Column("of the worst layer", "max_violation_worst"),
    Column("NLL (nats)", "nll"),
    Column("± over seeds", "nll_spread"),
    Column("less top-k's NLL", "nll_to_top_k"),
    Column("its ± over seeds", "nll_to_top_k_spread"),
)
POINT = re.compile(r"nll(?:_(rate|window)_([\d.e-]+))?")
ROUTER = "moe_top_k"  # whose frozen loss all points are compared with


def balance(records: Iterable[Record]) -> pd.DataFrame:
    """Return one row per router and way in which its prices follow the text: means over seeds.

    ``nll_to_top_k``: mean of the differences to ``moe_top_k`` of the same seed; ``_spread``: standard deviations over
    seeds.
    """
    cells = by_cell(
        one for one in records if one.config.get("measure", {}).get("_target_", "").endswith(".BalanceCurve")
    )
    rows = []
    for labels, runs in cells.items():
        baseline = {one.labels["seed"]: one.metrics["nll"] for one in cells.get((*labels[:-1], ROUTER), [])}
        for name in runs[0].metrics:
            point = POINT.fullmatch(name)
            if point is None:
                continue
            suffix = name.removeprefix("nll")
            row: dict[str, Any] = dict(zip(CELL, labels, strict=True)) | {"seeds": len(runs)} | origin(runs)
            row |= {f"price_{point[1]}": float(point[2])} if point[1] else {}
            for metric in ("nll", "max_violation", "max_violation_worst"):
                row[metric] = float(np.mean([one.metrics.get(f"{metric}{suffix}", np.nan) for one in runs]))
            nll = {one.labels["seed"]: one.metrics[name] for one in runs}
            differences = [nll[seed] - baseline[seed] for seed in sorted(set(nll) & set(baseline))]
            if len(nll) > 1:
                row["nll_spread"] = float(np.std(list(nll.values()), ddof=1))
            if differences and (labels[-1] != ROUTER or suffix):
                row["nll_to_top_k"] = float(np.mean(differences))
                if len(differences) > 1:
                    row["nll_to_top_k_spread"] = float(np.std(differences, ddof=1))
            rows.append(row)
    return ordered(pd.DataFrame(rows)) if rows else pd.DataFrame()
