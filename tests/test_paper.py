"""The paper quotes no number by hand, only macros that the tables script writes, and cites only what it lists."""

import pathlib
import re

import pytest
from test_report import ABLATION, synthetic

from nashswarm import report, typeset

PAPER = pathlib.Path(__file__).parents[1] / "paper"
SOURCE = re.sub(r"(?<!\\)%.*", "", (PAPER / "main.tex").read_text())
PREAMBLE, BODY = SOURCE.split(r"\begin{document}")
# lengths, widths of graphics, and names such as uniform4 are no results, nor are formulas and the level of intervals
LAYOUT = r"\\(?:setlength\{[^}]*\}\{[^}]*\}|includegraphics\[[^]]*\]\{[^}]*\}|method\{[^}]*\}|(?:eq)?ref\{[^}]*\})"
FORMULAS = r"\\begin\{equation\}.*?\\end\{equation\}|\$[^$]*\$"
CITATIONS = r"\\cite[tp]?\{[^}]*\}"
LEVEL = r"95\\,\\%"


def prose(text: str) -> str:
    return re.sub("|".join((LAYOUT, FORMULAS, CITATIONS, LEVEL)), "", text, flags=re.DOTALL)


def test_no_result_is_typed() -> None:
    assert re.findall(r"\d+(?:[.,]\d+)*|\\%", prose(BODY)) == []
    assert "per cent" not in re.sub(r"\\\w+\{\} per cent", "", prose(BODY))


def test_formulas_hold_no_decimal_number() -> None:
    assert not re.search(r"\d[.,]\d", "".join(re.findall(FORMULAS, BODY, flags=re.DOTALL)))


@pytest.mark.parametrize("typed", ["perplexity of 29.9", r"saves 90\,\% of it", "compresses 4 times", "1,024 windows"])
def test_a_typed_result_would_be_seen(typed: str) -> None:
    assert re.search(r"\d", prose(typed))


def test_every_macro_is_written_by_the_tables_script() -> None:
    means = report.average(report.frame(synthetic(method) for method in ABLATION))
    written = set(re.findall(r"\\newcommand\{\\([A-Za-z]+)\}", typeset.macros(means)))
    used = set(re.findall(r"\\([A-Z][a-z]+[A-Z][A-Za-z]*)", BODY))
    assert len(used) > 20
    assert used <= written, f"nothing writes {sorted(used - written)}"


def test_every_citation_is_listed_and_every_listed_work_is_cited() -> None:
    listed = set(re.findall(r"@\w+\{([^,]+),", (PAPER / "references.bib").read_text()))
    groups = re.findall(r"\\cite[tp]?\{([^}]*)\}", BODY)
    assert {key.strip() for group in groups for key in group.split(",")} == listed


def test_what_is_included_is_generated() -> None:
    included = re.findall(r"\\(?:input|includegraphics(?:\[[^]]*\])?)\{([^}]*)\}", SOURCE)
    assert {path.split("/")[0] for path in included} == {"generated"}
    names = {path.removeprefix("generated/") for path in included}
    assert names == {"numbers", "ablation", "ablation_pareto.pdf", "ablation_convergence.pdf"}
