"""The embedded text: where it comes from and how it is split."""

import ast
import collections
import io
import pathlib
import sysconfig
import tokenize
from collections.abc import Iterator

import pytest

from nashswarm.data import stdlib_docs
from nashswarm.data.stdlib_docs import (
    SPLITS,
    comment_blocks,
    docstrings,
    documents,
    full_line_comments,
    split_of,
    statements,
    text,
)

SOURCE = '''\
"""What the module says."""

# First line of three,
#   an indented second,
# and the third. ##
x = 1  # no block
# Two lines
# are a remark.


class A:
    """What the class says.

    More of it.
    """

    async def f(self):
        "What the method says."

    def g(self):
        return "not a docstring"
'''


TREE = ast.parse(SOURCE)
STRINGS = [  # statements with a line that only looks like a comment, and one that looks so and is one
    'x = """\n# a\n# b\n# c\n"""\n',
    'x = """a\n# b\n# c\n# d""" + (\n  # e\n  # f\n  # g\n  "h")\n',
    'x = "a\\\n# b\\\n# c\\\n# d"\n',
    'def f(x="""\n# a\n# b\n# c\n"""):\n    # d\n    # e\n    # f\n    pass\n',
    '@g("""\n# a\n# b\n# c\n""")\ndef f():\n    pass\n',
    'try:\n    x = 1\nexcept g("""\n# a\n# b\n# c\n"""):\n    pass\nelse:\n    # d\n    # e\n    # f\n    pass\n',
    'match x:\n    case """\n# a\n# b\n# c\n""":\n        # d\n        # e\n        # f\n        pass\n',
    'class A:\n    f"""\n# {x}\n# b\n# c\n"""\n    # d\n    # e\n    # f\n',
    "f(x,\n  # a\n  # b\n  # c\n  y)\n",
]


@pytest.fixture
def small_library(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The documents of a made-up standard library."""
    for name, source in {
        "b.py": SOURCE,
        "a/__init__.py": '"""A package."""\n"""no docstring"""\n',
        "a/again.py": '"""A package."""\n\ndef f():\n    """Said twice."""\n\ndef g():\n    """Said twice."""\n',
        "a/nothing.py": "x = 1\n",
        "a/silent.py": '"""Said twice."""\n',
        "a/relic.py": "print 'Python 2'\n",
        "test/test_a.py": '"""A test."""\n',
        "site-packages/peer.py": '"""Not ours."""\n',
        "config-3.11/x.py": '"""Build configuration."""\n',
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
    (tmp_path / "latin.py").write_bytes(b'"""caf\xe9"""\n')
    monkeypatch.setattr("pydoc_data.topics.topics", {"lambda": "Anonymous functions.", "copy": "Anonymous functions."})
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    uncached = stdlib_docs.documents.__wrapped__
    monkeypatch.setattr(stdlib_docs, "documents", uncached)
    yield uncached()


def test_documents_are_cached_and_sorted(small_library: dict[str, str]) -> None:
    module = "\n\n".join(body for _, body in sorted(docstrings(TREE) + comment_blocks(SOURCE, TREE)))
    assert list(small_library.items()) == [
        ("module a.__init__", "A package."),
        ("module a.again", "Said twice."),
        ("module b", module),
        ("topic copy", "Anonymous functions."),
    ]
    assert "\n\n".join(small_library.values()) == "\n\n".join(stdlib_docs.documents().values())


def test_paragraphs_are_in_exactly_one_split() -> None:
    """The first split, in the order train, calibration, test, that has a document with it."""
    home: dict[str, str] = {}
    for split in SPLITS:
        for name, body in documents().items():
            if split_of(name) == split:
                for part in body.split("\n\n"):
                    home.setdefault(part, split)
    for split in SPLITS:
        paragraphs = [
            part
            for name, body in documents().items()
            for part in body.split("\n\n")
            if split_of(name) == split == home[part]
        ]
        assert text(split) == "\n\n".join(paragraphs)


def test_text_of_test_and_calibration_shares_no_paragraph_with_train() -> None:
    """Short ones ("Return the result.") are everybody's; the others would be known by heart."""

    def paragraphs(split: str) -> list[str]:
        return [part.strip() for part in text(split).split("\n\n") if len(part.strip()) >= 200]

    known = set(paragraphs("train"))
    for split in ("calibration", "test"):
        shared = [part for part in paragraphs(split) if part in known]
        assert sum(map(len, shared)) <= 0.005 * len(text(split)), f"{len(shared)} paragraphs of {split}"


def test_text_is_deterministic(small_library: dict[str, str]) -> None:
    assert stdlib_docs.documents() == small_library


def test_split_of_gives_expected_shares() -> None:
    counts = collections.Counter(split_of(f"document {number}") for number in range(20_000))
    shares = {split: count / 20_000 for split, count in counts.items()}
    assert shares == pytest.approx({"train": 0.85, "calibration": 0.05, "test": 0.10}, abs=0.01)
    characters = {split: len(text(split)) for split in SPLITS}
    total = sum(characters.values())
    assert total > 2_000_000
    assert characters["train"] / total == pytest.approx(0.85, abs=0.07)
    assert 0.01 < characters["calibration"] / total < 0.12 and 0.04 < characters["test"] / total < 0.2


def test_text_of_unknown_split_refused() -> None:
    with pytest.raises(ValueError, match="unknown split 'validation' of the embedded text: choose one of train"):
        text("validation")


def test_docstrings_and_comment_blocks_found_with_lines() -> None:
    assert sorted(docstrings(TREE)) == [
        (1, "What the module says."),
        (12, "What the class says.\n\nMore of it."),
        (18, "What the method says."),
    ]
    assert comment_blocks(SOURCE, TREE) == [(3, "First line of three,\n  an indented second,\nand the third.")]


def by_tokenizer(source: str) -> list[tuple[int, str]]:
    """What Python's own tokenizer takes for a line that is nothing but a comment."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = [
        token for token in tokens if token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip()
    ]
    return [(token.start[0], token.string) for token in comments]


@pytest.mark.parametrize("source", [SOURCE, *STRINGS])
def test_comment_blocks_ignore_strings(source: str) -> None:
    assert full_line_comments(source, ast.parse(source)) == by_tokenizer(source)


def test_full_line_comments_of_stdlib_match_tokenizer() -> None:
    stdlib = pathlib.Path(sysconfig.get_path("stdlib"))
    for path in [*sorted(stdlib.glob("*.py"))[:20], *sorted(stdlib.glob("test/test_t*.py"))[:10]]:
        source = path.read_text(encoding="utf-8")
        assert full_line_comments(source, ast.parse(source)) == by_tokenizer(source), path


def test_statements_match_ast_walk() -> None:
    for source in [SOURCE, *STRINGS, pathlib.Path(ast.__file__).read_text()]:
        tree = ast.parse(source)
        wanted = [node for node in ast.walk(tree) if isinstance(node, ast.stmt | ast.ExceptHandler)]
        assert sorted(map(id, statements(tree))) == sorted(map(id, wanted))


def test_text_is_prose_of_stdlib() -> None:
    names = set(documents())
    assert "module email.message" in names or "module email" in names
    assert any(name.startswith("topic ") for name in names)
    assert not any(part in name for name in names for part in ("site-packages", "idle_test", "topics topics"))
    assert all(body.strip() for body in documents().values())
