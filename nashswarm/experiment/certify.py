"""Certify a saved model: reopen its run, decode its bytes, enumerate all deviations and compare with the record.

Of the program that compressed the model, only decoders and calibration are used.  The sums are those of
``enumeration`` (lattices and groups) and of ``tile_deviations`` (trellis tiles), second implementations of the games.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float

from nashswarm.experiment import compression
from nashswarm.experiment.decoded_costs import (
    Quadratic,
    check_players,
    float64,
    make_quadratic,
    place_codes,
    symbol_bits,
)
from nashswarm.experiment.enumeration import by_block, gain_of_codes, gain_of_steps
from nashswarm.experiment.identity import TARGET
from nashswarm.experiment.tile_deviations import gain_of_tiles
from nashswarm.kernels import trellis
from nashswarm.kernels.trellis import Trellis
from nashswarm.layers import Layer, Moments
from nashswarm.methods.nash_swarm.settings import NashSwarm
from nashswarm.packed import file_format, model_folder
from nashswarm.packed.model_folder import SavedModel
from nashswarm.progress import show_progress
from nashswarm.quant.entropy import CodeTables
from nashswarm.quant.lattice import LatticeTensor

LIMIT = 1e-6  # nats per token that a player may still gain in what counts as an equilibrium
ABSOLUTE, RELATIVE = 1e-7, 0.01  # a float32 tie that rounds the other way changes the rest of its row

Decoded = Mapping[str, file_format.Decoded | Trellis]


@dataclasses.dataclass(frozen=True)
class Regrets:
    """What the players of a saved model could gain alone, in nats per token.

    ``codes``: by their codes, of every block, or of every group of rows of trellis tiles.  ``choices``: by another
    step or rate; None if there was no game of them.  ``by_player``: of every player, by whatever it can change.
    ``choice``: what is chosen.  ``recorded``: the largest, by the program that compressed the model, if it says so.
    ``partly``: whether some players were left out.
    """

    codes: Float[np.ndarray, " blocks"]
    choices: Float[np.ndarray, " players"] | None
    by_player: Float[np.ndarray, " players"]
    choice: str
    players: int
    recorded: float | None
    partly: bool = False

    @property
    def largest(self) -> float:
        """The most that any player could gain."""
        return float(max(part.max() for part in (self.codes, self.choices) if part is not None))


def certify(
    folder: pathlib.Path, model: str | None = None, dataset: str | None = None, tiles: int | None = None
) -> dict[str, Any]:
    """Compute the certificate of the compressed model in ``folder``, regrets in nats per token.

    The result says what was enumerated, the regrets, and whether they agree with the record.  ``model`` and
    ``dataset``: paths of the full model and of its text, if they have moved since.  ``tiles``: try the rates of so many
    trellis tiles alone, drawn by lot; by default those of all.  A regret that is below the recorded one then agrees.

    Raises ValueError or OSError in one sentence for a damaged folder, another model or text, and less than one tile.
    """
    if tiles is not None and tiles < 1:
        raise ValueError(f"{tiles} tiles to try: name at least 1")
    started = time.monotonic()
    saved = model_folder.read(folder)
    loaded = compression.reopen(saved.about, {"model": model, "dataset": dataset})
    layers = loaded.session.layers
    decoded = decode(saved.tensors, layers)
    for tensor in decoded.values():
        check_players(tensor)
    settings = saved.about["config"]["method"]
    moments = _moments(loaded, settings)
    quadratic = partial(make_quadratic, moments=moments, settings=settings)
    coded = any(isinstance(tensor, Trellis) for tensor in decoded.values())
    regrets = (
        _regrets_of_tiles(saved, layers, decoded, quadratic, tiles)
        if coded
        else _regrets_of_blocks(saved, layers, decoded, {layer.name: quadratic(layer) for layer in layers})
    )
    recorded, largest = regrets.recorded, regrets.largest
    tolerance = None if recorded is None else ABSOLUTE + RELATIVE * recorded
    agrees = None
    if recorded is not None and tolerance is not None:
        agrees = largest - recorded <= tolerance and (regrets.partly or recorded - largest <= tolerance)
    return {
        "file": str(folder / model_folder.WEIGHTS),
        "enumerated": "codes" if regrets.choices is None else f"codes and {regrets.choice}",
        "layers": len(layers),
        "players": regrets.players,
        **({"tiles_enumerated": len(regrets.choices)} if regrets.choices is not None and coded else {}),
        "regret_max": largest,
        "regret_mean": float(regrets.by_player.mean()),
        "regret_of_codes": float(regrets.codes.max()),
        f"regret_of_{regrets.choice}": None if regrets.choices is None else float(regrets.choices.max()),
        "price": saved.about["record"]["metrics"].get("price"),
        "recorded_regret_max": recorded,
        "tolerance": tolerance,
        "agrees": agrees,
        "equilibrium": largest <= LIMIT,
        "seconds": round(time.monotonic() - started, 1),
    }


def _moments(loaded: compression.LoadedRun, settings: Mapping[str, Any]) -> Mapping[str, Moments]:
    """Return the statistics that the method with these settings took its damages from."""
    if "gradients_at" not in settings:
        return loaded.session.zipf_moments() if "floor" in settings else loaded.session.moments()
    method = NashSwarm(**{name: value for name, value in settings.items() if name != TARGET})
    return method.game(loaded.session.context(), loaded.rng).moments


def _regrets_of_blocks(
    saved: SavedModel, layers: tuple[Layer, ...], decoded: Decoded, quadratics: dict[str, Quadratic]
) -> Regrets:
    """Return the regrets of blocks of 16 rows, by their codes and, if there was a game of them, by their steps."""
    settings, metrics = saved.about["config"]["method"], saved.about["record"]["metrics"]
    step_gains, bits, price = None, None, 0.0
    if saved.game:
        bits, price = symbol_bits(CodeTables.unpack(saved.tensors[file_format.TABLES])), metrics["price"] / 8
        tensors = {name: tensor for name, tensor in decoded.items() if isinstance(tensor, LatticeTensor)}
        step_gains = gain_of_steps(layers, tensors, quadratics, bits, settings, metrics, saved.game)
        quadratics = {
            name: quadratic.scale_rows(saved.game[f"weights/{name}"].astype(float))
            for name, quadratic in quadratics.items()
        }
    price_in_codes = settings.get("rate_in_codes", 0.0) * price

    def code_gain(layer: Layer) -> Float[np.ndarray, " blocks"]:
        matrix = place_codes(cast(file_format.Decoded, decoded[layer.name]), bits, price_in_codes)
        return by_block(gain_of_codes(float64(layer.weight), matrix, quadratics[layer.name]))

    code_gains = np.concatenate([code_gain(layer) for layer in layers])
    if step_gains is None:
        return Regrets(code_gains, None, code_gains, "steps", len(code_gains), None)
    by_player = np.maximum(code_gains, step_gains)
    return Regrets(code_gains, step_gains, by_player, "steps", len(by_player), metrics.get("regret_max"))


def _regrets_of_tiles(
    saved: SavedModel,
    layers: tuple[Layer, ...],
    decoded: Decoded,
    quadratic: Callable[[Layer], Quadratic],
    count: int | None,
) -> Regrets:
    """Return the regrets of groups of rows, by their paths, and of ``count`` tiles, or all, by their rates.

    Without a price there was no game of rates.  Raises ValueError for a method without the settings of such a game.
    """
    settings, metrics = saved.about["config"]["method"], saved.about["record"]["metrics"]
    matrices = {name: tensor for name, tensor in decoded.items() if isinstance(tensor, Trellis)}
    if "floor" not in settings or "rates" not in settings or len(matrices) < len(layers):
        name = next(iter(matrices))
        raise ValueError(f"{name} is trellis-coded, but not by method=nash_swarm: there is no game to certify")
    price = metrics.get("price")
    shapes = [trellis.tile_rates(matrices[layer.name]).shape for layer in layers]
    sizes = [groups * across for groups, across in shapes]
    chosen = np.full(sum(sizes), price is not None)
    if price is not None and count is not None and count < len(chosen):
        chosen[:] = False
        chosen[np.random.default_rng(0).choice(len(chosen), count, replace=False)] = True
    parts = [part.reshape(shape) for part, shape in zip(np.split(chosen, np.cumsum(sizes)[:-1]), shapes, strict=True)]
    found = []
    for number in show_progress(range(len(layers)), "enumerating"):
        name = layers[number].name
        found.append(
            gain_of_tiles(
                layers[number], matrices[name], quadratic(layers[number]),
                settings["rates"], price or 0.0, parts[number], torch.get_num_threads(),
            )
        )  # fmt: skip
    gains, paths = (np.concatenate(part) for part in zip(*found, strict=True))
    if price is None:
        return Regrets(paths, None, paths, "rates", len(chosen), metrics.get("regret_of_codes"))
    return Regrets(paths, gains, gains, "rates", len(chosen), metrics.get("regret_max"), not chosen.all())


def decode(tensors: Mapping[str, np.ndarray], layers: tuple[Layer, ...]) -> dict[str, file_format.Decoded | Trellis]:
    """Decode every layer from its stored bytes, by name.

    Raises ValueError for a layer that is missing, damaged or of another shape.
    """
    tables = CodeTables.unpack(tensors[file_format.TABLES]) if file_format.TABLES in tensors else None
    decoded = {}
    for layer in layers:
        if f"{layer.name}.weight" not in tensors:
            raise ValueError(f"the file lacks the layer {layer.name}; it belongs to another model")
        tensor = file_format.decode(layer.name, tensors[f"{layer.name}.weight"], tables)
        shape = file_format.shape_of(tensor)
        if shape != layer.weight.shape:
            raise ValueError(
                f"{layer.name} is stored as {shape}, the model has it as "
                f"{tuple(layer.weight.shape)}; name the right model by --model"
            )
        decoded[layer.name] = tensor
    return decoded
