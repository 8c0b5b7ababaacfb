"""The paper quotes no number by hand, only macros that the tables script writes, and cites only what it lists."""

import json
import math
import pathlib
import re

import pandas as pd
import pytest

from nashswarm.records.record import Record
from nashswarm.reporting import latex
from nashswarm.reporting.audit import document
from nashswarm.reporting.audit.evidence import Evidence
from nashswarm.reporting.labels import REFERENCE
from nashswarm.reporting.paper import benchmarks, macros, tables

ROOT = pathlib.Path(__file__).parents[3]
PAPER = ROOT / "paper"
RECORDS = ROOT / "results" / "records"
SOURCE = re.sub(r"(?<!\\)%.*", "", (PAPER / "main.tex").read_text())
PREAMBLE, BODY = SOURCE.split(r"\begin{document}")
# lengths, widths of graphics, and names such as uniform4 are no results, nor are formulas and the level of intervals
LAYOUT = r"\\(?:setlength\{[^}]*\}\{[^}]*\}|includegraphics\[[^]]*\]\{[^}]*\}|method\{[^}]*\}|(?:eq)?ref\{[^}]*\})"
FORMULAS = r"\\begin\{equation\*?\}.*?\\end\{equation\*?\}|\$[^$]*\$"
CITATIONS = r"\\cite[tp]?\{[^}]*\}"
LEVEL = r"95\\,\\%"


def prose(text: str) -> str:
    return re.sub("|".join((LAYOUT, FORMULAS, CITATIONS, LEVEL)), "", text, flags=re.DOTALL)


def test_paper_prose_holds_no_typed_result() -> None:
    assert re.findall(r"\d+(?:[.,]\d+)*|\\%", prose(BODY)) == []
    assert "per cent" not in re.sub(r"\\\w+\{\} per cent", "", prose(BODY))


def test_paper_formulas_hold_no_decimal_number() -> None:
    assert not re.search(r"\d[.,]\d", "".join(re.findall(FORMULAS, BODY, flags=re.DOTALL)))


@pytest.mark.parametrize("typed", ["perplexity of 29.9", r"saves 90\,\% of it", "compresses 4 times", "1,024 windows"])
def test_prose_with_a_typed_result_keeps_its_digits(typed: str) -> None:
    assert re.search(r"\d", prose(typed))


@pytest.mark.usefixtures("few_resamples")
def test_paper_macros_are_written_from_committed_records(committed_records: list[Record], evidence: Evidence) -> None:
    written = set(macros.of_records(committed_records))
    written |= set(benchmarks.of_benchmarks(ROOT / "results/benchmarks"))
    written |= set(re.findall(r"\\newcommand\{\\([A-Za-z]+)\}", document.included(evidence)["audit_numbers"]))
    used = set(re.findall(r"\\([A-Z][a-z]+[A-Z][A-Za-z]*)", BODY))
    assert len(used) > 100
    assert used <= written, f"nothing writes {sorted(used - written)}"


def test_paper_citations_are_the_listed_works() -> None:
    listed = set(re.findall(r"@\w+\{([^,]+),", (PAPER / "references.bib").read_text()))
    groups = re.findall(r"\\cite[tp]?\{([^}]*)\}", BODY)
    assert {key.strip() for group in groups for key in group.split(",")} == listed


def test_paper_inclusions_are_generated_from_committed_files() -> None:
    included = set(re.findall(r"\\(?:input|includegraphics(?:\[[^]]*\])?)\{([^}]*)\}", SOURCE))
    assert {path.split("/")[0] for path in included} == {"generated", "architecture"}
    names = {path.removeprefix("generated/") for path in included} - {"architecture", "numbers"}
    optional = set(re.findall(r"\\whenmade\{([^}]*)\}", SOURCE))
    figures = {path.name for path in (ROOT / "results/figures").glob("*.pdf")}
    table_names = {path.stem for path in (ROOT / "results/tables").glob("*.tex")}
    generated_names = (
        figures | table_names | {f"{name}_budgets" for name in table_names} | {f"audit_{name}" for name in AUDIT}
    )
    assert names <= generated_names | optional | {path.removesuffix(".tex") for path in optional}, (
        names - generated_names
    )


AUDIT = ("claims", "verdicts", "sizes", "numbers")


def test_paper_diagram_holds_no_number() -> None:
    drawn = re.sub(r"(?<!\\)%.*", "", (PAPER / "architecture.tex").read_text())
    words = re.findall(r"\{((?:[^{}]|\{[^{}]*\})*)\}\s*;|\{([^{}]*)\} \(", drawn)
    assert len(words) > 10 and not re.search(r"\d", "".join(part for pair in words for part in pair))


def means(**differing: list[str]) -> pd.DataFrame:
    rows = {"model": "gpt", "dataset": "text", "measure": "quality", "experiment": "e", "method": "gptq[bits=3]"}
    numbers = {"bytes_file": 3e6, "bits_per_weight_model": 3.0, "kl": 0.0625, "tokens": 100.0, "seeds": 1.0}
    count = max(map(len, differing.values()))
    return pd.DataFrame({name: [value] * count for name, value in (rows | numbers).items()} | differing)


