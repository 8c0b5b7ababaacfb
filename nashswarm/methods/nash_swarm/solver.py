"""Encode the layers of a model in trellis tiles, and play the game of their rates under one price of a byte.

A tile pays its damage, and its bytes times the price.  Tiles of different groups of rows do not interact; those of one
group do, through the curvature of the inputs.  A move changes the sum of all damages and priced bytes by exactly the
change of the mover's own cost, so best replies one after another end in an equilibrium (Monderer & Shapley 1996).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Integer

from nashswarm import layers
from nashswarm.calibration.context import CalibrationContext
from nashswarm.kernels import trellis as form
from nashswarm.kernels.encoder import KEEP, RATES
from nashswarm.layers import Layer, Moments
from nashswarm.methods.method import DecodedWeights
from nashswarm.methods.nash_swarm import prices
from nashswarm.methods.nash_swarm.prices import Damage, Rates
from nashswarm.methods.nash_swarm.workers import Result, of_layers
from nashswarm.quant import trellis
from nashswarm.quant.curvature import Curvature
from nashswarm.quant.trellis import Encoded, State
from nashswarm.quant.trellis_arrangement import Arrangement, Grouping, Layout, arrange, arrange_again

ROUGHLY = 2e-3  # share of the damage that a sweep has to gain to be followed by another, before the last round
NEXT = (-1, 1)  # steps from the present rate of a tile: all that is tried before the last round
ROUNDED_UP = 1.001  # the most that a tile can gain, with room for rounding
LOWEST = 0.5  # to which share of itself the price may fall after rates were tried, and none that gains was left out
SETTLED = 2e-7  # nats per token: sweeps of a layer, and rounds of the game, end when they gain no more


@dataclasses.dataclass(frozen=True)
class PlayedLayer:
    """A layer after a round: its codes, its damage, and what its players could still gain.

    ``at_rates``: the damage of each tile at each rate, if it alone took that rate and replied, minus its present
    damage; infinite at rates that were not tried or cannot gain.  ``code_regret``: what the paths of a group of rows
    could gain, each changing alone, added up; the largest of all groups.  ``every_rate``: whether all rates were tried,
    or only those next to the present one.
    """

    layout: Layout
    encoded: Encoded
    damage: float
    at_rates: Damage
    code_regret: float
    every_rate: bool

    @property
    def rates(self) -> Rates:
        """The rates of the tiles."""
        return self.encoded.rates.numpy().astype(np.int64)


@dataclasses.dataclass(frozen=True)
class SolvedGame:
    """The end of a game.  ``price``: of a byte in nats per token; 0 without a game.  ``history``: of each round."""

    played: dict[str, PlayedLayer]
    price: float
    history: dict[str, list[float]]


class RateGame:
    """The layers of a model and their statistics.  ``allowed``: the rates that a tile can take."""

    def __init__(
        self,
        context: CalibrationContext,
        moments: Mapping[str, Moments],
        allowed: Sequence[int],
        grouping: Grouping,
        rotated: bool,
        sweeps: int,
        floor: float,
        seed: int,
    ) -> None:
        self.context, self.layers, self.allowed = context, context.layers, tuple(allowed)
        self.grouping, self.rotated, self.sweeps, self.floor, self.seed = grouping, rotated, sweeps, floor, seed
        self.moments = moments

    # Sizes.

    def shapes(self) -> list[tuple[int, int]]:
        """Return the groups of rows and the tiles across of every layer."""
        sizes = [layer.weight.shape for layer in self.layers]
        return [(form.groups_of(rows), form.tiles_across(columns)) for rows, columns in sizes]

    def side_bytes(self) -> int:
        """Return the bytes of all layers beside their tiles."""
        ordered = self.grouping != "stored"
        sizes = [layer.weight.shape for layer in self.layers]
        return sum(form.side_bytes(rows, columns, ordered, ordered) for rows, columns in sizes)

    def smallest_bytes(self) -> int:
        """Return the bytes of all layers with every tile at the lowest rate."""
        tiles = sum(groups * across for groups, across in self.shapes())
        return self.side_bytes() + tiles * self.allowed[0] * prices.BYTES_PER_BIT

    # The game.

    def solve(self, budget: int, rounds: int) -> SolvedGame:
        """Play until no tile gains by another rate, at the price at which all layers take at most ``budget`` bytes.

        The first rates come from expected damages.  In each round the price is found again from the true damages,
        tiles that gain by another rate take it one after another, and the columns sweep.  In the last rounds every rate
        of every tile is tried, and the budget is closed: the tiles that lose least by it move.
        """
        left = budget - self.side_bytes()
        played = self._encode(self._first_rates(left))
        history: dict[str, list[float]] = {"price": [], "potential": [], "regret": []}
        for _ in range(rounds):
            damage = [part.at_rates for part in played.values()]
            price = prices.price_for(damage, left, self.allowed)
            wanted = [prices.best_rates(part, price, self.allowed) for part in damage]
            played = self._play(played, wanted, price)
            history["price"].append(price)
            history["potential"].append(potential(played, price))
            history["regret"].append(rate_regret(played, price)[0])
            if history["regret"][-1] < SETTLED:
                break
        wanted, lowest = [part.rates for part in played.values()], 0.0
        for _ in range(rounds):
            lowest = max(lowest, LOWEST * price)
            played = self._play(played, wanted, price, last=True)
            damage, rates = [part.at_rates for part in played.values()], [part.rates for part in played.values()]
            price = max(prices.price_for(damage, left, self.allowed), lowest)
            closed = prices.close(damage, rates, left, self.allowed)
            played = self._play(played, closed, price, last=True, forced=True)
            if rate_regret(played, price)[0] < SETTLED:
                break
            wanted = [prices.best_rates(part.at_rates, price, self.allowed) for part in played.values()]
        return SolvedGame(played, price, history)

    def uniform(self, budget: int) -> SolvedGame:
        """Encode all tiles at one rate, or at two neighbouring ones dealt evenly, so that the budget is used up."""
        rates = prices.spread(self.shapes(), budget - self.side_bytes(), self.allowed)
        return SolvedGame(self._encode(rates, last=True, alone=True), 0.0, {})

    def once(self, budget: int) -> SolvedGame:
        """Encode all tiles at the first rates, and leave it at that."""
        return SolvedGame(self._encode(self._first_rates(budget - self.side_bytes()), alone=True), 0.0, {})

    def first_weights(self, budget: int) -> DecodedWeights:
        """Return the weights after one pass of error feedback at the first rates."""
        rates = self._first_rates(budget - self.side_bytes())

        def quantize(layer: Layer, part: Rates) -> form.Trellis:
            state = trellis.feedback(*self._arrange(layer), torch.from_numpy(part.astype(np.uint8)))
            return trellis.finish(state.arrangement.layout, state.encoded())

        quantized = self._of_layers(quantize, "quantizing once", rates)
        return DecodedWeights({layer.name: part for layer, part in zip(self.layers, quantized, strict=True)})

    def _first_rates(self, left: int) -> list[Rates]:
        """Return the rates at which the tiles take at most ``left`` bytes at one price, by their expected damages."""
        expected = self._of_layers(self._expect, "weighing tiles")
        price = prices.price_for(expected, left, self.allowed)
        return [prices.best_rates(part, price, self.allowed) for part in expected]

    # One layer.

    def _expect(self, layer: Layer) -> Damage:
        """Return the expected damage of each tile at each rate."""
        arrangement, factor = self._arrange(layer)
        return prices.expected_damage(arrangement.energies(factor).numpy())

    def _arrange(self, layer: Layer) -> tuple[Arrangement, torch.Tensor]:
        """Return the layer as its tiles are cut, and the factor of its curvature."""
        return arrange(layer.weight, self._curvature(layer), self.grouping, self.rotated, self.seed)

    def _curvature(self, layer: Layer) -> Curvature:
        return layers.curvature(layer, self.moments, self.floor)

    def _encode(self, rates: Sequence[Rates], last: bool = False, alone: bool = False) -> dict[str, PlayedLayer]:
        """Encode every layer at these rates: error feedback, then sweeps.  ``alone``: no other rates are tried."""

        def encode(layer: Layer, part: Rates) -> PlayedLayer:
            state = trellis.feedback(*self._arrange(layer), torch.from_numpy(part.astype(np.uint8)))
            return self._settle(state, last, tried=() if alone else NEXT)

        encoded = self._of_layers(encode, "encoding", rates)
        return {layer.name: part for layer, part in zip(self.layers, encoded, strict=True)}

    def _play(
        self,
        played: dict[str, PlayedLayer],
        wanted: Sequence[Rates],
        price: float,
        last: bool = False,
        forced: bool = False,
    ) -> dict[str, PlayedLayer]:
        """Let tiles take the rates that they want, as far as that lowers their cost (always, if they are ``forced``).

        After the ``last`` moves every rate of every tile is tried.
        """

        def play(layer: Layer, rates: Rates) -> PlayedLayer:
            before = played[layer.name]
            if (rates == before.rates).all() and (before.every_rate or not last):
                return before
            arrangement = arrange_again(layer.weight, self._curvature(layer), before.layout)
            state = trellis.reopen(arrangement, before.encoded)
            for tile in np.flatnonzero((rates != before.rates).any(0)):
                _move(state, int(tile), rates[:, tile], None if forced else price)
            return self._settle(state, last, self.allowed if last else NEXT, price)

        after = self._of_layers(play, "playing", wanted)
        return {layer.name: part for layer, part in zip(self.layers, after, strict=True)}

    def _of_layers(self, function: Callable[..., Result], description: str, *arguments: Sequence[Any]) -> list[Result]:
        """Return the function's result for each layer; several layers are computed at a time, with one thread each."""
        return of_layers(function, self.layers, *arguments, track=self.context.track, description=description)

    def _settle(self, state: State, last: bool, tried: Sequence[int], price: float = 0.0) -> PlayedLayer:
        """Sweep until the columns are settled, and measure what each tile would gain by the rates that are ``tried``.

        Unless it is the ``last`` time, the sweeps end early.  ``NEXT`` stands for the rates next to that of each tile.
        The damage at rates that are not tried is infinite, and so is that at rates that cannot be worth their bytes,
        because no weights at all would gain as much.
        """
        enough = SETTLED if last else max(SETTLED, ROUGHLY * state.damage)
        for _ in range(self.sweeps):
            gain, changed = trellis.sweep(state)
            if not changed or gain < enough:
                break
        state.refresh()
        layout, own = state.arrangement.layout, state.rates.numpy().astype(np.int64)
        at_rates = np.full((*layout.shape, RATES), np.inf)
        choices = np.array(self.allowed)
        for tile in range(layout.shape[1]) if len(tried) else ():
            rates = own[:, tile, None]
            if tried is NEXT:
                place = np.searchsorted(choices, rates)
                usable = np.abs(np.arange(len(choices)) - place) == 1
            else:
                costs = LOWEST * price * prices.BYTES_PER_BIT * (choices - rates)
                usable = costs < ROUNDED_UP * trellis.most_gain(state, tile).numpy()[:, None]
            masks = torch.from_numpy((usable << choices).sum(1).astype(np.int32))
            changes = trellis.deviations(state, tile, masks).numpy()
            at_rates[:, tile, choices] = np.where(usable, changes[:, choices], np.inf)
        at_own = np.take_along_axis(at_rates, own[..., None], 2)
        np.put_along_axis(at_rates, own[..., None], np.minimum(at_own, 0), 2)
        every_rate = len(tried) == len(self.allowed) and tried is not NEXT
        return PlayedLayer(layout, state.encoded(), state.damage, at_rates, trellis.path_regret(state), every_rate)


