"""Mutated bytes of all that files hold: read, or refused in a sentence; no crash, no hang, no huge allocation."""

import functools
import gzip
import pathlib
import resource
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import pandas
import pytest
import safetensors.torch
import torch
import transformers

from nashswarm import kernels
from nashswarm.data.text_file import read_file
from nashswarm.kernels.trellis import Trellis
from nashswarm.models import gguf_file, sources
from nashswarm.models.packaged_gguf import quantized_types
from nashswarm.packed import file_format
from nashswarm.quant.entropy import CodeTables
from nashswarm.records import record
from tests.conftest import build as build_model
from tests.conftest import packed_by

MUTATIONS = {  # of each kind of content, a million in all; fewer of those that take long to read
    "tiles": 150_000, "groups": 150_000, "lattice": 150_000, "paths": 60_000, "trellis": 100_000,
    "code_tables": 150_000, "record": 60_000, "checkpoint": 60_000, "a.txt.gz": 50_000, "a.jsonl": 50_000,
    "a.parquet": 30_000, "a.csv": 30_000, "a.gguf": 30_000,
}  # fmt: skip
GUIDED = 20_000  # of each kind, where atheris looks for inputs that reach new code
SEALED = ("groups", "lattice", "paths", "code_tables")  # with a checksum
MOST_SECONDS, MOST_BYTES = 2.0, 256 << 20  # of one content of a few kilobytes; pages are not given back at once


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """Change, cut, double or overwrite a few places."""
    changed = bytearray(content)
    for _ in range(int(rng.integers(1, 5))):
        place = int(rng.integers(min(len(changed), 64) if rng.random() < 0.5 else len(changed)))  # headers come first
        kind = rng.integers(5)
        if kind == 0:
            changed[place] = int(rng.integers(256))
        elif kind == 1:
            changed[place] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            extreme = [0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000, len(changed)][int(rng.integers(6))]
            changed[place : place + 4] = int(extreme).to_bytes(4, "little")
        elif kind == 3:
            changed[place:place] = changed[place : place + int(rng.integers(1, 40))]
        else:
            del changed[place : place + int(rng.integers(1, 40))]
        changed = changed or bytearray(b"\0")
    return bytes(changed)


def resealed(content: bytes, rng: np.random.Generator) -> bytes:
    """Change what is behind the checksum of a container and mend that, so that the parts are read as well.

    In half of the contents the length stays, as otherwise the lengths of the parts are all that is looked at.
    """
    body = mutated(content[8:], rng)
    if rng.random() < 0.5:
        body = body[: len(content) - 8].ljust(len(content) - 8, b"\0")
    return sealed(content[:4], body)


def sealed(start: bytes, body: bytes) -> bytes:
    """Join the parts of a container by a checksum that is right."""
    return start + zlib.crc32(body).to_bytes(4, "little") + body


def decode(name: str, tables: CodeTables | None) -> Callable[[bytes], Any]:
    def read(content: bytes) -> None:
        decoded = file_format.decode(name, np.frombuffer(content, np.uint8).copy(), tables)
        if isinstance(decoded, Trellis):
            kernels.rows_of(decoded, torch.arange(min(decoded.rows, 8)))

    return read


def through(path: pathlib.Path, read: Callable[[pathlib.Path], Any]) -> Callable[[bytes], Any]:
    def write_and_read(content: bytes) -> None:
        path.write_bytes(content)
        read(path)

    return write_and_read


def check_weights(checksum: str, path: pathlib.Path) -> None:
    file_format.verified_sizes([path], checksum)


def read_gguf(path: pathlib.Path) -> None:
    """Read a GGUF file as the command does: a file that no longer begins with GGUF is no such file."""
    sources.check_location(sources.ModelSource(str(path)))
    sources.read_config(str(path))
    quantized_types(path)


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[bytes, Callable[[bytes], Any]]]:
    return contents_in(tmp_path_factory.mktemp("mutated"))


