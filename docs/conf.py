"""How Sphinx makes the documentation; ``make docs`` runs it."""

import re
from pathlib import Path
from typing import Any

import matplotlib.style

import nashswarm
from nashswarm.records import record
from nashswarm.reporting import curves

ROOT = Path(__file__).parent.parent
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
doctest_test_doctest_blocks = ""  # those of docstrings are run by pytest
highlight_language = "python"

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?!https?:)[^)#]+)\)")


def name_files(app: Any, path: Path, document: str, source: list[str]) -> None:
    """What is included from outside links to files of the repository; a page can only name them."""

    def named(link: re.Match[str]) -> str:
        text, file = link[1], link[2].removeprefix("../")
        return f"`{file}`" if text.strip("`") == file else f"{text} (`{file}`)"

    source[0] = LINK.sub(named, source[0])


def skip(app: Any, what: str, name: str, thing: Any, skipped: bool, options: Any) -> bool:
    """Fields of named tuples say nothing of themselves."""
    return skipped or str(getattr(thing, "__doc__", "")).startswith("Alias for field number")


def draw(app: Any) -> None:
    """The picture that only these pages have: the bits of every matrix, from the record of the whole method."""
    runs = record.read_all(ROOT / "results/records/ablation")
    folder = ROOT / "docs/generated"
    whole = next(one for one in runs if one.labels["method"] == "nash_swarm")
    with matplotlib.style.context(ROOT / "paper/style.mplstyle"):
        folder.mkdir(exist_ok=True)
        curves.layer_bits(whole).savefig(folder / "layer_bits.png")


def setup(app: Any) -> None:
    app.connect("builder-inited", draw)
    app.connect("autodoc-skip-member", skip)
    app.connect("include-read", name_files)
