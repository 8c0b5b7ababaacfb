"""Forecast what ``nashswarm compress`` takes of any model, from its config alone: the option ``--plan``.

Everything is measured on this machine, by the code that compresses: calibration on models of one and of two blocks with
random weights, whose difference is a block, and the game on matrices of few rows.  Seconds are those of the processor,
shared by the threads: what else runs at present does not count.
"""

import copy
import dataclasses
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from nashswarm import memory
from nashswarm.calibration.context import CalibrationContext
from nashswarm.calibration.moments import calibrate
from nashswarm.layers import Layer, Moments
from nashswarm.methods.nash_swarm.settings import QUICK_SHARE, NashSwarm
from nashswarm.models import architecture, matrices, shapes, sources
from nashswarm.models.split_experts import unfuse

ROWS = 256  # of the matrices that the game is measured on
LEAST_BITS = 2.0  # with which they have room for what is stored beside their tiles
COLUMNS = (512, 1536)  # of these; the time of a weight grows with them
WINDOWS = 4  # that calibration is measured on; the fastest counts
MOST_MEASURED = 1_500_000_000  # parameters of a model of two blocks
ACTIVATIONS = 3  # bytes that a block keeps for its backward pass, in those of the inputs of its matrices
LOGIT_BYTES = 16  # of a logit of the window in work: itself, its gradient, and what comes between
GAME_BYTES = 28  # of a weight of the matrix that is played: weights, values, errors and replies


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a model takes, or a part of it.

    ``calibration``: seconds of a window.  ``game``: of all its matrices.  ``moments``: bytes.  ``inputs``: bytes of the
    inputs of all matrices in a window, each once.  ``largest``: weights of the largest matrix.
    """

    parameters: float
    calibration: float
    game: float
    moments: float
    inputs: float
    largest: float


def forecast(name: str, config: Any, method: NashSwarm, windows: int, length: int) -> dict[str, Any]:
    """Return the bytes, seconds and memory of compressing a model of this config with so many windows of text.

    ``length``: tokens of a window.  Raises ValueError for a model of which two blocks are too large to be measured.
    """
    started = memory.resident_bytes()
    cut = [first_blocks(config, blocks) for blocks in (1, 2)]
    with torch.device("meta"):
        parameters, measured = _parameters(_new(config)), _parameters(_new(cut[1]))
    if measured > MOST_MEASURED:
        raise ValueError(
            f"{name} is too wide to be measured: two of its blocks have {measured:,} parameters; "
            "--plan --by-layer forecasts it"
        )
    seconds_of_weight = game_seconds(method)
    one, two = (measure(_new(part).eval(), length, seconds_of_weight) for part in cut)
    blocks = 1 + (parameters - one.parameters) / max(two.parameters - one.parameters, 1)
    whole = Cost(
        **{
            field.name: getattr(one, field.name)
            + (blocks - 1) * max(getattr(two, field.name) - getattr(one, field.name), 0)
            for field in dataclasses.fields(Cost)
        }
    )
    used = max(windows // QUICK_SHARE, 1) if method.effort == "quick" else windows
    seconds = {"calibrating": used * whole.calibration, "playing": whole.game}
    block_inputs = two.inputs - one.inputs
    logits = LOGIT_BYTES * length * config.get_text_config().vocab_size
    working = max(whole.inputs + ACTIVATIONS * block_inputs + logits, GAME_BYTES * whole.largest)
    return {
        "model": name,
        "windows": [used, length],
        "threads": torch.get_num_threads(),
        "parameters": parameters,
        "bytes_file": int(method.bits * parameters / 8),
        "seconds": {stage: round(value, 1) for stage, value in seconds.items()},
        "minutes": round(sum(seconds.values()) / 60, 1),
        "slowest": max(seconds, key=lambda stage: seconds[stage]),
        "peak_bytes": int(started + 4 * parameters + whole.moments + working),
    }


def config_of(model: str) -> Any:
    """Return the config of a folder, of a name on the hub, of the embedded model, or of a name in ``shapes``.

    Raises ValueError if there is none.
    """
    if (shape := shapes.SHAPES.get(model) or shapes.LARGE.get(model)) is not None:
        return transformers.AutoConfig.for_model(**shape)
    if model == "default":
        return sources.read_config(str(sources.EMBEDDED))
    if not pathlib.Path(model).exists() and not sources.may_be_on_hub(model):
        raise ValueError(f"{model} holds no {sources.CONFIG}, and no shape is known by that name")
    try:
        return sources.read_config(model)
    except OSError as error:
        raise ValueError(f"{model} holds no {sources.CONFIG}, and no shape is known by that name") from error


def measure(model: Any, length: int, seconds_of_weight: Mapping[int, float]) -> Cost:
    """Calibrate a model on random windows, and return what it takes."""
    unfuse(model)
    layers = matrices.find_layers(model)
    names = [name for layer in layers for name in layer.modules]
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(model.config.get_text_config().vocab_size, (WINDOWS, length), generator=generator)
    stamps: list[float] = []

    def stamped(items: Sequence[Any], description: str) -> Iterator[Any]:
        for item in items:
            stamps.append(time.process_time())
            yield item
        stamps.append(time.process_time())

    table = calibrate(model, names, windows, generator, track=stamped, expected="zipf", rounded=True).tensors()
    inputs = [int(key.rsplit("/")[-1]) for key in table if ":inputs" in key and not key.endswith("/")]
    return Cost(
        parameters=_parameters(model),
        calibration=min(np.diff(stamps)) / torch.get_num_threads(),
        game=sum(layer.parameters * interpolated(layer.weight.shape[1], seconds_of_weight) for layer in layers),
        moments=sum(tensor.nbytes for tensor in table.values()),
        inputs=4 * length * sum(inputs),
        largest=max(layer.parameters for layer in layers),
    )


def game_seconds(method: NashSwarm) -> dict[int, float]:
    """Return the seconds that a weight of a matrix takes in the game on all threads, by the columns of the matrix."""
    seconds, method = {}, dataclasses.replace(method, bits=max(method.bits, LEAST_BITS))
    for columns in COLUMNS:
        context = _context_of_samples(columns, torch.get_num_threads())
        started = time.process_time()
        method.compress(context, np.random.default_rng(0))
        seconds[columns] = (time.process_time() - started) / context.parameters / torch.get_num_threads()
    return seconds


def sample_matrices(columns: int, count: int) -> tuple[list[Layer], dict[str, Moments]]:
    """Return ``count`` random matrices and their moments, with sensitivities as unlike as those of a model."""
    generator = torch.Generator().manual_seed(0)
    layers: list[Layer] = []
    moments: dict[str, Moments] = {}
    for number in range(count):
        inputs = (
            torch.randn(2 * columns, columns, generator=generator) * torch.randn(columns, generator=generator).exp()
        )
        outputs = torch.randn(ROWS, generator=generator).exp() / ROWS
        mean = inputs.T @ inputs / len(inputs)
        name = str(number)
        weight = torch.randn(ROWS, columns, generator=generator) / columns**0.5
        layers.append(Layer(name, name, 0.0, (name,), ("Linear",), weight))
        moments[name] = Moments(mean, outputs, outputs, mean)
    return layers, moments


def _context_of_samples(columns: int, count: int) -> CalibrationContext:
    layers, moments = sample_matrices(columns, count)

    def heldout_kl(weights: Mapping[str, Tensor], tokens: int | None) -> float:
        raise NotImplementedError("a sample has no text")

    return CalibrationContext(
        tuple(layers), 0, count * ROWS * columns, lambda: moments, heldout_kl, lambda kind, key, compute: compute(),
        zipf_moments=lambda share=1: moments,
    )  # fmt: skip


def interpolated(columns: int, seconds: Mapping[int, float]) -> float:
    """Return the seconds of a weight of a matrix with so many columns, from those of two other numbers of columns."""
    (few, fast), (many, slow) = seconds.items()
    return max(fast + (slow - fast) * (columns - few) / (many - few), min(fast, slow) / 2)


def first_blocks(config: Any, blocks: int) -> Any:
    """Return a config with the first blocks alone."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    depth = text.num_hidden_layers
    for key, value in vars(text).items():
        if isinstance(value, list) and len(value) == depth:
            setattr(text, key, value[:blocks])
    text.num_hidden_layers = min(blocks, depth)
    return config


def _new(config: Any) -> Any:
    """Return a model of a config with random weights, or without memory in a context of the meta device."""
    kind = architecture.class_of(config)
    make = kind.from_config if hasattr(kind, "from_config") else kind._from_config  # of a class that chooses, or of one
    return make(copy.deepcopy(config), dtype=torch.float32)


def _parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