def contents_in(folder: pathlib.Path) -> dict[str, tuple[bytes, Callable[[bytes], Any]]]:
    """Return for each kind a valid content and its reader, which may write into the folder."""
    model = build_model("gpt2")
    readers: dict[str, tuple[bytes, Callable[[bytes], Any]]] = {}
    for form in ("tiles", "groups", "paths", "lattice", "trellis"):
        packed = packed_by(model, form)
        tables = CodeTables.unpack(packed["code_tables"]) if "code_tables" in packed else None
        name = min((name for name in packed if name != "code_tables"), key=lambda name: len(packed[name]))
        readers[form] = packed[name].tobytes(), decode(name, tables)
        if tables is not None:
            unpack = lambda content: CodeTables.unpack(np.frombuffer(content, np.uint8))  # noqa: E731
            readers["code_tables"] = packed["code_tables"].tobytes(), unpack
    fields = {"labels": {"seed": "0"}, "config": {"seed": 0}, "metrics": {"kl": 0.5}, "series": {"kl": [0.5, 0.25]}}
    one = record.Record(**fields, layers=[{"name": "a"}], allocation="a 3\n", provenance={})
    path = record.write(folder, one)
    readers["record"] = path.read_bytes(), through(path, record.read)
    table = pandas.DataFrame({"text": ["a line", "é", "another one"] * 20, "number": range(60)})
    table.to_parquet(folder / "a.parquet")
    table.to_csv(folder / "a.csv", index=False)
    table.to_json(folder / "a.jsonl", orient="records", lines=True)
    (folder / "a.txt.gz").write_bytes(gzip.compress(b"some text\n" * 40))
    for file in ("a.parquet", "a.csv", "a.jsonl", "a.txt.gz"):
        readers[file] = (folder / file).read_bytes(), through(folder / file, read_file)
    weights = {"a.weight": torch.arange(100, dtype=torch.uint8), "b": torch.ones(4, 4, dtype=torch.float16)}
    readers["checkpoint"] = (
        safetensors.torch.save(weights, {"format": "pt"}),
        through(folder / "a.safetensors", functools.partial(check_weights, file_format.checksum(weights))),
    )
    if find_spec("gguf"):
        shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        gguf_file.write(
            transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=16, **shape)), folder / "a.gguf"
        )
        readers["a.gguf"] = (folder / "a.gguf").read_bytes(), through(folder / "a.gguf", read_gguf)
    return readers


def test_mutations_of_all_kinds_are_a_million() -> None:
    assert sum(MUTATIONS.values()) >= 1_000_000


@pytest.mark.slow
@pytest.mark.parametrize("kind", MUTATIONS)
def test_mutated_content_is_read_or_refused_in_a_sentence(
    kind: str, contents: dict[str, tuple[bytes, Callable[[bytes], Any]]]
) -> None:
    if kind not in contents:
        pytest.skip("the package gguf is not installed")
    content, read = contents[kind]
    read(content)
    rng = np.random.default_rng([*kind.encode()])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(MUTATIONS[kind]):
        mutate = resealed if kind in SEALED and number % 2 else mutated  # the others stop at the checksum
        changed = mutate(content, rng)
        started = time.process_time()
        try:
            read(changed)
        except ValueError as error:
            assert str(error) and "\n\n" not in str(error)
        assert time.process_time() - started < MOST_SECONDS, changed
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak)
    assert grown < MOST_BYTES, f"{grown:,} bytes more than before"


@pytest.mark.slow
@pytest.mark.parametrize("kind", MUTATIONS)
def test_guided_content_is_read_or_refused_in_a_sentence(kind: str, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("atheris", reason="pip install -e '.[fuzz]'")
    if kind == "a.gguf":
        pytest.importorskip("gguf")
    command = [sys.executable, "-m", "tests.packed.guided", kind, str(tmp_path), str(GUIDED)]
    ended = subprocess.run(command, capture_output=True, text=True, errors="replace")
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert f"Done {GUIDED}" in ended.stderr
