"""The memory of this process: what it holds, its high-water mark, and giving back what is no longer used."""

import contextlib
import ctypes
import errno
import os
import pathlib
import resource
import sys


def reset_peak() -> bool:
    """Start a new high-water mark of this process's resident set: whether the kernel allows it."""
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def peak_bytes() -> int:
    """The high-water mark of the resident set, in bytes."""
    with contextlib.suppress(OSError, StopIteration):
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def resident_bytes() -> int:
    """The resident set at this moment, in bytes; its high-water mark where the system does not tell."""
    with contextlib.suppress(OSError):
        return resource.getpagesize() * int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return peak_bytes()


def usage_by_kind() -> dict[str, int]:
    """Bytes of this process in memory now: its ``own``, those of ``mapped`` files (programs, checkpoints), which the
    system may drop and read again, and how many of all are ``pinned``.  Empty where the system does not tell."""
    names = {"RssAnon": "own", "RssFile": "mapped", "VmLck": "pinned"}
    with contextlib.suppress(OSError):
        lines = (line.split(":") for line in pathlib.Path("/proc/self/status").read_text().splitlines())
        return {names[name]: 1024 * int(value.split()[0]) for name, value in lines if name in names}
    return {}


def pin(address: int, size: int) -> None:
    """Keep these bytes in memory (mlock).  Raises OSError where the system does not let this process."""
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "mlock"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if library.mlock(ctypes.c_void_p(address), ctypes.c_size_t(size)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def trim_heap() -> None:
    """Return freed memory to the system, where the C library can (glibc).

    It keeps what is freed for the next request of that size, and between tensors that stay, pieces of many sizes add up
    to a second model.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