def test_numbers_of_a_table_are_named_by_their_origin() -> None:
    value_of = macros.numbers(means(method=["gptq[bits=2.3]", "nash_lattice"]), "main")
    assert all(re.fullmatch("[A-Za-z]+", name) for name in value_of)
    assert value_of["MainGptqBitsTwoThreeKl"] == "0.0625" and value_of["MainNashLatticeBytesFile"] == "3.00"
    assert value_of["MainParametersMillions"] == "8.0" and value_of["MainModelName"] == "gpt"
    tasks = macros.numbers(means(dataset=["sst2", "cola"]), "glue")
    assert {"GlueSstTwoGptqBitsThreeKl", "GlueColaGptqBitsThreeKl"} <= set(tasks)
    assert r"\newcommand{\MainModelName}{gpt}" in latex.commands(value_of)


def test_numbers_of_different_texts_raise() -> None:
    table = means(method=["gptq", "hqq"]).assign(tokens=[100.0, 1.0])
    with pytest.raises(ValueError, match="different tokens"):
        macros.numbers(table)


def test_numbers_of_full_precision_follow_from_the_same_text() -> None:
    value_of = macros.numbers(means(method=["gptq"]).assign(perplexity=60.0, nll_delta=math.log(1.5)))
    assert value_of["GptqPerplexityFull"] == "40.00"


def test_budgets_absent_run_is_a_dash() -> None:
    lines = tables.budgets(means(method=["gptq[bits=2]", "gptq[bits=3]", "hqq[bits=3]"]), ("2", "3")).splitlines()
    assert lines[-5:-2] == [
        r"\midrule",
        r"gptq & 3.00 & 0.0625 & 3.00 & 0.0625 \\",
        r"hqq & -- & -- & 3.00 & 0.0625 \\",
    ]


def test_correlation_of_a_power_law_is_one() -> None:
    layers = pd.DataFrame({"layer_damage": [1e-4, 1e-3, 1e-2, 0.0], "layer_kl": [2e-4, 2e-3, 2e-2, 1.0]})
    assert math.isclose(macros.correlation(layers), 1)


def test_settings_of_ablation_are_those_of_the_reference(committed_records: list[Record]) -> None:
    ablation = [one for one in committed_records if one.labels["experiment"] == "ablation"]
    reference_run = next(one for one in ablation if one.labels["method"] == REFERENCE)
    value_of = macros.settings(ablation)
    assert value_of["SettingSwarmNeighbours"] == str(reference_run.config["method"]["swarm"]["neighbours"])
    assert value_of["SettingTestWindows"] == str(reference_run.config["dataset"]["test_windows"])


def test_mixtures_of_trained_models_have_macros(committed_records: list[Record]) -> None:
    routed_run = next(
        one
        for one in committed_records
        if one.labels["model"] == "moe_small64" and one.labels["method"] == macros.ROUTED
    )
    value_of = macros.mixtures([routed_run], "moe")
    assert value_of["MoeMoeSmallSixFourExperts"] == "64"
    assert float(value_of["MoeMoeSmallSixFourActiveMillions"]) == round(
        routed_run.metrics["active_parameters"] / 1e6, 1
    )
    assert macros.mixtures([one for one in committed_records if one.labels["experiment"] == "main"]) == {}


def test_benchmark_rotation_gives_the_largest_change_per_method(tmp_path: pathlib.Path) -> None:
    changes = {"gptq": (1.01, 0.97), "nash_lattice": (1.0, 1.02)}
    rows = [
        {"method": method, "signs": signs, "kl_straight": 2.0, "kl_turned": 2.0 * change}
        for method, both in changes.items()
        for signs, change in enumerate(both)
    ]
    (tmp_path / "rotation.json").write_text(json.dumps({"rows": rows, "provenance": {"dirty": False}}))
    expected = {"RotationGptqMost": "3.0", "RotationNashLatticeMost": "2.0", "RotationDraws": "2"}
    assert benchmarks.of_benchmarks(tmp_path) == expected


def test_benchmark_sweeps_and_reruns_give_worst_round_and_equal_runs(tmp_path: pathlib.Path) -> None:
    idle = {"each, disabled": [1.0, 3.1], "each, offline": [1.5, 3.0], "by hand": [1.0, 0.6]}
    sweeps = {"idle": idle, "seconds": {"one after the other": [300.0, 340.0], "two processes": [150.0, 200.0]}}
    reproduced = {"runs": [{"moved": []}, {"moved": ["kl"]}, {"moved": []}]}
    for name, content in (("sweeps", sweeps), ("reproduced", reproduced)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content | {"provenance": {"dirty": False}}))
    expected = {"ReproducedRuns": "3", "ReproducedSame": "2", "SweepsTimes": "1.7", "SweepsAdded": "2.5"}
    assert benchmarks.of_benchmarks(tmp_path) == expected


def test_benchmark_rows_have_macros_and_uncommitted_code_raises(tmp_path: pathlib.Path) -> None:
    row = {"role": "shrink", "windows": 1, "variant": "flock of 7"}
    row |= {"difference_percent": -12.34, "low_percent": -15.0, "high_percent": 0.04}
    content = {"rows": [row], "provenance": {"dirty": False}}
    path = tmp_path / "flock.json"
    path.write_text(json.dumps(content))
    value_of = benchmarks.of_benchmarks(tmp_path)
    assert value_of["FlockShrinkOneFlockOfSevenDifferencePercent"] == "$-$12.3"
    assert value_of["FlockShrinkOneFlockOfSevenHighPercent"] == "+0.0"
    for unclean in ({"dirty": True}, {"dirty": None}, {}):
        path.write_text(json.dumps(content | {"provenance": unclean}))
        with pytest.raises(ValueError, match=r"flock\.json comes from uncommitted or unknown code"):
            benchmarks.of_benchmarks(tmp_path)
