"""Tiles of fixed widths that compete for bits."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from jaxtyping import Int

from nashswarm.calibration.context import CalibrationContext
from nashswarm.games import flock
from nashswarm.methods.bit_allocation.baselines import dual_ascent, equal_loss, evolve
from nashswarm.methods.bit_allocation.blocks import PLAYED_WIDTHS, check_divisible, grid_shape, quantize_layers
from nashswarm.methods.bit_allocation.damages import block_damages, report_regret
from nashswarm.methods.bit_allocation.game import by_lot, by_quantiles, solve
from nashswarm.methods.method import Compressed, store_groups
from nashswarm.methods.swarm import Flock
from nashswarm.quant.grid import GRID_WIDTHS, WIDTHS, QuantizedTensor, Scheme
from nashswarm.quant.pack import packed_bytes
from nashswarm.quant.prototype import QUANTILES

BitGame = Literal["equilibrium", "quantiles", "lot", "equal_loss", "dual_ascent", "evolution"]


@dataclasses.dataclass(frozen=True)
class Split:
    """The byte budget of a model with a share ``pruned`` of its blocks removed and the rest at ``bits``."""

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
    """Tiles compete for widths under one price per byte until nobody gains by changing alone; each minds its flock.

    ``bits``: stored bits per parameter of the whole model, everything counted.  ``bit_game``: ``equilibrium``, or what
    the ablations put in its place: ``quantiles`` of importance or ``lot``, bits handed out at random; or the idea of
    another: ``equal_loss`` (BAQ), ``dual_ascent`` (Radio), ``evolution`` (EvoPress).  ``code_game``: each block replies
    with the codes of least damage; otherwise one min-max rounding.  ``split``: a preset's budget instead of ``bits``,
    with at least its share of pruned blocks.  ``coded``: entropy-code the tiles of the budget, so that the file takes
    less.  ``generations`` and ``offspring``: of the evolution.  ``cache``: reuse statistics and baselines of earlier
    runs.
    """

    bits: float | None = 3.0
    bit_widths: Sequence[int] = PLAYED_WIDTHS
    group_size: int = 64
    bit_game: BitGame = "equilibrium"
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
        if self.bit_game not in get_args(BitGame):
            raise ValueError(f"unknown method.bit_game {self.bit_game!r}: choose {', '.join(get_args(BitGame))}")
        if self.generations < 0 or self.offspring < 1:
            raise ValueError("method.generations must not be negative, and method.offspring at least 1")
        if self.swarm is not None and self.swarm.local_reply is not None:
            raise ValueError("method.swarm.local_reply belongs to method=nash_swarm; set it to null")
        if self.bit_game == "quantiles" and len(self.bit_widths) != len(self.quantiles) + 1:
            raise ValueError(f"method.quantiles {self.quantiles} need {len(self.quantiles) + 1} method.bit_widths")
        if self.split is not None and 0 not in self.bit_widths:
            raise ValueError(f"method.split prunes, so method.bit_widths {list(self.bit_widths)} must contain 0")
        if tuple(self.bit_widths) != tuple(sorted(set(self.bit_widths) & set(WIDTHS))) or not self.bit_widths:
            known = ", ".join(map(str, WIDTHS))
            raise ValueError(f"method.bit_widths {list(self.bit_widths)} must be ascending widths among {known}")
        if self.coded and max(self.bit_widths) > max(GRID_WIDTHS):
            raise ValueError(f"method.coded is for codes; method.bit_widths {list(self.bit_widths)} stores floats")

    def compress(self, context: CalibrationContext, rng: np.random.Generator) -> Compressed:
        scheme = Scheme(self.group_size, search=self.code_game)
        check_divisible(context.layers, self.group_size)
        budget = self._budget(context, scheme)
        moments = context.moments()
        blocks = block_damages(context, moments, self.bit_widths, scheme, self.code_game)
        weighed = moments if self.code_game else None

        def tensors_at(profile: Int[np.ndarray, " blocks"]) -> dict[str, QuantizedTensor]:
            return quantize_layers(context.layers, blocks.bits(profile), scheme, weighed)

        def measure(profile: Int[np.ndarray, " blocks"]) -> float:
            found = tensors_at(profile)
            return context.heldout_kl({name: tensor.dequantize() for name, tensor in found.items()}, None)

        if self.bit_game != "equilibrium":
            passes = 0
            if self.bit_game == "quantiles":
                profile = by_quantiles(blocks, budget, self.quantiles)
            elif self.bit_game == "equal_loss":
                profile = equal_loss(blocks, budget)
            elif self.bit_game == "dual_ascent":
                profile = dual_ascent(blocks, budget)
            elif self.bit_game == "evolution":
                profile = evolve(blocks, budget, measure, rng, self.generations, self.offspring)
                passes = self.offspring * (self.generations + 1)
            else:
                profile = by_lot(blocks, budget, rng)
            damage, metrics = report_regret(blocks, profile)
            metrics["heldout_passes"] = passes
            return store_groups(blocks.bits(profile), tensors_at(profile), damage, metrics, coded=self.coded)

        pruned = self.split.pruned if self.split else 0.0
        alone = solve(blocks, budget, pruned)
        best, choice, passes = alone, (0.0, 0.0), 0
        if self.swarm is not None:
            coupling = flock.flock(blocks.features, self.swarm.neighbours, self.swarm.graph, rng)
            candidates = list(itertools.product(self.swarm.align, self.swarm.shrink))
            solved = {
                pair: alone if pair == (0.0, 0.0) else solve(blocks, budget, pruned, coupling, *pair)
                for pair in candidates
            }
            if len(candidates) > 1:
                passes = len(candidates)
                scores = {
                    pair: measure(solution.profile)
                    for pair, solution in context.track(list(solved.items()), "choosing the flock")
                }
                choice = min(scores, key=lambda pair: scores[pair])
            else:
                choice = candidates[0]
            best = solved[choice]
        metrics, series = best.report(blocks)
        metrics |= {
            "flock_moves": int((best.profile != alone.profile).sum()),
            "flock_align": choice[0],
            "flock_shrink": choice[1],
            "heldout_passes": passes,
        }
        damage = blocks.damage_by_layer(best.profile)
        return store_groups(
            blocks.bits(best.profile), tensors_at(best.profile), damage, metrics, series, coded=self.coded
        )

    def _budget(self, context: CalibrationContext, scheme: Scheme) -> int:
        """Bytes that the packed layers may take.  Raises ValueError if not even the smallest widths fit."""

        def bytes_at(bits: int) -> int:
            shapes = [grid_shape(layer, scheme) for layer in context.layers]
            return sum(packed_bytes(np.full(rows * columns, bits), scheme) for rows, columns in shapes)

        if self.split is not None:
            share = 1 - self.split.pruned
            return int(share * bytes_at(self.split.bits) + self.split.pruned * bytes_at(0))
        assert self.bits is not None
        budget = int(self.bits * context.parameters / 8) - context.fixed_bytes
        smallest = bytes_at(self.bit_widths[0])
        if budget < smallest:
            least = 8 * (smallest + context.fixed_bytes) / context.parameters
            raise ValueError(
                f"method.bits={self.bits} is below the smallest possible size of this model, "
                f"{least:.3f} bits per parameter with widths {list(self.bit_widths)}; raise method.bits"
            )
        return budget
