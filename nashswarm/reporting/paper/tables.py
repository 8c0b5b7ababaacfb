"""Tables that fit the paper: its columns, and methods by budget side by side."""

import re
from collections.abc import Sequence

import pandas as pd

from nashswarm.reporting import tables, typeset
from nashswarm.reporting.formats import MARK, MISSING, OFFICIAL
from nashswarm.reporting.latex import table_row, tabular, tex
from nashswarm.reporting.typeset import Column

COLUMNS = tuple(
    column
    for column in typeset.COLUMNS
    if column.metric
    not in {
        "bytes_file_before", "compression", "perplexity", "nll_delta_before", "quantize_seconds", "quantize_peak_bytes",
        "finetune_seconds", "finetune_chosen_step", "bytes_resident", "decode_ratio", "examples",
        *(f"{name}_full" for name in OFFICIAL),
    }
)  # fmt: skip
ROUTERS = tuple(
    column
    for column in tables.ROUTERS
    if column.metric
    not in {
        "load_cv", "dropped", "resident_hits", "resident_hits_without", "served_tokens_per_second",
        "served_tokens_per_second_without", "looks_ahead", "seeds",
    }
)  # fmt: skip
BUDGET = re.compile(r"(.+)\[bits=([\d.]+)\]")


def budgets(means: pd.DataFrame, bits: Sequence[str]) -> str:
    """Return a ``tabular`` with one row a method, and for each budget of ``bits`` its stored bits and its KL.

    Rows of methods that are not named ``<method>[bits=<bits>]`` are left out.
    """
    named = means["method"].str.extract(BUDGET)
    columns = (Column("bits/param", "bits_per_weight_model"), Column("KL", "kl"))
    head = [
        table_row(["", *(rf"\multicolumn{{2}}{{c}}{{told {budget} bits}}" for budget in bits)]),
        " ".join(rf"\cmidrule(lr){{{2 * place + 2}-{2 * place + 3}}}" for place in range(len(bits))),
        table_row(["method", *(column.heading for _ in bits for column in columns)]),
    ]
    lines = []
    for method in dict.fromkeys(named[0].dropna()):
        cells = [tex(method)]
        for budget in bits:
            rows = means[(named[0] == method) & (named[1] == budget)]
            for column in columns:
                cells.append(tex(_significant(rows.iloc[0], column.metric) if len(rows) else MISSING))
        lines.append(cells)
    return tabular(f"@{{}}l{'rr' * len(bits)}@{{}}", head, lines)


def _significant(row: pd.Series, metric: str) -> str:
    """Write two decimals of bits, three digits of another metric, and the mark of a difference."""
    value = row[metric]
    if pd.isna(value):
        return MISSING
    mark = MARK if row.get(f"{metric}_p", 1.0) <= typeset.LEVEL else ""
    return (format(value, ".2f") if metric.startswith("bits") else format(value, "#.3g").rstrip(".")) + mark
