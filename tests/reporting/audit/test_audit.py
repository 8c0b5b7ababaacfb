"""The audit says what its records say, and would say otherwise of other records."""

import dataclasses
import pathlib
import re
from typing import Any

import pandas as pd
import pytest

from nashswarm.models.shapes import ParameterCounts
from nashswarm.records import record
from nashswarm.reporting.audit import claim, document
from nashswarm.reporting.audit.evidence import REMOVED, Evidence, gather, removals
from nashswarm.reporting.audit.time_claims import cache
from nashswarm.runtime.cache_misses import CACHEGRIND
from scripts import audit

ROOT = pathlib.Path(__file__).parents[3]
TABLES = ROOT / "results" / "tables"
PLACE = "default", "stdlib_docs"


def verdicts(evidence: Evidence) -> dict[str, str]:
    return {row.name: row.cells()[5] for row in document.claims(evidence)}


@pytest.mark.slow
def test_audit_of_committed_records_equals_committed_tables() -> None:
    evidence = gather(ROOT / "results" / "records")
    assert document.markdown(evidence) == (TABLES / "audit.md").read_text()
    assert document.latex(evidence) == (TABLES / "audit.tex").read_text()


def test_claims_of_committed_records_have_a_verdict_each(evidence: Evidence) -> None:
    verdict_of = verdicts(evidence)
    assert list(verdict_of) == [f"C{number}" for number in range(1, 13)]
    assert {re.sub(" here$", "", verdict) for verdict in verdict_of.values()} <= {claim.HOLDS, claim.FAILS, claim.LATER}
    assert all(command.startswith("`python ") for *_, command in (row.cells() for row in document.claims(evidence)))


def test_audit_records_come_from_committed_code(evidence: Evidence) -> None:
    assert not any(run.provenance["dirty"] for run in evidence.published.values())
    text = "".join(path.read_text() for path in (ROOT / "results" / "records" / "audit").iterdir())
    assert not re.search(r"/(work|tmp|home|root)/", text)


def test_claims_without_evidence_are_decided_later(evidence: Evidence) -> None:
    verdict_of = verdicts(dataclasses.replace(evidence, honest={}, family={}, removed=pd.DataFrame()))
    assert {verdict_of[name] for name in ("C2", "C3", "C6", "C7", "C12")} == {claim.LATER}


def test_verdict_on_a_claimed_model_omits_the_word_here(evidence: Evidence) -> None:
    there = dataclasses.replace(evidence, honest={("gpt2", "wikitext2_raw"): evidence.honest[PLACE]})
    assert verdicts(evidence)["C2"] == f"{claim.FAILS} here" and verdicts(there)["C2"] == claim.FAILS


def test_verdicts_on_size_of_one_linear_layer_are_reversed(evidence: Evidence) -> None:
    """A model that is one linear layer saves as much at every size; without classes it would be what was published."""
    linear = {name: ParameterCounts(10**9, (10**9,)) for name in evidence.sizes}
    verdict_of = verdicts(dataclasses.replace(evidence, sizes=linear))
    assert (verdict_of["C1"], verdict_of["C10"]) == (claim.FAILS, claim.HOLDS)
    assert linear["gpt2"].compression(0) == pytest.approx(0.90625)


@pytest.mark.parametrize(
    "name, method, changed",
    [
        ("C2", "as_published", {"kl_high": 0.0, "bytes_file": 1}),
        ("C3", "as_published", {"decode_ratio_low": 1.1}),
        ("C6", "nash_lattice", {"decode_ratio_high": 2.8}),
    ],
)
def test_verdicts_on_changed_runs_are_reversed(
    name: str, method: str, changed: dict[str, float], evidence: Evidence
) -> None:
    rows = dict(evidence.honest[PLACE])
    recorded_verdict = verdicts(dataclasses.replace(evidence, honest={PLACE: rows}))[name]
    rows[method] = pd.Series(dict(rows[method]) | changed)
    changed_verdict = verdicts(dataclasses.replace(evidence, honest={PLACE: rows}))[name]
    assert {recorded_verdict, changed_verdict} == {f"{claim.FAILS} here", f"{claim.HOLDS} here"}
    assert changed_verdict == f"{claim.HOLDS} here"


