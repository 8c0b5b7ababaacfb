"""A release: what describes it agrees, its wheel is what the sources say, and the paper's package builds by itself."""

import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Callable

import pytest
import yaml

import nashswarm
from scripts import arxiv, release

ROOT = pathlib.Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REPOSITORY = PROJECT["urls"]["Repository"].removeprefix(release.GITHUB)
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
ZENODO = json.loads((ROOT / ".zenodo.json").read_text())


def test_version_is_the_same_everywhere() -> None:
    assert set(release.versions().values()) == {nashswarm.__version__}
    assert set(release.repositories().values()) == {REPOSITORY}


def test_tag_of_another_version_or_repository_is_refused() -> None:
    assert release.differing(f"v{nashswarm.__version__}", REPOSITORY) == []
    assert release.differing("v0.1.0-alpha", REPOSITORY) == []  # the same version in longer words
    assert len(release.differing("v9.9", REPOSITORY)) == len(release.versions())
    (wrong,) = release.differing("vnext", REPOSITORY)
    assert "the tag vnext is no version" in wrong
    assert any("notebooks/1_" in line for line in release.differing(f"v{nashswarm.__version__}", "other/name"))


def test_zenodo_says_what_the_citation_says() -> None:
    assert ZENODO["title"] == CITATION["title"] and ZENODO["upload_type"] == CITATION["type"]
    assert ZENODO["license"] == CITATION["license"] == PROJECT["license"]
    assert ZENODO["keywords"] == CITATION["keywords"]
    people = [
        f"{person['family-names']}, {person['given-names']}" if "family-names" in person else person["name"]
        for person in CITATION["authors"]
    ]
    assert [person["name"] for person in ZENODO["creators"]] == people and people[0] == "Uzun, Şükrü"


def test_workflows_run_what_exists() -> None:
    """Targets of make, scripts and tests.  No workflow has a secret but the token of the run itself."""
    makefile = (ROOT / "Makefile").read_text()
    for path in sorted((ROOT / ".github/workflows").glob("*.yml")):
        text = path.read_text()
        assert set(yaml.safe_load(text)["jobs"]), path
        for target in re.findall(r"\bmake ([a-z-]+)", re.sub(r"^#.*", "", text, flags=re.M)):
            assert re.search(rf"^{target}:", makefile, re.M), target
        for name in re.findall(r"\b((?:scripts|tests|examples|notebooks)/[\w./]+\w)", text):
            assert (ROOT / name).exists(), name
        assert "secrets." not in text


def paper_in(folder: pathlib.Path) -> pathlib.Path:
    """A small paper as latexmk leaves it: what was read is in ``main.fls``."""
    paper = folder / "paper"
    (paper / "generated").mkdir(parents=True)
    (paper / "main.tex").write_text(
        "\\documentclass{article}\n\\begin{document}\\input{generated/numbers}\\cite{one}\n\\label{a}\\ref{a}"
        "\\bibliographystyle{plain}\\bibliography{references}\\end{document}\n"
    )
    (paper / "generated/numbers.tex").write_text("\\newcommand{\\One}{1}\n")
    (paper / "references.bib").write_text("@book{one}\n")
    (paper / "main.bbl").write_text("\\begin{thebibliography}{1}\\bibitem{one} One.\\end{thebibliography}\n")
    read = ("main.tex", "./generated/numbers.tex", "main.aux", "main.bbl", "/usr/share/texmf/article.cls")
    (paper / "main.fls").write_text("PWD /somewhere\n" + "".join(f"INPUT {name}\n" for name in read))
    return paper


def test_paper_package_holds_what_was_read_and_nothing_else(tmp_path: pathlib.Path) -> None:
    paper = paper_in(tmp_path)
    files = arxiv.gather(paper)
    assert list(files) == ["generated/numbers.tex", "main.bbl", "main.tex"]
    with tarfile.open(fileobj=io.BytesIO(arxiv.pack(files))) as archive:
        assert archive.getnames() == list(files)
    os.utime(paper / "main.tex", (1, 1))
    assert arxiv.pack(arxiv.gather(paper)) == arxiv.pack(files)