def _move(state: State, tile: int, wanted: Integer[np.ndarray, " groups"], price: float | None) -> None:
    """Move the tiles in one place across to the rates that they want, those that gain by it."""
    own = state.rates[:, tile].numpy().astype(np.int64)
    moving = wanted != own
    if price is not None:
        masks = torch.from_numpy(np.where(moving, 1 << wanted, 0).astype(np.int32))
        change = trellis.deviations(state, tile, masks).numpy()[np.arange(len(wanted)), wanted]
        moving &= change + price * prices.BYTES_PER_BIT * (wanted - own) < 0
    if moving.any():
        trellis.adopt(state, tile, torch.from_numpy(np.where(moving, wanted, KEEP).astype(np.uint8)))


def potential(played: dict[str, PlayedLayer], price: float) -> float:
    """Return the sum of all damages and of all bytes of tiles times the price, in nats per token."""
    damage = sum(part.damage for part in played.values())
    return damage + price * prices.tile_bytes([part.rates for part in played.values()])


def rate_regret(played: dict[str, PlayedLayer], price: float) -> tuple[float, float]:
    """Return the most that a tile could gain by another rate, and the mean over tiles, in nats per token."""
    gains = []
    for part in played.values():
        cost = part.at_rates + price * prices.BYTES_PER_BIT * np.arange(part.at_rates.shape[-1])
        stay = price * prices.BYTES_PER_BIT * part.rates  # with the present codes, whose damage counts as 0
        gains.append((stay - cost.min(-1)).ravel())
    regret = np.maximum(np.concatenate(gains), 0)
    return float(regret.max()), float(regret.mean())