def test_component_claim_holds_where_every_test_survives(evidence: Evidence) -> None:
    """Two tables: the swarm matters in one of them."""
    rows = [(method, table, "default", True) for method in REMOVED for table in ("ablation", "main")]
    removed = pd.DataFrame(rows, columns=["method", "experiment", "model", "costs"])
    assert verdicts(dataclasses.replace(evidence, removed=removed))["C7"] == f"{claim.HOLDS} here"
    removed.loc[len(removed) - 1, "costs"] = False
    [row] = [row for row in document.claims(dataclasses.replace(evidence, removed=removed)) if row.name == "C7"]
    assert row.cells()[5] == f"{claim.FAILS} here"
    assert "`lattice_no_swarm` in 1 of 2 (ablation 1 of 1, main 0 of 1)" in row.honest
    assert "`fixed_no_nash` in 2 of 2 (ablation 1 of 1, main 1 of 1)" in row.honest
    kept = removed[removed["method"] != "fixed_no_nash"]
    assert verdicts(dataclasses.replace(evidence, removed=kept))["C7"] == claim.LATER
    there = dataclasses.replace(evidence, removed=removed.assign(model="gpt2"))
    assert verdicts(there)["C7"] == claim.FAILS


def test_removals_of_two_experiments_are_paired_in_each(tmp_path: pathlib.Path) -> None:
    """A method without swarm that is worse in every window, and again one that does what the whole one does."""
    ablation = list(record.read_all(ROOT / "results" / "records" / "ablation"))
    whole, alone, still = (next(run for run in ablation if run.labels["method"] == name) for name in
                           ("nash_lattice", "lattice_no_swarm", "fixed_no_nash"))  # fmt: skip
    worse = {"kl": [1.1 * value for value in whole.series["kl"]]}
    metrics = whole.metrics | {"kl": 1.1 * whole.metrics["kl"]}
    alone = dataclasses.replace(alone, series=whole.series | worse, metrics=metrics)
    same = dataclasses.replace(alone, series=whole.series, metrics=whole.metrics)
    for experiment, runs, suffix in (("ablation", (whole, alone, still), ""), ("main", (whole, same), "[bits=3]")):
        for run in runs:
            labels = run.labels | {"experiment": experiment, "method": run.labels["method"] + suffix}
            record.write(tmp_path / experiment, dataclasses.replace(run, labels=labels))
    pairs = removals(tmp_path)
    assert [tuple(row) for row in pairs[["experiment", "method", "costs"]].to_numpy()] == [
        ("ablation", "fixed_no_nash", True), ("ablation", "lattice_no_swarm", True),
        ("main", "lattice_no_swarm", False),
    ]  # fmt: skip


def test_small_model_claim_without_gain_fails_here(evidence: Evidence) -> None:
    rows = dict(evidence.honest[PLACE])
    assert verdicts(dataclasses.replace(evidence, honest={PLACE: rows}))["C12"] == f"{claim.FAILS} here"
    rows["as_published"] = pd.Series(dict(rows["as_published"]) | {"kl_high": 0.0, "bytes_file": 1})
    assert verdicts(dataclasses.replace(evidence, honest={PLACE: rows}))["C12"] == claim.LATER


def test_speed_claim_is_decided_at_the_claimed_sizes(evidence: Evidence) -> None:
    small = evidence.honest[PLACE]["nash_lattice"]
    fast = pd.Series(dict(small) | {"bytes_file": 50e6, "decode_ratio_high": 3.0})
    for other, verdict in ((fast, claim.HOLDS), (dict(fast) | {"decode_ratio_high": 1.0}, claim.FAILS)):
        honest = {PLACE: evidence.honest[PLACE], ("gpt2_random", "any"): {"nash_lattice": pd.Series(other)}}
        assert verdicts(dataclasses.replace(evidence, honest=honest))["C6"] == f"{verdict} here"


def mixture(method: str, change: float) -> record.Record:
    """A quick validation whose loss changes by about so much."""
    nll = [2.0, 2.5, 3.0, 2.2]
    worse = [value + change + shift for value, shift in zip(nll, (0.01, -0.01, 0.02, -0.02), strict=True)]
    metrics = {"bytes_memory": 8e6, "bytes_file": 1e6, "nll": 2.4, "nll_quantized": 2.4 + change}
    labels = {"method": method, "dataset": "story", "model": "moe_small", "seed": "0"}
    return record.Record(labels, {}, metrics, {"nll": nll, "nll_quantized": worse}, [], "", {})


