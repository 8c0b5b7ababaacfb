"""What a measure of a trained mixture of experts is, and what it is given."""

import abc
import dataclasses
from typing import Any

from jaxtyping import Int
from torch import Tensor

from nashswarm.measures.measure import MeasureResult
from nashswarm.moe.model import MoeForCausalLM
from nashswarm.moe.training import Trained
from nashswarm.progress import Track

CALIBRATION_WINDOWS = 64  # of the training text


@dataclasses.dataclass(frozen=True)
class MoeTarget:
    """A trained model, the test windows, and calibration windows of the text that it was trained on."""

    trained: Trained
    windows: Int[Tensor, "windows length"]
    calibration: Int[Tensor, "calibration length"]
    track: Track

    @property
    def model(self) -> MoeForCausalLM:
        return self.trained.model


class MoeMeasure(abc.ABC):
    """A measure of a trained mixture of experts."""

    @abc.abstractmethod
    def measure(self, target: MoeTarget) -> MeasureResult:
        """Return metrics and series of the record."""

    def check(self, windows: Int[Tensor, "windows length"], context: int) -> None:
        """Check before training that the measure fits these test windows and a model of ``context`` tokens.

        Raises ValueError if it does not; by default every measure fits.
        """
        return None


def check_sizes(measure: Any, *names: str) -> None:
    """Raise ValueError that names all of these fields of a measure that are below 1; None is allowed."""
    sizes = {name: getattr(measure, name) for name in names}
    if wrong := [f"measure.{name}={size}" for name, size in sizes.items() if size is not None and size < 1]:
        raise ValueError(f"{', '.join(wrong)} must be at least 1")
