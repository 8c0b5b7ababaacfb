"""What the rate game decides: the weight of every row's sensitivity, and the offset of every block's step."""

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

RowWeights = Mapping[str, Float[Tensor, " out"]]
Offsets = Mapping[str, Int[np.ndarray, " row_blocks"]]


@dataclasses.dataclass(frozen=True)
class StepChoices:
    """The choices from which every step of a model follows, once a base step is given.

    ``row_weights``: by layer, the factor by which each row's sensitivity is multiplied.  ``offsets``: by layer, what
    each block of 16 rows adds to its step, in quarter octaves.  ``metrics``: how the choices came about, recorded as
    metrics of the run (``flock_align``, the bytes a block pays for its distance from a neighbour, is read again).
    ``history``: potential and largest regret, in nats per token, before and after each sweep of best responses.
    """

    row_weights: RowWeights
    offsets: Offsets
    metrics: dict[str, float]
    history: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    @property
    def align(self) -> float:
        """Bytes that a block pays per quarter octave between it and a neighbour."""
        return self.metrics["flock_align"]

    def with_metrics(self, **metrics: float) -> "StepChoices":
        """Return the same choices with more ``metrics``."""
        return dataclasses.replace(self, metrics=self.metrics | metrics)

    def moved_blocks(self, other: "StepChoices") -> int:
        """Return the number of blocks whose offset differs from ``other``."""
        return sum(int((part != other.offsets[name]).sum()) for name, part in self.offsets.items())

    def tensors(self) -> dict[str, Tensor]:
        """Return row weights and offsets as tensors, as a saved model keeps them."""
        offsets = {f"offsets/{name}": torch.from_numpy(part) for name, part in self.offsets.items()}
        return {f"weights/{name}": part for name, part in self.row_weights.items()} | offsets

    def to_cache(self) -> dict[str, Tensor]:
        """Return all fields as tensors, as the calibration cache keeps them."""
        metrics = {f"found/{name}": torch.tensor(float(value)).double() for name, value in self.metrics.items()}
        history = {f"path/{name}": torch.tensor(values).double() for name, values in self.history.items()}
        return self.tensors() | metrics | history

    @classmethod
    def from_cache(cls, tensors: Mapping[str, Tensor], layers: Iterable[str]) -> "StepChoices":
        """Return the choices for ``layers``, by name, that ``to_cache`` turned into ``tensors``."""
        names = list(layers)
        return cls(
            {name: tensors[f"weights/{name}"] for name in names},
            {name: tensors[f"offsets/{name}"].numpy() for name in names},
            {key.removeprefix("found/"): float(part) for key, part in tensors.items() if key.startswith("found/")},
            {key.removeprefix("path/"): part.tolist() for key, part in tensors.items() if key.startswith("path/")},
        )
