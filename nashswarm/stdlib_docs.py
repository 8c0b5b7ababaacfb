"""The embedded text: English prose that ships with CPython itself.

Nothing is downloaded and no text is committed: language-reference topics (``pydoc_data.topics``), docstrings and
comment blocks of the standard library are read from the source files of the interpreter that runs.  The text differs a
little between Python versions, so every record carries its sha256.
"""

import ast
import functools
import hashlib
import io
import pathlib
import re
import sysconfig
import tokenize

SPLITS = ("train", "calibration", "test")
NOT_PROSE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "_bundled", "__pycache__"}
COMMENT_LINES = 3  # shorter comment blocks are remarks about the next line of code, not prose
COMMENTED = re.compile(rf"(?:^[ \t\f]*#.*\n?){{{COMMENT_LINES}}}", re.MULTILINE)  # or a string that looks so


def split_of(name: str) -> str:
    """The split a document belongs to, by a hash of its name: 85 % train, 5 % calibration, 10 % test.

    >>> split_of("module email.policy"), split_of("topic lambda")
    ('train', 'test')
    """
    percentile = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 100
    return "test" if percentile < 10 else "calibration" if percentile < 15 else "train"


def comment_blocks(source: str) -> list[tuple[int, str]]:
    """(line number, text) of every run of at least three full-line comments."""
    if not COMMENTED.search(source):
        return []
    blocks: list[tuple[int, list[str]]] = []
    last_line = -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or not token.line.lstrip().startswith("#"):
            continue
        if token.start[0] != last_line + 1:
            blocks.append((token.start[0], []))
        blocks[-1][1].append(re.sub(r"^[#:!]+ ?", "", token.string).rstrip("# "))
        last_line = token.start[0]
    return [(line, "\n".join(lines).strip()) for line, lines in blocks if len(lines) >= COMMENT_LINES]


def docstrings(source: str) -> list[tuple[int, str]]:
    """(line number, text) of every docstring, indentation removed."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [(node, ast.get_docstring(node)) for node in ast.walk(ast.parse(source)) if isinstance(node, owners)]
    return [(node.body[0].lineno, text) for node, text in found if text]


@functools.cache
def documents() -> dict[str, str]:
    """Name → text of every document, sorted by name; a passage that occurs twice is kept once."""
    from pydoc_data import topics

    passages = {f"topic {name}": [text] for name, text in topics.topics.items()}
    stdlib = pathlib.Path(sysconfig.get_path("stdlib"))
    for path in sorted(stdlib.rglob("*.py")):
        parts = path.relative_to(stdlib).with_suffix("").parts
        if NOT_PROSE & set(parts) or parts[0].startswith("config-") or parts == ("pydoc_data", "topics"):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            located = sorted(docstrings(source) + comment_blocks(source))
        except (UnicodeDecodeError, SyntaxError, tokenize.TokenError):
            continue  # a template or a Python 2 relic, not a module of the running interpreter
        passages["module " + ".".join(parts)] = [text for _, text in located]

    seen: set[str] = set()
    kept: dict[str, str] = {}
    for name in sorted(passages):
        fresh = [text for text in dict.fromkeys(passages[name]) if text not in seen]
        seen.update(fresh)
        if fresh:
            kept[name] = "\n\n".join(fresh)
    return kept


def paragraphs(split: str) -> list[str]:
    """The paragraphs of the documents of ``split``, in order."""
    bodies = [body for name, body in documents().items() if split_of(name) == split]
    return [part for body in bodies for part in body.split("\n\n")]


@functools.cache
def text(split: str) -> str:
    """The documents of ``split`` (train, calibration or test), one after the other.

    A paragraph that also stands in an earlier split is left out: what tests was never trained or calibrated on.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r} of the embedded text: choose one of {', '.join(SPLITS)}")
    seen = {part for earlier in SPLITS[: SPLITS.index(split)] for part in paragraphs(earlier)}
    return "\n\n".join(part for part in paragraphs(split) if part not in seen)
