"""A method that only lays out: every matrix in trellis tiles, as the tests round it."""

import dataclasses

import numpy as np

from nashswarm.calibration.context import CalibrationContext
from nashswarm.methods.method import Compressed, store_trellis
from tests.conftest import trellis_tensor


@dataclasses.dataclass(frozen=True)
class Rounding:
    def compress(self, context: CalibrationContext, rng: np.random.Generator) -> Compressed:
        trellises = {layer.name: trellis_tensor(layer.weight, number) for number, layer in enumerate(context.layers)}
        return store_trellis(trellises, dict.fromkeys(trellises, 0.5), {"players": 7.0}, {"moves": [2.0, 1.0]})
