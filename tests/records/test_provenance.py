"""Where a record says that it comes from."""

import datetime
import pathlib
import subprocess
from collections.abc import Iterator

import pytest

from nashswarm.records import provenance

NOW = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)


def git(folder: pathlib.Path, *words: str) -> str:
    who = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
    return subprocess.run(
        ["git", *who, "-C", str(folder), *words], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def checkout(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    """A repository with a commit, and a package in it that it does not track."""
    git(tmp_path, "init", "--quiet")
    (tmp_path / "paper.txt").write_text("about something else\n")
    git(tmp_path, "add", "paper.txt")
    git(tmp_path, "commit", "--quiet", "--message", "somebody's own")
    code = tmp_path / "nashswarm" / "records" / "provenance.py"
    code.parent.mkdir(parents=True)
    code.write_text("# the installed package\n")
    monkeypatch.setattr(provenance, "__file__", str(code))
    provenance.code.cache_clear()
    yield tmp_path
    provenance.code.cache_clear()


def test_provenance_of_untracked_package_has_no_commit(checkout: pathlib.Path) -> None:
    (checkout / "paper.txt").write_text("changed\n")
    origin = provenance.provenance(NOW)
    assert (origin["commit"], origin["dirty"]) == (None, None) and origin["started"] == "2026-01-02T03:04:05+00:00"


def test_provenance_of_changed_checkout_is_dirty(checkout: pathlib.Path) -> None:
    git(checkout, "add", "nashswarm")
    git(checkout, "commit", "--quiet", "--message", "the package itself")
    origin = provenance.provenance(NOW)
    assert (origin["commit"], origin["dirty"]) == (git(checkout, "rev-parse", "HEAD"), False)
    (checkout / "nashswarm/records/provenance.py").write_text("# changed\n")
    assert provenance.provenance(NOW) == origin, "what is changed or committed later is not what this process runs"
    provenance.code.cache_clear()
    assert provenance.provenance(NOW)["dirty"] is True


@pytest.mark.parametrize(
    "path, dirty",
    [
        ("nashswarm/moe/router.py", True),
        ("experiments/mirror.py", True),
        ("results/notes.py", False),
        ("nashswarm/notes.txt", False),
        ("scratch.py", False),
    ],
)
def test_provenance_with_untracked_module_is_dirty(path: str, dirty: bool, checkout: pathlib.Path) -> None:
    git(checkout, "add", "nashswarm")
    git(checkout, "commit", "--quiet", "--message", "the package itself")
    (checkout / path).parent.mkdir(parents=True, exist_ok=True)
    (checkout / path).write_text("x = 1\n")
    assert provenance.provenance(NOW)["dirty"] is dirty
