"""Turn a model's layers into paths on their lattices, given a base step.

The base step is the step of a weight of sensitivity 1, and it fixes the price of a bit, as in ``nash_lattice``.  Paths
come from one pass of error feedback, in which every code weighs its damage against its length.  The lengths are those
of tables, and of expected sizes, that were fitted to the codes of a pass before.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from nashswarm.layers import Layer
from nashswarm.memory import trim_heap
from nashswarm.methods.nash_lattice.quantizer import LatticeQuantizer
from nashswarm.packed.file_format import TABLES
from nashswarm.progress import Track
from nashswarm.quant.curvature import FactoredCurvature
from nashswarm.quant.entropy import CodeTables, fit_tables
from nashswarm.quant.integer_code import encode_integers
from nashswarm.quant.lattice import LEVELS_PER_OCTAVE, Lattice, bit_price
from nashswarm.quant.lattice_paths import GAIN, PathTensor, path_error_feedback
from nashswarm.quant.path_entropy import encode_paths, first_tables, with_fitted_sizes

HEADER_BYTES = 64  # of a matrix, about


@dataclasses.dataclass(frozen=True)
class PathModel:
    """All layers at one base step: their paths, the tables fitted to them, and the bits of their codes by layer."""

    base_step: float
    tensors: dict[str, PathTensor]
    tables: CodeTables
    bits: dict[str, float]

    @functools.cached_property
    def packed(self) -> dict[str, np.ndarray]:
        """The stored bytes of every layer, and of the tables."""
        layers = {name: encode_paths(tensor, self.tables) for name, tensor in self.tensors.items()}
        return layers | {TABLES: self.tables.pack()}

    @functools.cached_property
    def estimated_bytes(self) -> int:
        """About how many bytes ``packed`` takes; nothing is coded for it."""
        total = len(self.tables.pack()) + sum(self.bits.values()) / 8
        return int(total) + sum(HEADER_BYTES + bytes_of_exponents(tensor.lattice) for tensor in self.tensors.values())


class PathQuantizer:
    """The layers of one model and their factored curvature, by layer.

    ``lattices``: the same layers as codes on a lattice, from which the search for a step starts.  ``tables`` and
    ``fitted``, lattices by layer: what the lengths of codes are taken from.
    """

    def __init__(self, layers: Sequence[Layer], curvatures: Mapping[str, FactoredCurvature], track: Track) -> None:
        self.layers, self.curvatures, self.track = layers, curvatures, track
        self.lattices = LatticeQuantizer(layers, curvatures, False, 1.0, track)
        self.tables = first_tables()
        self.fitted: dict[str, Lattice] = {}

    def quantize_at(self, base_step: float) -> PathModel:
        """Return all layers at ``base_step``; tables and expected sizes of the result are fitted to its codes."""
        price, counts = GAIN * bit_price(base_step), {}
        tensors: dict[str, PathTensor] = {}
        for layer in self.track(self.layers, "encoding paths"):
            lattice = self.lattice(layer, base_step)
            tensor = path_error_feedback(layer.weight, self.curvatures[layer.name], lattice, self.tables, price)
            tensors[layer.name], counts[layer.name] = with_fitted_sizes(tensor)
        trim_heap()
        tables = fit_tables(np.sum([one.symbols for one in counts.values()], 0))
        return PathModel(base_step, tensors, tables, {name: one.bits(tables) for name, one in counts.items()})

    def adapt(self, base_step: float) -> PathModel:
        """Return ``quantize_at(base_step)``; later passes pay by its tables and its expected sizes."""
        model = self.quantize_at(base_step)
        self.tables = model.tables
        self.fitted = {name: tensor.lattice for name, tensor in model.tensors.items()}
        return model

    def lattice(self, layer: Layer, base_step: float) -> Lattice:
        """Return the layer's grid of half steps, with the expected sizes of the pass that adapted them, if one did."""
        lattice = self.lattices.lattice(layer, base_step, self.lattices.neutral)
        lattice = dataclasses.replace(lattice, base=lattice.base / 2)
        fitted = self.fitted.get(layer.name)
        if fitted is None:
            return lattice
        moved = round(LEVELS_PER_OCTAVE * math.log2(fitted.base / lattice.base))
        row_size = (fitted.row_size.int() + moved).clamp(-128, 127).to(torch.int8)
        return dataclasses.replace(lattice, row_size=row_size, column_size=fitted.column_size)

    def damage(self, layer: Layer, tensor: PathTensor) -> float:
        """Return the damage of a layer in nats per token."""
        return float(self.lattices.damage_by_row(layer, tensor, self.lattices.neutral).double().sum())


def bytes_of_exponents(lattice: Lattice) -> int:
    """Return the bytes that the exponents of rows and columns take in a file."""
    sides = (lattice.row_scale, lattice.column_scale, lattice.row_size, lattice.column_size)
    return sum(len(encode_integers(side.numpy())) for side in sides)
