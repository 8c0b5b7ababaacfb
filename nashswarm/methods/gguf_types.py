"""GGUF files whose tensors choose their types of ggml under one price of a byte.

Tensors are players, their actions the types that llama.cpp reads and that divide their rows into blocks.  A tensor pays
its damage, measured with its own rounding into each type, and its bytes times the price.  Tensors do not interact in
the second-order damage, so the least damage within a budget is a multiple-choice knapsack problem, and what all tensors
together could gain is at most the sum of their regrets at the price (Everett 1963).
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from nashswarm.calibration.context import CalibrationContext
from nashswarm.errors import require
from nashswarm.games import optima
from nashswarm.games.potential import Game
from nashswarm.layers import Layer, Moments, curvature
from nashswarm.methods.method import Compressed
from nashswarm.methods.peers.llama_cpp import code_width
from nashswarm.models import gguf_architectures, gguf_file
from nashswarm.models.gguf_file import PackedTensor
from nashswarm.quant.curvature import Curvature, factor_curvature
from nashswarm.quant.ggml.packing import pack
from nashswarm.quant.ggml.rounding import round_matrix
from nashswarm.quant.ggml.types import TYPES

FLOAT = "F16"
ALL_TYPES = (*TYPES, FLOAT)
GAP = 1e-6  # of the integer programme, relative


@dataclasses.dataclass(frozen=True)
class TypeGame:
    """The game of the tensors of a model, and its solution.

    ``damage`` in nats per token and ``size`` in bytes, by tensor and type; a type that refuses the rows of a tensor has
    the numbers of F16, to which it falls back.  ``price`` in nats per byte; ``profile`` is the type of each tensor,
    and ``room`` the bytes of the budget that are left.
    """

    tensors: tuple[str, ...]
    types: tuple[str, ...]
    damage: Float[np.ndarray, "tensors types"]
    size: Int[np.ndarray, "tensors types"]
    price: float
    profile: Int[np.ndarray, " tensors"]
    room: int

    def regret(self) -> Float[np.ndarray, " tensors"]:
        """Return what each tensor would gain by its best type at the price, in nats per token."""
        return Game(self.damage + self.price * self.size).regret(self.profile)


@dataclasses.dataclass(frozen=True)
class GgufTypes:
    """The types of least damage for all tensors of a GGUF file, which takes at most ``bits`` per parameter.

    ``bits``: of the whole file without a tokenizer, everything counted.  ``types``: those that tensors choose among;
    F16 is always among them.  ``sweeps``: of descent over codes, steps and shifts after error feedback.  ``floor``:
    share of a tensor's mean sensitivity that is added to that of each row.  ``cache``: reuse statistics and damages of
    earlier runs.
    """

    bits: float = 4.5
    types: Sequence[str] = ALL_TYPES
    sweeps: int = 3
    floor: float = 0.1
    cache: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.bits < math.inf:
            raise ValueError(f"method.bits={self.bits} must be a positive number")
        if unknown := [name for name in self.types if name not in ALL_TYPES]:
            raise ValueError(f"unknown method.types {', '.join(unknown)}: choose among {', '.join(ALL_TYPES)}")
        if self.sweeps < 0 or self.floor < 0:
            raise ValueError("method.sweeps and method.floor must not be negative")

    def compress(self, context: CalibrationContext, rng: np.random.Generator) -> Compressed:
        """Solve the game for the budget, and round every tensor into its type.

        Raises MissingPackage without the package ``gguf``, and ValueError for a model that cannot be written as GGUF or
        that is larger even with the smallest types.
        """
        model = writable_model(context)
        budget = int(self.bits * context.parameters / 8)
        rounded = self.round(context, budget - other_bytes(model, context.layers, self.types, None, None))
        packed, game = rounded.packed, rounded.game
        weights = sum(layer.parameters for layer in context.layers)
        stored = sum(tensor.content.nbytes for tensor in packed.values())
        regret = game.regret()
        return Compressed(
            packed={name: tensor.content.reshape(-1) for name, tensor in packed.items()},
            weights=_Decoded(packed),
            allocation="".join(f"{name} {tensor.type}\n" for name, tensor in packed.items()),
            code_bits=sum(code_width(packed[layer.name].type) * layer.parameters for layer in context.layers),
            damage=rounded.damage,
            metrics={
                "bits_per_weight_resident": 8 * stored / weights,
                "players": len(packed),
                "price": game.price,
                "damage": sum(rounded.damage.values()),
                "regret_max": float(regret.max()),
                "regret_sum": float(regret.sum()),
            },
            float_bits=32,
            foreign="llama.cpp",
            file_bytes=budget - game.room,
        )

    def round(self, context: CalibrationContext, budget: int) -> "RoundedTensors":
        """Solve the game for a ``budget`` of bytes of all tensors of the layers, and round them into their types."""
        moments = self._moments(context)
        game = solve(context.layers, self._damages(context, moments), self._all_types(), budget)
        packed, damage = {}, {}
        for layer, action in context.track(list(zip(context.layers, game.profile, strict=True)), "rounding"):
            own = curvature(layer, moments, self.floor)
            name = game.types[action] if fits(layer, game.types[action]) else FLOAT
            packed[layer.name] = round_layer(layer, name, own, self.sweeps)
            error = layer.weight - decode(packed[layer.name])
            damage[layer.name] = float(own.damage_by_row(error).double().sum())
        return RoundedTensors(game, packed, damage)

    def _all_types(self) -> tuple[str, ...]:
        return tuple(name for name in ALL_TYPES if name in self.types or name == FLOAT)

    def _moments(self, context: CalibrationContext) -> Mapping[str, Moments]:
        assert context.moments_after is not None
        return context.moments_after({"weights": "full"}, None)

    def _damages(
        self, context: CalibrationContext, moments: Mapping[str, Moments]
    ) -> Float[np.ndarray, "layers types"]:
        """Return the damage of every layer in every type after error feedback, or read it from the cache.

        The descent lowers all of them by a similar share, for three times the time.
        """
        types = self._all_types()

        def compute() -> dict[str, Tensor]:
            rows = [
                measure_types(layer, types, curvature(layer, moments, self.floor))
                for layer in context.track(context.layers, "measuring types")
            ]
            return {"damage": torch.tensor(rows, dtype=torch.float32)}

        return context.cached("ggml_damage", {"types": types, "floor": self.floor}, compute)["damage"].double().numpy()


@dataclasses.dataclass(frozen=True)
class RoundedTensors:
    """The matrices of a model in their types, the game that chose these, and the damage of each, in nats per token."""

    game: TypeGame
    packed: dict[str, PackedTensor]
    damage: dict[str, float]


def writable_model(context: CalibrationContext) -> Any:
    """Return the model of a context.

    Raises MissingPackage without the package ``gguf``, ValueError if the model cannot be written as GGUF.
    """
    require("method=gguf_types", ["gguf"], "models")
    assert context.calibration is not None
    model, _ = context.calibration
    gguf_architectures.check_writable(model)
    return model


def solve(
    layers: Sequence[Layer], damage: Float[np.ndarray, "layers types"], types: Sequence[str], budget: int
) -> TypeGame:
    """Return the types of least damage within a ``budget`` of bytes, and the price at which they are compared.

    ``damage`` is NaN where a type refuses the rows of a layer.  Raises ValueError if the smallest types take more.
    """
    size = np.array([[tensor_bytes(layer, name) for name in types] for layer in layers])
    refused, fallback = np.isnan(damage), list(types).index(FLOAT)
    damage = np.where(refused, damage[:, [fallback]], damage)
    size = np.where(refused, size[:, [fallback]], size)
    if (smallest := int(size.min(1).sum())) > budget:
        raise ValueError(f"{smallest}")
    _, price = optima.dual_bound(damage, size, budget)
    profile = optima.integer_programme(damage, size, budget, GAP)
    profile = np.where(np.take_along_axis(refused, profile[:, None], 1)[:, 0], fallback, profile)
    room = budget - int(optima.total(size, profile))
    return TypeGame(tuple(layer.name for layer in layers), tuple(types), damage, size, price, profile, room)


def fits(layer: Layer, name: str) -> bool:
    """Whether the rows of a layer are whole blocks of a type."""
    return name == FLOAT or TYPES[name].fits(layer.weight.shape[1])


def tensor_bytes(layer: Layer, name: str) -> int:
    """Return the bytes of a layer in a type that it fits, padded as in the file."""
    rows, columns = layer.weight.shape
    return gguf_file.padded(rows * (2 * columns if name == FLOAT else TYPES[name].row_bytes(columns)))


def measure_types(layer: Layer, types: Sequence[str], own: Curvature) -> list[float]:
    """Return the damage of a layer in each type after error feedback, NaN where it does not fit."""
    factored = factor_curvature(own)
    damages = []
    for name in types:
        if not fits(layer, name):
            damages.append(math.nan)
            continue
        values = (
            layer.weight.half().float()
            if name == FLOAT
            else round_matrix(TYPES[name], layer.weight, factored, 0).dequantize()
        )
        damages.append(float(own.damage_by_row(layer.weight - values).double().sum()))
    return damages


def round_layer(layer: Layer, name: str, own: Curvature, sweeps: int) -> PackedTensor:
    """Round a layer into a type and pack it."""
    if name == FLOAT:
        return PackedTensor(FLOAT, layer.weight.half().numpy().view(np.uint8))
    matrix = round_matrix(TYPES[name], layer.weight, factor_curvature(own), sweeps)
    return PackedTensor(name, pack(matrix))


def decode(tensor: PackedTensor) -> Float[Tensor, "rows columns"]:
    """Return the weights that packed bytes stand for, as the package ``gguf`` decodes them."""
    import gguf

    kind = gguf.GGMLQuantizationType[tensor.type]
    return torch.from_numpy(np.array(gguf.dequantize(tensor.content, kind), np.float32))


def other_bytes(model: Any, layers: Sequence[Layer], types: Sequence[str], tokenizer: Any, name: str | None) -> int:
    """Return the bytes of a file beside the matrices of ``layers``: header, certificate, tokenizer, other tensors."""
    shapes = {layer.name: layer.weight.shape for layer in layers}
    blank = {
        f"{layer}.weight": PackedTensor(FLOAT, np.broadcast_to(np.uint8(0), (rows, 2 * columns)))
        for layer, (rows, columns) in shapes.items()
    }
    zeros = np.zeros((len(shapes), len(types)))
    game = TypeGame(tuple(shapes), tuple(types), zeros, zeros.astype(int), 0.0, np.zeros(len(shapes), int), 0)
    size = gguf_file.file_bytes(model, tokenizer, name, blank, certificate(game, model))
    return size - sum(gguf_file.padded(tensor.content.size) for tensor in blank.values())


def certificate(game: TypeGame, model: Any) -> dict[str, Any]:
    """Return the keys of a file from which the regret of every tensor can be computed again."""
    names = gguf_architectures.layout(model).names
    return {
        "nashswarm.price": game.price,
        "nashswarm.types": list(game.types),
        "nashswarm.tensors": [names[f"{name}.weight"] for name in game.tensors],
        "nashswarm.damage": game.damage.astype(np.float32).ravel().tolist(),
    }


class _Decoded(Mapping[str, Tensor]):
    """The weights of packed tensors, decoded when one is asked for: all at a time are as large as the model."""

    def __init__(self, packed: Mapping[str, PackedTensor]) -> None:
        self.packed = packed

    def __getitem__(self, name: str) -> Tensor:
        return decode(self.packed[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.packed)

    def __len__(self) -> int:
        return len(self.packed)
