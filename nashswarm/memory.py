"""Memory of this process: its size, its peak, pinned pages, and returning freed memory to the system."""

import contextlib
import ctypes
import errno
import os
import pathlib
import resource
import sys
from collections.abc import Iterator

MAPPED_FROM = 1 << 20  # bytes
MAPPED_FROM_BY_DEFAULT = 1 << 25  # to which glibc raises it while large blocks are freed


def reset_peak() -> bool:
    """Reset the peak of the resident set, and return whether the kernel allows it."""
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def peak_bytes() -> int:
    """Return the peak of the resident set, in bytes."""
    with contextlib.suppress(OSError, StopIteration):
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def resident_bytes() -> int:
    """Return the current resident set, in bytes, or its peak on systems that report only that."""
    with contextlib.suppress(OSError):
        return resource.getpagesize() * int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return peak_bytes()


def usage_by_kind() -> dict[str, int]:
    """Return the bytes of this process in memory by kind, or nothing on systems that do not report them.

    ``own`` is anonymous memory.  ``mapped`` is memory of files (programs, checkpoints), which the system may drop and
    read again.  ``pinned`` is the part of both that must stay in memory.
    """
    names = {"RssAnon": "own", "RssFile": "mapped", "VmLck": "pinned"}
    with contextlib.suppress(OSError):
        lines = (line.split(":") for line in pathlib.Path("/proc/self/status").read_text().splitlines())
        return {names[name]: 1024 * int(value.split()[0]) for name, value in lines if name in names}
    return {}


def pin(address: int, size: int) -> None:
    """Keep ``size`` bytes from ``address`` on in memory (mlock).

    Raises OSError if the system does not allow it.
    """
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "mlock"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if library.mlock(ctypes.c_void_p(address), ctypes.c_size_t(size)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@contextlib.contextmanager
def pages_of_their_own() -> Iterator[None]:
    """Give allocations above a megabyte pages of their own during the context, if the C library can (glibc).

    They are returned to the system as soon as they are freed.  On the heap, tensors that live for unlike times leave
    holes that nothing else fits into.
    """
    _set_mapped_from(MAPPED_FROM)
    try:
        yield
    finally:
        _set_mapped_from(MAPPED_FROM_BY_DEFAULT)


def _set_mapped_from(size: int) -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-3, size)  # M_MMAP_THRESHOLD


def trim_heap() -> None:
    """Return freed memory of the heap to the system, if the C library can (glibc).

    glibc keeps freed memory for later requests.  With tensors of many sizes this adds up to the size of a second model.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
