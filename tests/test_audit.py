"""The audit says what its records say, and would say otherwise of other records."""

import dataclasses
import pathlib
import re

import pandas as pd
import pytest

from nashswarm import record
from nashswarm.shapes import Sizes
from scripts import audit

ROOT = pathlib.Path(__file__).parent.parent
TABLES = ROOT / "results" / "tables"
PLACE = "default", "stdlib_docs"


@pytest.fixture(scope="module")
def evidence() -> audit.Evidence:
    return audit.gather(ROOT / "results" / "records")


def verdicts(evidence: audit.Evidence) -> dict[str, str]:
    return {row.name: row.cells()[5] for row in audit.claims(evidence)}


def test_committed_tables_follow_from_the_records(evidence: audit.Evidence) -> None:
    assert audit.markdown(evidence) == (TABLES / "audit.md").read_text()
    assert audit.latex(evidence) == (TABLES / "audit.tex").read_text()


def test_every_claim_has_a_row_and_a_verdict(evidence: audit.Evidence) -> None:
    found = verdicts(evidence)
    assert list(found) == [f"C{number}" for number in range(1, 13)]
    assert {re.sub(" here$", "", verdict) for verdict in found.values()} <= {audit.HOLDS, audit.FAILS, audit.LATER}
    assert all(command.startswith("`python ") for *_, command in (row.cells() for row in audit.claims(evidence)))


def test_the_audit_ran_on_committed_code(evidence: audit.Evidence) -> None:
    assert not any(run.provenance["dirty"] for run in evidence.published.values())
    text = "".join(path.read_text() for path in (ROOT / "results" / "records" / "audit").iterdir())
    assert not re.search(r"/(work|tmp|home|root)/", text)


def test_without_evidence_there_is_no_verdict(evidence: audit.Evidence) -> None:
    found = verdicts(dataclasses.replace(evidence, honest={}))
    assert {found[name] for name in ("C2", "C3", "C6", "C7")} == {audit.LATER}


def test_a_verdict_on_a_model_of_the_claim_is_not_one_from_elsewhere(evidence: audit.Evidence) -> None:
    there = dataclasses.replace(evidence, honest={("gpt2", "wikitext2_raw"): evidence.honest[PLACE]})
    assert verdicts(evidence)["C2"] == f"{audit.FAILS} here" and verdicts(there)["C2"] == audit.FAILS


def test_verdicts_on_size_follow_the_sizes(evidence: audit.Evidence) -> None:
    """A model that is one linear layer saves as much at every size; without classes it would be what was published."""
    linear = {name: Sizes(10**9, (10**9,)) for name in evidence.sizes}
    found = verdicts(dataclasses.replace(evidence, sizes=linear))
    assert (found["C1"], found["C10"]) == (audit.FAILS, audit.HOLDS)
    assert linear["gpt2"].compression(0) == pytest.approx(0.90625)


@pytest.mark.parametrize(
    "claim, method, changed",
    [
        ("C2", "as_published", {"kl_high": 0.0, "bytes_file": 1}),
        ("C3", "as_published", {"decode_ratio_low": 1.1}),
        ("C6", "nash_swarm", {"decode_ratio_high": 2.8}),
        ("C7", "no_swarm", {"kl_p": 0.5}),
    ],
)
def test_verdicts_on_runs_follow_the_runs(
    claim: str, method: str, changed: dict[str, float], evidence: audit.Evidence
) -> None:
    rows = dict(evidence.honest[PLACE])
    rows[method] = pd.Series(dict(rows[method]) | changed)
    other = verdicts(dataclasses.replace(evidence, honest={PLACE: rows}))[claim]
    assert {verdicts(evidence)[claim], other} == {f"{audit.FAILS} here", f"{audit.HOLDS} here"}
    assert (other == f"{audit.FAILS} here") == ("kl_p" in changed)


def test_an_equilibrium_would_be_recognized(evidence: audit.Evidence) -> None:
    run = evidence.published[PLACE]
    calm = dataclasses.replace(run, metrics=run.metrics | {"reply_regret": 0.0})
    assert verdicts(evidence)["C8"] == audit.FAILS
    assert verdicts(dataclasses.replace(evidence, published={PLACE: calm}))["C8"] == audit.HOLDS


def test_another_model_joins_every_cell_that_is_measured(evidence: audit.Evidence) -> None:
    more = {**evidence.published, ("gpt2", "wikitext2_raw"): evidence.published[PLACE]}
    rows = audit.claims(dataclasses.replace(evidence, published=more))
    joined = [row.name for row in rows if "gpt2 on wikitext2_raw: " in row.published]
    assert joined == ["C2", "C3", "C4", "C5", "C8", "C9", "C12"]


def test_latex_rows_are_whole(evidence: audit.Evidence) -> None:
    found = audit.latex(evidence)
    counts = [len(re.findall(r"(?<!\\)&", line)) for line in found.splitlines() if line.endswith(r"\\")]
    assert counts == [5] * 13 + [10] * (1 + len(evidence.sizes))
    assert found.isascii()


def test_without_records_there_is_a_sentence(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit.main(["--records", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("the audit has no records; run ")


def test_two_runs_of_one_model_are_refused(evidence: audit.Evidence, tmp_path: pathlib.Path) -> None:
    run = evidence.published[PLACE]
    for seed in (0, 1):
        record.write(tmp_path / "audit", dataclasses.replace(run, config=dict(run.config) | {"seed": seed}))
    with pytest.raises(ValueError, match="two records audit default on stdlib_docs"):
        audit.gather(tmp_path)
