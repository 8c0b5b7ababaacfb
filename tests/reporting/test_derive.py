"""Everything that ``make derive`` writes, made again from the committed records."""

import filecmp
import pathlib

import pytest

from scripts import audit, figures, resources, tables

ROOT = pathlib.Path(__file__).parents[2]
WRITERS = {"tables": (tables.main, audit.main, resources.main), "figures": (figures.main,)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRITERS)
def test_every_committed_file_is_derived_again_to_the_last_byte(
    kind: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for write in WRITERS[kind]:
        assert write(["--out", str(tmp_path)]) == 0
    committed = sorted(path.name for path in (ROOT / "results" / kind).iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == committed
    same, changed, unreadable = filecmp.cmpfiles(ROOT / "results" / kind, tmp_path, committed, shallow=False)
    assert same == committed, [*changed, *unreadable]
