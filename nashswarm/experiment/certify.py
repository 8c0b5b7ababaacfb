"""The certificate of a compressed model, computed again from the bytes in its folder.

Only decoders and calibration are shared with the program that compressed it.  Every sum of the game is written down
here a second time, in float64: the damage, the reply rule (one pass of error feedback, by a reversed Cholesky factor
instead of an inverse), the lengths of codes, and the enumeration of all that a block could do alone.

- Codes: every weight tries every code between the least and the largest of its layer, or of its tile's width, and pays
  for its length what codes of its method pay; the gains of a block's weights are added up.
- Steps: every block tries every other offset of the method, its codes answering by the reply rule and everything else
  as it is stored; fixed-width formats have no steps to try.
"""

import dataclasses
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Integer
from torch import Tensor

from nashswarm.experiment import compression
from nashswarm.layers import Layer, Moments
from nashswarm.packed import file_format, model_folder
from nashswarm.quant.entropy import CodeTables
from nashswarm.quant.grid import GRID_WIDTHS
from nashswarm.quant.lattice import LatticeTensor
from nashswarm.quant.prototype import ClassedTensor

LIMIT = 1e-6  # nats per token that a player may still gain at what counts as an equilibrium
ABSOLUTE, RELATIVE = 1e-7, 0.01  # a code that float32 rounds the other way at a tie changes its row from there on
BLOCK = 16  # rows of a player
DAMPING = 0.01  # of the mean diagonal of H, where the method names none
CHUNK = 1 << 18  # weights enumerated at once
LOWEST, HIGHEST, ESCAPE, TOTAL = -12, 5, 48, 1 << 14  # of the code tables, as the format fixes them
MIN_MAGNITUDE = 2.0**-7  # added to mean magnitudes, as the format fixes it

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Quadratic:
    """Second derivatives of the loss in a matrix, in nats per token: ``rows`` (f) times ``inputs`` (H, damped), and
    ``lookups`` (d); the pieces that a matrix lacks are None."""

    rows: Float[Array, " out"]
    inputs: Float[Array, "in in"] | None
    lookups: Float[Array, "out in"] | None

    def weighed(self, weights: Float[Array, " out"]) -> "Quadratic":
        """Every row's second derivatives times its weight."""
        lookups = None if self.lookups is None else weights[:, None] * self.lookups
        return Quadratic(weights * self.rows, self.inputs, lookups)

    def slope(self, error: Float[Array, "out in"], rows: slice = slice(None)) -> Float[Array, "out in"]:
        """How fast damage grows with each error of these rows."""
        total = np.zeros_like(error)
        if self.inputs is not None:
            total += self.rows[rows, None] * (error @ self.inputs)
        if self.lookups is not None:
            total += self.lookups[rows] * error
        return total

    def stiffness(self, rows: slice = slice(None)) -> Float[Array, "out in"] | float:
        total: Any = 0.0
        if self.inputs is not None:
            total = total + self.rows[rows, None] * self.inputs.diagonal()
        return total if self.lookups is None else total + self.lookups[rows]


