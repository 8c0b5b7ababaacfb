"""Names in the documentation exist, and quotations are the words of the code."""

import functools
import importlib.util
import pathlib
import re
import tomllib
from typing import Any

import pytest

from nashswarm.reporting import formats, typeset

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted(DOCS.rglob("*.md"))}
PAGES |= {name: (ROOT / name).read_text() for name in ("README.md", "README.tr.md")}
GROUPS = ("model", "dataset", "method", "measure", "experiment")
LEFT = ("results/quickstart", "results/cache", "results/records/single")  # by runs, not committed
CONFS = (ROOT / "conf", ROOT / "examples/adding/conf")


def resolve(name: str) -> Any:
    """Import what a dotted name stands for.  Raises AttributeError or ModuleNotFoundError if nothing does."""
    module, *rest = name.split(".")
    thing: Any = importlib.import_module(module)
    for depth, part in enumerate(rest, 2):
        try:
            thing = getattr(thing, part)
        except AttributeError:
            thing = importlib.import_module(".".join(name.split(".")[:depth]))
    return thing


@pytest.mark.parametrize("page", PAGES)
def test_page_names_exist(page: str) -> None:
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
def test_page_include_marks_are_in_the_included_file(page: str) -> None:
    for path, options in re.findall(r"```\{(?:literal)?include\} (\S+)\n((?::.*\n)*)", PAGES[page]):
        text = ((ROOT / page).parent / path).read_text()
        for place in re.findall(r":(?:start-after|end-before): \"(.*)\"", options):
            assert place in text, f"{path}: {place}"
        for name in re.findall(r":pyobject: (\w+)", options):
            assert f"def {name}(" in text, f"{path}: {name}"


@pytest.mark.parametrize("page", PAGES)
def test_page_is_not_cut_out_of_another_by_marks(page: str) -> None:
    assert not re.search(r":(?:start-after|end-before|start-at|end-at):", PAGES[page])


def test_table_columns_are_explained() -> None:
    explained = set(re.findall(r"^\| ([^|]+) \|", PAGES["docs/reading.md"], re.M))
    official = {heading for name in formats.OFFICIAL.values() for heading in (f"{name} %", f"Δ{name} (points)")}
    assert {column.heading for column in typeset.COLUMNS} - official <= explained | {"examples"}


@functools.cache
def source() -> str:
    """Return the code of the package, with strings that are written in pieces joined."""
    code = "".join(path.read_text() for path in sorted((ROOT / "nashswarm").rglob("*.py")))
    return re.sub(r'"\s*\n\s*f?"', "", code)


def test_messages_of_the_faq_are_those_of_the_code() -> None:
    quoted = re.findall(r"```text\n(.*?)\n```", PAGES["docs/faq.md"], re.S)
    assert len(quoted) >= 4
    for message in quoted:
        assert message in source(), message


def test_glossary_names_code_that_exists() -> None:
    glossary = PAGES["docs/method.md"].split("## Glossary")[1].split("## What is minimized")[0]
    rows = [row.strip("| ").split(" | ") for row in glossary.splitlines() if row.startswith("| ")]
    identifiers = {name for row in rows for name in re.findall(r"`(\w+)`", row[2])}
    identifiers |= set(re.findall(r"`([A-Z]\w+)`", glossary))
    assert len(rows) > 15 and len(identifiers) > 20
    for name in identifiers:
        pattern = rf"^(?:class|def) {name}\b" if name[0].isupper() else rf"\b{name}\b"
        assert re.search(pattern, source(), re.M), name


def names(text: str) -> set[str]:
    """The code in the prose of a page."""
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    return {" ".join(name.split()) for name in re.findall(r"`([^`]+)`", prose)}


def blocks(text: str) -> list[str]:
    """The code blocks of a page, comments aside."""
    return [re.sub(r"\s+#.*", "", block) for block in re.findall(r"```.*?```", text, re.S)]


def numbers(text: str) -> set[str]:
    """The numbers in the prose of a page."""
    prose = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", text, flags=re.S)
    return {number.replace(",", ".") for number in re.findall(r"\d+(?:[.,]\d+)?", prose)}


def test_turkish_readme_is_a_short_form_of_the_english_one() -> None:
    """It says less: its commands, names, links and numbers are all in the English one, which it links to."""
    english, turkish = (ROOT / "README.md").read_text(), PAGES["README.tr.md"]
    assert len(turkish.splitlines()) <= 60
    assert "](README.md)" in turkish and "](README.tr.md)" in english
    assert set(blocks(turkish)) <= set(blocks(english)) and len(blocks(turkish)) >= 3
    assert names(turkish) <= names(english)
    links = set(re.findall(r"\]\(([^)]+)\)", turkish)) - {"README.md"}
    assert links <= set(re.findall(r"\]\(([^)]+)\)", english))
    assert numbers(turkish) <= numbers(english)


