"""Committed tables and figures: ``make derive`` writes them again to the last byte, and git keeps the shown figures."""

import filecmp
import pathlib
import re
import subprocess

import pytest

from scripts import audit, figures, resources, tables

ROOT = pathlib.Path(__file__).parents[2]
WRITERS = {"tables": (tables.main, audit.main, resources.main), "figures": (figures.main,)}
PAGES = ("*.md", "docs/**/*.md", "experiments/**/*.md", "notebooks/*.ipynb", "results/*.md")


def committed(folder: str) -> list[str]:
    """Return the names of the files that git tracks in a folder, sorted."""
    listed = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=True)
    return sorted(pathlib.PurePath(line).name for line in listed.stdout.splitlines())


def shown_figures() -> list[str]:
    """Return the names of the figures that a document or the paper shows, sorted."""
    documents = "".join(path.read_text() for pattern in PAGES for path in ROOT.glob(pattern))
    pictures = re.findall(r"results/figures/(\w+\.(?:png|gif|pdf|svg))", documents)
    source = re.sub(r"(?<!\\)%.*", "", (ROOT / "paper/main.tex").read_text())
    return sorted({*pictures, *re.findall(r"generated/(\w+\.(?:pdf|png))", source)})


def test_committed_figures_are_those_shown() -> None:
    assert committed("results/figures") == shown_figures(), "git add -f what is shown, git rm what is not"


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRITERS)
def test_derive_of_committed_records_writes_equal_bytes(
    kind: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for write in WRITERS[kind]:
        assert write(["--out", str(tmp_path)]) == 0
    names = committed(f"results/{kind}")
    derived = sorted(path.name for path in tmp_path.iterdir())
    assert derived == names if kind == "tables" else set(names) <= set(derived)
    same, changed, unreadable = filecmp.cmpfiles(ROOT / "results" / kind, tmp_path, names, shallow=False)
    assert same == names, [*changed, *unreadable]
