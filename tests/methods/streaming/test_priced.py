"""Compression by layer at one price chooses the rates and codes of the whole-model way, also after it was killed."""

import pathlib
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor

import nashswarm as nashswarm  # registers the format
from nashswarm.calibration.context import CalibrationContext
from nashswarm.calibration.moments import calibrate
from nashswarm.methods.nash_swarm import report
from nashswarm.methods.nash_swarm.solver import RateGame
from nashswarm.methods.streaming import budget, compress, gradients, priced, shards
from nashswarm.methods.streaming.settings import ByPrice
from nashswarm.methods.streaming.surroundings import Call
from nashswarm.models.matrices import find_layers
from nashswarm.models.split_experts import unfuse
from tests.methods.streaming.test_by_layer_architectures import DENSE, MIXTURES, NoTokenizer, saved

SETTINGS = ByPrice(bits=6.0, seed=5, label_seed=7)
COMMON = {"llama", "gpt2", "mixtral"}
KINDS = [pytest.param(kind, marks=() if kind in COMMON else pytest.mark.slow) for kind in [*DENSE, *MIXTURES]]


class Killed(BaseException):
    """Stands for a kill signal: no handler of errors catches it."""


@pytest.fixture(scope="module")
def windows() -> Tensor:
    return torch.randint(5, 500, (2, 24), generator=torch.Generator().manual_seed(1))


def saved_and_split(kind: str, folder: pathlib.Path, **wanted: Any) -> Any:
    """Return a tiny model that is saved in ``folder``, its experts split."""
    model = saved(kind, folder, **wanted)
    unfuse(model)
    return model


def whole_model(model: Any, windows: Tensor, left: int) -> dict[str, Tensor]:
    """Return the stored matrices of ``nash_swarm`` with ``effort=quick`` whose tiles take ``left`` bytes."""
    layers = find_layers(model)
    names = [name for layer in layers for name in layer.modules]
    generator = torch.Generator().manual_seed(SETTINGS.label_seed)
    moments = calibrate(model, names, windows, generator, expected="zipf", rounded=True)
    nothing: Any = dict
    context = CalibrationContext(layers, 0, 0, nothing, nothing, nothing)
    game = RateGame(context, moments, SETTINGS.rates, "weight", True, 0, SETTINGS.floor, SETTINGS.seed)
    packed = report.report(game.once(left + game.side_bytes())).packed
    return {f"{name}.weight": torch.from_numpy(part) for name, part in packed.items()}


def matrices(folder: pathlib.Path) -> dict[str, Tensor]:
    """Return the rows of bytes in the files of a folder."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        tensors |= safetensors.torch.load_file(path)
    return {name: part for name, part in tensors.items() if part.dtype == torch.uint8}


@pytest.mark.parametrize(("kind", "tied"), [("llama", False), ("llama", True), ("mixtral", False)])
def test_priced_bytes_are_those_of_the_whole_model(
    kind: str, tied: bool, windows: Tensor, tmp_path: pathlib.Path
) -> None:
    """Bit by bit, with the same windows and labels; some experts see no token."""
    few = {"num_experts_per_tok": 1, "num_local_experts": 8} if kind == "mixtral" else {}
    model = saved_and_split(kind, tmp_path / "full", tie_word_embeddings=tied, **few)
    source = shards.open_source(tmp_path / "full")
    priced.compress_at_price(source, NoTokenizer(), windows, tmp_path / "out", SETTINGS)
    found = matrices(tmp_path / "out")
    expected = whole_model(model, windows, budget.bytes_for_tiles(source.model, SETTINGS, ()))
    assert set(found) == set(expected)
    for name, part in expected.items():
        assert torch.equal(found[name], part), name


@pytest.mark.parametrize("kind", KINDS)
def test_priced_folder_loads_and_meets_its_bytes(kind: str, windows: Tensor, tmp_path: pathlib.Path) -> None:
    whole = saved_and_split(kind, tmp_path / "full")
    source = shards.open_source(tmp_path / "full")
    metrics = priced.compress_at_price(source, NoTokenizer(), windows, tmp_path / "out", SETTINGS)
    asked = SETTINGS.bits * metrics["parameters"] / 8
    assert asked - 2000 < metrics["bytes_file"] <= asked
    assert not list(tmp_path.glob("*.unfinished")) and not list((tmp_path / "out").glob(".*"))
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    with torch.no_grad():
        full, small = (part(input_ids=windows, use_cache=False).logits for part in (whole, model.dequantize().eval()))
    assert (small - full).norm() < 0.5 * full.norm()


@pytest.mark.parametrize("kind", ["llama", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_priced_killed_at_any_write_resumes_to_the_same_bytes(
    kind: str, windows: Tensor, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each start writes one file more than the start before it, and is killed with half of the next one written."""
    saved_and_split(kind, tmp_path / "full")
    source, write_whole, left = shards.open_source(tmp_path / "full"), compress.write_whole, [0]
    priced.compress_at_price(source, NoTokenizer(), windows, tmp_path / "never", SETTINGS)

    def write(path: pathlib.Path, content: bytes) -> None:
        if not left[0]:
            path.parent.mkdir(exist_ok=True)
            path.with_name(f".{path.name}.0123.partial").write_bytes(content[: len(content) // 2])
            raise Killed
        left[0] -= 1
        write_whole(path, content)

    monkeypatch.setattr(compress, "write_whole", write)
    steps = 4  # files of a step, the write of about at the start of each run included
    for number in range(1000):
        left[0] = 2 + number % steps
        try:
            metrics = priced.compress_at_price(source, NoTokenizer(), windows, tmp_path / "killed", SETTINGS)
            break
        except Killed:
            assert not (tmp_path / "killed").exists()
    assert metrics["starts"] > 5
    names = {path.name for path in (tmp_path / "never").iterdir()}
    assert names == {path.name for path in (tmp_path / "killed").iterdir()}
    for name in names - {"nashswarm.json"}:
        assert (tmp_path / "never" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name


def test_priced_below_the_smallest_size_raises_before_any_work(windows: Tensor, tmp_path: pathlib.Path) -> None:
    saved_and_split("llama", tmp_path / "full")
    source = shards.open_source(tmp_path / "full")
    with pytest.raises(ValueError, match=r"below the smallest possible size of this model, [\d.]+ bits"):
        priced.compress_at_price(source, NoTokenizer(), windows, tmp_path / "out", ByPrice(bits=0.5))
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_check_backward_block_without_gradients_raises() -> None:
    class Detached(torch.nn.Linear):
        def forward(self, states: Tensor) -> Tensor:
            return super().forward(states).detach()

    block, states = Detached(2, 2), torch.zeros(1, 3, 2)
    with pytest.raises(ValueError, match=r"gradients do not pass through h.0, a Detached .*: say --method gptq"):
        gradients.check_backward(block, "h.0", Call((states,), {}), states[0])