@pytest.mark.parametrize(
    "spoil, sentence",
    [
        (lambda paper: (paper / "main.fls").unlink(), "has not been built: run make paper first"),
        (lambda paper: (paper / "main.bbl").unlink(), "lacks main.bbl: run make paper again"),
        (lambda paper: (paper / "generated/numbers.tex").unlink(), "lacks generated/numbers.tex"),
    ],
)
def test_missing_file_of_the_paper_is_named(
    tmp_path: pathlib.Path,
    spoil: Callable[[pathlib.Path], object],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paper = paper_in(tmp_path)
    spoil(paper)
    assert arxiv.main(["--paper", str(paper), "--out", str(tmp_path / "out.tar.gz")]) == 1
    assert sentence in capsys.readouterr().err and not (tmp_path / "out.tar.gz").exists()


@pytest.mark.parametrize(
    "name, text, sentence",
    [
        ("main.log", "Overfull \\hbox (3.2pt too wide) in paragraph at lines 5--9\n", "Overfull .hbox .3.2pt too wide"),
        (  # TeX breaks the lines of its log
            "main.log",
            f"Package natbib Warning: Citation `{'a' * 39}' on p\nage 1 undefined on input line 3.\n",
            "Citation `a+' on page 1 undefined",
        ),
        ("main.aux", "\\newlabel{end:body}{{A}{11}{}{}{}}\n", "the body ends on page 11, of 10 at most"),
        ("main.aux", "\\newlabel{other}{{A}{9}{}{}{}}\n", "lacks the label end:body"),
    ],
)
def test_fault_of_a_build_is_named(
    tmp_path: pathlib.Path, name: str, text: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    paper = paper_in(tmp_path)
    assert arxiv.main(["--paper", str(paper), "--check"]) == 1
    assert "has not been built" in capsys.readouterr().err
    (paper / "main.log").write_text("Underfull \\hbox (badness 10000) in paragraph at lines 5--9\n")
    (paper / "main.aux").write_text("\\newlabel{end:body}{{10}{10}{Reproducibility}{section.10}{}}\n")
    assert arxiv.main(["--paper", str(paper), "--check"]) == 0
    (paper / name).write_text(text)
    assert arxiv.main(["--paper", str(paper), "--check"]) == 1
    assert re.search(sentence, capsys.readouterr().err)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_paper_without_latex_names_it_before_it_installs_anything() -> None:
    commands = subprocess.run(
        ["make", "--no-print-directory", "--dry-run", "paper"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "command -v latexmk" in commands.splitlines()[0]
    assert "arxiv.py --check" in commands.splitlines()[-1]


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_paper_package_builds_by_itself(tmp_path: pathlib.Path) -> None:
    files = arxiv.gather(paper_in(tmp_path))
    assert arxiv.build(files) == 1
    with pytest.raises(ValueError, match=r"does not build by itself: ! LaTeX Error: File `generated/numbers\.tex'"):
        arxiv.build({name: content for name, content in files.items() if not name.startswith("generated")})
    with pytest.raises(ValueError, match=r"builds, but: .*Citation `one'.*undefined"):
        arxiv.build(files | {"main.bbl": b"\\begin{thebibliography}{1}\\bibitem{two} Two.\\end{thebibliography}\n"})


@pytest.mark.slow
def test_wheel_holds_the_kernels_and_the_model(tmp_path: pathlib.Path) -> None:
    """It has the kernels built, and neither their sources nor the tests."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"nashswarm/kernels/nashswarm_kernels.so", "nashswarm/models/default_model/model.safetensors"} <= names
    assert {"nashswarm/conf/config.yaml", "nashswarm/reporting/page.css"} <= names
    choices = subprocess.check_output(["git", "ls-files", "conf"], cwd=ROOT, text=True).split()
    assert {f"nashswarm/{path}" for path in choices} <= names
    assert not [name for name in names if name.startswith(("conf/", "tests/", "nashswarm/kernels/csrc"))]
