"""Settings of the method ``nash_archive``, and its entry ``NashArchive.compress``."""

import dataclasses
import math

import numpy as np

from nashswarm import layers
from nashswarm.calibration.context import CalibrationContext
from nashswarm.calibration.moments_table import MomentsTable
from nashswarm.memory import trim_heap
from nashswarm.methods.method import Compressed, check_budget
from nashswarm.methods.nash_archive.quantizer import PathModel, PathQuantizer
from nashswarm.methods.nash_lattice.budget import BUDGET_TOLERANCE, ByteSlope, step_for_budget
from nashswarm.packed.tiles import to_tiles
from nashswarm.quant.curvature import FactoredCurvature, factor_curvature
from nashswarm.quant.lattice import bit_price
from nashswarm.quant.lattice_paths import GAIN

ADAPTING_PASSES = 3  # of tables and expected sizes; later ones gain less than a hundredth of the damage
TRIALS = 3  # searches by estimates, at most
SPARE = BUDGET_TOLERANCE / 4  # share of the budget that is left when an estimate was too low


@dataclasses.dataclass(frozen=True)
class NashArchive:
    """One price of a bit for the whole model; codes on lattice paths weigh damage against it, and are entropy-coded.

    The smallest file at equal quality, for archives: a loaded model takes more than twice the bytes of its file.  Steps
    follow from sensitivities and the price in closed form.  Nobody plays beyond that, so there is no certificate.

    ``bits``: stored bits per parameter of the whole model, everything counted.  ``floor``: share of a layer's mean
    sensitivity that is added to that of each row.  ``cache``: reuse statistics of earlier runs.

    Raises ValueError for a setting without a meaning.
    """

    bits: float = 3.0
    floor: float = 0.1
    cache: bool = True

    def __post_init__(self) -> None:
        if self.bits is None or not 0 < self.bits < math.inf:
            raise ValueError(f"method.bits={self.bits} must be a positive number")
        if not 0 <= self.floor < math.inf:
            raise ValueError(f"method.floor={self.floor} must not be negative")

    def compress(self, context: CalibrationContext, rng: np.random.Generator) -> Compressed:
        """Return the model compressed to ``bits`` per parameter.

        Raises ValueError if the model is larger even with every code zero.
        """
        budget = int(self.bits * context.parameters / 8) - context.fixed_bytes
        quantizer = PathQuantizer(context.layers, self.curvatures(context), context.track)
        smallest = quantizer.lattices.smallest_bytes()
        check_budget(self.bits, budget, smallest, context.parameters, "every code zero")
        return _report(quantizer, model_for_budget(quantizer, budget))

    def curvatures(self, context: CalibrationContext) -> dict[str, FactoredCurvature]:
        """Return the factored curvature of every layer, by name."""
        moments = MomentsTable.of(context.zipf_moments())
        curvatures = {}
        for layer in context.track(context.layers, "factoring"):
            curvatures[layer.name] = factor_curvature(layers.curvature(layer, moments, self.floor))
            for name in layer.modules:
                del moments[name]  # all moments are as large as the model
        trim_heap()
        return curvatures


def model_for_budget(quantizer: PathQuantizer, budget: int) -> PathModel:
    """Return the model at the finest base step found that takes at most ``budget`` bytes.

    The first passes adapt tables and expected sizes, each at a step that corrects what the one before missed.  Then
    both stay, so that bytes depend on the step alone, and the step is searched for by estimates of the bytes.  What
    these get wrong is taken from what they may use.  Raises ValueError if no step fits.
    """
    step, at_high_rate = quantizer.lattices.step_of_rounding(budget), quantizer.lattices.bytes_per_bit
    for _ in range(ADAPTING_PASSES):
        model = quantizer.adapt(step)
        step *= 2.0 ** ((model.estimated_bytes - budget) / at_high_rate)
    slope, allowed = ByteSlope(at_high_rate), budget
    for _ in range(TRIALS):
        model = step_for_budget(quantizer.quantize_at, lambda one: one.estimated_bytes, allowed, step, slope)
        excess = sum(len(content) for content in model.packed.values()) - budget
        if excess <= 0:
            return model
        step, allowed = model.base_step, allowed - excess - int(SPARE * budget)
    raise ValueError(f"no step was found at which the layers take {budget} bytes; raise method.bits")


def _report(quantizer: PathQuantizer, model: PathModel) -> Compressed:
    damage = {layer.name: quantizer.damage(layer, model.tensors[layer.name]) for layer in quantizer.layers}
    weights = sum(layer.parameters for layer in quantizer.layers)
    resident = sum(to_tiles(tensor).nbytes for tensor in model.tensors.values())
    return Compressed(
        packed=model.packed,
        weights={layer.name: model.tensors[layer.name].dequantize() for layer in quantizer.layers},
        allocation="".join(
            f"{layer.name} {model.bits[layer.name] / layer.parameters:.3f}\n" for layer in quantizer.layers
        ),
        code_bits=int(sum(model.bits.values())),
        damage=damage,
        metrics={
            "damage": sum(damage.values()),
            "bits_per_weight_resident": 8 * resident / weights,
            "price": 8 * GAIN * bit_price(model.base_step),
        },
    )
