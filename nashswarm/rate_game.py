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
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeVar, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import sparse
from torch import Tensor

from nashswarm import allocation, swarm
from nashswarm.allocation import Layer
from nashswarm.checkpoint import TABLES
from nashswarm.game import Coupling, Game, best_response
from nashswarm.linear import to_tiles
from nashswarm.methods import PROBE_TOKENS, Compressed, Flock, Oracle
from nashswarm.quant.entropy import CodeTables, coded_bits, count, encode_integers, encode_lattice, tables_of
from nashswarm.quant.grid import TILE_ROWS, row_blocks
from nashswarm.quant.lattice import Lattice, LatticeTensor, Rows, lattice_of, price_at, stack
from nashswarm.quant.pack import run_lengths
from nashswarm.quant.reply import (
    Coding,
    Curvature,
    Settled,
    Whitened,
    lattice_reply,
    lattice_settle,
    pieces,
    regret_by_row,
    whiten,
)

BitGame = Literal["equilibrium", "uniform"]
CodeGame = Literal["equilibrium", "pass", "rounding"]
BUDGET_TOLERANCE = 1e-3
COARSE = 1e-2  # how closely a budget is met before offsets are chosen
REFERENCE = 3.0  # bits per weight at which sensitivities are measured, whatever the budget
REGRET = 5e-7  # nats per token: what a block must gain to move once the unit is settled
FIRST = 3  # sweeps before code tables are fitted again
ROUNDS = 6  # of meeting the budget and moving, at most
TRIALS = 12  # units tried until the budget is met

Found = TypeVar("Found")
Offsets = Mapping[str, Int[np.ndarray, " row_blocks"]]
Weights = Mapping[str, Float[Tensor, " out"]]
Blocks = Bool[np.ndarray, " row_blocks"]
ALL = slice(None)


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

    def compress(self, oracle: Oracle, rng: np.random.Generator) -> Compressed:
        budget = int(self.bits * oracle.parameters / 8) - oracle.fixed_bytes
        table = _Table(self, oracle, rng)
        smallest = table.smallest_bytes()
        if budget < smallest:
            least = 8 * (smallest + oracle.fixed_bytes) / oracle.parameters
            raise ValueError(
                f"method.bits={self.bits} is below the smallest possible size of this model, {least:.3f} bits per "
                "parameter with every code zero; raise method.bits"
            )
        return table.report(*table.play_on(budget, table.stance()))


@dataclasses.dataclass(frozen=True)
class Stance:
    """What the players bring to a budget: the multipliers of their rows' sensitivities, the offsets of their steps, and
    how they were found."""

    weights: Weights
    offsets: Offsets
    found: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Played:
    """All layers at one unit: tensors, the tables that code them, and the sweeps of each layer."""

    unit: float
    tensors: dict[str, LatticeTensor]
    tables: CodeTables
    settled: dict[str, Settled]

    @functools.cached_property
    def packed(self) -> dict[str, np.ndarray]:
        """The stored bytes of every layer, and of the tables."""
        layers = {name: encode_lattice(tensor, self.tables) for name, tensor in self.tensors.items()}
        return layers | {TABLES: self.tables.pack()}

    def fitted(self) -> "Played":
        """The same codes; tables and sizes fitted to them."""
        tensors = {name: _expected(tensor) for name, tensor in self.tensors.items()}
        return dataclasses.replace(self, tensors=tensors, tables=tables_of(count(tensors.values())))

    @property
    def bytes(self) -> int:
        return sum(len(packed) for packed in self.packed.values())


class Slope:
    """How many bytes an octave of the unit saves: a bit a weight at high rate, then what was measured last."""

    def __init__(self, at_high_rate: float) -> None:
        self.at_high_rate = self.now = at_high_rate

    def learn(self, octaves: float, saved: int) -> None:
        if abs(octaves) > 0.01:  # what is nearer tells more of ties than of the slope
            self.now = min(max(saved / octaves, self.at_high_rate / 20), 2 * self.at_high_rate)