@dataclasses.dataclass(frozen=True)
class RateCost:
    """What codes pay for their length: ``price`` nats per token a bit, by the ``bits`` of every symbol in every table;
    the ``levels`` of the weights say which table."""

    price: float
    bits: Float[Array, "tables symbols"]
    levels: Integer[Array, "out in"]

    def length(self, codes: Integer[Array, "rows in"] | int, rows: slice = slice(None)) -> Float[Array, "rows in"]:
        """Bits of these codes in these rows."""
        level, magnitudes = self.levels[rows], np.abs(codes)
        shift = np.maximum((level - HIGHEST + 1) // 2, 0)
        symbols = np.minimum(magnitudes >> shift, ESCAPE)
        signs = (magnitudes > 0) & (symbols == 0)
        return self.bits[np.maximum(level - 2 * shift, LOWEST) - LOWEST, symbols] + shift + signs


@dataclasses.dataclass(frozen=True)
class DecodedMatrix:
    """A decoded matrix: where its weights lie, their codes and steps, the least and largest code of each, and what they
    pay for their length."""

    values: Float[Array, "out in"]
    codes: Integer[Array, "out in"]
    steps: Float[Array, "out in"]
    low: int
    high: Integer[Array, "out in"] | int
    toll: RateCost | None = None


def certify(folder: pathlib.Path, model: str | None = None, dataset: str | None = None) -> dict[str, Any]:
    """The certificate of the compressed model in ``folder``: what was enumerated, the regrets found in nats per token,
    and whether they agree with the recorded ones.  ``model`` and ``dataset``: where they lie today.

    Raises ValueError or OSError in one sentence for a damaged folder and for another model or text.
    """
    started = time.monotonic()
    kept = model_folder.read(folder)
    loaded = compression.reopen(kept.about, {"model": model, "dataset": dataset})
    layers = loaded.session.layers
    decoded = decode(kept.tensors, layers)
    rules = kept.about["config"]["method"]
    metrics = kept.about["record"]["metrics"]
    moments = loaded.session.moments()
    bowls = {layer.name: bowl(layer, moments, rules) for layer in layers}
    steps, bits, price = None, None, 0.0
    if kept.game:
        bits, price = lengths(CodeTables.unpack(kept.tensors[file_format.TABLES])), metrics["price"] / 8
        tensors = {name: tensor for name, tensor in decoded.items() if isinstance(tensor, LatticeTensor)}
        steps = gain_of_steps(layers, tensors, bowls, bits, rules, metrics, kept.game)
        bowls = {name: found.weighed(kept.game[f"weights/{name}"].astype(float)) for name, found in bowls.items()}
    own_price = rules.get("rate_in_codes", 0.0) * price
    codes = np.concatenate(
        [
            by_block(
                gain_of_codes(_double(layer.weight), laid(decoded[layer.name], bits, own_price), bowls[layer.name])
            )
            for layer in layers
        ]
    )
    worst = codes if steps is None else np.maximum(codes, steps)
    recorded = metrics.get("regret_max") if steps is not None else None
    found = float(worst.max())
    return {
        "file": str(folder / model_folder.WEIGHTS),
        "enumerated": "codes" if steps is None else "codes and steps",
        "layers": len(layers),
        "players": len(worst),
        "regret_max": found,
        "regret_mean": float(worst.mean()),
        "regret_of_codes": float(codes.max()),
        "regret_of_steps": None if steps is None else float(steps.max()),
        "price": metrics.get("price"),
        "recorded_regret_max": recorded,
        "tolerance": None if recorded is None else ABSOLUTE + RELATIVE * recorded,
        "agrees": None if recorded is None else abs(found - recorded) <= ABSOLUTE + RELATIVE * recorded,
        "equilibrium": found <= LIMIT,
        "seconds": round(time.monotonic() - started, 1),
    }


def decode(tensors: Mapping[str, Array], layers: tuple[Layer, ...]) -> dict[str, file_format.Decoded]:
    """Every layer from its stored bytes.  Raises ValueError for one that is absent, damaged or of another shape."""
    tables = CodeTables.unpack(tensors[file_format.TABLES]) if file_format.TABLES in tensors else None
    decoded = {}
    for layer in layers:
        if f"{layer.name}.weight" not in tensors:
            raise ValueError(f"the file lacks the layer {layer.name}; it belongs to another model")
        found = file_format.decode(layer.name, tensors[f"{layer.name}.weight"], tables)
        if found.codes.shape != layer.weight.shape:
            raise ValueError(
                f"{layer.name} is stored as {tuple(found.codes.shape)}, the model has it as "
                f"{tuple(layer.weight.shape)}; name the right model by --model"
            )
        decoded[layer.name] = found
    return decoded


def bowl(layer: Layer, moments: Mapping[str, Moments], rules: Mapping[str, Any]) -> Quadratic:
    """The layer's curvature as the game defines it: damped, and where replies are local, sparse."""
    rows, inputs, lookups = np.zeros(len(layer.weight)), None, None
    for found in (moments[module] for module in layer.modules):
        if found.lookup:
            seen = np.outer(_double(found.inputs), _double(found.outputs))
            lookups = seen if lookups is None else lookups + seen
        else:
            rows, inputs = _double(found.coupled), (_double(found.inputs) + _double(found.coupled_inputs)) / 2
    if inputs is not None:
        local = (rules.get("swarm") or {}).get("local_reply")
        inputs = inputs if local is None else _neighbourly(inputs, local)
        inputs = inputs + rules.get("damping", DAMPING) * inputs.diagonal().mean() * np.eye(len(inputs))
    return Quadratic(rows, inputs, lookups)


def laid(
    tensor: file_format.Decoded, bits: Float[Array, "tables symbols"] | None = None, price: float = 0.0
) -> DecodedMatrix:
    """Where the weights lie and could lie, and what their codes pay at the ``price`` of a bit.

    Raises ValueError for the prototype's format, in which nobody plays.
    """
    if isinstance(tensor, ClassedTensor):
        raise ValueError("the format of method=as_published has no players: there is nothing to certify")
    if isinstance(tensor, LatticeTensor):
        lattice = tensor.lattice
        codes = tensor.codes.numpy().astype(np.int64)
        columns = 2.0 ** (_double(lattice.column_scale) / 4)
        steps = np.outer(lattice.base * 2.0 ** (_double(lattice.row_scale) / 4), columns)
        toll = None if bits is None or not price else RateCost(price, bits, levels(*sides(tensor)))
        return DecodedMatrix(codes * steps, codes, steps, int(codes.min()), int(codes.max()), toll)
    size = tensor.scheme.group_size
    width = np.repeat(tensor.bits.numpy().astype(np.int64), BLOCK, 0)[: len(tensor.codes)]
    grid = np.isin(width, GRID_WIDTHS)
    scale, largest = (
        np.repeat(np.where(grid, part, 0), size, 1) for part in (_double(tensor.scale), (1 << width % 16) - 1)
    )
    codes = np.where(np.repeat(grid, size, 1), tensor.codes.numpy(), 0).astype(np.int64)
    return DecodedMatrix(_double(tensor.dequantize()), codes, scale, 0, largest)


def gain_of_codes(weight: Float[Array, "out in"], found: DecodedMatrix, bowl: Quadratic) -> Float[Array, " out"]:
    """What the weights of every row would gain, each by its best other code alone, added up."""
    gains = np.zeros(len(weight))
    count = max(1, CHUNK // weight.shape[1])
    for start in range(0, len(weight), count):
        rows = slice(start, start + count)
        slope, stiffness = bowl.slope(weight[rows] - found.values[rows], rows), bowl.stiffness(rows)
        high = found.high if isinstance(found.high, int) else found.high[rows]
        best, toll = np.zeros_like(slope), found.toll
        paid = toll.price * toll.length(found.codes[rows], rows) if toll else 0.0
        for code in range(found.low, int(np.max(high)) + 1):
            change = (code - found.codes[rows]) * found.steps[rows]
            gain = change * (slope - stiffness * change / 2)
            if toll:
                gain += paid - toll.price * toll.length(code, rows)
            np.maximum(best, gain if isinstance(high, int) else np.where(code <= high, gain, 0), out=best)
        gains[rows] = best.sum(1)
    return gains


def gain_of_steps(
    layers: tuple[Layer, ...],
    tensors: Mapping[str, LatticeTensor],
    bowls: Mapping[str, Quadratic],
    bits: Float[Array, "tables symbols"],
    rules: Mapping[str, Any],
    metrics: Mapping[str, float],
    game: Mapping[str, Array],
) -> Float[Array, " blocks"]:
    """What every block would gain by its best other offset, in nats per token."""
    offsets, price = np.array(rules["offsets"]), metrics["price"] / 8
    parts = []
    for layer in layers:
        tensor, curved = tensors[layer.name], bowls[layer.name]
        pull = None if rules["code_game"] == "rounding" else feedback_matrix(curved)
        curved = curved.weighed(game[f"weights/{layer.name}"].astype(float))
        parts.append(costs(_double(layer.weight), tensor, curved, pull, bits, offsets, price))
    found = np.concatenate(parts)
    stay = list(offsets).index(0)
    if align := metrics["flock_align"]:
        own = np.concatenate([game[f"offsets/{layer.name}"] for layer in layers])
        mover, other = game["flock/pairs"]
        apart = np.zeros(found.shape)
        distance = np.abs(own[mover, None] + offsets - own[other, None])
        np.add.at(apart, mover, 8 * price * align * game["flock/weights"][:, None] * distance)
        found += apart
    return found[:, stay] - found.min(1)


def costs(
    weight: Float[Array, "out in"],
    tensor: LatticeTensor,
    bowl: Quadratic,
    pull: Float[Array, "in in"] | None,
    bits: Float[Array, "tables symbols"],
    offsets: Int[Array, " offsets"],
    price: float,
) -> Float[Array, "blocks offsets"]:
    """What every block pays at every offset, in nats per token, ``price`` a bit; at 0 for its codes as they are stored.
    The sizes that the coder expects of columns are the stored ones, for nobody else moves."""
    lattice = tensor.lattice
    row_scale, column_scale, row_size, column_size = sides(tensor)

    def damage(codes: Int[Array, "out in"], steps: Float[Array, "out in"]) -> Float[Array, " blocks"]:
        error = weight - codes * steps
        return by_block((bowl.slope(error) * error).sum(1) / 2)

    def steps_at(scale: Int[Array, " out"]) -> Float[Array, "out in"]:
        return np.outer(lattice.base * 2.0 ** (scale / 4), 2.0 ** (column_scale / 4))

    found = []
    for offset in offsets:
        if offset == 0:
            own = tensor.codes.numpy().astype(np.int64)
            length = by_block(
                RateCost(price, bits, levels(row_scale, column_scale, row_size, column_size)).length(own).sum(1)
            )
            found.append(damage(own, steps_at(row_scale)) + price * length)
            continue
        moved = (row_scale + offset).clip(-128, 127)
        steps = steps_at(moved)
        codes = replies(weight, steps, pull)
        rows = fitted(np.abs(codes).mean(1), moved)
        length = by_block(RateCost(price, bits, levels(moved, column_scale, rows, column_size)).length(codes).sum(1))
        found.append(damage(codes, steps) + price * length)
    return np.stack(found, 1)


def feedback_matrix(bowl: Quadratic) -> Float[Array, "in in"] | None:
    """How far an error of column i moves the target of a later column j: G_ij / G_jj; H = G Gᵀ, G upper triangular.

    What columns before j have done can then be made good by j alone, and ``e H eᵀ = Σ_j (G_jj (e_j + Σ_i<j e_i
    G_ij / G_jj))²`` is least when every column rounds to its target.  Lookups count in H on average.
    """
    if bowl.inputs is None:
        return None
    inputs = bowl.inputs
    if bowl.lookups is not None:
        inputs = inputs + np.diag(bowl.lookups.sum(0) / bowl.rows.sum())
    upper = np.linalg.cholesky(inputs[::-1, ::-1])[::-1, ::-1]
    return upper / upper.diagonal()


def replies(
    weight: Float[Array, "out in"], steps: Float[Array, "out in"], pull: Float[Array, "in in"] | None
) -> Int[Array, "out in"]:
    """The codes of one pass of error feedback, column by column; without ``pull`` of plain rounding."""
    if pull is None:
        return np.rint(weight / steps).astype(np.int64)
    wanted, step = np.ascontiguousarray(weight.T), np.ascontiguousarray(steps.T)
    codes, error = np.zeros_like(wanted), np.zeros_like(wanted)
    for column in range(len(wanted)):
        target = wanted[column] + pull[:column, column] @ error[:column]
        codes[column] = np.rint(target / step[column])
        error[column] = wanted[column] - codes[column] * step[column]
    return codes.T.astype(np.int64)


def lengths(tables: CodeTables) -> Float[Array, "tables symbols"]:
    """Bits of every symbol by every table, with the sign of what is not zero and the 32 bits of what is escaped."""
    bits = -np.log2(tables.frequencies / TOTAL)
    bits[:, 1:] += 1
    bits[:, ESCAPE] += 32
    return bits


def fitted(magnitudes: Float[Array, " n"], scale: Int[Array, " n"]) -> Int[Array, " n"]:
    """The size, in half octaves, that the coder is told of rows with codes of these mean magnitudes."""
    return np.rint(2 * np.log2(magnitudes + MIN_MAGNITUDE) + scale / 2).clip(-128, 127).astype(np.int64)


def sides(tensor: LatticeTensor) -> tuple[Int[Array, " n"], ...]:
    """Scales of rows and columns, and the sizes of both that the coder expects."""
    names = ("row_scale", "column_scale", "row_size", "column_size")
    return tuple(getattr(tensor.lattice, name).numpy().astype(np.int64) for name in names)


def levels(
    row_scale: Int[Array, " out"],
    column_scale: Int[Array, " in"],
    row_size: Int[Array, " out"],
    column_size: Int[Array, " in"],
) -> Int[Array, "out in"]:
    """Twice the binary logarithm of the magnitude that the coder expects of every code."""
    return row_size[:, None] + column_size - (row_scale[:, None] + column_scale) // 2


def by_block(rows: Float[Array, " out"]) -> Float[Array, " blocks"]:
    """The sum of every 16 rows."""
    return np.add.reduceat(rows, np.arange(0, len(rows), BLOCK))


def _neighbourly(inputs: Float[Array, "in in"], neighbours: int) -> Float[Array, "in in"]:
    """H with the entries of each column's most correlated columns alone; what is dropped goes to the diagonal."""
    if neighbours >= len(inputs) - 1:
        return inputs
    size = np.sqrt(np.maximum(inputs.diagonal(), np.finfo(np.float32).tiny))
    correlation = np.abs(inputs / np.outer(size, size))
    np.fill_diagonal(correlation, 0)
    kept = np.zeros(inputs.shape, bool)
    np.put_along_axis(kept, np.argsort(-correlation, 1, kind="stable")[:, :neighbours], True, 1)
    kept |= kept.T
    np.fill_diagonal(kept, True)
    return np.where(kept, inputs, 0) + np.diag(np.abs(np.where(kept, 0, inputs)).sum(1))


def _double(tensor: Tensor) -> Array:
    return tensor.cpu().double().numpy()
