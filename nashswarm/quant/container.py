"""A container of byte strings that starts with their kind and a checksum.

Layout: the kind (4 bytes), the CRC-32 of all that follows, the number of parts, their lengths, and the parts.  Integers
are unsigned, of 32 bits, in little-endian order.
"""

import itertools
import struct
import zlib

import numpy as np
from jaxtyping import UInt8

KINDS = {"lattice": b"NSl1", "paths": b"NSd1", "groups": b"NSg1", "tables": b"NSt1"}
COUNT = struct.Struct("<I")


def seal(kind: str, *parts: bytes) -> UInt8[np.ndarray, " bytes"]:
    """Join parts into a container of this kind."""
    body = b"".join([COUNT.pack(len(parts)), *(COUNT.pack(len(part)) for part in parts), *parts])
    return np.frombuffer(KINDS[kind] + COUNT.pack(zlib.crc32(body)) + body, np.uint8)


def unseal(kind: str, packed: UInt8[np.ndarray, " bytes"]) -> list[bytes]:
    """Split a container into its parts.

    Raises ValueError if it is of another kind or damaged.

    >>> unseal("tables", seal("tables", b"one", b"two"))
    [b'one', b'two']
    """
    content = packed.tobytes()
    if content[:4] != KINDS[kind]:
        raise ValueError(f"these bytes begin with {content[:4]!r}; entropy-coded {kind} begin with {KINDS[kind]!r}")
    body = content[8:]
    if len(content) < 12 or zlib.crc32(body) != COUNT.unpack_from(content, 4)[0]:
        raise ValueError(f"the checksum of entropy-coded {kind} is wrong: the file is damaged; copy it again")
    (parts,) = COUNT.unpack_from(body)
    lengths = np.frombuffer(body[4 : 4 * parts + 4], f"<u{COUNT.size}") if 4 * parts + 4 <= len(body) else ()
    ends = np.cumsum([4 * parts + 4, *lengths])
    if ends[-1] != len(body) or len(lengths) != parts:
        raise ValueError(f"the parts of entropy-coded {kind} are not as long as they claim: the file is damaged")
    return [body[start:end] for start, end in itertools.pairwise(ends)]