class _Table:
    """Where the game of one model is played: its layers, their curvature, and the rules."""

    def __init__(self, rules: NashSwarm, oracle: Oracle, rng: np.random.Generator) -> None:
        self.rules, self.oracle = rules, oracle
        self.flock_seed = int(rng.integers(2**31))
        moments = dict(oracle.moments())
        self.features = allocation.features(oracle.layers, moments, None) if rules.swarm else None
        local = rules.swarm.local_reply if rules.swarm else None
        self.whitened: dict[str, Whitened] = {}
        for layer in oracle.track(oracle.layers, "factoring"):
            curved = allocation.curvature(layer, moments)
            for name in layer.modules:
                del moments[name]  # as large as the model, and told now
            if local is not None:
                curved = curved.neighbourly(local)
            self.whitened[layer.name] = whiten(curved, feedback=rules.code_game != "rounding")
        self.counts = [row_blocks(len(layer.weight)) for layer in oracle.layers]
        self.sweeps = rules.sweeps if rules.code_game == "equilibrium" else 0
        self.passes = 0
        self.slope = Slope(sum(layer.parameters for layer in oracle.layers) / 8)
        self.plain = Stance(
            {layer.name: torch.ones(len(layer.weight)) for layer in oracle.layers},
            {layer.name: np.zeros(count, int) for layer, count in zip(oracle.layers, self.counts, strict=True)},
            {"strength": 0.0, "flock_shrink": 0.0, "flock_align": 0.0, "flock_moves": 0},
        )

    # one layer

    def lattice(self, layer: Layer, unit: float, stance: Stance, shift: int = 0) -> Lattice:
        """The layer's grid at ``unit``, every block at its offset and ``shift`` beyond."""
        ground = self.whitened[layer.name]
        if self.rules.bit_game == "uniform":
            flat = torch.ones(len(layer.weight)), torch.ones(layer.weight.shape[1])
            return lattice_of(layer.weight, unit * float(layer.weight.square().mean().sqrt()), *flat)
        found = lattice_of(layer.weight, unit, ground.rows * stance.weights[layer.name], ground.columns)
        offsets = torch.from_numpy(stance.offsets[layer.name] + shift).repeat_interleave(TILE_ROWS)
        moved = (found.row_scale + offsets[: len(layer.weight)]).clamp(-128, 127).to(torch.int8)
        return dataclasses.replace(found, row_scale=moved)

    def damage(self, layer: Layer, tensor: LatticeTensor, stance: Stance, rows: Rows = ALL) -> Float[Tensor, " out"]:
        """Nats per token of every row, as the players see it."""
        weight, curvature = layer.weight[rows], self.curvature(layer, stance, rows)
        by_piece = [
            curvature.of_rows(piece).damage_by_row(weight[piece] - tensor.of_rows(piece).dequantize())
            for piece in pieces(weight)
        ]
        return torch.cat(by_piece)

    def cost(
        self, layer: Layer, tensor: LatticeTensor, played: Played, stance: Stance, rows: Rows = ALL
    ) -> Float[Tensor, " blocks"]:
        """What every block pays for these codes, in nats per token: damage and bits."""
        paid = price_at(played.unit) * coded_bits(tensor, played.tables)
        return _blocks(self.damage(layer, tensor, stance, rows) + paid)

    # the whole model

    def play(self, unit: float, stance: Stance, sweeps: int) -> Played:
        """Every layer's codes at ``unit``, by one pass and so many ``sweeps``, and the tables that fit them; of codes
        that mind their length, the tables that they paid by, which fit those of the ``FIRST`` sweeps."""
        tensors: dict[str, LatticeTensor] = {}
        for layer in self.oracle.track(self.oracle.layers, "replying"):
            found = lattice_reply(layer.weight, self.whitened[layer.name], self.lattice(layer, unit, stance))
            tensors[layer.name] = _expected(found)
        played = Played(unit, tensors, tables_of(count(tensors.values())), {})
        if not sweeps:
            return played
        if not self.rules.rate_in_codes:
            return self.settle(played, stance, sweeps).fitted()
        return self.settle(self.settle(played, stance, FIRST).fitted(), stance, sweeps)

    def settle(self, played: Played, stance: Stance, sweeps: int) -> Played:
        """So many sweeps of best replies of all codes, at the price of the tables and sizes as they are."""
        coding = self.coding(played.unit, played.tables)
        tensors, settled = {}, {}
        for layer in self.oracle.track(self.oracle.layers, "settling"):
            now, own = played.tensors[layer.name], self.curvature(layer, stance)
            tensors[layer.name], ended = lattice_settle(layer.weight, now, own, coding, sweeps)
            settled[layer.name] = ended.after(played.settled.get(layer.name))
        return Played(played.unit, tensors, played.tables, settled)

    def curvature(self, layer: Layer, stance: Stance, rows: Rows = ALL) -> Curvature:
        """Of these rows, as the players see it."""
        return self.whitened[layer.name].curvature.of_rows(rows).weighed(stance.weights[layer.name][rows])

    def meet(self, budget: int, unit: float, stance: Stance, sweeps: int, tolerance: float) -> Played:
        """The finest unit found whose bytes stay within ``budget``, to ``tolerance``."""

        def trial(unit: float) -> Played:
            return self.play(unit, stance, sweeps)

        return _meet(trial, lambda played: played.bytes, budget, unit, self.slope, tolerance)

    def coding(self, unit: float, tables: CodeTables) -> Coding | None:
        """What codes cost in their own eyes."""
        return Coding(tables, self.rules.rate_in_codes * price_at(unit)) if self.rules.rate_in_codes else None

    def unit_of_rounding(self, budget: int) -> float:
        """The unit at which plain rounding on the lattice would take ``budget`` bytes: where the search begins."""

        def trial(unit: float) -> tuple[float, int]:
            tensors = {}
            for layer in self.oracle.layers:
                lattice = self.lattice(layer, unit, self.plain)
                steps = lattice.row_steps()[:, None] * lattice.column_steps()
                tensors[layer.name] = LatticeTensor((layer.weight / steps).round().int(), lattice)
            return unit, _estimated_bytes(tensors, tables_of(count(tensors.values())))

        first = 2.0**-12 if self.rules.bit_game == "equilibrium" else 2.0**-1
        return _meet(trial, lambda found: found[1], budget, first, Slope(self.slope.at_high_rate), 2 * COARSE)[0]

    def smallest_bytes(self) -> int:
        """Bytes with every code zero."""
        tensors = {}
        for layer in self.oracle.layers:
            zeros = torch.zeros(layer.weight.shape, dtype=torch.int32)
            tensors[layer.name] = _expected(LatticeTensor(zeros, self.lattice(layer, 1.0, self.plain)))
        return _estimated_bytes(tensors, tables_of(count(tensors.values())))

    # what is found once

    def stance(self) -> Stance:
        """How the players stand at the ``REFERENCE``, from where every budget starts: solved, or remembered."""
        if self.rules.bit_game == "uniform":
            return self.plain
        rules = {key: value for key, value in dataclasses.asdict(self.rules).items() if key not in ("bits", "cache")}

        def solve() -> dict[str, Tensor]:
            budget = max(REFERENCE * self.slope.at_high_rate, 2.0 * self.smallest_bytes())
            stance = self.solve(self.unit_of_rounding(int(budget)))
            parts: dict[str, Tensor] = {f"weights/{name}": part for name, part in stance.weights.items()}
            parts |= {f"offsets/{name}": torch.from_numpy(part) for name, part in stance.offsets.items()}
            found = {f"found/{name}": torch.tensor(float(value)).double() for name, value in stance.found.items()}
            return parts | found | {"found/heldout_passes": torch.tensor(float(self.passes)).double()}

        parts = self.oracle.remember("game", {"rules": rules}, solve)
        names = [layer.name for layer in self.oracle.layers]
        return Stance(
            {name: parts[f"weights/{name}"] for name in names},
            {name: parts[f"offsets/{name}"].numpy() for name in names},
            {key.removeprefix("found/"): float(part) for key, part in parts.items() if key.startswith("found/")},
        )

    def solve(self, unit: float) -> Stance:
        """Strength of measured damages, shrinkage, offsets and alignment, one after the other, each chosen by the KL of
        held-out calibration text at equal bytes."""
        stance = self.plain
        played = self.play(unit, stance, 0)
        budget = played.bytes
        ratios, found = self.probe(played) if max(self.rules.strength) > 0 else ({}, {})
        flock = self.rules.swarm
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
                dataclasses.replace(found, found=found.found | {"flock_moves": _moves(found, alone)})
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
        if self.rules.bit_game == "uniform":
            return stance, self.meet(budget, unit, stance, self.sweeps, BUDGET_TOLERANCE), None, rounds
        align = stance.found["flock_align"]
        played = self.meet(budget, unit, stance, 0, COARSE)
        stance = self.replied(self.actions(played, stance), played, stance, align)
        unit = self.meet(budget, played.unit, stance, 0, BUDGET_TOLERANCE).unit
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
            played = self.moved(played, stance, movers)
            costs = costs.copy()
            costs[movers] = self.actions(played, stance, movers)
        return stance, played, costs

    def moved(self, played: Played, stance: Stance, movers: Blocks) -> Played:
        """These blocks reply anew, at the offsets of ``stance``; all others, the tables and column sizes stay."""
        coding = self.coding(played.unit, played.tables)
        tensors = dict(played.tensors)
        for layer, rows in self.rows(movers):
            weight, ground = layer.weight[rows], self.whitened[layer.name].of_rows(rows)
            lattice = self.lattice(layer, played.unit, stance).of_rows(rows)
            column_size = played.tensors[layer.name].lattice.column_size
            passed = lattice_reply(weight, ground, dataclasses.replace(lattice, column_size=column_size))
            found = _expected(passed, columns_too=False)
            if self.sweeps:
                found, _ = lattice_settle(weight, found, self.curvature(layer, stance, rows), coding, self.sweeps)
            tensors[layer.name] = tensors[layer.name].replaced(rows, found)
        return dataclasses.replace(played, tensors=tensors)

    def choose(self, stances: Sequence[Stance], budget: int, unit: float) -> Stance:
        """The stance of least KL on held-out calibration text, as it would be at ``budget`` bytes: all play at
        ``unit``, and as many bytes as an octave of it saves are a factor of 4."""
        if len(stances) == 1:
            return stances[0]
        scores = []
        for stance in self.oracle.track(stances, "choosing on held-out text"):
            played = self.play(unit, stance, 0)
            weights = {name: part.dequantize() for name, part in played.tensors.items()}
            octaves = (played.bytes - budget) / self.slope.at_high_rate
            scores.append(self.oracle.heldout_kl(weights, None) * 4.0**octaves)
            self.passes += 1
        return stances[int(np.argmin(scores))]

    def probe(self, played: Played) -> tuple[dict[str, float], dict[str, float]]:
        """Measured over predicted damage of every layer when it alone is compressed, and the correlation of their
        logarithms."""
        predicted, measured = [], []
        for layer in self.oracle.track(self.oracle.layers, "probing layers"):
            tensor = played.tensors[layer.name]
            predicted.append(float(self.damage(layer, tensor, self.plain).double().sum()))
            measured.append(self.oracle.heldout_kl({layer.name: tensor.dequantize()}, PROBE_TOKENS))
            self.passes += 1
        logs = np.log(np.maximum([predicted, measured], 1e-12))
        ratios = np.exp(np.clip(logs[1] - logs[0], -5, 5))
        names = [layer.name for layer in self.oracle.layers]
        several = len(names) > 2  # of two layers the correlation is 1 or -1
        found = {"damage_correlation": float(np.corrcoef(logs)[0, 1])} if several else {}
        return dict(zip(names, ratios.tolist(), strict=True)), found

    @functools.cached_property
    def flock(self) -> sparse.csr_array:
        """The coupling of the row blocks."""
        assert self.rules.swarm is not None and self.features is not None
        rng = np.random.default_rng(self.flock_seed)
        return swarm.flock(self.features, self.rules.swarm.neighbours, self.rules.swarm.graph, rng)

    def shrink(self, stance: Stance, coupling: sparse.csr_array, strength: float) -> Weights:
        """Every row's log sensitivity moved by ``strength`` toward the mean of its block's flock."""
        logs = {
            layer.name: (self.whitened[layer.name].rows * stance.weights[layer.name]).clamp(min=1e-30).log()
            for layer in self.oracle.layers
        }
        means = np.concatenate([_blocks(part, mean=True).numpy() for part in logs.values()])
        toward = self.by_layer(swarm.shrink(means, coupling, 1.0))
        return {
            name: stance.weights[name]
            * (
                strength * (torch.from_numpy(toward[name]).float().repeat_interleave(TILE_ROWS)[: len(part)] - part)
            ).exp()
            for name, part in logs.items()
        }

    def actions(
        self, played: Played, stance: Stance, movers: Blocks | None = None
    ) -> Float[np.ndarray, "blocks actions"]:
        """What every offset would cost every block (of ``movers``, or of all) that moves alone, in nats per token: code
        tables and the expected sizes of columns stay as they are, and so do the codes of a block that stays."""
        costs = []
        shifts = [shift for shift in self.rules.offsets if shift]
        for layer, rows in self.oracle.track(self.rows(movers), "trying offsets"):
            weight, now = layer.weight[rows], played.tensors[layer.name].of_rows(rows)
            by_shift = {0: self.cost(layer, now, played, stance, rows)}
            if shifts:
                lattices = [self.lattice(layer, played.unit, stance, shift).of_rows(rows) for shift in shifts]
                ground = self.whitened[layer.name].of_rows(rows)
                ground = dataclasses.replace(ground, rows=ground.rows.repeat(len(shifts)))
                answer = lattice_reply(weight.repeat(len(shifts), 1), ground, stack(lattices))
                for shift, codes, lattice in zip(shifts, answer.codes.split(len(weight)), lattices, strict=True):
                    placed = dataclasses.replace(lattice, column_size=now.lattice.column_size)
                    tensor = _expected(LatticeTensor(codes, placed), columns_too=False)
                    by_shift[shift] = self.cost(layer, tensor, played, stance, rows)
            costs.append(torch.stack([by_shift[shift] for shift in self.rules.offsets], 1))
        return torch.cat(costs).numpy()

    def rows(self, movers: Blocks | None) -> list[tuple[Layer, Rows]]:
        """The rows of these blocks (None: of all), layer by layer, not more at a time than memory should hold."""
        found: list[tuple[Layer, Rows]] = []
        for layer in self.oracle.layers:
            if movers is None:
                found += [(layer, piece) for piece in pieces(layer.weight)]
                continue
            moving = torch.from_numpy(self.by_layer(movers)[layer.name]).repeat_interleave(TILE_ROWS)
            chosen = moving[: len(layer.weight)].nonzero()[:, 0]
            found += [(layer, chosen[piece]) for piece in pieces(layer.weight[chosen])]
        return found

    def game(
        self, costs: Float[np.ndarray, "blocks actions"], played: Played, stance: Stance, align: float
    ) -> tuple[Game, Int[np.ndarray, " blocks"], int]:
        """The bit game at the price of the unit, the present profile, and the offset that is action 0; offsets that a
        block cannot reach from where it stands are dearer than all others."""
        offsets = np.concatenate([stance.offsets[layer.name] for layer in self.oracle.layers])
        reached = offsets[:, None] + np.array(self.rules.offsets)
        least = int(reached.min())
        own = np.full((len(costs), int(reached.max()) - least + 1), 10 * costs.max())
        np.put_along_axis(own, reached - least, costs, 1)
        steps = np.arange(own.shape[1])
        apart = 8 * price_at(played.unit) * align * np.abs(steps[:, None] - steps)
        return Game(own, (Coupling(self.flock, apart),) if align else ()), offsets - least, least

    def replied(
        self, costs: Float[np.ndarray, "blocks actions"], played: Played, stance: Stance, align: float
    ) -> Stance:
        """The stance where best replies end."""
        game, profile, least = self.game(costs, played, stance, align)
        offsets = self.by_layer(best_response(game, profile).profile + least)
        return dataclasses.replace(stance, offsets=offsets, found=stance.found | {"flock_align": align})

    def by_layer(self, values: np.ndarray) -> dict[str, np.ndarray]:
        parts = np.split(values, np.cumsum(self.counts)[:-1])
        return {layer.name: part for layer, part in zip(self.oracle.layers, parts, strict=True)}

    # the end

    def report(
        self,
        stance: Stance,
        played: Played,
        costs: Float[np.ndarray, "blocks actions"] | None,
        rounds: Mapping[str, list[float]],
    ) -> Compressed:
        """Packed bytes, weights, and the certificate."""
        price = price_at(played.unit)
        names = [layer.name for layer in self.oracle.layers]
        damage = {
            layer.name: float(self.damage(layer, played.tensors[layer.name], self.plain).double().sum())
            for layer in self.oracle.layers
        }
        bits = {name: float(coded_bits(part, played.tables).sum()) for name, part in played.tensors.items()}
        resident = sum(to_tiles(tensor).nbytes for tensor in played.tensors.values())
        metrics = {
            "damage": sum(damage.values()),
            "bits_per_weight_resident": 8 * resident / sum(layer.parameters for layer in self.oracle.layers),
            "players": sum(self.counts),
            **stance.found,
        }
        if costs is not None:
            metrics |= {"price": 8 * price} | self.certificate(costs, played, stance)
            metrics["potential_start"] = [*rounds["potential"], metrics["potential_end"]][0]
        series = {name: values for name, values in rounds.items() if values}
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
        parts: dict[str, Tensor] = {f"weights/{name}": part for name, part in stance.weights.items()}
        parts |= {f"offsets/{name}": torch.from_numpy(part) for name, part in stance.offsets.items()}
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
            _blocks(regret_by_row(layer.weight, played.tensors[layer.name], self.curvature(layer, stance), coding))
            for layer in self.oracle.layers
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


