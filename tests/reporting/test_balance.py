"""The table of what even load costs, from records made by hand."""

import numpy as np
import pandas as pd
import pytest

from nashswarm.records.record import Record
from nashswarm.reporting.balance import BALANCE, balance
from nashswarm.reporting.tables import special_table
from nashswarm.reporting.typeset import cells

MEASURE = {"_target_": "nashswarm.measures.moe.balance_curve.BalanceCurve"}


def run_of(method: str, seed: int, **metrics: float) -> Record:
    labels = {"experiment": "moe_balance", "model": "moe_small64", "dataset": "text", "measure": "balance_curve"}
    config = {"measure": MEASURE, "method": method, "seed": seed}
    return Record(labels | {"method": method, "seed": str(seed)}, config, metrics, {}, [], "", {"dirty": False})


RUNS = [
    run_of("moe_top_k", 0, nll=4.0, max_violation=2.0, max_violation_worst=3.0),
    run_of("moe_top_k", 1, nll=5.0, max_violation=1.0, max_violation_worst=2.0),
    *(
        run_of(
            "moe_nash_swarm", seed, nll=3.9 + seed, max_violation=0.5, max_violation_worst=0.6,
            **{"nll_rate_0.03": 3.95 + 1.1 * seed, "max_violation_rate_0.03": 0.1},
            **{"max_violation_worst_rate_0.03": 0.2},
            nll_window_2048=4.1 + seed, max_violation_window_2048=0.05, max_violation_worst_window_2048=0.06,
        )
        for seed in (0, 1)
    ),
]  # fmt: skip


def test_balance_has_a_row_for_every_way_in_which_prices_follow() -> None:
    table = balance(RUNS)
    own = table[table["method"] == "moe_nash_swarm"]
    own = own.set_index(own["price_rate"].fillna(0) + own["price_window"].fillna(0))
    assert list(own.index) == [0, 0.03, 2048]
    assert list(own["nll_to_top_k"]) == pytest.approx([-0.1, 0.0, 0.1])
    assert own.loc[0.03, "nll_to_top_k_spread"] == pytest.approx(np.std([-0.05, 0.05], ddof=1))
    assert own.loc[0.03, "nll"] == pytest.approx((3.95 + 5.05) / 2) and own.loc[2048, "max_violation"] == 0.05
    top_k = table[table["method"] == "moe_top_k"]
    assert len(top_k) == 1 and pd.isna(top_k["nll_to_top_k"]).all()


def test_special_table_of_such_records_is_typeset_with_its_columns() -> None:
    special = special_table(RUNS)
    assert special is not None and special[1] is BALANCE
    content = cells(*special)
    assert "0.03" in content["rate of prices"].tolist()
    assert "2,048" in content["window of prices, tokens"].tolist()
    assert special_table([]) is None
