"""Trellis-coded models on disk: the bytes of the file are the bytes in memory, and damaged ones are refused."""

import copy
import json
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from torch import Tensor

from nashswarm.kernels import trellis, trellis_codes
from nashswarm.measures.size import resident_bytes
from nashswarm.models.matrices import find_layers
from nashswarm.packed import checkpoint, file_format
from nashswarm.packed.matrix import TrellisMatrix
from tests.conftest import trellis_tensor

WEIGHTS, MATRIX = "model.safetensors", "transformer.h.0.mlp.c_fc"
PROGRAM = """
import pathlib, sys, torch, transformers, nashswarm
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokens = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
with torch.no_grad():
    logits = model(input_ids=tokens).logits
answer = model.generate(tokens, max_new_tokens=6, do_sample=False, eos_token_id=None)
torch.save({"logits": logits, "answer": answer}, sys.argv[2])
model.save_pretrained(sys.argv[3])
"""


@pytest.fixture(scope="module")
def small(random_model: Callable[[str], Any], packed: Callable[..., dict[str, np.ndarray]]) -> Any:
    """A trellis-coded GPT-2 in memory; not to be changed."""
    model = random_model("gpt2")
    checkpoint.adopt(model, find_layers(model), packed(model, "trellis"))
    return model


@pytest.fixture(scope="module")
def folder(small: Any, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The same on disk; not to be changed."""
    path = tmp_path_factory.mktemp("trellis")
    small.save_pretrained(path)
    return path


@pytest.fixture
def damaged(folder: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy that a test may change."""
    return pathlib.Path(shutil.copytree(folder, tmp_path / "model"))


def load(folder: pathlib.Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def stored(folder: pathlib.Path) -> dict[str, Tensor]:
    return {name: part.clone() for name, part in safetensors.torch.load_file(folder / WEIGHTS).items()}


def resealed(folder: pathlib.Path, tensors: dict[str, Tensor]) -> None:
    """Write other tensors, and the checksum that belongs to them."""
    safetensors.torch.save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["checksum"] = file_format.checksum(tensors)
    (folder / "config.json").write_text(json.dumps(config))


def matrices(model: Any) -> list[TrellisMatrix]:
    return [module for module in model.modules() if isinstance(module, TrellisMatrix)]


def mapped_files(model: Any) -> set[str]:
    """The names of the files in which the bytes of the matrices lie."""
    lines = [line.split() for line in pathlib.Path("/proc/self/maps").read_text().splitlines()]
    ranges = [(*(int(end, 16) for end in words[0].split("-")), words[-1]) for words in lines]
    names = set()
    for matrix in matrices(model):
        start = matrix.content.data_ptr()
        names |= {path for low, high, path in ranges if low <= start and start + matrix.content.nbytes <= high}
    return {pathlib.Path(name).name for name in names}


@pytest.mark.skipif(not pathlib.Path("/proc/self/maps").exists(), reason="the system does not list mapped files")
@pytest.mark.parametrize("shards", [False, True])
def test_from_pretrained_maps_matrices_and_copies_nothing(shards: bool, small: Any, tmp_path: pathlib.Path) -> None:
    small.save_pretrained(tmp_path, max_shard_size="30KB" if shards else "1GB")
    files = {path.name for path in tmp_path.glob("model*.safetensors")}
    assert len(files) > 2 if shards else files == {WEIGHTS}
    model = load(tmp_path)
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 2, 3]]))
    assert len(matrices(model)) == 10 and mapped_files(model) == files
    for own in (copy.deepcopy(model), transformers.AutoModelForCausalLM.from_pretrained(tmp_path, disable_mmap=True)):
        assert len(matrices(own)) == 10 and mapped_files(own) & files == set()


