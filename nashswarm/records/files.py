"""Files that are written whole or not at all, their JSON text, and claims that keep two processes apart."""

import contextlib
import fcntl
import json
import logging
import os
import pathlib
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

log = logging.getLogger(__name__)


@contextlib.contextmanager
def claim(path: pathlib.Path) -> Iterator[None]:
    """Hold ``path`` alone among all processes that see its folder, on any machine; a later process waits.

    Partial files of ``path`` that a killed process left are removed.  The claim is a kernel lock on a hidden file
    beside ``path``.  It ends with its process, so no claim is ever stale.  Folders that it made and that are empty in
    the end are removed: a refused run leaves nothing.

    Raises OSError with the path in its message, for example if the file system has no locks.
    """
    lock = path.with_name(f".{path.name}.lock")
    absent = [folder for folder in lock.parents if not folder.exists()]
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = _locked(lock)
    except OSError as error:
        raise OSError(error.errno, f"cannot claim {path}: {error.strerror}") from error
    with file:
        try:
            for partial in lock.parent.glob(f".{path.stem}.*.partial"):
                shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)
            yield
        finally:
            lock.unlink(missing_ok=True)
            for folder in absent:
                with contextlib.suppress(OSError):  # it holds something by now
                    folder.rmdir()


def _locked(path: pathlib.Path) -> IO[str]:
    """Open and lock the file at ``path``, again if its last holder removed it meanwhile."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)  # another worker may have removed it, empty
        file = path.open("a")
        try:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("another worker holds %s; waiting for it", path)
                fcntl.lockf(file, fcntl.LOCK_EX)
            if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def write_whole(path: pathlib.Path, content: bytes) -> None:
    """Write ``content`` to ``path`` in one step; an error leaves nothing behind.

    Raises OSError (for example for a full disk) with the path in its message.
    """
    write_together({path: content})


def write_together(contents: Mapping[pathlib.Path, bytes]) -> None:
    """Write several files and move them to their paths, in order, once all of them are on the disk.

    Raises OSError (for example for a full disk) with the path in its message; an error leaves nothing behind.
    """
    partials = {path: _beside(path) for path in contents}
    path = next(iter(contents))
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with partials[path].open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, partial in partials.items():
            partial.replace(path)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from error
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)


def write_report(path: pathlib.Path, report: Mapping[str, Any], text: str) -> None:
    """Write ``report`` to ``path`` with the suffix .json, and ``text``, its tables in Markdown, with .md.

    Raises OSError (for example for a full disk) with the path in its message; an error leaves nothing behind.
    """
    content = json_text(report) + "\n"
    write_together({path.with_suffix(".json"): content.encode(), path.with_suffix(".md"): text.encode()})


def json_text(value: Any, *, allow_nan: bool = True, margin: str = "\n") -> str:
    """Return ``value`` as JSON with one key a line, where a list of scalars, and a flat item of a list, is one line.

    Numbers have all digits that ``json.dumps`` writes.  ``margin``: the line break and indent of this level.  Raises
    ValueError for a number that is not finite, unless ``allow_nan``.

    >>> print(json_text({"kl": [0.5, 0.25], "rows": [{"bits": 3, "kl": 0.5}]}))
    {
     "kl": [0.5, 0.25],
     "rows": [
      {"bits": 3, "kl": 0.5}
     ]
    }
    """

    def line(content: Any) -> str:
        return json.dumps(content, ensure_ascii=False, allow_nan=allow_nan)

    def block(item: Any) -> str:
        return json_text(item, allow_nan=allow_nan, margin=f"{margin} ")

    if isinstance(value, dict) and value:
        lines = [line({key: 0})[1:-2] + block(item) for key, item in value.items()]  # the key, a colon and a space
        return f"{{{margin} {f',{margin} '.join(lines)}{margin}}}"
    if isinstance(value, list | tuple) and not _flat(value):
        lines = [line(item) if _flat(item) else block(item) for item in value]
        return f"[{margin} {f',{margin} '.join(lines)}{margin}]"
    return line(value)


def _flat(value: Any) -> bool:
    """Return whether ``value`` contains no list and no object."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return not any(isinstance(item, dict | list | tuple) for item in items)


def _beside(path: pathlib.Path) -> pathlib.Path:
    """Return a path beside ``path`` to prepare it at; it is random, because process numbers repeat across machines."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def write_by(path: pathlib.Path, writer: Callable[[pathlib.Path], None]) -> None:
    """Let ``writer`` fill a file and move it to ``path`` in one step, for contents too large to hold twice in memory.

    Raises OSError (for example for a full disk) with the path in its message; an error leaves nothing behind.
    """
    partial = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer(partial)
        partial.replace(path)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)


def write_folder(
    folder: pathlib.Path,
    contents: Mapping[str, bytes],
    fill: Callable[[pathlib.Path], object] = lambda folder: None,
    check: Callable[[pathlib.Path], object] = lambda folder: None,
) -> None:
    """Write a new or empty folder in one step, with the files ``contents`` and those that ``fill`` adds.

    ``check`` sees the folder before it gets its name; if it raises, nothing is left behind.  Raises OSError (for
    example for a full disk) with the path in its message; an error leaves nothing behind.
    """
    folder = folder.resolve()
    partial = _beside(folder)
    try:
        partial.mkdir(parents=True)
        fill(partial)
        for name, content in contents.items():
            with (partial / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        check(partial)
        partial.replace(folder)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {folder}: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
