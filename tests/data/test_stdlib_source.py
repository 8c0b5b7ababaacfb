"""Source code of the standard library: every split its own modules, as they are."""

import inspect
import shlex

import pytest

from nashswarm.data import stdlib_source
from nashswarm.data.stdlib_docs import SPLITS, split_of


def test_text_holds_whole_modules_of_one_split() -> None:
    source, split = inspect.getsource(shlex), split_of("source shlex")
    assert {name: source in stdlib_source.text(name) for name in SPLITS} == {name: name == split for name in SPLITS}
    assert len(stdlib_source.text("train")) > len(stdlib_source.text("test")) > 100_000


def test_text_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown split 'validation' of the standard library: choose one of train"):
        stdlib_source.text("validation")
