"""A release: what describes it agrees, its wheel is what the sources say, and the paper's package builds by itself."""

import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Callable

import pytest
import yaml

import nashswarm
from scripts import arxiv, release

ROOT = pathlib.Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, (BUILD,) = PYPROJECT["project"], PYPROJECT["build-system"]["requires"]
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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The wheel of this platform, built from the source archive."""
    folder = tmp_path_factory.mktemp("dist")
    # the hook of the build system writes the archive, as `python -m build --sdist` has it do
    program = f"from scikit_build_core.build import build_sdist; print(build_sdist({str(folder)!r}))"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--target", str(folder / "tools"), BUILD], check=True)
    environment = os.environ | {"PYTHONPATH": str(folder / "tools")}
    archive = subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, env=environment, text=True).split()[-1]
    command = [*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(folder / archive)]
    subprocess.run(command, cwd=folder, check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_wheel_holds_the_kernels_and_the_model(wheel: pathlib.Path) -> None:
    """It has the kernels built, and neither their sources nor the tests."""
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"nashswarm/kernels/nashswarm_kernels.so", "nashswarm/models/default_model/model.safetensors"} <= names
    assert {"nashswarm/conf/config.yaml", "nashswarm/reporting/page.css"} <= names
    choices = subprocess.check_output(["git", "ls-files", "conf"], cwd=ROOT, text=True).split()
    assert {f"nashswarm/{path}" for path in choices} <= names
    assert not [name for name in names if name.startswith(("conf/", "tests/", "nashswarm/kernels/csrc"))]


@pytest.mark.slow
def test_wheel_works_outside_the_checkout_without_a_compiler(wheel: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """In an environment that has the wheel, and beside it the packages of this one."""
    home, place = tmp_path / "home", tmp_path / "place"
    home.mkdir()
    place.mkdir()
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "clean"], check=True)
    python, program = tmp_path / "clean/bin/python", tmp_path / "clean/bin/nashswarm"
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps", wheel]
    subprocess.run(pip, check=True)
    (packages,) = (tmp_path / "clean").glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n")  # not its own .pth files: no checkout
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CC", "CXX")}
    environment = kept | {"PATH": str(program.parent), "HOME": str(home), "OMP_NUM_THREADS": "1"}

    def run(*command: object) -> str:
        words = list(map(str, command))
        done = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout

    where = run(python, "-c", "import nashswarm; print(nashswarm.__file__)")
    assert pathlib.Path(where.strip()).is_relative_to(packages)
    assert re.search(r"^kernels +(avx|neon|portable)", run(program, "doctor"), re.M)
    run(program, "compress", "default", "--bits", "3", "--effort", "quick", "--out", "small")
    assert (place / "small/model.safetensors").exists() and "bytes in memory" in run(program, "inspect", "small")
    assert "single" in run(program, "quickstart", "--out", "first")
    assert list((place / "first").rglob("*.html"))
