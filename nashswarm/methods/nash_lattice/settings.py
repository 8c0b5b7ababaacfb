"""Settings of the method ``nash_lattice``, and its entry ``NashLattice.compress``."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from nashswarm import layers
from nashswarm.calibration.context import CalibrationContext
from nashswarm.calibration.moments_table import MomentsTable
from nashswarm.memory import trim_heap
from nashswarm.methods.bit_allocation import blocks
from nashswarm.methods.method import Compressed, check_budget
from nashswarm.methods.nash_lattice.quantizer import LatticeQuantizer
from nashswarm.methods.nash_lattice.report import report
from nashswarm.methods.nash_lattice.selection import HeldoutSelection
from nashswarm.methods.nash_lattice.solver import RateGameSolver
from nashswarm.methods.swarm import Flock
from nashswarm.quant.curvature import FactoredCurvature, factor_curvature

BitGame = Literal["equilibrium", "uniform"]
CodeGame = Literal["equilibrium", "pass", "rounding"]
Effort = Literal["default", "best"]


@dataclasses.dataclass(frozen=True)
class NashLattice:
    """One price of a bit for the whole model, steps and codes at equilibrium, entropy-coded; the flock informs both.

    ``bits``: stored bits per parameter of the whole model, everything counted.  ``bit_game``: ``equilibrium``, or
    ``uniform``, the same step in every matrix relative to the size of its weights.  ``offsets``: what a block may add
    to its step, in quarter octaves.  ``code_game``: ``equilibrium`` (error feedback, then coordinate descent), one
    ``pass`` of error feedback, or ``rounding``.  ``sweeps``: of coordinate descent, at most.  ``rate_in_codes``: the
    share of a code's length that the code pays for in the descent, 0 to 1.  Below 1 codes and blocks disagree about the
    worth of a bit, and at few bits some blocks then regret every offset.  ``strength``: how far measured damages of
    layers correct predicted ones, 0 to 1.  ``floor``: share of a layer's mean sensitivity that is added to that of each
    row.  ``effort``: by ``best``, held-out calibration text selects among the values of ``strength``, and of ``align``
    and ``shrink`` of the flock, which takes passes of the model for each layer and each value; by ``default`` the first
    of each counts, and no pass is taken where these are 0.  ``cache``: reuse statistics and solved games of earlier
    runs.

    Raises ValueError for a setting without a meaning.
    """

    bits: float = 3.0
    bit_game: BitGame = "equilibrium"
    offsets: Sequence[int] = (-4, -2, -1, 0, 1, 2, 4)
    code_game: CodeGame = "equilibrium"
    sweeps: int = 20
    rate_in_codes: float = 1.0
    strength: Sequence[float] = (0.0, 0.5)
    floor: float = 0.1
    effort: Effort = "default"
    cache: bool = True
    swarm: Flock | None = dataclasses.field(default_factory=lambda: Flock(align=(0.0, 0.25)))

    def __post_init__(self) -> None:
        for name, known in (("bit_game", BitGame), ("code_game", CodeGame), ("effort", Effort)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(f"unknown method.{name} {getattr(self, name)!r}: choose {', '.join(get_args(known))}")
        if self.bits is None or not 0 < self.bits < math.inf:
            raise ValueError(f"method.bits={self.bits} must be a positive number")
        if 0 not in self.offsets or list(self.offsets) != sorted(set(self.offsets)) or max(map(abs, self.offsets)) > 40:
            raise ValueError(f"method.offsets {list(self.offsets)} must be ascending small integers, 0 among them")
        if not self.strength or min(self.strength) < 0 or max(self.strength) > 1:
            raise ValueError(f"method.strength {list(self.strength)} must hold numbers between 0 and 1")
        if self.sweeps < 0 or not 0 <= self.rate_in_codes <= 1:
            raise ValueError("method.sweeps must not be negative and method.rate_in_codes be between 0 and 1")
        if not 0 <= self.floor < math.inf:
            raise ValueError(f"method.floor={self.floor} must not be negative")
        if self.bit_game == "uniform" and self.rate_in_codes:
            raise ValueError("method.rate_in_codes needs a price, which method.bit_game=uniform has not; set it to 0")

    def compress(self, context: CalibrationContext, rng: np.random.Generator) -> Compressed:
        """Return the model compressed to ``bits`` per parameter, with the certificate of its game.

        Raises ValueError if the model is larger even with every code zero.
        """
        budget = int(self.bits * context.parameters / 8) - context.fixed_bytes
        solver = self.solver(context, rng)
        smallest = solver.quantizer.smallest_bytes()
        check_budget(self.bits, budget, smallest, context.parameters, "every code zero")
        choices = self.selection(solver, context).reference_choices()
        return report(solver, solver.solve_for_budget(budget, choices))

    def solver(self, context: CalibrationContext, rng: np.random.Generator) -> RateGameSolver:
        """Return the solver of this game on the layers of ``context``, their curvature factored."""
        flock_seed = int(rng.integers(2**31))
        moments = MomentsTable.of(context.zipf_moments())
        features = blocks.features(context.layers, moments, None) if self._flock else None
        curvatures: dict[str, FactoredCurvature] = {}
        for layer in context.track(context.layers, "factoring"):
            curvature = layers.curvature(layer, moments, self.floor)
            for name in layer.modules:
                del moments[name]  # all moments are as large as the model
            if self._local_reply is not None:
                curvature = curvature.keep_top_correlations(self._local_reply)
            curvatures[layer.name] = factor_curvature(curvature, feedback=self._feedback)
        trim_heap()
        uniform = self.bit_game == "uniform"
        quantizer = LatticeQuantizer(context.layers, curvatures, uniform, self.rate_in_codes, context.track)
        sweeps = self.sweeps if self.code_game == "equilibrium" else 0
        return RateGameSolver(quantizer, self.offsets, sweeps, self._flock, features, flock_seed)

    def selection(self, solver: RateGameSolver, context: CalibrationContext) -> HeldoutSelection:
        """Return the selection of the ``solver``'s first choices, on held-out text where there are several."""
        fields = dataclasses.asdict(self)
        game_key = {name: value for name, value in fields.items() if name not in ("bits", "cache")}
        curvature_key = {"local_reply": self._local_reply, "feedback": self._feedback, "floor": self.floor}
        strengths = self.strength if self.effort == "best" else self.strength[:1]
        return HeldoutSelection(solver, context, strengths, game_key, curvature_key)

    @property
    def _flock(self) -> Flock | None:
        """The flock with the values among which this effort selects."""
        if self.swarm is None or self.effort == "best":
            return self.swarm
        return dataclasses.replace(self.swarm, align=self.swarm.align[:1], shrink=self.swarm.shrink[:1])

    @property
    def _local_reply(self) -> int | None:
        return self.swarm.local_reply if self.swarm else None

    @property
    def _feedback(self) -> bool:
        return self.code_game != "rounding"
