"""Extract the embedded text: English prose from the source files of CPython's standard library.

Nothing is downloaded and no text is committed: the topics of the language reference (``pydoc_data.topics``), docstrings
and comment blocks are read from the files of the running interpreter.  The text differs a little between Python
versions, so every record carries its sha256.
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
COMMENT_LINES = 3  # a shorter comment block is about the next line of code and no prose
Statement = ast.stmt | ast.ExceptHandler
COMMENTED = re.compile(
    rf"(?:^[ \t\f]*#.*\n?){{{COMMENT_LINES}}}", re.MULTILINE
)  # matches strings that look like comments, too


def split_of(name: str) -> str:
    """Return the split of a document, by a hash of its name: 85 % train, 5 % calibration, 10 % test.

    >>> split_of("module email.policy"), split_of("topic lambda")
    ('train', 'test')
    """
    percentile = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 100
    return "test" if percentile < 10 else "calibration" if percentile < 15 else "train"


def comment_blocks(source: str, tree: ast.Module) -> list[tuple[int, str]]:
    """Return (line number, text) of every run of at least three full-line comments; ``tree`` is ``source`` parsed."""
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
    """Return (line number, comment) of every line that holds a comment alone.

    Python's tokenizer is slow.  It is used only if a line that starts with ``#`` lies inside a statement with a string
    of several lines, because that line may be part of the string.
    """
    lines = enumerate(source.split("\n"), 1)
    hash_lines = {number: line.lstrip() for number, line in lines if line.lstrip().startswith("#")}
    if not any(_has_long_string(node) for node in statements(tree) if not hash_lines.keys().isdisjoint(_lines(node))):
        return list(hash_lines.items())
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = [token for token in tokens if token.type == tokenize.COMMENT]
    return [(token.start[0], token.string) for token in comments if token.line.lstrip().startswith("#")]


def docstrings(tree: ast.Module) -> list[tuple[int, str]]:
    """Return (line number, text) of every docstring, indentation removed."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    documented = [(node, ast.get_docstring(node)) for node in (tree, *statements(tree)) if isinstance(node, owners)]
    return [(node.body[0].lineno, text) for node, text in documented if text]


def statements(tree: ast.Module) -> list[Statement]:
    """Return all statements of a module and all handlers of exceptions, nested ones included.

    ``ast.walk`` would visit expressions as well, which are many more.
    """
    nodes: list[Statement] = list(tree.body)
    for node in nodes:
        for part in ("body", "orelse", "finalbody", "handlers"):
            nodes += getattr(node, part, ())
        for case in getattr(node, "cases", ()):
            nodes += case.body
    return nodes


def _lines(node: Statement) -> range:
    """Return the lines of a statement after its first one, without those of the statements nested in it."""
    first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", ()))])
    inner = getattr(node, "body", ())
    return range(first + 1, inner[0].lineno if inner else (node.end_lineno or first) + 1)


def _has_long_string(node: Statement) -> bool:
    """Check whether a statement holds a string of several lines, nested statements left out."""
    parts = [part for part in ast.iter_child_nodes(node) if not isinstance(part, ast.stmt | ast.ExceptHandler)]
    inner = [part for each in parts for part in ast.walk(each) if isinstance(part, ast.Constant | ast.JoinedStr)]
    return any(part.end_lineno != part.lineno for part in inner)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Disable the garbage collector for a while: searching so many nodes for cycles takes longer than parsing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@functools.cache
def documents() -> dict[str, str]:
    """Return the text of every document by its name, sorted; a passage that occurs twice is kept once."""
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
    texts: dict[str, str] = {}
    for name in sorted(passages):
        fresh = [text for text in dict.fromkeys(passages[name]) if text not in seen]
        seen.update(fresh)
        if fresh:
            texts[name] = "\n\n".join(fresh)
    return texts


def paragraphs(split: str) -> list[str]:
    """Return the paragraphs of the documents of ``split``, in order."""
    bodies = [body for name, body in documents().items() if split_of(name) == split]
    return [part for body in bodies for part in body.split("\n\n")]


@functools.cache
def text(split: str) -> str:
    """Return the documents of ``split`` (train, calibration or test) as one text.

    A paragraph that an earlier split holds as well is left out, so that no test text was trained or calibrated on.
    Raises ValueError for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r} of the embedded text: choose one of {', '.join(SPLITS)}")
    seen = {part for earlier in SPLITS[: SPLITS.index(split)] for part in paragraphs(earlier)}
    return "\n\n".join(part for part in paragraphs(split) if part not in seen)
