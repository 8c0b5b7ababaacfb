"""Solve the rate game: blocks choose their steps under one price of a bit, and codes answer the blocks.

A player is a block of 16 rows.  Its action is an offset, in quarter octaves, from the step that the price gives it (see
``quant.lattice``).  Its codes answer by one pass of error feedback.  Block i at offset a pays
``D_i(a) + λ · bits_i(a)`` nats per token.  Both terms are exact: the damage D has all cross terms of H, and lengths are
those of the code tables of the whole model.  Where the flock aligns, a block also pays λ · ``align`` bytes for every
quarter octave between it and a neighbour.

The budget is met by changing the base step, and coordinate descent lets every code weigh damage against length.  At the
end base step, code tables and expected sizes of columns are frozen.  Blocks then depend on one another only through the
flock, and best responses continue until no block gains.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import sparse

from nashswarm.games.potential import Coupling, Game, best_response
from nashswarm.memory import trim_heap
from nashswarm.methods.nash_lattice.budget import BUDGET_TOLERANCE, COARSE_TOLERANCE, ByteSlope, step_for_budget
from nashswarm.methods.nash_lattice.certificate import regret_metrics
from nashswarm.methods.nash_lattice.quantizer import (
    Blocks,
    LatticeQuantizer,
    QuantizedModel,
    by_block,
    with_fitted_sizes,
)
from nashswarm.methods.nash_lattice.step_choices import StepChoices
from nashswarm.methods.swarm import Flock
from nashswarm.quant.lattice import LatticeTensor, bit_price, stack_rows
from nashswarm.quant.lattice_codes import lattice_error_feedback, regret_by_row

REGRET = 5e-7  # nats per token that a block must gain to move once the base step is frozen
ROUNDS = 6  # at most, of meeting the budget and then moving blocks

Costs = Float[np.ndarray, "blocks actions"]


@dataclasses.dataclass(frozen=True)
class SolvedGame:
    """The end of the game at a budget.

    ``costs``: what each offset would cost each block that deviates alone, in nats per token; None without a price.
    ``rounds``: ``potential`` and largest ``regret``, in nats per token, of every round before its blocks moved.
    """

    choices: StepChoices
    model: QuantizedModel
    costs: Costs | None
    rounds: dict[str, list[float]]


class RateGameSolver:
    """Best responses of a model's blocks, on codes that a ``quantizer`` makes.

    ``offsets``: what a block may add to its step in one move, in quarter octaves.  ``sweeps``: of coordinate descent,
    at most.  ``swarm``: settings of the flock, a graph over the ``features`` of the blocks, drawn with ``flock_seed``;
    None plays without a flock.  ``trials``: base steps tried for a budget so far, and the bytes that they took.
    """

    def __init__(
        self,
        quantizer: LatticeQuantizer,
        offsets: Sequence[int],
        sweeps: int,
        swarm: Flock | None,
        features: Float[np.ndarray, "blocks features"] | None,
        flock_seed: int,
    ) -> None:
        self.quantizer, self.offsets, self.sweeps = quantizer, offsets, sweeps
        self.swarm, self.features, self.flock_seed = swarm, features, flock_seed
        self.slope = ByteSlope(quantizer.bytes_per_bit)
        self.trials: list[tuple[float, int]] = []

    @functools.cached_property
    def coupling(self) -> sparse.csr_array:
        """The flock's weights between blocks."""
        assert self.swarm is not None and self.features is not None
        return self.swarm.coupling(self.features, np.random.default_rng(self.flock_seed))

    # At the budget.

    def solve_for_budget(self, budget: int, choices: StepChoices) -> SolvedGame:
        """Solve the game, from ``choices``, at the base step at which the model takes ``budget`` bytes.

        A move of the blocks changes the size.  Meeting the budget and moving blocks therefore alternate, until the
        moves leave the size within the tolerance, at most ``ROUNDS`` times.
        """
        rounds: dict[str, list[float]] = {"potential": [], "regret": []}
        step = self.quantizer.step_of_rounding(budget)
        if self.quantizer.uniform:
            return SolvedGame(choices, self.quantize_to(budget, step, choices, self.sweeps), None, rounds)
        coarse = self.quantize_to(budget, step, choices, 0, COARSE_TOLERANCE)
        step = coarse.base_step
        choices = self.best_response_offsets(self.offset_costs(coarse, choices), step, choices, choices.align)
        del coarse  # its codes, like those of every round, are as large as the model
        step = self.quantize_to(budget, step, choices, 0).base_step
        while True:
            model = self.quantize_to(budget, step, choices, self.sweeps)
            costs = self.offset_costs(model, choices)
            game, profile, _ = self.offset_game(costs, model.base_step, choices, choices.align)
            rounds["potential"].append(game.potential(profile))
            rounds["regret"].append(float(game.regret(profile).max()))
            end = self.equilibrate_offsets(model, choices, costs)
            if (1 - BUDGET_TOLERANCE) * budget <= end.model.packed_bytes <= budget:
                return dataclasses.replace(end, rounds=rounds)
            if len(rounds["regret"]) == ROUNDS:
                return SolvedGame(choices, model, costs, rounds)
            choices = end.choices
            excess = end.model.packed_bytes - (1 - BUDGET_TOLERANCE / 2) * budget
            step = model.base_step * 2.0 ** (excess / self.slope.latest)
            del model, end

    def quantize_to(
        self, budget: int, first_step: float, choices: StepChoices, sweeps: int, tolerance: float = BUDGET_TOLERANCE
    ) -> QuantizedModel:
        """Return the model at the finest base step found that takes at most ``budget`` bytes, and record the trials."""

        def quantize(base_step: float) -> QuantizedModel:
            model = self.quantizer.quantize_at(base_step, choices, sweeps)
            self.trials.append((base_step, model.packed_bytes))
            return model

        return step_for_budget(quantize, lambda model: model.packed_bytes, budget, first_step, self.slope, tolerance)

    def equilibrate_offsets(self, model: QuantizedModel, choices: StepChoices, costs: Costs) -> SolvedGame:
        """Move blocks that regret their offset until none does, at the base step, tables and column sizes of ``model``.

        The codes of a block that moves go on from error feedback to descent at the price of the same tables, so that
        no block pays more than it moved for.
        """
        for _ in range(ROUNDS):
            game, profile, lowest = self.offset_game(costs, model.base_step, choices, choices.align)
            movers = game.regret(profile) > REGRET
            if not movers.any():
                break
            profile = np.where(movers, best_response(game, profile).profile, profile)
            choices = dataclasses.replace(choices, offsets=self.quantizer.split_by_layer(profile + lowest))
            model = self.quantizer.requantize_blocks(model, choices, movers, self.sweeps)
            costs = costs.copy()
            costs[movers] = self.offset_costs(model, choices, movers)
        return SolvedGame(choices, model, costs, {})

    # The game.

    def offset_costs(self, model: QuantizedModel, choices: StepChoices, blocks: Blocks | None = None) -> Costs:
        """Return what each offset would cost each of ``blocks`` (None: of all) that moves alone, in nats per token.

        Code tables and the expected sizes of columns stay as in ``model``, and so do the codes of a block that stays.
        """
        quantizer, costs = self.quantizer, []
        shifts = [shift for shift in self.offsets if shift]
        row_pieces = quantizer.row_pieces(blocks)
        layers = {layer.name: layer for layer, _ in row_pieces}
        layer_lattices = {name: quantizer.lattice(layer, model.base_step, choices) for name, layer in layers.items()}
        for layer, rows in quantizer.track(row_pieces, "trying offsets"):
            weight, current = layer.weight[rows], model.tensors[layer.name].select_rows(rows)
            cost_by_shift = {0: quantizer.cost_by_block(layer, current, model, choices, rows)}
            if shifts:
                lattices = [layer_lattices[layer.name].select_rows(rows).shift_row_scales(shift) for shift in shifts]
                curvature, weights = quantizer.curvatures[layer.name], weight.repeat(len(shifts), 1)
                stacked = lattice_error_feedback(weights, curvature, stack_rows(lattices))
                for shift, codes, lattice in zip(shifts, stacked.codes.split(len(weight)), lattices, strict=True):
                    lattice = dataclasses.replace(lattice, column_size=current.lattice.column_size)
                    tensor = with_fitted_sizes(LatticeTensor(codes, lattice), columns_too=False)
                    cost_by_shift[shift] = quantizer.cost_by_block(layer, tensor, model, choices, rows)
            costs.append(torch.stack([cost_by_shift[shift] for shift in self.offsets], 1))
        trim_heap()
        return torch.cat(costs).numpy()

    def offset_game(
        self, costs: Costs, base_step: float, choices: StepChoices, align: float
    ) -> tuple[Game, Int[np.ndarray, " blocks"], int]:
        """Return the game over absolute offsets, the present profile, and the offset that is action 0.

        ``costs`` covers the offsets that a block reaches from its present one; all others cost more than any of them.
        Neighbours pay ``align`` bytes, at the price of ``base_step``, for every quarter octave between them.
        """
        offsets = np.concatenate([choices.offsets[layer.name] for layer in self.quantizer.layers])
        reachable = offsets[:, None] + np.array(self.offsets)
        lowest = int(reachable.min())
        own_cost = np.full((len(costs), int(reachable.max()) - lowest + 1), 10 * costs.max())
        np.put_along_axis(own_cost, reachable - lowest, costs, 1)
        steps = np.arange(own_cost.shape[1])
        disagreement = 8 * bit_price(base_step) * align * np.abs(steps[:, None] - steps)
        couplings = (Coupling(self.coupling, disagreement),) if align else ()
        return Game(own_cost, couplings), offsets - lowest, lowest

    def best_response_offsets(self, costs: Costs, base_step: float, choices: StepChoices, align: float) -> StepChoices:
        """Return ``choices`` with the offsets at which best responses end.

        A history that is already there stays: it is the one of the reference rate.
        """
        game, profile, lowest = self.offset_game(costs, base_step, choices, align)
        equilibrium = best_response(game, profile)
        history = choices.history or {"potential": equilibrium.potentials, "regret": equilibrium.regrets}
        offsets = self.quantizer.split_by_layer(equilibrium.profile + lowest)
        return dataclasses.replace(choices, offsets=offsets, history=history).with_metrics(flock_align=align)

    def regret_metrics(self, solved: SolvedGame) -> dict[str, float]:
        """Return the regrets of the solved game by enumeration, in nats per token; see ``certificate``."""
        assert solved.costs is not None
        quantizer, choices, model = self.quantizer, solved.choices, solved.model
        game, profile, _ = self.offset_game(solved.costs, model.base_step, choices, choices.align)
        rate_term = quantizer.rate_term(model)
        code_regrets = []
        for layer in quantizer.layers:
            tensor, curvature = model.tensors[layer.name], quantizer.curvature(layer, choices)
            code_regrets.append(by_block(regret_by_row(layer.weight, tensor, curvature, rate_term)))
        return regret_metrics(game, profile, torch.cat(code_regrets).numpy())
