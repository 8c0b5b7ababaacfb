"""What a measure is, and what it is given: a full model, its compressed copy and test windows."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Int
from torch import Tensor

from nashswarm import errors
from nashswarm.data.glue import Truth
from nashswarm.layers import Layer
from nashswarm.models import evaluation
from nashswarm.progress import Track

MeasureResult = tuple[dict[str, float], dict[str, list[float]]]  # metrics and series of the record


@dataclasses.dataclass(frozen=True)
class EvaluationTarget:
    """A full model, its compressed copy and the test windows.

    ``compressed``: with the decompressed weights as floats.  ``packed``: loads the compressed model so that it computes
    on packed weights.  ``reference``: the full model's predictions for the windows, given a batch size.  ``layers``:
    the full model's matrices.  ``weights``: the decompressed matrices by layer name.  ``damage``: nats per token that
    the method predicted for each layer, if it predicts any.  ``text``, ``tokenizer``: what the windows were cut from.
    ``truth``: labels, where each window is an example of a task.  ``calibration``: the windows of calibration.
    """

    full: Any
    compressed: Any
    packed: Callable[[], Any]
    windows: Int[Tensor, "windows length"]
    reference: Callable[[int], evaluation.Reference]
    track: Track
    tokenizer: Any = None
    layers: tuple[Layer, ...] = ()
    weights: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    damage: Mapping[str, float] = dataclasses.field(default_factory=dict)
    text: str = ""
    truth: Truth | None = None
    calibration: Int[Tensor, "calibration length"] | None = None


@runtime_checkable
class Measure(Protocol):
    """A measure of a compressed model.

    Optional attributes: ``NEEDS``, the packages that it imports, with ``EXTRA``, the extra that installs them; and
    ``check(windows)``, which raises ValueError if the measure does not fit these test windows.
    """

    def measure(self, target: EvaluationTarget) -> MeasureResult:
        """Return metrics and series of the record."""
        ...


@dataclasses.dataclass(frozen=True)
class Several:
    """Several measures of the same compressed model, one after the other."""

    measures: Sequence[Measure]

    def measure(self, target: EvaluationTarget) -> MeasureResult:
        metrics: dict[str, float] = {}
        series: dict[str, list[float]] = {}
        for part in self.measures:
            part_metrics, part_series = part.measure(target)
            metrics |= part_metrics
            series |= part_series
        return metrics, series


def require(measure: Measure) -> None:
    """Check that the packages that a measure needs are installed.  Raises ValueError, which names the missing ones."""
    for part in parts_of(measure):
        try:
            errors.require(f"measure={type(part).__name__}", getattr(part, "NEEDS", ()), getattr(part, "EXTRA", "eval"))
        except errors.MissingPackage as missing:
            raise ValueError(str(missing)) from None


def check(measure: Measure, windows: Int[Tensor, "windows length"]) -> None:
    """Check that a measure fits these test windows.  Raises ValueError if it needs more or longer ones."""
    for part in parts_of(measure):
        getattr(part, "check", lambda _: None)(windows)


def check_number(number: int, windows: Int[Tensor, "windows length"]) -> None:
    """Check that there are ``number`` windows.  Raises ValueError if not."""
    if not 1 <= number <= len(windows):
        raise ValueError(f"measure.windows={number} must be between 1 and the {len(windows)} test windows")


def check_length(tokens: int, windows: Int[Tensor, "windows length"]) -> None:
    """Check that a prompt and its continuation of ``tokens`` in all fit a window.  Raises ValueError if not."""
    if tokens > windows.shape[1]:
        raise ValueError(f"measure.prompt_tokens + measure.new_tokens exceed the window of {windows.shape[1]}")


def parts_of(measure: Measure) -> Sequence[Measure]:
    """Return the measures that ``Several`` takes, or the measure itself."""
    return measure.measures if isinstance(measure, Several) else [measure]
