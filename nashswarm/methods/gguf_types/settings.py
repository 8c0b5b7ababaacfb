"""The method ``gguf_types``: damages of types, the game, and tensors rounded into what it gives them."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from nashswarm.calibration.context import CalibrationContext
from nashswarm.errors import require
from nashswarm.layers import Layer, Moments, curvature
from nashswarm.methods.gguf_types.certificate import ALL_TYPES, FLOAT, certificate, fits, sizes
from nashswarm.methods.method import Compressed
from nashswarm.methods.peers.llama_cpp import code_width
from nashswarm.methods.type_game import TypeGame, solve
from nashswarm.models import gguf_architectures, gguf_file
from nashswarm.models.gguf_file import PackedTensor
from nashswarm.quant.curvature import Curvature, factor_curvature
from nashswarm.quant.ggml.packing import pack
from nashswarm.quant.ggml.rounding import round_matrix
from nashswarm.quant.ggml.types import TYPES


@dataclasses.dataclass(frozen=True)
class RoundedTensors:
    """The matrices of a model in their types, the game that chose these, and the damage of each, in nats per token."""

    game: TypeGame
    packed: dict[str, PackedTensor]
    damage: dict[str, float]


@dataclasses.dataclass(frozen=True)
class GgufTypes:
    """The types of least damage for all tensors of a GGUF file, which takes at most ``bits`` per parameter.

    ``bits``: of the whole file without a tokenizer, everything counted.  ``types``: those that tensors choose among;
    F16 is always one of them.  ``sweeps``: of descent over codes, steps and shifts after error feedback.  ``floor``:
    share of a tensor's mean sensitivity that is added to that of each row.  ``cache``: reuse statistics and damages of
    earlier runs.
    """

    library: ClassVar[str] = "llama.cpp"
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

    @property
    def actions(self) -> tuple[str, ...]:
        """The types that tensors choose among, F16 included."""
        return tuple(name for name in ALL_TYPES if name in self.types or name == FLOAT)

    def compress(self, context: CalibrationContext, rng: np.random.Generator) -> Compressed:
        """Solve the game for the budget, and round every tensor into its type.

        Raises MissingPackage without the package ``gguf``, and ValueError for a model that cannot be written as GGUF or
        that is larger even with the smallest types.
        """
        require("method=gguf_types", ["gguf"], "models")
        assert context.calibration is not None
        model, _ = context.calibration
        gguf_architectures.check_writable(model)
        total = int(self.bits * context.parameters / 8)
        rounded = self.round(context, total, other_bytes(model, context.layers, self.actions, None, None))
        packed, weights = rounded.packed, sum(layer.parameters for layer in context.layers)
        stored = sum(tensor.content.nbytes for tensor in packed.values())
        return Compressed(
            packed={name: tensor.content.reshape(-1) for name, tensor in packed.items()},
            weights=_Decoded(packed),
            allocation="".join(f"{name} {tensor.type}\n" for name, tensor in packed.items()),
            code_bits=sum(code_width(packed[layer.name].type) * layer.parameters for layer in context.layers),
            damage=rounded.damage,
            metrics=rounded.game.metrics()
            | {"bits_per_weight_resident": 8 * stored / weights, "damage": sum(rounded.damage.values())},
            float_bits=32,
            foreign=self.library,
            file_bytes=total - rounded.game.room,
        )

    def round(self, context: CalibrationContext, total: int, others: int) -> RoundedTensors:
        """Choose types within a file of ``total`` bytes, of which ``others`` are beside the layers, and round to them.

        Raises ValueError if the smallest types take more.
        """
        size, refused = sizes(context.layers, self.actions)
        if (least := int(size.min(1).sum()) + others) > total:
            raise ValueError(
                f"a GGUF file of {total:,} bytes is too small: with the smallest types that fit its rows this model "
                f"takes {least:,} bytes, {8 * least / context.parameters:.3f} bits per parameter; ask for more"
            )
        moments = context.zipf_moments()
        damage = self._damages(context, moments)
        names = tuple(layer.name for layer in context.layers)
        game = solve(names, self.actions, np.where(refused, damage[:, [-1]], damage), size, total - others)
        packed, damages = {}, {}
        for layer, action in context.track(list(zip(context.layers, game.profile, strict=True)), "rounding"):
            own = curvature(layer, moments, self.floor)
            packed[layer.name] = round_layer(layer, game.types[action], own, self.sweeps)
            error = layer.weight - decode(packed[layer.name])
            damages[layer.name] = float(own.damage_by_row(error).double().sum())
        return RoundedTensors(game, packed, damages)

    def _damages(
        self, context: CalibrationContext, moments: Mapping[str, Moments]
    ) -> Float[np.ndarray, "layers types"]:
        """Return the damage of every layer in every type after error feedback, computed or read from the cache.

        The descent, which takes three times as long, lowers all of them by a similar share.
        """

        def compute() -> dict[str, Tensor]:
            layers = context.track(context.layers, "measuring types")
            rows = [measure_types(layer, self.actions, curvature(layer, moments, self.floor)) for layer in layers]
            return {"damage": torch.tensor(rows)}

        key = {"types": list(self.actions), "floor": self.floor}
        return context.cached("ggml_damage", key, compute)["damage"].double().numpy()


def measure_types(layer: Layer, types: Sequence[str], own: Curvature) -> list[float]:
    """Return the damage of a layer in each type after error feedback, NaN in one that its rows refuse."""
    factored = factor_curvature(own)

    def values(name: str) -> Float[Tensor, "rows columns"]:
        if name == FLOAT:
            return layer.weight.half().float()
        return round_matrix(TYPES[name], layer.weight, factored, 0).dequantize()

    return [
        float(own.damage_by_row(layer.weight - values(name)).double().sum()) if fits(layer, name) else math.nan
        for name in types
    ]


def round_layer(layer: Layer, name: str, own: Curvature, sweeps: int) -> PackedTensor:
    """Round a layer into a type and pack it."""
    if name == FLOAT:
        return PackedTensor(FLOAT, layer.weight.half().numpy().view(np.uint8))
    return PackedTensor(name, pack(round_matrix(TYPES[name], layer.weight, factor_curvature(own), sweeps)))


def decode(tensor: PackedTensor) -> Float[Tensor, "rows columns"]:
    """Return the weights that packed bytes stand for, as the package ``gguf`` decodes them."""
    import gguf

    kind = gguf.GGMLQuantizationType[tensor.type]
    return torch.from_numpy(np.array(gguf.dequantize(tensor.content, kind), np.float32))


def other_bytes(model: Any, layers: Sequence[Layer], types: tuple[str, ...], tokenizer: Any, name: str | None) -> int:
    """Return the bytes of a file beside the matrices of ``layers``: header, certificate, tokenizer, other tensors."""
    shapes = {layer.name: layer.weight.shape for layer in layers}
    blank = {
        f"{layer}.weight": PackedTensor(FLOAT, np.broadcast_to(np.uint8(0), (rows, 2 * columns)))
        for layer, (rows, columns) in shapes.items()
    }
    zeros = np.zeros((len(shapes), len(types)))
    game = TypeGame(tuple(shapes), types, zeros, zeros.astype(int), 0.0, zeros[:, 0].astype(int))
    size = gguf_file.file_bytes(model, tokenizer, name, blank, certificate(game, model))
    return size - sum(gguf_file.padded(tensor.content.size) for tensor in blank.values())


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