@pytest.mark.parametrize("kind", ["gpt2", "llama_tied", "bert", "opt"])
def test_saved_matrices_lie_on_cache_lines(
    kind: str, random_model: Callable[[str], Any], packed: Callable[..., dict[str, np.ndarray]], tmp_path: pathlib.Path
) -> None:
    """Whatever stands before them: names and norms of more models."""
    model = random_model(kind)
    checkpoint.adopt(model, find_layers(model), packed(model, "trellis"))
    model.save_pretrained(tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    base = 8 + int.from_bytes(content[:8], "little")
    entries = json.loads(content[8:base])
    places = [base + entry["data_offsets"][0] for name, entry in entries.items() if entry.get("dtype") == "U8"]
    own = base + entries[file_format.PADDING]["data_offsets"][0]
    assert len(places) >= 10 and {place % 64 for place in places if place != own} == {0}
    assert entries[file_format.PADDING]["shape"][0] <= 128
    again = type(model).from_pretrained(tmp_path)
    for matrix in matrices(again):
        assert matrix.content.data_ptr() % 64 == 0 and matrix.tiles.payload.data_ptr() % 64 == 0
    assert file_format.PADDING not in again.state_dict()


def test_bytes_in_memory_are_those_of_the_file(folder: pathlib.Path) -> None:
    model, tensors = load(folder), stored(folder)
    held = {name.removesuffix(".matrix"): one for name, one in model.named_modules() if isinstance(one, TrellisMatrix)}
    assert len(held) == 10
    for name, matrix in held.items():
        assert torch.equal(matrix.content, tensors[f"{name}.weight"])
    starts = sum(8 * (1 + -(-matrix.shape[0] // 64)) for matrix in held.values())
    floats = sum(4 * part.numel() for part in model.parameters())  # half of it in the file
    codes = sum(tensors[f"{name}.weight"].nbytes for name in held)
    assert resident_bytes(model) == codes + starts + floats
    assert resident_bytes(model) <= 1.03 * (folder / WEIGHTS).stat().st_size


def test_opening_or_adopting_never_decodes(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: Any) -> Tensor:
        raise AssertionError("a matrix was decoded")

    for module, name in ((trellis, "dequantize"), (trellis, "unpack_codes"), (trellis_codes, "unpack_codes")):
        monkeypatch.setattr(module, name, never)
    model = load(folder)
    model.hf_quantizer.postprocess_model(model)  # which compress calls on packed matrices


@pytest.mark.slow
def test_other_process_computes_same_bits_and_saves_same_bytes(
    small: Any, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    command = [sys.executable, "-c", PROGRAM, str(folder), str(tmp_path / "answer.pt"), str(tmp_path / "again")]
    subprocess.run(command, check=True, capture_output=True)
    answered = torch.load(tmp_path / "answer.pt")
    tokens = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    with torch.no_grad():
        assert torch.equal(answered["logits"], small(input_ids=tokens).logits)
    answer = small.generate(tokens, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(answered["answer"], answer)
    names = {path.name for path in folder.iterdir()}
    assert {path.name for path in (tmp_path / "again").iterdir()} == names
    assert all((tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes() for name in names)


def test_save_pretrained_over_the_mapped_files_keeps_both(
    damaged: pathlib.Path, folder: pathlib.Path, token_windows: Tensor
) -> None:
    model = load(damaged)
    norm = model.transformer.ln_f.weight
    with torch.no_grad():
        expected = model(input_ids=token_windows).logits
        norm.mul_(2)
        model.save_pretrained(damaged)
        norm.div_(2)
        assert torch.equal(model(input_ids=token_windows).logits, expected)
        again = load(damaged)
        again.transformer.ln_f.weight.div_(2)
        assert torch.equal(again(input_ids=token_windows).logits, expected)
    assert (damaged / WEIGHTS).read_bytes() != (folder / WEIGHTS).read_bytes()


def test_decode_of_bytes_at_odd_places_gives_same_matrix(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Bytes of an odd number stand before the matrices in the file."""
    tensors = stored(folder)
    safetensors.torch.save_file(tensors | {file_format.PADDING: torch.zeros(3, dtype=torch.uint8)}, tmp_path / WEIGHTS)
    shifted = safetensors.torch.load_file(tmp_path / WEIGHTS)
    names = [name for name, part in tensors.items() if part.dtype == torch.uint8 and name != file_format.PADDING]
    assert len(names) == 10 and all(shifted[name].data_ptr() % 2 == 1 for name in names)
    for name in names:
        matrix = file_format.decode(name, shifted[name].numpy(), None)
        assert isinstance(matrix, trellis.Trellis)
        assert torch.equal(trellis.dequantize(matrix), trellis.dequantize(trellis.parse(tensors[name])))


def test_decode_of_read_only_bytes_copies_them() -> None:
    content = trellis_tensor(torch.randn(40, 24)).content.numpy()
    content.flags.writeable = False
    matrix = file_format.decode("matrix", content, None)
    assert isinstance(matrix, trellis.Trellis) and not np.shares_memory(matrix.content.numpy(), content)
    assert np.array_equal(matrix.content.numpy(), content)


def changed_version(content: Tensor) -> Tensor:
    content[3] = ord("2")
    return content


def changed_rotation(content: Tensor) -> Tensor:
    content[4] = 2
    return content


def repeated_row(content: Tensor) -> Tensor:
    order = trellis.parse(content).row_order
    order[0] = int(order[1])
    return content


def repeated_column(content: Tensor) -> Tensor:
    order = trellis.parse(content).column_order
    order[5] = 700
    return content


def changed_rate(content: Tensor) -> Tensor:
    rates = trellis.parse(content).rates
    rates[0, 0] = (rates[0, 0] & 0xF0) | (7 if rates[0, 0] & 15 != 7 else 6)
    return content


def impossible_rate(content: Tensor) -> Tensor:
    trellis.parse(content).rates[0, 0] |= 15
    return content


DAMAGES: list[tuple[Callable[[Tensor], Tensor], str]] = [
    (changed_version, "it is in version 2 of trellis tiles, this program reads version 1; install the nashswarm that"),
    (changed_rotation, "the header of a trellis-coded matrix is wrong: the file is damaged; copy it again"),
    (repeated_row, "an order in a trellis-coded matrix is no permutation: the file is damaged; copy it again"),
    (repeated_column, "an order in a trellis-coded matrix is no permutation: the file is damaged; copy it again"),
    (changed_rate, "the tiles of a trellis-coded matrix do not fit its rates: the file is damaged; copy it again"),
    (impossible_rate, "the tiles of a trellis-coded matrix do not fit its rates: the file is damaged; copy it again"),
    (lambda content: content[:-128], "do not fit its rates: the file is damaged; copy it again"),
    (lambda content: torch.cat([content, content[:1]]), "do not fit its rates: the file is damaged; copy it again"),
    (lambda content: content[:100], "a trellis-coded matrix is cut short: the file is damaged; copy it again"),
    (lambda content: content[:10], "10 bytes are too few for a header: the file is damaged; copy it again"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=range(len(DAMAGES)))
def test_from_pretrained_damaged_matrix_with_new_checksum_refused(
    damage: Callable[[Tensor], Tensor], message: str, damaged: pathlib.Path
) -> None:
    tensors = stored(damaged)
    tensors[f"{MATRIX}.weight"] = damage(tensors[f"{MATRIX}.weight"]).clone()
    resealed(damaged, tensors)
    with pytest.raises(ValueError, match=re.escape(f"{MATRIX} cannot be read: ") + ".*" + re.escape(message)):
        load(damaged)


def test_from_pretrained_changed_byte_refused(folder: pathlib.Path, damaged: pathlib.Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()

    @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
    @given(some.integers(0, len(whole) - 1), some.integers(1, 255))
    def check(place: int, change: int) -> None:
        content = bytearray(whole)
        content[place] ^= change
        (damaged / WEIGHTS).write_bytes(content)
        with pytest.raises((ValueError, OSError), match=r"model\.safetensors|format|metadata"):
            load(damaged)

    check()


@settings(max_examples=200, deadline=None)
@given(some.data())
def test_decode_of_any_changed_bytes_gives_matrix_or_refuses(data: some.DataObject) -> None:
    content = trellis_tensor(torch.randn(70, 40, generator=torch.Generator().manual_seed(0))).content.clone()
    sides = len(content) - len(trellis.parse(content).payload)
    for _ in range(data.draw(some.integers(1, 3))):
        content[data.draw(some.integers(4, sides - 1))] = data.draw(some.integers(0, 255))
    content = content[: data.draw(some.sampled_from([len(content), len(content) - 1, sides, sides - 5]))]
    try:
        matrix = file_format.decode("matrix", content.numpy(), None)
    except ValueError as error:
        assert str(error).startswith("matrix cannot be read: ")
        return
    assert isinstance(matrix, trellis.Trellis)
    assert trellis.dequantize(matrix).shape == (matrix.rows, matrix.columns)


def test_from_pretrained_matrix_of_other_shape_refused(damaged: pathlib.Path) -> None:
    tensors = stored(damaged)
    tensors[f"{MATRIX}.weight"] = trellis_tensor(torch.randn(256, 32)).content
    resealed(damaged, tensors)
    with pytest.raises(ValueError, match=f"{MATRIX} is stored as 256x32, the model has it as 256x64: weights and"):
        load(damaged)


def test_from_pretrained_without_matrix_refused(damaged: pathlib.Path) -> None:
    tensors = stored(damaged)
    del tensors[f"{MATRIX}.weight"]
    safetensors.torch.save_file(tensors, damaged / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match=r"damaged, or not the files that belong to this config\.json"):
        load(damaged)


def test_from_pretrained_matrix_swapped_for_another_refused(damaged: pathlib.Path) -> None:
    """Both are whole; the checksum covers names, too."""
    tensors = stored(damaged)
    first, second = f"{MATRIX}.weight", f"{MATRIX.replace('.0.', '.1.')}.weight"
    tensors[first], tensors[second] = tensors[second], tensors[first]
    safetensors.torch.save_file(tensors, damaged / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match=r"damaged, or not the files that belong to this config\.json"):
        load(damaged)