@pytest.mark.parametrize("change, verdict", [(0.2, claim.FAILS), (0.0, claim.HOLDS)])
def test_mixture_claim_with_growing_loss_fails(change: float, verdict: str, evidence: Evidence) -> None:
    with_mixture = dataclasses.replace(evidence, mixtures={"quick_validation": [mixture("moe_dense", change)]})
    [row] = [row for row in document.claims(with_mixture) if row.name == "C4"]
    assert row.cells()[5] == verdict and "8.00 → 1.00 MB" in row.honest


@pytest.mark.parametrize("ratio, verdict", [(1.5, claim.FAILS), (0.7, claim.HOLDS)])
def test_routing_claim_follows_the_time_of_a_layer(ratio: float, verdict: str, evidence: Evidence) -> None:
    times = {"route_plain_8": 1.0, "route_flock_8": 1.25, "layer_ratio_batch_1_8": 3.0, "layer_ratio_batch_64_8": ratio}
    timed = dataclasses.replace(mixture("moe_nash_swarm", 0.0), metrics=times, config={"measure": {"tokens": 64}})
    with_times = dataclasses.replace(evidence, mixtures={"performance_analysis": [timed]})
    [row] = [row for row in document.claims(with_times) if row.name == "C5"]
    assert row.cells()[5] == verdict and "with 8 experts 3.0× at batch 1" in row.honest and "1.25× plain" in row.honest


def test_equilibrium_claim_without_regret_holds(evidence: Evidence) -> None:
    run = evidence.published[PLACE]
    calm = dataclasses.replace(run, metrics=run.metrics | {"reply_regret": 0.0})
    assert verdicts(evidence)["C8"] == claim.FAILS
    assert verdicts(dataclasses.replace(evidence, published={PLACE: calm}))["C8"] == claim.HOLDS


def test_claims_of_two_models_name_both_where_measured(evidence: Evidence) -> None:
    more = {**evidence.published, ("gpt2", "wikitext2_raw"): evidence.published[PLACE]}
    rows = document.claims(dataclasses.replace(evidence, published=more))
    joined = [row.name for row in rows if "gpt2 on wikitext2_raw: " in row.published]
    assert joined == ["C2", "C3", "C4", "C5", "C8", "C9", "C12"]


def test_latex_rows_have_equal_column_counts(evidence: Evidence) -> None:
    source = document.latex(evidence)
    counts = [len(re.findall(r"(?<!\\)&", line)) for line in source.splitlines() if line.endswith(r"\\")]
    assert counts == [5] * 13 + [10] * (1 + len(evidence.sizes))
    assert source.isascii()


def test_audit_script_without_records_fails_in_one_sentence(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit.main(["--records", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("the audit has no records; run ")


def test_gather_two_runs_of_one_model_raises(evidence: Evidence, tmp_path: pathlib.Path) -> None:
    run = evidence.published[PLACE]
    for seed in (0, 1):
        record.write(tmp_path / "audit", dataclasses.replace(run, config=dict(run.config) | {"seed": seed}))
    with pytest.raises(ValueError, match="two records audit default on stdlib_docs"):
        gather(tmp_path)


def test_cache_claim_verdict_follows_counts(evidence: Evidence) -> None:
    common = {"counter": CACHEGRIND, "reads": 100.0, "first_misses": 10.0, "last_misses": 0.0}
    rows = [common | {"form": "float32"}, common | {"form": "3 bits", "first_fall": 0.9, "last_fall": None}]
    worse = [*rows, common | {"form": "4 bits", "first_fall": 0.9, "last_fall": 0.66}]

    def row(counted: Any) -> claim.Claim:
        return cache(dataclasses.replace(evidence, misses=counted))

    assert row(()).cells()[5] == claim.LATER
    assert row(rows).cells()[5] == f"{claim.HOLDS} here" and row(worse).cells()[5] == f"{claim.FAILS} here"
    assert "first level fall by 90.0–90.0 % and misses of the last level fall by 66.0–66.0 %" in row(worse).honest
    assert "the last level" not in row(rows).honest and "of floats 90.0–90.0 %" in row(rows).honest
