"""Build the documentation with Sphinx; ``make docs`` runs it."""

import pathlib
import re
from typing import Any

import matplotlib.style

import nashswarm
from nashswarm.records import record
from nashswarm.reporting.figures import games

ROOT = pathlib.Path(__file__).parent.parent
project = "nashswarm"
author = "Şükrü Uzun and the nashswarm contributors"
copyright = author
version = release = nashswarm.__version__
myst_enable_extensions = ["deflist"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.doctest", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "nashswarm"
html_static_path = ["static"]
html_css_files = ["wide.css"]
myst_heading_anchors = 3
autodoc_inherit_docstrings = False  # those of transformers are Markdown
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True}
autodoc_mock_imports = ["triton"]
doctest_test_doctest_blocks = ""  # those of docstrings are run by pytest
highlight_language = "default"  # Python that may also be a formula

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?!https?:)[^)#]+)(?:#[^)]*)?\)")
MODULE = "## {0}\n\n```{{eval-rst}}\n.. automodule:: {0}\n```\n"


def modules(package: pathlib.Path) -> list[str]:
    """Return the dotted names of the public modules of a package's folder, those of its subpackages after its own."""
    paths = sorted(package.rglob("*.py"), key=lambda path: (len(path.parts), path))
    public = [path for path in paths if path.name == "__init__.py" or not path.name.startswith("_")]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in public]


def add_modules(app: Any, document: str, source: list[str]) -> None:
    """Append the reference of every module to the page of its package: ``api/quant`` documents ``nashswarm/quant``."""
    folder, _, name = document.rpartition("/")
    package = ROOT / "nashswarm" / name
    if folder == "api" and package.is_dir():
        source[0] += "\n" + "\n".join(map(MODULE.format, modules(package)))


def name_files(source: list[str], inside: pathlib.Path | None) -> None:
    """Replace links to files outside ``docs/`` by the names of these files: a built page cannot link to them."""

    def named(link: re.Match[str]) -> str:
        text, file = link[1], link[2]
        if inside and (inside / file).resolve().is_relative_to(ROOT / "docs"):
            return link[0]
        file = re.sub(r"^(\.\./)+", "", file)
        return f"`{file}`" if text.strip("`") == file else f"{text} (`{file}`)"

    source[0] = LINK.sub(named, source[0])


def skip(app: Any, what: str, name: str, thing: Any, skipped: bool, options: Any) -> bool:
    """Skip the fields of named tuples: their docstrings say nothing."""
    return skipped or str(getattr(thing, "__doc__", "")).startswith("Alias for field number")


def draw(app: Any) -> None:
    """Draw the figure that only these pages have: the bits of every matrix, from the record of the whole method."""
    runs = record.read_all(ROOT / "results/records/ablation")
    folder = ROOT / "docs/generated"
    whole = next(one for one in runs if one.labels["method"] == "nash_lattice")
    with matplotlib.style.context(ROOT / "nashswarm/reporting/figures/style.mplstyle"):
        folder.mkdir(exist_ok=True)
        games.layer_bits(whole).savefig(folder / "layer_bits.png")


def setup(app: Any) -> None:
    app.connect("builder-inited", draw)
    app.connect("autodoc-skip-member", skip)
    app.connect("source-read", add_modules)
    app.connect("source-read", lambda app, document, source: name_files(source, (ROOT / "docs" / document).parent))
    app.connect("include-read", lambda app, path, document, source: name_files(source, None))