# the tree of docs/architecture.md


def tree() -> dict[str, str]:
    """Every path of the tree in docs/architecture.md, below the repository, with its comment."""
    (drawn,) = re.findall(r"```text\n(nashswarm/\s.*?)```", PAGES["docs/architecture.md"], re.S)
    paths: dict[str, str] = {}
    parents: list[str] = []
    for line in drawn.splitlines():
        marks, name, comment = re.fullmatch(r"([│├└─ ]*)(\S+)\s*(.*)", line).groups()  # type: ignore[union-attr]
        parents = [*parents[: len(marks) // 4], name.rstrip("/")]
        paths["/".join(parents)] = comment
    return paths


def test_tree_of_the_architecture_names_what_exists_with_a_comment() -> None:
    for path, comment in tree().items():
        assert (ROOT / path).exists(), path
        assert comment, f"{path} has no comment"


def test_tree_of_the_architecture_has_every_package_and_top_level_file() -> None:
    package = ROOT / "nashswarm"
    folders = {path.parent for path in package.rglob("__init__.py")}
    files = set(package.glob("*.py"))
    assert {path.relative_to(ROOT).as_posix() for path in folders | files} <= set(tree())


def test_picture_of_the_layers_is_the_import_contract() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    (drawn,) = re.findall(r"```text\n(cli\b.*?)```", PAGES["docs/architecture.md"], re.S)
    shown = [re.split(r"\s{2,}", line)[0] for line in drawn.splitlines()]
    assert shown == layers


def test_files_to_read_first_are_six_that_exist() -> None:
    (listed,) = re.findall(r"## Six files to read first\n(.*?)(?=\n## |\Z)", PAGES["docs/architecture.md"], re.S)
    files = re.findall(r"^\d\. `([^`]+)`", listed, re.M)
    assert len(files) == 6
    for file in files:
        assert (ROOT / file).is_file(), file


# the reference


def test_reference_has_every_public_module_once() -> None:
    """Pages of packages are filled from the tree by docs/conf.py, so a new module needs no line of its own."""
    conf = importlib.util.spec_from_file_location("docs_conf", DOCS / "conf.py")
    assert conf is not None and conf.loader is not None
    module = importlib.util.module_from_spec(conf)
    conf.loader.exec_module(module)
    documented = re.findall(r"automodule:: (\S+)", PAGES["docs/api/top_level.md"])
    for page in DOCS.glob("api/*.md"):
        source = [page.read_text()]
        module.add_modules(None, f"api/{page.stem}", source)
        if page.stem != "top_level":
            documented += re.findall(r"automodule:: (\S+)", source[0])
    public = {name for name in module.modules(ROOT / "nashswarm") if name != "nashswarm"}
    assert sorted(documented) == sorted(public)
    linked = re.findall(r"^\w+$", PAGES["docs/api/index.md"].split("```{toctree}")[1], re.M)
    assert sorted(linked) == sorted(page.stem for page in DOCS.glob("api/*.md") if page.stem != "index")


# numbers


SETTINGS = {"2.5", "3.0", "4.3", "7.0", "95 %", "3.11", "3.12"}  # budgets, sizes of models, the level, versions
SETTINGS |= {"2,5", "3,0", "4,3", "7,0", "%95"}  # in Turkish


@pytest.mark.parametrize("page", PAGES)
def test_page_prose_holds_no_typed_result(page: str) -> None:
    """Tables are included, figures are drawn from records; what is left are settings, versions and the level."""
    prose = re.sub(r"<!-- rows of .*?<!-- end -->|```.*?```|`[^`]*`|\]\([^)]*\)", "", PAGES[page], flags=re.S)
    typed = set(re.findall(r"\d+[.,]\d+|(?<![-\d])\d+ ?%|%\d+|\d+×", prose))
    assert typed <= SETTINGS


@pytest.mark.parametrize("name", ["quantize_nash_swarm_adaptive", "NashSuruMoE", "DinamikKuantizasyon", "CPUOptimizer"])
def test_name_of_the_prototype_leads_to_one_that_exists(name: str) -> None:
    rows = [row.split(" | ") for row in PAGES["docs/prototype.md"].splitlines() if row.startswith("| ")]
    (ours,) = [cells[1] for cells in rows if f"`{name}`" in cells[0]]
    successors = re.findall(r"`(nashswarm\.[\w.]+)`", ours)
    assert successors
    for successor in successors:
        resolve(successor)
