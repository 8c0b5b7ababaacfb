"""The steps of compression at one price: each reads the files of earlier ones, and returns what is to be said of it."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Int
from torch import Tensor

from nashswarm.calibration.moments import bfloat16_products
from nashswarm.calibration.moments_table import MomentsTable
from nashswarm.layers import Layer, Moments
from nashswarm.methods.streaming import compress, tiles
from nashswarm.methods.streaming.block import first_states
from nashswarm.methods.streaming.budget import bytes_for_tiles
from nashswarm.methods.streaming.gradients import check_backward, embedding_backward, for_each_pass, head_backward
from nashswarm.methods.streaming.layout import FLOAT_BITS, tiled_layout
from nashswarm.methods.streaming.moments import block_outputs, counted_rows
from nashswarm.methods.streaming.settings import ByPrice
from nashswarm.methods.streaming.shards import Source
from nashswarm.methods.streaming.skeleton import BLOCK, Unit, structure_of, units, weight_of
from nashswarm.methods.streaming.surroundings import Call, Surroundings
from nashswarm.packed import file_format

OUTER = -1  # the number of what is outside of blocks


@dataclasses.dataclass(frozen=True)
class Run:
    """What all steps read: the checkpoint, the windows, the settings, and the folder of what is passed between them."""

    source: Source
    windows: Int[Tensor, "windows length"]
    settings: ByPrice
    work: pathlib.Path

    @property
    def blocks(self) -> list[Unit]:
        """The units of decoder blocks."""
        return [unit for unit in units(self.source.model) if unit.kind == BLOCK]

    def path(self, kind: str, number: int = OUTER) -> pathlib.Path:
        """Return the file of what is passed on: ``inputs`` or ``gradients`` of block ``number``, for example."""
        return self.work / f".{compress.STATES}-{kind}-{number + 1:05d}.safetensors"

    def write(self, kind: str, tensors: dict[str, Tensor], number: int = OUTER) -> None:
        """Write tensors for later steps."""
        compress.write_tensors(self.path(kind, number), tensors)

    def read(self, kind: str, number: int = OUTER) -> dict[str, Tensor]:
        """Read the tensors of an earlier step.  Raises ValueError if the file is gone."""
        path = self.path(kind, number)
        if not path.is_file():
            raise ValueError(f"{self.work} lacks {path.name}, from which the run resumes; delete it and start again")
        return safetensors.torch.load_file(path)


@torch.no_grad()
def forward(run: Run, number: int) -> dict[str, Any]:
    """Compute the states between blocks: before the first one (``OUTER``), or after block ``number``."""
    if number == OUTER:
        states = first_states(run.source, run.windows)
        run.write("rows", {"rows": states.rows})
        run.write("inputs", {"states": states.hidden}, 0)
        return {}
    unit, block, calls = _open(run, number)
    inputs = run.read("inputs", number)["states"]
    if all(_kind(run, other) != _kind(run, unit) for other in run.blocks[:number]):
        check_backward(block, unit.modules[0], calls[0], inputs[0])
    with bfloat16_products(), counted_rows(block, _names(unit)) as rows:
        outputs = block_outputs(block, calls, inputs)
    run.write("rows-read", {"counts": torch.tensor(list(rows.values()), dtype=torch.int64)}, number)
    run.write("inputs", {"states": outputs}, number + 1)
    return {}


@torch.no_grad()
def backward(run: Run, number: int) -> dict[str, Any]:
    """Compute gradients between blocks, and the energies of tiles: of the head, block ``number``, the embedding."""
    structure = structure_of(run.source.model)
    if number == len(structure.blocks):
        states, weight = run.read("inputs", number)["states"], _outer_weight(run, structure.head)
        seed = run.settings.label_seed
        table, gradients = head_backward(_surroundings(run), structure.head, weight, run.windows, states, seed)
        run.write("gradients", {"gradients": gradients}, number)
        run.write("moments-head", table.tensors())
        return {}
    if number == OUTER:
        gradients = run.read("gradients", 0)["gradients"]
        table = embedding_backward(_surroundings(run), structure.embedding, run.windows, gradients)
        run.write("moments-embedding", table.tensors())
        energies = {}
        for layer in _outer_layers(run):
            (energies[layer.name],) = tiles.energies_of([layer], _outer_moments(run), run.settings)
        run.write("energies", energies)
        return {}
    unit, block, calls = _open(run, number)
    energies = {}

    def weigh(names: Sequence[str], moments: Mapping[str, Moments]) -> None:
        layers = _layers(block, names)
        for name, part in zip(names, tiles.energies_of(layers, moments, run.settings), strict=True):
            energies[f"{unit.modules[0]}.{name}"] = part

    run.write("gradients", {"gradients": _each_pass(run, number, unit, block, calls, weigh)}, number)
    run.write("energies", energies, number)
    return {}


def choose_rates(run: Run, number: int) -> dict[str, Any]:
    """Choose the rates of all tiles at one price, so that the model has at most the bytes that were asked for."""
    energies: dict[str, Tensor] = {}
    for block in [*range(len(run.blocks)), OUTER]:
        energies |= run.read("energies", block)
    model = run.source.model
    names = [name for unit in units(model) for group in unit.matrices for name in group]
    reached = [name for name in names if name in energies]
    left = bytes_for_tiles(model, run.settings, [name for name in names if name not in energies])
    rates, price = tiles.choose_rates([energies[name] for name in reached], left, run.settings.rates)
    run.write("rates", dict(zip(reached, rates, strict=True)))
    return {"price": price}


@torch.no_grad()
def encode_unit(run: Run, number: int) -> dict[str, Any]:
    """Encode the matrices of a unit at their rates, and write its file."""
    unit, rates = units(run.source.model)[number], run.read("rates")
    contents: dict[str, Tensor] = {}
    damages: list[float] = []

    def encode(names: Sequence[str], layers: Sequence[Layer], moments: Mapping[str, Moments]) -> None:
        chosen = [rates[name] for name in names]
        for name, (content, damage) in zip(names, tiles.encoded(layers, moments, chosen, run.settings), strict=True):
            contents[f"{name}.weight"] = content
            damages.append(damage)

    if unit.kind == BLOCK:
        prefix, place = f"{unit.modules[0]}.", run.blocks.index(unit)
        _, block, calls = _open(run, place)

        def use(names: Sequence[str], moments: Mapping[str, Moments]) -> None:
            encode([f"{prefix}{name}" for name in names], _layers(block, names), moments)

        _each_pass(run, place, unit, block, calls, use)
        state = {f"{prefix}{name}": part for name, part in block.state_dict().items()}
    else:
        for layer in _outer_layers(run):
            if layer.name == unit.matrices[0][0]:
                encode([layer.name], [layer], _outer_moments(run))
        state = _surroundings(run).model.state_dict()
    others = {name: state[name] for name in unit.tensors if name not in contents}
    tensors = contents | file_format.to_stored_floats(others, FLOAT_BITS)
    path = run.work / list(tiled_layout(run.source.model, {}))[number]
    compress.write_tensors(path, tensors, as_lines=True)
    return {"damage": sum(damages)}


def forget(run: Run, unit: Unit) -> None:
    """Delete what no later step reads, once the file of a block is written."""
    if unit.kind == BLOCK:
        number = run.blocks.index(unit)
        run.path("inputs", number).unlink(missing_ok=True)
        run.path("gradients", number + 1).unlink(missing_ok=True)


def _open(run: Run, number: int) -> tuple[Unit, Any, list[Call]]:
    """Return the unit of block ``number``, the block with its weights, and what it is called with on each window."""
    surroundings = _surroundings(run)
    calls = [surroundings.call(window, number) for window in run.windows]
    del surroundings
    unit = run.blocks[number]
    return unit, run.source.block(unit.modules[0]), calls


def _each_pass(
    run: Run,
    number: int,
    unit: Unit,
    block: Any,
    calls: Sequence[Call],
    use: Callable[[Sequence[str], Mapping[str, Moments]], None],
) -> Tensor:
    """Let ``use`` see the moments of block ``number``, and return the gradients at its inputs."""
    prefix = f"{unit.modules[0]}."
    groups = [tuple(name.removeprefix(prefix) for name in group) for group in unit.matrices]
    rows = dict(zip(_names(unit), run.read("rows-read", number)["counts"].tolist(), strict=True))
    inputs, gradients = run.read("inputs", number)["states"], run.read("gradients", number + 1)["gradients"]
    return for_each_pass(block, groups, rows, calls, inputs, gradients, use)


def _surroundings(run: Run) -> Surroundings:
    return run.source.surroundings(run.windows.unique(), run.read("rows")["rows"])


def _names(unit: Unit) -> list[str]:
    """Return the names of the matrices in a block."""
    return [name.removeprefix(f"{unit.modules[0]}.") for group in unit.matrices for name in group]


def _kind(run: Run, unit: Unit) -> Any:
    """Return what is alike in blocks that compute alike: their classes and shapes."""
    block = run.source.model.get_submodule(unit.modules[0])
    return [type(module) for module in block.modules()], [part.shape for part in block.parameters()]


def _layers(block: Any, names: Sequence[str]) -> list[Layer]:
    modules = [block.get_submodule(name) for name in names]
    return [
        tiles.as_layer(name, (name,), weight_of(module).contiguous())
        for name, module in zip(names, modules, strict=True)
    ]


def _outer_layers(run: Run) -> list[Layer]:
    """Return embedding and head, one layer if they are tied, with their weights mapped from the checkpoint."""
    structure = structure_of(run.source.model)
    if structure.tied:
        modules = (structure.embedding, structure.head)
        return [tiles.as_layer(structure.embedding, modules, run.source.mapped(f"{structure.embedding}.weight"))]
    names = (structure.embedding, structure.head)
    return [tiles.as_layer(name, (name,), run.source.mapped(f"{name}.weight")) for name in names]


def _outer_weight(run: Run, name: str) -> Tensor:
    """Return the matrix of embedding or head in 32-bit floats."""
    structure = structure_of(run.source.model)
    stored = structure.embedding if structure.tied else name
    return run.source.mapped(f"{stored}.weight").float()


def _outer_moments(run: Run) -> MomentsTable:
    tensors = run.read("moments-head")
    return MomentsTable.from_tensors(tensors | run.read("moments-embedding"))
