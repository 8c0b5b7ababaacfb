"""The embedded text: English prose that ships with CPython itself.

Nothing is downloaded and no text is committed: language-reference topics (``pydoc_data.topics``), docstrings and
comment blocks of the standard library are read from the source files of the interpreter that runs.  The text differs a
little between Python versions, so every record carries its sha256.
"""

import ast
import contextlib
import functools
import gc
import hashlib
import io
import pathlib
import re
import sysconfig
import tokenize
from collections.abc import Iterator

SPLITS = ("train", "calibration", "test")
NOT_PROSE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "_bundled", "__pycache__"}
COMMENT_LINES = 3  # shorter comment blocks are remarks about the next line of code, not prose
Statement = ast.stmt | ast.ExceptHandler
COMMENTED = re.compile(rf"(?:^[ \t\f]*#.*\n?){{{COMMENT_LINES}}}", re.MULTILINE)  # or a string that looks so


def split_of(name: str) -> str:
    """The split a document belongs to, by a hash of its name: 85 % train, 5 % calibration, 10 % test.

    >>> split_of("module email.policy"), split_of("topic lambda")
    ('train', 'test')
    """
    percentile = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 100
    return "test" if percentile < 10 else "calibration" if percentile < 15 else "train"


def comment_blocks(source: str, tree: ast.Module) -> list[tuple[int, str]]:
    """(line number, text) of every run of at least three full-line comments; ``tree`` is what ``source`` parses to."""
    if not COMMENTED.search(source):
        return []
    blocks: list[tuple[int, list[str]]] = []
    last_line = -1
    for number, comment in full_line_comments(source, tree):
        if number != last_line + 1:
            blocks.append((number, []))
        blocks[-1][1].append(re.sub(r"^[#:!]+ ?", "", comment).rstrip("# "))
        last_line = number
    return [(line, "\n".join(lines).strip()) for line, lines in blocks if len(lines) >= COMMENT_LINES]


def full_line_comments(source: str, tree: ast.Module) -> list[tuple[int, str]]:
    """(line number, comment) of every line that is nothing but one.  Python's tokenizer is slow, and asked only where a
    line that looks so stands in a statement with a string of several lines."""
    lines = enumerate(source.split("\n"), 1)
    found = {number: line.lstrip() for number, line in lines if line.lstrip().startswith("#")}
    if not any(_has_long_string(node) for node in statements(tree) if not found.keys().isdisjoint(_lines(node))):
        return list(found.items())
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = [token for token in tokens if token.type == tokenize.COMMENT]
    return [(token.start[0], token.string) for token in comments if token.line.lstrip().startswith("#")]


def docstrings(tree: ast.Module) -> list[tuple[int, str]]:
    """(line number, text) of every docstring, indentation removed."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [(node, ast.get_docstring(node)) for node in (tree, *statements(tree)) if isinstance(node, owners)]
    return [(node.body[0].lineno, text) for node, text in found if text]


def statements(tree: ast.Module) -> list[Statement]:
    """All statements of a module, handlers of exceptions among them; ``ast.walk`` goes through expressions too, of
    which there are many more."""
    found: list[Statement] = list(tree.body)
    for node in found:
        for part in ("body", "orelse", "finalbody", "handlers"):
            found += getattr(node, part, ())
        for case in getattr(node, "cases", ()):
            found += case.body
    return found


def _lines(node: Statement) -> range:
    """The lines of a statement after its first, but for those of the statements in it."""
    first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", ()))])
    inner = getattr(node, "body", ())
    return range(first + 1, inner[0].lineno if inner else (node.end_lineno or first) + 1)


def _has_long_string(node: Statement) -> bool:
    """Whether a string in a statement, but for those in its statements, has several lines."""
    parts = [part for part in ast.iter_child_nodes(node) if not isinstance(part, ast.stmt | ast.ExceptHandler)]
    inner = [part for each in parts for part in ast.walk(each) if isinstance(part, ast.Constant | ast.JoinedStr)]
    return any(part.end_lineno != part.lineno for part in inner)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Python does not look for cycles meanwhile: among so many nodes that takes longer than to parse them."""
    collected = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collected:
            gc.enable()


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
            with uncollected():
                tree = ast.parse(source)
                located = sorted(docstrings(tree) + comment_blocks(source, tree))
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
