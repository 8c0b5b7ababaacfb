"""Check the header of a GGUF file before a parser reads it that trusts every count in it.

The parser of the package ``gguf`` makes an object for each element that an array claims to have, also behind the end of
the file: one changed byte would cost hours and all memory.
"""

import contextlib
import io
import pathlib
import struct
from collections.abc import Iterator
from typing import BinaryIO

MAGIC, VERSIONS = b"GGUF", (2, 3)
SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes by type, as GGUF numbers them
STRING, ARRAY, UINT32, COUNT = 8, 9, 4, 8
LEAST_ENTRY, LEAST_TENSOR = 13, 32  # bytes: of a key with a value, of a tensor's name, dimensions, type and place
MOST_DIMENSIONS, MOST_LEVELS = 4, 4


def check_header(path: pathlib.Path) -> None:
    """Check that metadata and tensors of a GGUF file lie within it.

    Raises ValueError in one sentence that names the file.
    """
    with path.open("rb") as file:
        try:
            _Header(file, path.stat().st_size).check()
        except (ValueError, struct.error) as error:
            raise ValueError(
                f"the GGUF file {path} cannot be loaded as a language model: it is cut short or damaged ({error}); get "
                "it again"
            ) from error


@contextlib.contextmanager
def told_as_damaged(path: pathlib.Path) -> Iterator[None]:
    """Raise ValueError that names the file for any error by which a parser of GGUF files ends in the context."""
    try:
        yield
    except ModuleNotFoundError:
        raise
    except Exception as error:  # parsers of damaged files raise errors of any kind
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"the GGUF file {path} cannot be read ({reason}): get it again") from error


class _Header:
    """A file that is read from its beginning, and the bytes that it has."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size

    def check(self) -> None:
        """Walk through the header.  Raises ValueError or struct.error where it does not fit the file."""
        if self.take(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        if (version := self.number("<I")) not in VERSIONS:
            raise ValueError(f"version {version} is none of {', '.join(map(str, VERSIONS))}")
        tensors, entries = self.number("<Q"), self.number("<Q")
        self.check_count(entries, LEAST_ENTRY, "entries")
        self.check_count(tensors, LEAST_TENSOR, "tensors")
        alignment = 32
        for _ in range(entries):
            key, kind = self.text(), self.number("<I")
            if key == b"general.alignment" and kind == UINT32:
                alignment = self.number("<I")
                if alignment < 1 or alignment & (alignment - 1):
                    raise ValueError(f"an alignment of {alignment} bytes is no power of two")
            else:
                self.skip_value(kind)
        places = [self.tensor() for _ in range(tensors)]
        start = -(-self.file.tell() // alignment) * alignment
        if places and start + max(places) > self.size:
            raise ValueError("a tensor begins behind its end")

    def tensor(self) -> int:
        """Read what is said of a tensor, and return its place in the data."""
        self.text()
        dimensions = self.number("<I")
        if dimensions > MOST_DIMENSIONS:
            raise ValueError(f"a tensor of {dimensions} dimensions")
        elements = 1
        for _ in range(dimensions):
            elements *= self.number("<Q")
        if elements > 8 * self.size:  # no type has less than a bit for each
            raise ValueError(f"a tensor of {elements:,} elements")
        self.number("<I")
        return self.number("<Q")

    def skip_value(self, kind: int, level: int = 0) -> None:
        """Read a value of metadata, whose arrays may hold arrays."""
        if kind in SCALARS:
            self.skip(SCALARS[kind])
        elif kind == STRING:
            self.text()
        elif kind == ARRAY and level < MOST_LEVELS:
            inner, count = self.number("<I"), self.number("<Q")
            self.check_count(count, SCALARS.get(inner, COUNT), "elements")
            if inner in SCALARS:
                self.skip(count * SCALARS[inner])
            else:
                for _ in range(count):
                    self.skip_value(inner, level + 1)
        else:
            raise ValueError(f"a value of the unknown type {kind}")

    def text(self) -> bytes:
        """Read a string."""
        return self.take(self.number("<Q"))

    def number(self, form: str) -> int:
        """Read a number."""
        value: int = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        return value

    def take(self, count: int) -> bytes:
        """Read bytes."""
        self.check_count(count, 1, "bytes")
        return self.file.read(count)

    def skip(self, count: int) -> None:
        """Go over bytes."""
        self.check_count(count, 1, "bytes")
        self.file.seek(count, io.SEEK_CUR)

    def check_count(self, count: int, each: int, what: str) -> None:
        """Raise ValueError if so many things do not fit into the rest of the file."""
        left = self.size - self.file.tell()
        if count * each > left:
            raise ValueError(f"{count:,} {what} are said to follow where {left:,} bytes do")
