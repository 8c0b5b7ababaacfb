"""The method ``compressed_tensors``: matrices choose widths and groups of the format of compressed-tensors."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from nashswarm.calibration.context import CalibrationContext
from nashswarm.errors import require
from nashswarm.layers import Layer, Moments, curvature
from nashswarm.methods.method import Compressed
from nashswarm.methods.type_game import TypeGame, solve
from nashswarm.models import compressed_tensors_folder as folders
from nashswarm.quant.curvature import factor_curvature
from nashswarm.quant.signed_groups import SignedGroups, round_signed

FLOAT = "float16"
TYPES = ("int4-g128", "int4-g64", "int4-g32", "int8-g128", "int8-g64", "int8-g32", FLOAT)
GAME = "game.json"


@dataclasses.dataclass(frozen=True)
class RoundedMatrices:
    """Matrices in their types, None in 16-bit floats, the game that chose these, and damages in nats per token."""

    game: TypeGame
    packed: dict[str, SignedGroups | None]
    damage: dict[str, float]


@dataclasses.dataclass(frozen=True)
class CompressedTensors:
    """The widths and groups of least damage for the matrices of a model, which takes at most ``bits`` per parameter.

    ``bits``: of weights and config, everything counted.  ``types``: those that matrices choose among, ``intB-gN`` for
    B bits and a scale for N columns; 16-bit floats are always one of them.  vLLM reads 4 and 8 bits, transformers 2 to
    8.  ``sweeps``: of coordinate descent over the codes after error feedback.  ``floor``: share of a matrix's mean
    sensitivity that is added to that of each row.  ``cache``: reuse statistics and damages of earlier runs.
    """

    library: ClassVar[str] = folders.PACKAGE
    bits: float = 8.0
    types: Sequence[str] = TYPES
    sweeps: int = 3
    floor: float = 0.1
    cache: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.bits < math.inf:
            raise ValueError(f"method.bits={self.bits} must be a positive number")
        for name in self.types:
            if name != FLOAT:
                try:
                    folders.parse_scheme(name)
                except ValueError as error:
                    raise ValueError(f"method.types: {error}, or {FLOAT}") from error
        if self.sweeps < 0 or self.floor < 0:
            raise ValueError("method.sweeps and method.floor must not be negative")

    @property
    def actions(self) -> tuple[str, ...]:
        """The types that matrices choose among, 16-bit floats as the last one."""
        return (*dict.fromkeys(name for name in self.types if name != FLOAT), FLOAT)

    def compress(self, context: CalibrationContext, rng: np.random.Generator) -> Compressed:
        """Solve the game for the budget, and round every matrix into its type.

        Raises MissingPackage without the package ``compressed-tensors``, and ValueError for a model that cannot be
        written in its format or that is larger even with the smallest types.
        """
        require("method=compressed_tensors", ["compressed-tensors"], "vllm")
        assert context.calibration is not None
        total = int(self.bits * context.parameters / 8)
        rounded = self.round(context, total, self.other_bytes(context))
        weights = {layer.name: layer.weight.half().float() for layer in context.layers}
        packed: dict[str, Any] = {
            name: weight.half().numpy().view(np.uint8).reshape(-1) for name, weight in weights.items()
        }
        chosen = {name: matrix for name, matrix in rounded.packed.items() if matrix is not None}
        for name, matrix in chosen.items():
            weights[name] = matrix.dequantize()
            packed[name] = np.zeros(matrix.codes.numel() * matrix.bits // 8 + 2 * matrix.scale.numel(), np.uint8)
        size = sum(content.nbytes for content in packed.values())
        widths = {layer.name: chosen[layer.name].bits if layer.name in chosen else 16 for layer in context.layers}
        parameters = sum(layer.parameters for layer in context.layers)
        return Compressed(
            packed=packed,
            weights=weights,
            allocation="".join(f"{name} {kind}\n" for name, kind in named(rounded.packed).items()),
            code_bits=sum(widths[layer.name] * layer.parameters for layer in context.layers),
            damage=rounded.damage,
            metrics=rounded.game.metrics()
            | {"bits_per_weight_resident": 8 * size / parameters, "damage": sum(rounded.damage.values())},
            float_bits=16,
            foreign=self.library,
            file_bytes=total - rounded.game.room,
        )

    def other_bytes(self, context: CalibrationContext) -> int:
        """Return the bytes of a model beside the matrices that can be packed.

        Raises ValueError for a model that has none.
        """
        assert context.calibration is not None
        model, _ = context.calibration
        layers = [layer for together in folders.products(model, context.layers) for layer in together]
        return folders.other_bytes(model, layers, self.actions[:-1])

    def round(self, context: CalibrationContext, total: int, others: int) -> RoundedMatrices:
        """Choose types within ``total`` bytes, of which ``others`` are beside the matrices, and round to them.

        Raises ValueError if the smallest types take more.
        """
        assert context.calibration is not None
        players = folders.products(context.calibration[0], context.layers)
        size = sizes([[_shape(layer.weight) for layer in player] for player in players], self.actions)
        if (least := int(size.min(1).sum()) + others) > total:
            raise ValueError(
                f"{total:,} bytes are too few: with the smallest types that fit its rows this model takes {least:,} "
                f"bytes, {8 * least / context.parameters:.3f} bits per parameter, since embedding and head stay in "
                "16-bit floats; ask for more"
            )
        moments = context.zipf_moments()
        damage = self._damages(context, players, moments)
        damage = np.where(np.isnan(damage), damage[:, [-1]], damage)
        names = tuple("+".join(layer.name for layer in player) for player in players)
        game = solve(names, self.actions, damage, size, total - others)
        packed: dict[str, SignedGroups | None] = {}
        damages = {}
        for player, action in context.track(list(zip(players, game.profile, strict=True)), "rounding"):
            for layer in player:
                matrix, damages[layer.name] = self._rounded(layer, self.actions[action], moments, self.sweeps)
                packed[layer.name] = matrix
        return RoundedMatrices(game, packed, damages)

    def _damages(
        self, context: CalibrationContext, players: Sequence[Sequence[Layer]], moments: Mapping[str, Moments]
    ) -> Float[np.ndarray, "players types"]:
        """Return the damage of every player in every type after error feedback, NaN where rows refuse the type."""

        def damage(player: Sequence[Layer], name: str) -> float:
            if not all(fits(layer.weight.shape[1], name) for layer in player):
                return math.nan
            return sum(self._rounded(layer, name, moments, 0)[1] for layer in player)

        def compute() -> dict[str, Tensor]:
            tracked = context.track(players, "measuring types")
            return {"damage": torch.tensor([[damage(player, name) for name in self.actions] for player in tracked])}

        key = {"types": list(self.actions), "floor": self.floor}
        return context.cached("signed_groups_damage", key, compute)["damage"].double().numpy()

    def _rounded(
        self, layer: Layer, name: str, moments: Mapping[str, Moments], sweeps: int
    ) -> tuple[SignedGroups | None, float]:
        """Return a matrix in a type, None in 16-bit floats, and its damage."""
        own = curvature(layer, moments, self.floor)
        matrix, stored = None, layer.weight.half().float()
        if name != FLOAT:
            matrix = round_signed(layer.weight, *folders.parse_scheme(name), factor_curvature(own), sweeps)
            stored = matrix.dequantize()
        return matrix, float(own.damage_by_row(layer.weight - stored).double().sum())


def fits(columns: int, name: str) -> bool:
    """Whether rows of so many columns are whole groups of a type."""
    return name == FLOAT or columns % folders.parse_scheme(name)[1] == 0


def sizes(shapes: Sequence[Sequence[tuple[int, int]]], types: Sequence[str]) -> Int[np.ndarray, "players types"]:
    """Return the bytes of every player in every type; those of 16-bit floats where rows refuse the type."""

    def size(player: Sequence[tuple[int, int]], name: str) -> int:
        scheme = name if name != FLOAT and all(fits(columns, name) for _, columns in player) else None
        return sum(folders.stored_bytes(rows, columns, scheme) for rows, columns in player)

    return np.array([[size(player, name) for name in types] for player in shapes], np.int64)


def certificate(game: TypeGame) -> bytes:
    """Return the file from which, with the model's files, the regret of every player can be computed again."""
    content = {"price": game.price, "types": game.types, "players": [name.split("+") for name in game.tensors]}
    return (json.dumps(content | {"damage": game.damage.tolist()}) + "\n").encode()


