"""Bit allocation among tiles of fixed widths, by the bit game or by one of its baselines."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from nashswarm.calibration.context import CalibrationContext
from nashswarm.methods.bit_allocation.blocks import PLAYED_WIDTHS, check_divisible, grid_shape, quantize_layers
from nashswarm.methods.bit_allocation.damages import block_damages
from nashswarm.methods.bit_allocation.rules import RULES, AllocationProblem
from nashswarm.methods.method import Compressed, check_budget, store_groups
from nashswarm.methods.swarm import Flock
from nashswarm.quant.grid import GRID_WIDTHS, WIDTHS, QuantizedTensor, Scheme
from nashswarm.quant.pack import packed_bytes
from nashswarm.quant.prototype import QUANTILES


@dataclasses.dataclass(frozen=True)
class Split:
    """The bytes of a model with a share ``pruned`` of its blocks removed and the rest at ``bits`` per weight."""

    bits: int
    pruned: float

    def __post_init__(self) -> None:
        if self.bits not in GRID_WIDTHS or not 0 <= self.pruned < 1:
            raise ValueError(
                f"method.split needs bits among {', '.join(map(str, GRID_WIDTHS))} and pruned from 0 to below 1, "
                f"not bits={self.bits} and pruned={self.pruned}"
            )


@dataclasses.dataclass(frozen=True)
class FixedWidth:
    """Tiles that compete for widths under one price per byte until none gains by changing alone.

    ``bits``: stored bits per parameter of the whole model, everything counted.  ``bit_widths``: widths that a tile can
    take.  ``bit_game``: the allocation rule: ``equilibrium``; or a baseline without a game, ``quantiles`` of importance
    or ``lot`` (at random); or a published rule, ``equal_loss`` (BAQ), ``dual_ascent`` (Radio) or ``evolution``
    (EvoPress).  ``code_game``: codes by error feedback, which lowers the damage; otherwise min-max rounding.
    ``split``: the bytes of a preset instead of ``bits``, with at least its share of pruned blocks.  ``coded``:
    entropy-code the tiles of the budget, so that the file takes less.  ``generations`` and ``offspring``: of the
    evolution.  ``cache``: reuse statistics and baselines of earlier runs.  ``swarm``: the flock whose neighbours each
    block minds; None without.
    """

    bits: float | None = 3.0
    bit_widths: Sequence[int] = PLAYED_WIDTHS
    group_size: int = 64
    bit_game: str = "equilibrium"
    quantiles: Sequence[float] = QUANTILES
    code_game: bool = True
    coded: bool = False
    split: Split | None = None
    generations: int = 20
    offspring: int = 8
    cache: bool = True
    swarm: Flock | None = dataclasses.field(default_factory=Flock)

    def __post_init__(self) -> None:
        if (self.bits is None) == (self.split is None):
            raise ValueError("give either method.bits or method.split: one of them must be null")
        if self.bits is not None and not math.isfinite(self.bits):
            raise ValueError(f"method.bits={self.bits} must be a finite number")
        if self.bit_game not in RULES:
            raise ValueError(f"unknown method.bit_game {self.bit_game!r}: choose {', '.join(RULES)}")
        if self.generations < 0 or self.offspring < 1:
            raise ValueError("method.generations must not be negative, and method.offspring at least 1")
        if self.swarm is not None and self.swarm.local_reply is not None:
            raise ValueError("method.swarm.local_reply belongs to method=nash_lattice; set it to null")
        if self.bit_game == "quantiles" and len(self.bit_widths) != len(self.quantiles) + 1:
            raise ValueError(f"method.quantiles {self.quantiles} need {len(self.quantiles) + 1} method.bit_widths")
        if self.split is not None and 0 not in self.bit_widths:
            raise ValueError(f"method.split prunes, so method.bit_widths {list(self.bit_widths)} must contain 0")
        if tuple(self.bit_widths) != tuple(sorted(set(self.bit_widths) & set(WIDTHS))) or not self.bit_widths:
            known = ", ".join(map(str, WIDTHS))
            raise ValueError(f"method.bit_widths {list(self.bit_widths)} must be ascending widths among {known}")
        if self.coded and max(self.bit_widths) > max(GRID_WIDTHS):
            raise ValueError(
                f"method.coded compresses codes and method.bit_widths {list(self.bit_widths)} stores floats; "
                "set it to false"
            )

    def compress(self, context: CalibrationContext, rng: np.random.Generator) -> Compressed:
        """Measure what each width costs each block, allocate the budget by ``bit_game``, and quantize.

        Raises ValueError if ``group_size`` does not divide the columns of a layer, or if the smallest widths exceed the
        budget.
        """
        scheme = Scheme(self.group_size, search=self.code_game)
        check_divisible(context.layers, self.group_size)
        budget = self._budget(context, scheme)
        moments = context.moments()
        blocks = block_damages(context, moments, self.bit_widths, scheme, self.code_game)

        def quantize_at(profile: Int[np.ndarray, " blocks"]) -> dict[str, QuantizedTensor]:
            return quantize_layers(context.layers, blocks.bits(profile), scheme, moments if self.code_game else None)

        def heldout_kl(profile: Int[np.ndarray, " blocks"]) -> float:
            return context.heldout_kl(
                {name: tensor.dequantize() for name, tensor in quantize_at(profile).items()}, None
            )

        problem = AllocationProblem(
            blocks, budget, heldout_kl,
            pruned=self.split.pruned if self.split else 0.0, swarm=self.swarm, quantiles=self.quantiles,
            generations=self.generations, offspring=self.offspring, track=context.track,
        )  # fmt: skip
        result = RULES[self.bit_game](problem, rng)
        return store_groups(
            blocks.bits(result.profile),
            quantize_at(result.profile),
            blocks.damage_by_layer(result.profile),
            result.metrics,
            result.series,
            coded=self.coded,
        )

    def _budget(self, context: CalibrationContext, scheme: Scheme) -> int:
        """Return the bytes that the packed layers may take.  Raises ValueError if not even the smallest widths fit."""

        def layer_bytes(bits: int) -> int:
            shapes = [grid_shape(layer, scheme) for layer in context.layers]
            return sum(packed_bytes(np.full(rows * columns, bits), scheme) for rows, columns in shapes)

        if self.split is not None:
            unpruned = 1 - self.split.pruned
            return int(unpruned * layer_bytes(self.split.bits) + self.split.pruned * layer_bytes(0))
        assert self.bits is not None
        budget = int(self.bits * context.parameters / 8) - context.fixed_bytes
        smallest = layer_bytes(self.bit_widths[0])
        check_budget(self.bits, budget, smallest, context.parameters, f"widths {list(self.bit_widths)}")
        return budget
