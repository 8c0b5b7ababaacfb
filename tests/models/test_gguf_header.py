"""A GGUF file whose header promises more than the file holds is refused before its parser reads it."""

import pathlib
import struct

import pytest

from nashswarm.models import sources
from nashswarm.models.gguf_header import check_header

VECTOR = b"".join((struct.pack("<Q", 1), b"a", struct.pack("<IQIQ", 1, 4, 0, 0)))  # a tensor of four floats
WORDS = b"".join((struct.pack("<Q", 5), b"words", struct.pack("<IIQ", 9, 8, 1), struct.pack("<Q", 2), b"ab"))


def file_of(folder: pathlib.Path, *entries: bytes, tensors: bytes = VECTOR, counts: tuple[int, int] = (1, 1)) -> str:
    content = b"GGUF" + struct.pack("<IQQ", 3, *counts) + b"".join(entries) + tensors
    path = folder / "model.gguf"
    path.write_bytes(content + bytes(-len(content) % 32) + bytes(16))
    return str(path)


def number(key: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


def test_check_header_of_a_whole_file_passes(tmp_path: pathlib.Path) -> None:
    check_header(pathlib.Path(file_of(tmp_path, WORDS)))
    check_header(pathlib.Path(file_of(tmp_path, number(b"general.alignment", 4, struct.pack("<I", 32)))))


@pytest.mark.parametrize(
    ("entry", "counts", "reason"),
    [
        (WORDS.replace(struct.pack("<Q", 1), struct.pack("<Q", 1 << 40)), (1, 1), "elements are said to follow"),
        (number(b"size", 9, struct.pack("<IQ", 4, 1 << 62)), (1, 1), "elements are said to follow"),
        (number(b"k" * 9, 99, b""), (1, 1), "a value of the unknown type 99"),
        (number(b"general.alignment", 4, struct.pack("<I", 24)), (1, 1), "an alignment of 24 bytes"),
        (WORDS, (1 << 33, 1), "tensors are said to follow"),
        (WORDS, (1, 1 << 33), "entries are said to follow"),
        (WORDS.replace(struct.pack("<Q", 5), struct.pack("<Q", 1 << 50)), (1, 1), "bytes are said to follow"),
    ],
)
def test_check_header_that_promises_too_much_raises(
    entry: bytes, counts: tuple[int, int], reason: str, tmp_path: pathlib.Path
) -> None:
    path = file_of(tmp_path, entry, counts=counts)
    with pytest.raises(ValueError, match=rf"model\.gguf .* is cut short or damaged \(.*{reason}.*\); get it again"):
        sources.check_location(sources.ModelSource(path))


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (struct.pack("<Q", 1) + b"a" + struct.pack("<I", 9), "a tensor of 9 dimensions"),
        (struct.pack("<Q", 1) + b"a" + struct.pack("<IQIQ", 1, 1 << 50, 0, 0), "elements"),
        (struct.pack("<Q", 1) + b"a" + struct.pack("<IQIQ", 1, 4, 0, 1 << 20), "a tensor begins behind its end"),
    ],
)
def test_check_header_of_tensors_outside_the_file_raises(tensor: bytes, reason: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=reason):
        check_header(pathlib.Path(file_of(tmp_path, tensors=tensor.ljust(33, b"\0"), counts=(1, 0))))


def test_read_config_of_a_header_without_a_model_names_the_file(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    with pytest.raises(ValueError, match=r"the GGUF file .*model\.gguf cannot be read \(.*\): get it again"):
        sources.read_config(file_of(tmp_path, WORDS))