def read_certificate(folder: pathlib.Path) -> TypeGame:
    """Return the game of a folder, with the types that its matrices have.

    Raises ValueError if the folder has none, or if its files are damaged.
    """
    if not (folder / GAME).is_file():
        raise ValueError(
            f"{folder} has no certificate of nashswarm ({GAME}): only folders that nashswarm wrote have one"
        )
    stored = folders.read_schemes(folder)
    try:
        content = json.loads((folder / GAME).read_text())
        types, players = tuple(content["types"]), content["players"]
        chosen = [{stored[name][0] or FLOAT for name in player} for player in players]
        profile = np.array([types.index(kind) for (kind,) in chosen])
        damage = np.array(content["damage"], float).reshape(len(players), len(types))
        size = sizes([[stored[name][1] for name in player] for player in players], types)
        return TypeGame(tuple(map("+".join, players)), types, damage, size, float(content["price"]), profile)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / GAME} does not go with the model beside it, copy the folder again: {error}"
        ) from error


def _shape(weight: Float[Tensor, "rows columns"]) -> tuple[int, int]:
    rows, columns = weight.shape
    return rows, columns


def named(packed: Mapping[str, SignedGroups | None]) -> dict[str, str]:
    """Return the type of each matrix."""
    return {name: FLOAT if matrix is None else folders.scheme_name(matrix) for name, matrix in packed.items()}