def _meet(
    trial: Callable[[float], Found],
    size: Callable[[Found], int],
    budget: int,
    unit: float,
    slope: Slope,
    tolerance: float = BUDGET_TOLERANCE,
) -> Found:
    """Units are tried by secants, inside the bracket of those that fitted and those that did not, until one takes
    between (1 − ``tolerance``) and 1 times ``budget`` bytes; ``slope`` is where they begin and what they learn."""
    aim = (1 - tolerance / 2) * budget
    best: Found | None = None
    tried: list[tuple[float, int]] = []
    log_unit = math.log2(unit)
    finest, coarsest = -math.inf, math.inf  # too fine, coarse enough
    while len(tried) < TRIALS or (best is None and len(tried) < 4 * TRIALS):
        found = trial(2.0**log_unit)
        if size(found) > budget:
            finest = max(finest, log_unit)
        else:
            coarsest = min(coarsest, log_unit)
        tried.append((log_unit, size(found)))
        if size(found) <= budget and (best is None or size(found) > size(best)):
            best = found
        if best is not None and size(best) >= (1 - tolerance) * budget:
            return best
        if len(tried) > 1:
            slope.learn(tried[-1][0] - tried[-2][0], tried[-2][1] - tried[-1][1])
        log_unit += min(max((size(found) - aim) / slope.now, -8.0), 8.0)
        if not finest < log_unit < coarsest:
            log_unit = (finest + coarsest) / 2 if math.isfinite(finest + coarsest) else log_unit
    if best is None:
        raise ValueError(f"no step was found at which the layers take {budget} bytes; raise method.bits")
    return best


