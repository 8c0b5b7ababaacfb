"""Select row weights and the flock's alignment on held-out calibration text, at a reference rate.

The reference is the same for every budget, so one selection serves all sizes of a model, and the cache keeps it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nashswarm.calibration.context import CalibrationContext
from nashswarm.games import flock
from nashswarm.methods.bit_allocation.damages import PROBE_TOKENS
from nashswarm.methods.nash_lattice.quantizer import by_block
from nashswarm.methods.nash_lattice.solver import RateGameSolver
from nashswarm.methods.nash_lattice.step_choices import StepChoices
from nashswarm.quant.grid import TILE_ROWS

REFERENCE_BITS = 3.0  # bits per weight


class HeldoutSelection:
    """The choices that a ``solver`` starts every budget from, selected by the held-out KL of a ``context``.

    ``strengths``: candidates for how far measured damages of layers correct predicted ones; those for shrinkage and
    alignment are the solver's ``swarm``.  ``game_key`` and ``curvature_key``: what the cached choices and the cached
    probe of layers depend on.  ``heldout_passes``: evaluations of the model on held-out text so far.
    """

    def __init__(
        self,
        solver: RateGameSolver,
        context: CalibrationContext,
        strengths: Sequence[float],
        game_key: Mapping[str, Any],
        curvature_key: Mapping[str, Any],
    ) -> None:
        self.solver, self.quantizer, self.context, self.strengths = solver, solver.quantizer, context, strengths
        self.game_key, self.curvature_key = game_key, curvature_key
        self.heldout_passes = 0

    def reference_choices(self) -> StepChoices:
        """Solve the game at the reference rate (3 bits per weight), or load it from the cache.

        Every budget starts from these choices.  Where there is nothing to select or to measure, it starts from neutral
        ones.
        """
        if self.quantizer.uniform or not self._any_candidate():
            return self.quantizer.neutral

        def solve() -> dict[str, Tensor]:
            choices = self.solve_at_reference(self.reference_step())
            return choices.with_metrics(heldout_passes=self.heldout_passes).to_cache()

        tensors = self.context.cached("game", {"rules": self.game_key}, solve)
        return StepChoices.from_cache(tensors, [layer.name for layer in self.quantizer.layers])

    def _any_candidate(self) -> bool:
        """Whether some candidate differs from the neutral choices."""
        swarm = self.solver.swarm
        return any((*self.strengths, *(swarm.shrink if swarm else ()), *(swarm.align if swarm else ())))

    def reference_step(self) -> float:
        """Return the base step at which plain rounding takes ``REFERENCE_BITS`` per weight, or a little more."""
        budget = max(REFERENCE_BITS * self.quantizer.bytes_per_bit, 2.0 * self.quantizer.smallest_bytes())
        return self.quantizer.step_of_rounding(int(budget))

    def solve_at_reference(self, base_step: float) -> StepChoices:
        """Choose the strength of measured damages, then shrinkage, then offsets with their alignment.

        Each choice is the candidate of least KL on held-out calibration text at equal bytes.
        """
        choices = self.quantizer.neutral
        ratios: dict[str, float] = {}
        metrics: dict[str, float] = {}
        if max(self.strengths) > 0:
            budget, ratios, metrics = self.probe_layers(base_step)
        else:
            budget = self.quantizer.quantize_at(base_step, choices, 0).packed_bytes
        if ratios:
            candidates = [self.corrected(ratios, strength) for strength in self.strengths]
            choices = self.select_on_heldout(candidates, budget, base_step)
        if self.solver.swarm is not None and max(self.solver.swarm.shrink) > 0:
            candidates = [self.shrunk(choices, strength) for strength in self.solver.swarm.shrink]
            choices = self.select_on_heldout(candidates, budget, base_step)
        model = self.quantizer.quantize_at(base_step, choices, 0)
        costs = self.solver.offset_costs(model, choices)
        unaligned = self.solver.best_response_offsets(costs, base_step, choices, 0.0)
        candidates = [unaligned]
        if self.solver.swarm is not None:
            aligned = [
                self.solver.best_response_offsets(costs, base_step, choices, align) for align in self.solver.swarm.align
            ]
            candidates = [one.with_metrics(flock_moves=one.moved_blocks(unaligned)) for one in aligned]
        return self.select_on_heldout(candidates, budget, base_step).with_metrics(**metrics)

    def select_on_heldout(self, candidates: Sequence[StepChoices], budget: int, base_step: float) -> StepChoices:
        """Return the candidate of least KL on held-out calibration text, as it would be at ``budget`` bytes.

        All candidates are quantized at ``base_step``.  Their KL is brought to equal bytes by the high-rate law: an
        octave of the step is one bit per weight, which divides the KL by 4.
        """
        if len(candidates) == 1:
            return candidates[0]
        scores = []
        for choices in self.quantizer.track(candidates, "selecting on held-out text"):
            model = self.quantizer.quantize_at(base_step, choices, 0)
            octaves = (model.packed_bytes - budget) / self.quantizer.bytes_per_bit
            weights = {name: tensor.dequantize() for name, tensor in model.tensors.items()}
            del model  # its codes are as large as the model
            scores.append(self.context.heldout_kl(weights, None) * 4.0**octaves)
            self.heldout_passes += 1
        return candidates[int(np.argmin(scores))]

    def probe_layers(self, base_step: float) -> tuple[int, dict[str, float], dict[str, float]]:
        """Compress one layer at a time, at ``base_step``, and measure its damage on held-out text.

        Returns the bytes of the whole model at that step, measured over predicted damage by layer, and the correlation
        of their logarithms as a metric.  The measurement is cached for all games that see the same curvature.
        """
        quantizer, neutral = self.quantizer, self.quantizer.neutral

        def measure() -> dict[str, Tensor]:
            model = quantizer.quantize_at(base_step, neutral, 0)
            predicted, measured = [], []
            for layer in quantizer.track(quantizer.layers, "probing layers"):
                tensor = model.tensors[layer.name]
                predicted.append(float(quantizer.damage_by_row(layer, tensor, neutral).double().sum()))
                measured.append(self.context.heldout_kl({layer.name: tensor.dequantize()}, PROBE_TOKENS))
            columns = {"bytes": [model.packed_bytes], "predicted": predicted, "measured": measured}
            return {name: torch.tensor(values, dtype=torch.float64) for name, values in columns.items()}

        # The name "unit" of the base step stays: caches are found by it.
        key = {**self.curvature_key, "unit": base_step, "probe_tokens": PROBE_TOKENS}
        probe = self.context.cached("probe", key, measure)
        self.heldout_passes += len(quantizer.layers)
        logs = np.log(np.maximum([probe["predicted"].numpy(), probe["measured"].numpy()], 1e-12))
        ratios = np.exp(np.clip(logs[1] - logs[0], -5, 5))
        names = [layer.name for layer in quantizer.layers]
        several = len(names) > 2  # of two layers the correlation is 1 or -1
        metrics = {"damage_correlation": float(np.corrcoef(logs)[0, 1])} if several else {}
        return int(probe["bytes"]), dict(zip(names, ratios.tolist(), strict=True)), metrics

    def corrected(self, ratios: Mapping[str, float], strength: float) -> StepChoices:
        """Return neutral choices whose row weights are each layer's damage ratio to the power ``strength``."""
        neutral = self.quantizer.neutral
        weights = {name: torch.full_like(part, ratios[name] ** strength) for name, part in neutral.row_weights.items()}
        return dataclasses.replace(neutral, row_weights=weights).with_metrics(strength=strength)

    def shrunk(self, choices: StepChoices, strength: float) -> StepChoices:
        """Return ``choices`` with every row's log sensitivity moved by ``strength`` to the mean of its flock."""
        quantizer = self.quantizer
        logs = {
            layer.name: (quantizer.curvatures[layer.name].rows * choices.row_weights[layer.name]).clamp(min=1e-30).log()
            for layer in quantizer.layers
        }
        block_means = np.concatenate([by_block(part, mean=True).numpy() for part in logs.values()])
        flock_means = quantizer.split_by_layer(flock.shrink(block_means, self.solver.coupling, 1.0))
        weights = {}
        for name, part in logs.items():
            target = torch.from_numpy(flock_means[name]).float().repeat_interleave(TILE_ROWS)[: len(part)]
            weights[name] = choices.row_weights[name] * (strength * (target - part)).exp()
        return dataclasses.replace(choices, row_weights=weights).with_metrics(flock_shrink=strength)
