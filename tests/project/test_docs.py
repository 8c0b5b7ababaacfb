"""What the documentation names exists, and what it quotes is what the code says."""

import functools
import importlib
import pathlib
import re
from typing import Any

import pytest

from nashswarm.reporting import typeset

ROOT = pathlib.Path(__file__).parents[2]
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


def english() -> str:
    """What README.tr.md translates: README.md, a link for each table, and the quick start after the introduction."""
    readme = (ROOT / "README.md").read_text().replace("(README.tr.md)", "(README.md)")
    readme = re.sub(r"<!-- (results/\S+) -->\n.*?<!-- end -->", r"[\1](\1)", readme, flags=re.S)
    start = re.sub(r"```\{include\}.*?```", "", PAGES["docs/quickstart.md"], flags=re.S)
    start = re.sub(r"^#", "##", start, flags=re.M).replace("](", "](docs/")
    introduction, heading, rest = readme.partition("## Compress your own model")
    return introduction + start + heading + rest


def sections(text: str) -> list[tuple[str, str]]:
    """The level of every heading and what stands below it."""
    _, *parts = re.split(r"^(#+) .*\n", text, flags=re.M)
    return list(zip(parts[::2], parts[1::2], strict=True))


def kept(section: str) -> dict[str, list[str]]:
    """What a translation keeps: commands, comments aside, names in the prose, where links lead, items and questions."""
    prose = re.sub(r"```.*?```", "", section, flags=re.S)
    return {
        "blocks": [re.sub(r"\s+#.*", "", block) for block in re.findall(r"```.*?```", section, re.S)],
        "names": sorted({" ".join(name.split()) for name in re.findall(r"`([^`]+)`", prose)}),
        "links": sorted(re.findall(r"\]\(([^)]+)\)", prose)),
        "marks": re.findall(r"^- |(?<=\n\n)\*\*", prose, re.M),
    }


def test_the_turkish_readme_is_the_english_one_section_by_section() -> None:
    """The glossary at its end is its own."""
    translated, glossary = PAGES["README.tr.md"].split("## Terimler")
    assert not sections(glossary)
    ours, theirs = sections(translated), sections(english())
    assert [level for level, _ in ours] == [level for level, _ in theirs]
    assert kept(translated.partition("# ")[0]) == kept(english().partition("# ")[0])
    for (_, turkish), (_, told) in zip(ours, theirs, strict=True):
        assert kept(turkish) == kept(told)


def test_the_turkish_readme_tells_no_number_that_the_english_one_does_not() -> None:
    def numbers(section: str) -> set[str]:
        prose = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", section, flags=re.S)
        return {found.replace(",", ".") for found in re.findall(r"\d+(?:[.,]\d+)?", prose)}

    translated = PAGES["README.tr.md"].split("## Terimler")[0]
    for (_, turkish), (_, told) in zip(sections(translated), sections(english()), strict=True):
        assert numbers(turkish) <= numbers(told)


@pytest.mark.parametrize("page", PAGES)
def test_no_result_is_typed(page: str) -> None:
    """Tables are included, figures are drawn from records; what is left are settings, versions and the level."""
    prose = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", PAGES[page], flags=re.S)
    told = {"2.5", "95 %", "3.11", "3.12"} | {"2,5", "%95", "3,0", "4,3", "7,0"}  # the latter in Turkish, with sizes
    assert set(re.findall(r"\d+[.,]\d+|(?<![-\d])\d+ ?%|%\d+|\d+×", prose)) <= told


@pytest.mark.parametrize("name", ["quantize_nash_swarm_adaptive", "NashSuruMoE", "DinamikKuantizasyon", "CPUOptimizer"])
def test_a_name_of_the_prototype_leads_to_one_that_exists(name: str) -> None:
    rows = [row.split(" | ") for row in PAGES["docs/prototype.md"].splitlines() if row.startswith("| ")]
    (ours,) = [cells[1] for cells in rows if f"`{name}`" in cells[0]]
    found = re.findall(r"`(nashswarm\.[\w.]+)`", ours)
    assert found
    for one in found:
        resolve(one)
