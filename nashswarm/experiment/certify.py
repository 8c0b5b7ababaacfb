"""Certify a saved model: reopen its run, decode its bytes, enumerate all deviations and compare with the record.

Of the program that compressed the model, only decoders and calibration are used.  The sums are those of
``enumeration``, a second implementation of the game.
"""

import pathlib
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from nashswarm.experiment import compression
from nashswarm.experiment.decoded_costs import float64, make_quadratic, place_codes, symbol_bits
from nashswarm.experiment.enumeration import by_block, gain_of_codes, gain_of_steps
from nashswarm.kernels.trellis import Trellis
from nashswarm.layers import Layer
from nashswarm.packed import file_format, model_folder
from nashswarm.quant.entropy import CodeTables
from nashswarm.quant.lattice import LatticeTensor

LIMIT = 1e-6  # nats per token that a player may still gain in what counts as an equilibrium
ABSOLUTE, RELATIVE = 1e-7, 0.01  # a float32 tie that rounds the other way changes the rest of its row


def certify(folder: pathlib.Path, model: str | None = None, dataset: str | None = None) -> dict[str, Any]:
    """Compute the certificate of the compressed model in ``folder``, regrets in nats per token.

    The result says what was enumerated, the regrets, and whether they agree with the record.  ``model`` and
    ``dataset``: paths of the full model and of its text, if they have moved since.

    Raises ValueError or OSError in one sentence for a damaged folder, and for another model or text.
    """
    started = time.monotonic()
    saved = model_folder.read(folder)
    loaded = compression.reopen(saved.about, {"model": model, "dataset": dataset})
    layers = loaded.session.layers
    decoded = decode(saved.tensors, layers)
    settings = saved.about["config"]["method"]
    metrics = saved.about["record"]["metrics"]
    moments = loaded.session.moments()
    quadratics = {layer.name: make_quadratic(layer, moments, settings) for layer in layers}
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
        matrix = place_codes(decoded[layer.name], bits, price_in_codes)
        return by_block(gain_of_codes(float64(layer.weight), matrix, quadratics[layer.name]))

    code_gains = np.concatenate([code_gain(layer) for layer in layers])
    regret = code_gains if step_gains is None else np.maximum(code_gains, step_gains)
    recorded = metrics.get("regret_max") if step_gains is not None else None
    largest = float(regret.max())
    tolerance = None if recorded is None else ABSOLUTE + RELATIVE * recorded
    return {
        "file": str(folder / model_folder.WEIGHTS),
        "enumerated": "codes" if step_gains is None else "codes and steps",
        "layers": len(layers),
        "players": len(regret),
        "regret_max": largest,
        "regret_mean": float(regret.mean()),
        "regret_of_codes": float(code_gains.max()),
        "regret_of_steps": None if step_gains is None else float(step_gains.max()),
        "price": metrics.get("price"),
        "recorded_regret_max": recorded,
        "tolerance": tolerance,
        "agrees": None if recorded is None or tolerance is None else abs(largest - recorded) <= tolerance,
        "equilibrium": largest <= LIMIT,
        "seconds": round(time.monotonic() - started, 1),
    }


def decode(tensors: Mapping[str, np.ndarray], layers: tuple[Layer, ...]) -> dict[str, file_format.Decoded]:
    """Decode every layer from its stored bytes, by name.

    Raises ValueError for a layer that is missing, damaged or of another shape.
    """
    tables = CodeTables.unpack(tensors[file_format.TABLES]) if file_format.TABLES in tensors else None
    decoded = {}
    for layer in layers:
        if f"{layer.name}.weight" not in tensors:
            raise ValueError(f"the file lacks the layer {layer.name}; it belongs to another model")
        tensor = file_format.decode(layer.name, tensors[f"{layer.name}.weight"], tables)
        if isinstance(tensor, Trellis):
            raise ValueError(
                f"{layer.name} is trellis-coded: certify enumerates the codes of lattices and groups alone"
            )
        if tensor.codes.shape != layer.weight.shape:
            raise ValueError(
                f"{layer.name} is stored as {tuple(tensor.codes.shape)}, the model has it as "
                f"{tuple(layer.weight.shape)}; name the right model by --model"
            )
        decoded[layer.name] = tensor
    return decoded
