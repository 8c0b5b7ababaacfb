"""Settings of the method ``nash_swarm``, and its entry ``NashSwarm.compress``."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np
from torch import Tensor

from nashswarm.calibration.context import CalibrationContext
from nashswarm.kernels.trellis_codes import INT8
from nashswarm.layers import Moments
from nashswarm.methods.method import Compressed, check_budget
from nashswarm.methods.nash_swarm.report import report
from nashswarm.methods.nash_swarm.solver import RateGame
from nashswarm.packed.file_format import PADDING_BYTES
from nashswarm.quant.trellis_arrangement import Grouping

RateRule = Literal["equilibrium", "uniform"]
GradientsAt = Literal["compressed", "full"]
Effort = Literal["quick", "default", "best"]
QUICK_SHARE = 3  # one in so many windows calibrates by quick effort
BEST_FACTOR = 4  # times as many windows calibrate by the best one
FIRST_BITS = 3.0  # of the pass before sensitivities are taken, whatever the budget


@dataclasses.dataclass(frozen=True)
class NashSwarm:
    """Tiles of 64 × 16 weights that choose their rates under one price of a byte; the flock decides who shares a tile.

    ``bits``: stored bits per parameter of the whole model, everything counted; a loaded model holds the same bytes.
    ``rates``: bits per weight that a tile can take, 0 to 7, or 8 for int8.  ``rate_rule``: ``equilibrium``, the game;
    or ``uniform``, the same rate everywhere, as nearly as the budget allows.  ``grouping``: who forms a tile: rows and
    columns of like ``weight``, of like ``features``, neighbours as ``stored``, or ``random`` ones; the last two are
    controls.  ``rotation``: of the rows of a group by a Hadamard matrix.  ``sweeps``: of best replies by all columns,
    at most, after error feedback and after every round of the game; 0 for error feedback alone.  ``rounds``: of the
    game, at most.  ``floor``: share of a layer's mean sensitivity that is added to that of each row.  ``gradients_at``:
    where gradients are taken, at the ``full`` model or, as a control, at one ``compressed`` by a single pass.
    ``effort``: ``quick`` for a single pass of error feedback at the rates that estimates advise, with a third of the
    calibration windows; nobody plays, so there is no certificate.  ``best`` for four times as many windows, where their
    number is left open.  ``cache``: reuse statistics of earlier runs.

    Raises ValueError for a setting without a meaning.
    """

    bits: float = 3.0
    rates: Sequence[int] = (0, 1, 2, 3, 4, 5, 6, 7, 8)
    rate_rule: RateRule = "equilibrium"
    grouping: Grouping = "weight"
    rotation: bool = True
    sweeps: int = 30
    rounds: int = 5
    floor: float = 0.1
    gradients_at: GradientsAt = "full"
    effort: Effort = "default"
    cache: bool = True

    def __post_init__(self) -> None:
        choices = {"rate_rule": RateRule, "grouping": Grouping, "gradients_at": GradientsAt, "effort": Effort}
        for name, known in choices.items():
            if getattr(self, name) not in get_args(known):
                raise ValueError(f"unknown method.{name} {getattr(self, name)!r}: choose {', '.join(get_args(known))}")
        if self.bits is None or not 0 < self.bits < math.inf:
            raise ValueError(f"method.bits={self.bits} must be a positive number")
        if list(self.rates) != sorted(set(self.rates) & set(range(INT8 + 1))) or not self.rates:
            raise ValueError(f"method.rates {list(self.rates)} must be ascending whole numbers from 0 to {INT8}")
        if self.sweeps < 0 or self.rounds < 1 or self.floor < 0:
            raise ValueError("method.sweeps and method.floor must not be negative, and method.rounds at least 1")

    @property
    def windows_factor(self) -> int:
        """How many times as many calibration windows as usual to take, where their number is left open."""
        return BEST_FACTOR if self.effort == "best" else 1

    def compress(self, context: CalibrationContext, rng: np.random.Generator) -> Compressed:
        """Return the model compressed to ``bits`` per parameter, with the certificate of its game.

        Raises ValueError if the model is larger even with every tile at the lowest rate.
        """
        game = self.game(context, rng)
        budget = self.budget(context)
        if self.rate_rule == "uniform":
            solved = game.uniform(budget)
        elif self.effort == "quick":
            solved = game.once(budget)
        else:
            solved = game.solve(budget, self.rounds)
        del game  # its statistics are larger than the model
        return report(solved)

    def game(self, context: CalibrationContext, rng: np.random.Generator) -> RateGame:
        """Return the game before its first move, with the statistics that its damages come from.

        Raises ValueError if the model is larger even with every tile at the lowest rate.
        """
        seed, budget = int(rng.integers(2**31)), self.budget(context)

        def game_on(moments: Mapping[str, Moments]) -> RateGame:
            sweeps = 0 if self.effort == "quick" else self.sweeps
            return RateGame(context, moments, self.rates, self.grouping, self.rotation, sweeps, self.floor, seed)

        smallest = game_on({}).smallest_bytes()
        check_budget(self.bits, budget, smallest, context.parameters, f"every tile at {self.rates[0]} bits")
        if self.gradients_at == "compressed":
            return game_on(moments_after_first_pass(context))
        return game_on(context.zipf_moments(QUICK_SHARE if self.effort == "quick" else 1))

    def first_weights(self, context: CalibrationContext, moments: Mapping[str, Moments]) -> Mapping[str, Tensor]:
        """Return the weights after a single pass of error feedback with these statistics."""
        game = RateGame(context, moments, self.rates, self.grouping, self.rotation, 0, self.floor, 0)
        return game.first_weights(max(self.budget(context), game.smallest_bytes()))

    def budget(self, context: CalibrationContext) -> int:
        """Return the bytes that all layers may take."""
        return int(self.bits * context.parameters / 8) - context.fixed_bytes - PADDING_BYTES


def moments_after_first_pass(context: CalibrationContext) -> Mapping[str, Moments]:
    """Return statistics with gradients of a model that a single pass has compressed.

    The pass has the default settings, whatever the budget, so that all budgets take the same statistics.
    """
    first = NashSwarm(bits=FIRST_BITS)
    return context.moments_after(lambda moments: first.first_weights(context, moments), {"bits": FIRST_BITS})
