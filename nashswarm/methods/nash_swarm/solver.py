"""The rate game: blocks choose their steps under one price of a bit, codes reply, an entropy coder stores them.

A player is a block of 16 rows.  Its action is an offset, in quarter octaves, to the step that one price gives it (see
``quant.lattice``); its codes answer by one pass of error feedback.  Block i at offset a costs, in nats per token,
``D_i(a) + λ · bits_i(a)``, both of them true: cross terms of H in full, lengths by the code tables of the whole model.
Where the flock aligns, a block pays λ · ``align`` bytes for every quarter octave between it and a neighbour.

What held-out text has to choose is chosen once, at one reference whatever the budget, and remembered.  A budget is then
met by the unit and best replies of the codes, each of which minds damage and, at the same price, its length: a block
that moves and lets its codes reply pays no more than the one pass it moved for.  At the end unit, code tables and the
sizes of columns stand still, which makes blocks independent of one another but for the flock, and they move until none
gains.  The certificate enumerates all actions of all blocks, and codes of all weights, at the end.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import sparse
from torch import Tensor

from nashswarm import layers
from nashswarm.calibration.context import CalibrationContext
from nashswarm.games import flock as swarm
from nashswarm.games.potential import Coupling, Game, best_response
from nashswarm.memory import trim_heap
from nashswarm.methods.bit_allocation import blocks
from nashswarm.methods.bit_allocation.damages import PROBE_TOKENS
from nashswarm.methods.method import Compressed
from nashswarm.methods.nash_swarm.quantizer import (
    BUDGET_TOLERANCE,
    COARSE,
    Blocks,
    Board,
    Offsets,
    Played,
    Stance,
    by_block,
    expected,
)
from nashswarm.methods.swarm import Flock
from nashswarm.packed.tiles import to_tiles
from nashswarm.quant.curvature import FactoredCurvature, factor_curvature
from nashswarm.quant.entropy import coded_bits
from nashswarm.quant.lattice import LatticeTensor, bit_price, stack_rows
from nashswarm.quant.lattice_codes import lattice_error_feedback, regret_by_row
from nashswarm.quant.pack import run_lengths

BitGame = Literal["equilibrium", "uniform"]
CodeGame = Literal["equilibrium", "pass", "rounding"]
REFERENCE = 3.0  # bits per weight at which sensitivities are measured, whatever the budget
REGRET = 5e-7  # nats per token: what a block must gain to move once the unit is settled
ROUNDS = 6  # of meeting the budget and moving, at most


@dataclasses.dataclass(frozen=True)
class NashSwarm:
    """One price of a bit for the whole model, steps and codes at equilibrium, entropy-coded; the flock informs both.

    ``bits``: stored bits per parameter of the whole model, everything counted.  ``bit_game``: ``equilibrium``, or in
    its place ``uniform``, the same step in proportion to its weights in every matrix.  ``offsets``: what a block may
    add to its step, in quarter octaves.  ``code_game``: ``equilibrium``, one ``pass`` of error feedback, or
    ``rounding``.  ``sweeps``: of best replies, at most.  ``rate_in_codes``: how much of its length's price a code
    minds in its best replies, 0 to 1; below 1 codes and blocks disagree on what a bit is worth, and at few bits some
    blocks then regret every offset.  ``strength``: how far measured damages of layers correct predicted ones, 0 to 1;
    where several values stand, held-out calibration text chooses.  ``cache``: reuse statistics and solved games of
    earlier runs.
    """

    bits: float = 3.0
    bit_game: BitGame = "equilibrium"
    offsets: Sequence[int] = (-4, -2, -1, 0, 1, 2, 4)
    code_game: CodeGame = "equilibrium"
    sweeps: int = 20
    rate_in_codes: float = 1.0
    strength: Sequence[float] = (0.0, 0.5)
    cache: bool = True
    swarm: Flock | None = dataclasses.field(default_factory=lambda: Flock(align=(0.0, 0.25)))

    def __post_init__(self) -> None:
        for name, known in (("bit_game", BitGame), ("code_game", CodeGame)):
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
        if self.bit_game == "uniform" and self.rate_in_codes:
            raise ValueError("method.rate_in_codes needs a price, which method.bit_game=uniform has not; set it to 0")

    def compress(self, context: CalibrationContext, rng: np.random.Generator) -> Compressed:
        budget = int(self.bits * context.parameters / 8) - context.fixed_bytes
        table = _Table(self, context, rng)
        smallest = table.smallest_bytes()
        if budget < smallest:
            least = 8 * (smallest + context.fixed_bytes) / context.parameters
            raise ValueError(
                f"method.bits={self.bits} is below the smallest possible size of this model, {least:.3f} bits per "
                "parameter with every code zero; raise method.bits"
            )
        return table.report(*table.play_on(budget, table.stance()))


class _Table(Board):
    """The board, the rules, and what the oracle knows: where the game of one model is played."""

    def __init__(self, rules: NashSwarm, context: CalibrationContext, rng: np.random.Generator) -> None:
        self.rules, self.context = rules, context
        self.flock_seed = int(rng.integers(2**31))
        moments = dict(context.moments())
        self.features = blocks.features(context.layers, moments, None) if rules.swarm else None
        local = rules.swarm.local_reply if rules.swarm else None
        feedback = rules.code_game != "rounding"
        self.sight = {"local_reply": local, "feedback": feedback}  # what the curvature that players see depends on
        whitened: dict[str, FactoredCurvature] = {}
        for layer in context.track(context.layers, "factoring"):
            curved = layers.curvature(layer, moments)
            for name in layer.modules:
                del moments[name]  # as large as the model, and told now
            if local is not None:
                curved = curved.keep_top_correlations(local)
            whitened[layer.name] = factor_curvature(curved, feedback=feedback)
        trim_heap()
        super().__init__(context.layers, whitened, rules.bit_game == "uniform", rules.rate_in_codes, context.track)
        self.sweeps = rules.sweeps if rules.code_game == "equilibrium" else 0
        self.passes = 0

    # what is found once

    def stance(self) -> Stance:
        """How the players stand at the ``REFERENCE``, from where every budget starts: solved, or remembered."""
        if self.uniform:
            return self.plain
        rules = {key: value for key, value in dataclasses.asdict(self.rules).items() if key not in ("bits", "cache")}

        def solve() -> dict[str, Tensor]:
            budget = max(REFERENCE * self.slope.at_high_rate, 2.0 * self.smallest_bytes())
            stance = self.solve(self.unit_of_rounding(int(budget)))
            found = stance.found | {"heldout_passes": self.passes}
            told = {f"found/{name}": torch.tensor(float(value)).double() for name, value in found.items()}
            path = {f"path/{name}": torch.tensor(values).double() for name, values in stance.path.items()}
            return stance.tensors() | told | path

        parts = self.context.cached("game", {"rules": rules}, solve)
        names = [layer.name for layer in self.layers]
        return Stance(
            {name: parts[f"weights/{name}"] for name in names},
            {name: parts[f"offsets/{name}"].numpy() for name in names},
            {key.removeprefix("found/"): float(part) for key, part in parts.items() if key.startswith("found/")},
            {key.removeprefix("path/"): part.tolist() for key, part in parts.items() if key.startswith("path/")},
        )

    def solve(self, unit: float) -> Stance:
        """Strength of measured damages, shrinkage, offsets and alignment, one after the other, each chosen by the KL of
        held-out calibration text at equal bytes."""
        stance = self.plain
        flock = self.rules.swarm
        if max(self.rules.strength) > 0:
            budget, ratios, found = self.probe(unit)
        else:
            budget, ratios, found = self.play(unit, stance, 0).bytes, {}, {}
        coupling = self.flock if flock is not None else None

        def weighed(strength: float) -> Stance:
            weights = {
                name: torch.full_like(part, ratios[name] ** strength) for name, part in self.plain.weights.items()
            }
            return dataclasses.replace(self.plain, weights=weights, found=self.plain.found | {"strength": strength})

        def shrunk(strength: float) -> Stance:
            assert coupling is not None
            return dataclasses.replace(
                stance, weights=self.shrink(stance, coupling, strength), found=stance.found | {"flock_shrink": strength}
            )

        if ratios:
            stance = self.choose([weighed(strength) for strength in self.rules.strength], budget, unit)
        if flock is not None and max(flock.shrink) > 0:
            stance = self.choose([shrunk(strength) for strength in flock.shrink], budget, unit)
        played = self.play(unit, stance, 0)
        costs = self.actions(played, stance)
        alone = self.replied(costs, played, stance, 0.0)
        stances = [alone]
        if flock is not None:
            stances = [self.replied(costs, played, stance, align) for align in flock.align]
            stances = [
                dataclasses.replace(found, found=found.found | {"flock_moves": found.moves_from(alone)})
                for found in stances
            ]
        stance = self.choose(stances, budget, unit)
        return dataclasses.replace(stance, found=stance.found | found)

    def play_on(
        self, budget: int, stance: Stance
    ) -> tuple[Stance, Played, Float[np.ndarray, "blocks actions"] | None, dict[str, list[float]]]:
        """The game at the price of the budget: the end, what every offset costs there, and the potential and the
        largest regret of every round, before its moves."""
        rounds: dict[str, list[float]] = {"potential": [], "regret": []}
        unit = self.unit_of_rounding(budget)
        if self.uniform:
            return stance, self.meet(budget, unit, stance, self.sweeps, BUDGET_TOLERANCE), None, rounds
        align = stance.found["flock_align"]
        coarse = self.meet(budget, unit, stance, 0, COARSE)
        stance, unit = self.replied(self.actions(coarse, stance), coarse, stance, align), coarse.unit
        del coarse  # its codes, as those of every round, are as large as the model
        unit = self.meet(budget, unit, stance, 0, BUDGET_TOLERANCE).unit
        while True:
            met = self.meet(budget, unit, stance, self.sweeps, BUDGET_TOLERANCE)
            costs = self.actions(met, stance)
            game, profile, _ = self.game(costs, met, stance, align)
            rounds["potential"].append(game.potential(profile))
            rounds["regret"].append(float(game.regret(profile).max()))
            calm, played, after = self.calm(met, stance, costs)
            if (1 - BUDGET_TOLERANCE) * budget <= played.bytes <= budget:
                return calm, played, after, rounds
            if len(rounds["regret"]) == ROUNDS:
                return stance, met, costs, rounds
            stance = calm
            unit = met.unit * 2.0 ** ((played.bytes - (1 - BUDGET_TOLERANCE / 2) * budget) / self.slope.now)
            del met, played

    def calm(
        self, played: Played, stance: Stance, costs: Float[np.ndarray, "blocks actions"]
    ) -> tuple[Stance, Played, Float[np.ndarray, "blocks actions"]]:
        """Blocks that regret their offset move, while unit, code tables and the sizes of columns stay as they are.
        Their codes reply at the price of those tables, so that nobody pays more than it moved for."""
        for _ in range(ROUNDS):
            game, profile, lowest = self.game(costs, played, stance, stance.found["flock_align"])
            movers = game.regret(profile) > REGRET
            if not movers.any():
                break
            profile = np.where(movers, best_response(game, profile).profile, profile)
            stance = dataclasses.replace(stance, offsets=self.by_layer(profile + lowest))
            played = self.moved(played, stance, movers, self.sweeps)
            costs = costs.copy()
            costs[movers] = self.actions(played, stance, movers)
        return stance, played, costs

    def choose(self, stances: Sequence[Stance], budget: int, unit: float) -> Stance:
        """The stance of least KL on held-out calibration text, as it would be at ``budget`` bytes: all play at
        ``unit``, and as many bytes as an octave of it saves are a factor of 4."""
        if len(stances) == 1:
            return stances[0]
        scores = []
        for stance in self.track(stances, "choosing on held-out text"):
            played = self.play(unit, stance, 0)
            octaves = (played.bytes - budget) / self.slope.at_high_rate
            weights = {name: part.dequantize() for name, part in played.tensors.items()}
            del played  # its codes are as large as the model
            scores.append(self.context.heldout_kl(weights, None) * 4.0**octaves)
            self.passes += 1
        return stances[int(np.argmin(scores))]

    def probe(self, unit: float) -> tuple[int, dict[str, float], dict[str, float]]:
        """Bytes of the model at ``unit``, before anything is chosen; measured over predicted damage of every layer when
        it alone is compressed so, and the correlation of their logarithms.  Measured once for all games that see the
        same curvature."""

        def alone() -> dict[str, Tensor]:
            played = self.play(unit, self.plain, 0)
            predicted, measured = [], []
            for layer in self.track(self.layers, "probing layers"):
                tensor = played.tensors[layer.name]
                predicted.append(float(self.damage(layer, tensor, self.plain).double().sum()))
                measured.append(self.context.heldout_kl({layer.name: tensor.dequantize()}, PROBE_TOKENS))
            found = {"bytes": [played.bytes], "predicted": predicted, "measured": measured}
            return {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}

        found = self.context.cached("probe", self.sight | {"unit": unit, "probe_tokens": PROBE_TOKENS}, alone)
        self.passes += len(self.layers)
        logs = np.log(np.maximum([found["predicted"].numpy(), found["measured"].numpy()], 1e-12))
        ratios = np.exp(np.clip(logs[1] - logs[0], -5, 5))
        names = [layer.name for layer in self.layers]
        several = len(names) > 2  # of two layers the correlation is 1 or -1
        correlation = {"damage_correlation": float(np.corrcoef(logs)[0, 1])} if several else {}
        return int(found["bytes"]), dict(zip(names, ratios.tolist(), strict=True)), correlation

    @functools.cached_property
    def flock(self) -> sparse.csr_array:
        """The coupling of the row blocks."""
        assert self.rules.swarm is not None and self.features is not None
        rng = np.random.default_rng(self.flock_seed)
        return swarm.flock(self.features, self.rules.swarm.neighbours, self.rules.swarm.graph, rng)

    def actions(
        self, played: Played, stance: Stance, movers: Blocks | None = None
    ) -> Float[np.ndarray, "blocks actions"]:
        """What every offset would cost every block (of ``movers``, or of all) that moves alone, in nats per token: code
        tables and the expected sizes of columns stay as they are, and so do the codes of a block that stays."""
        costs = []
        shifts = [shift for shift in self.rules.offsets if shift]
        parts = self.rows(movers)
        own = {layer.name: layer for layer, _ in parts}
        standing = {name: self.lattice(layer, played.unit, stance) for name, layer in own.items()}
        for layer, rows in self.track(parts, "trying offsets"):
            weight, now = layer.weight[rows], played.tensors[layer.name].select_rows(rows)
            by_shift = {0: self.cost(layer, now, played, stance, rows)}
            if shifts:
                lattices = [standing[layer.name].select_rows(rows).shift_row_scales(shift) for shift in shifts]
                ground = self.whitened[layer.name].select_rows(rows)
                ground = dataclasses.replace(ground, rows=ground.rows.repeat(len(shifts)))
                answer = lattice_error_feedback(weight.repeat(len(shifts), 1), ground, stack_rows(lattices))
                for shift, codes, lattice in zip(shifts, answer.codes.split(len(weight)), lattices, strict=True):
                    placed = dataclasses.replace(lattice, column_size=now.lattice.column_size)
                    tensor = expected(LatticeTensor(codes, placed), columns_too=False)
                    by_shift[shift] = self.cost(layer, tensor, played, stance, rows)
            costs.append(torch.stack([by_shift[shift] for shift in self.rules.offsets], 1))
        trim_heap()
        return torch.cat(costs).numpy()

    def game(
        self, costs: Float[np.ndarray, "blocks actions"], played: Played, stance: Stance, align: float
    ) -> tuple[Game, Int[np.ndarray, " blocks"], int]:
        """The bit game at the price of the unit, the present profile, and the offset that is action 0; offsets that a
        block cannot reach from where it stands are dearer than all others."""
        offsets = np.concatenate([stance.offsets[layer.name] for layer in self.layers])
        reached = offsets[:, None] + np.array(self.rules.offsets)
        least = int(reached.min())
        own = np.full((len(costs), int(reached.max()) - least + 1), 10 * costs.max())
        np.put_along_axis(own, reached - least, costs, 1)
        steps = np.arange(own.shape[1])
        apart = 8 * bit_price(played.unit) * align * np.abs(steps[:, None] - steps)
        return Game(own, (Coupling(self.flock, apart),) if align else ()), offsets - least, least

    def replied(
        self, costs: Float[np.ndarray, "blocks actions"], played: Played, stance: Stance, align: float
    ) -> Stance:
        """The stance where best replies end; its path stays that of the first time."""
        game, profile, least = self.game(costs, played, stance, align)
        ended = best_response(game, profile)
        path = stance.path or {"potential": ended.potentials, "regret": ended.regrets}
        offsets = self.by_layer(ended.profile + least)
        return dataclasses.replace(stance, offsets=offsets, found=stance.found | {"flock_align": align}, path=path)

    # the end

    def report(
        self,
        stance: Stance,
        played: Played,
        costs: Float[np.ndarray, "blocks actions"] | None,
        rounds: Mapping[str, list[float]],
    ) -> Compressed:
        """Packed bytes, weights, and the certificate."""
        price = bit_price(played.unit)
        names = [layer.name for layer in self.layers]
        damage = {
            layer.name: float(self.damage(layer, played.tensors[layer.name], self.plain).double().sum())
            for layer in self.layers
        }
        bits = {name: float(coded_bits(part, played.tables).sum()) for name, part in played.tensors.items()}
        resident = sum(to_tiles(tensor).nbytes for tensor in played.tensors.values())
        metrics = {
            "damage": sum(damage.values()),
            "bits_per_weight_resident": 8 * resident / sum(layer.parameters for layer in self.layers),
            "players": sum(self.counts),
            **stance.found,
        }
        if costs is not None:
            metrics |= {"price": 8 * price} | self.certificate(costs, played, stance)
            metrics["potential_start"] = [*rounds["potential"], metrics["potential_end"]][0]
        series = {name: values for name, values in rounds.items() if values}
        series |= {f"{name}_of_reference": values for name, values in stance.path.items()}
        if not self.uniform:
            series["price_of_trial"] = [8 * bit_price(unit) for unit, _ in self.tried]
            series["bytes_of_trial"] = [float(spent) for _, spent in self.tried]
        if played.settled:
            longest = max(len(found.moves) for found in played.settled.values())
            metrics["sweeps"] = longest
            metrics["unsettled"] = sum(bool(found.moves and found.moves[-1]) for found in played.settled.values())
            series["moves"] = [
                float(sum(found.moves[sweep] for found in played.settled.values() if sweep < len(found.moves)))
                for sweep in range(longest)
            ]
        return Compressed(
            packed=played.packed,
            weights={name: played.tensors[name].dequantize() for name in names},
            allocation=_text(stance.offsets, {name: bits[name] / played.tensors[name].codes.numel() for name in names}),
            code_bits=int(sum(bits.values())),
            damage=damage,
            metrics=metrics,
            series=series,
            game={} if costs is None else self.brought(stance),
        )

    def brought(self, stance: Stance) -> dict[str, Tensor]:
        """What the certificate cannot read from the packed bytes: multipliers, offsets and, if it aligns, the flock."""
        parts = stance.tensors()
        if stance.found["flock_align"]:
            links = self.flock.tocoo()
            pairs = torch.from_numpy(np.stack([links.row, links.col]).astype(np.int64))
            parts |= {"flock/pairs": pairs, "flock/weights": torch.from_numpy(links.data)}
        return parts

    def certificate(
        self, costs: Float[np.ndarray, "blocks actions"], played: Played, stance: Stance
    ) -> dict[str, float]:
        """The largest and the mean gain of a block that deviates alone, in nats per token: by another offset, as
        ``costs`` tells, or by other codes for its weights, each alone, their gains added up."""
        game, profile, _ = self.game(costs, played, stance, stance.found["flock_align"])
        steps = game.regret(profile)
        coding = self.coding(played.unit, played.tables)
        by_layer = [
            by_block(regret_by_row(layer.weight, played.tensors[layer.name], self.curvature(layer, stance), coding))
            for layer in self.layers
        ]
        codes = torch.cat(by_layer).numpy()
        worst = np.maximum(steps, codes)
        return {
            "potential_end": game.potential(profile),
            "regret_max": float(worst.max()),
            "regret_mean": float(worst.mean()),
            "regret_of_steps": float(steps.max()),
            "regret_of_codes": float(codes.max()),
        }


def _text(offsets: Offsets, bits: Mapping[str, float]) -> str:
    """One line a layer: its name, bits per weight of its codes, and the run-length coded offsets of its blocks."""
    lines = []
    for name, values in offsets.items():
        runs = " ".join(f"{value:+d}*{length}" for value, length in zip(*run_lengths(values.astype(int)), strict=True))
        lines.append(f"{name} {bits[name]:.3f} {runs}\n")
    return "".join(lines)
