"""What the tests of commands share: options for a short calibration, which is computed once in each file of tests."""

import pathlib

import pytest


@pytest.fixture(scope="module")
def options(text_file: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    cache = str(tmp_path_factory.mktemp("cache"))
    return ["--calibration", str(text_file), "--windows", "6", "--length", "32", "--cache", cache]
