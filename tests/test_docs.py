"""What the documentation names exists, and what it quotes is what the code says."""

import functools
import importlib
import pathlib
import re
from typing import Any

import pytest

from nashswarm import typeset

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted(DOCS.rglob("*.md"))}
PAGES["README.tr.md"] = (ROOT / "README.tr.md").read_text()
GROUPS = ("model", "dataset", "method", "measure", "experiment")
LEFT = ("results/quickstart", "results/cache", "results/records/single")  # by runs, not committed
CONFS = (ROOT / "conf", ROOT / "examples/adding/conf")


def resolve(name: str) -> Any:
    """What a dotted name stands for.  Raises AttributeError or ModuleNotFoundError if nothing does."""
    module, *rest = name.split(".")
    found = importlib.import_module(module)
    for depth, part in enumerate(rest, 2):
        try:
            found = getattr(found, part)
        except AttributeError:
            found = importlib.import_module(".".join(name.split(".")[:depth]))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_exists(page: str) -> None:
    text = PAGES[page]
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|^)make ([\w-]+)", text, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target
    for path in re.findall(r"`((?:nashswarm|scripts|results|experiments|examples|conf|tests)/[\w./]+)`", text):
        assert (ROOT / path).exists() or path.startswith(LEFT), path
    for group in GROUPS:
        for choices in re.findall(rf"\b{group}=([\w,]+)", text):
            for choice in choices.split(","):
                assert any((conf / group / f"{choice}.yaml").exists() for conf in CONFS), f"{group}={choice}"
    for name in re.findall(r"`(nashswarm\.[\w.]+)`", text):
        resolve(name)
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (folder / link).exists() or link.startswith("generated/"), link
    for included in re.findall(r"\{(?:literal)?include\} (\S+)", text):
        assert (folder / included).exists(), included


@pytest.mark.parametrize("page", PAGES)
def test_where_an_include_begins_and_ends_is_in_the_file(page: str) -> None:
    for path, options in re.findall(r"```\{(?:literal)?include\} (\S+)\n((?::.*\n)*)", PAGES[page]):
        text = ((ROOT / page).parent / path).read_text()
        for place in re.findall(r":(?:start-after|end-before): \"(.*)\"", options):
            assert place in text, f"{path}: {place}"
        for name in re.findall(r":pyobject: (\w+)", options):
            assert f"def {name}(" in text, f"{path}: {name}"


def test_every_column_of_the_tables_is_explained() -> None:
    explained = set(re.findall(r"^\| ([^|]+) \|", PAGES["docs/results.md"], re.M))
    official = {heading for name in typeset.OFFICIAL.values() for heading in (f"{name} %", f"Δ{name} (points)")}
    assert {column.heading for column in typeset.COLUMNS} - official <= explained | {"examples"}


@functools.cache
def source() -> str:
    """The code, strings that are written in several pieces put together."""
    code = "".join(path.read_text() for path in sorted((ROOT / "nashswarm").rglob("*.py")))
    return re.sub(r'"\s*\n\s*f?"', "", code)


def test_messages_that_the_answers_quote_are_those_of_the_code() -> None:
    quoted = re.findall(r"```text\n(.*?)\n```", PAGES["docs/faq.md"], re.S)
    assert len(quoted) >= 4
    for message in quoted:
        assert message in source(), message


def test_the_commands_of_the_turkish_readme_are_commands_of_the_english_one() -> None:
    """Comments aside, the shell and Python blocks of both are the same, up to what the translation adds of its own."""

    def code(text: str, language: str) -> list[str]:
        blocks = re.findall(rf"```{language}\n(.*?)```", text, re.S)
        return [re.sub(r"\s+#.*", "", line) for line in "".join(blocks).splitlines()]

    english = (ROOT / "README.md").read_text()
    assert code(PAGES["README.tr.md"], "python") == code(english, "python")
    told = [line for line in code(english, "sh") if line.startswith(("make", "nashswarm"))]
    assert [line for line in code(PAGES["README.tr.md"], "sh") if line.startswith(("make", "nashswarm"))] == told


@pytest.mark.parametrize("page", PAGES)
def test_no_result_is_typed(page: str) -> None:
    """Tables are included, figures are drawn from records; what is left are settings, versions and the level."""
    prose = re.sub(r"```.*?```|`[^`]*`", "", PAGES[page], flags=re.S)
    assert set(re.findall(r"\d+[.,]\d+|(?<![-\d])\d+ ?%|\d+×", prose)) <= {"2.5", "95 %", "3.11", "3.12"}


@pytest.mark.parametrize("name", ["quantize_nash_swarm_adaptive", "NashSuruMoE", "DinamikKuantizasyon", "CPUOptimizer"])
def test_a_name_of_the_prototype_leads_to_one_that_exists(name: str) -> None:
    rows = [row.split(" | ") for row in PAGES["docs/prototype.md"].splitlines() if row.startswith("| ")]
    (ours,) = [cells[1] for cells in rows if f"`{name}`" in cells[0]]
    found = re.findall(r"`(nashswarm\.[\w.]+)`", ours)
    assert found
    for one in found:
        resolve(one)
