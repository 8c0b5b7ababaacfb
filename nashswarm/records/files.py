"""Files that are there whole or not at all, and claims that keep two processes apart."""

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
    """Have ``path`` alone among all processes that see its folder, whichever machine they run on; one that comes later
    waits.  What a killed process left half-written of it is removed.

    It is the kernel's lock of a hidden file beside it: it ends with its process, killed or not, so none is ever stale.
    Raises OSError with the path in its message, for example where the file system has no locks.
    """
    lock = path.with_name(f".{path.name}.lock")
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


def _locked(path: pathlib.Path) -> IO[str]:
    """The file at ``path``, locked; not one that its last holder has removed meanwhile."""
    while True:
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
    """Put ``content`` at ``path`` in one step; after an error nothing is left behind.

    Raises OSError (for example a full disk) with the path in its message.
    """
    write_together({path: content})


def write_together(contents: Mapping[pathlib.Path, bytes]) -> None:
    """Put every content at its path, the last path last, once all of them are safely on the disk.

    Raises OSError (for example a full disk) with the path in its message; nothing is left behind then.
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


def write_report(path: pathlib.Path, found: Mapping[str, Any], text: str) -> None:
    """Put ``found`` at ``path`` with the suffix .json, and ``text``, which tells of it in Markdown, with .md.

    Raises OSError (for example a full disk) with the path in its message; nothing is left behind then.
    """
    content = json.dumps(found, indent=1) + "\n"
    write_together({path.with_suffix(".json"): content.encode(), path.with_suffix(".md"): text.encode()})


def _beside(path: pathlib.Path) -> pathlib.Path:
    """Where ``path`` is prepared; process numbers repeat from machine to machine, so a lot is drawn."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def write_by(path: pathlib.Path, writer: Callable[[pathlib.Path], None]) -> None:
    """Let ``writer`` fill a file beside ``path`` and put it there in one step: for contents too large to hold twice.

    Raises OSError (for example a full disk) with the path in its message; nothing is left behind then.
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
    folder: pathlib.Path, contents: Mapping[str, bytes], fill: Callable[[pathlib.Path], object] = lambda folder: None
) -> None:
    """Put a folder with these files, and what ``fill`` adds to it, at ``folder``, new or empty, in one step.

    Raises OSError (for example a full disk) with the path in its message; nothing is left behind then.
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
        partial.replace(folder)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {folder}: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