def _moves(stance: Stance, other: Stance) -> int:
    """How many blocks have another offset."""
    return sum(int((part != other.offsets[name]).sum()) for name, part in stance.offsets.items())


def _expected(tensor: LatticeTensor, columns_too: bool = True) -> LatticeTensor:
    return LatticeTensor(tensor.codes, tensor.lattice.expecting(tensor.codes.abs().float(), columns_too))


def _estimated_bytes(tensors: Mapping[str, LatticeTensor], tables: CodeTables) -> int:
    """What storing them takes, but for headers and what the coder adds."""
    total = len(tables.pack())
    for tensor in tensors.values():
        lattice = tensor.lattice
        sides = (lattice.row_scale, lattice.column_scale, lattice.row_size, lattice.column_size)
        total += int(coded_bits(tensor, tables).sum() / 8) + sum(len(encode_integers(side.numpy())) for side in sides)
    return total


def _blocks(rows: Float[Tensor, " out"], mean: bool = False) -> Float[Tensor, " row_blocks"]:
    """The sum (or the mean) over every block of 16 rows, in float64."""
    padded = torch.nn.functional.pad(rows.double(), (0, -len(rows) % TILE_ROWS)).view(-1, TILE_ROWS).sum(1)
    if not mean:
        return padded
    return padded / _blocks(torch.ones(len(rows)))


def _text(offsets: Offsets, bits: Mapping[str, float]) -> str:
    """One line a layer: its name, bits per weight of its codes, and the run-length coded offsets of its blocks."""
    lines = []
    for name, values in offsets.items():
        runs = " ".join(f"{value:+d}*{length}" for value, length in zip(*run_lengths(values.astype(int)), strict=True))
        lines.append(f"{name} {bits[name]:.3f} {runs}\n")
    return "".join(lines)
