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

BATCH = 8  # windows
MeasureResult = tuple[dict[str, float], dict[str, list[float]]]


@dataclasses.dataclass(frozen=True)
class EvaluationTarget:
    """A full model, its compressed copy as floats, and the test windows.  ``packed``: the compressed model as it is
    loaded, computing on packed weights.  ``reference``: the full model's answers to the windows, given a batch size.
    ``layers``: the full model's matrices, ``weights``: the compressed ones by the layers' names, ``damage``: what the
    method predicts of each, in nats per token, if it predicts any.  ``text``, ``tokenizer``: what the windows were cut
    from, and by what.  ``truth``: what is right of them, where each is an example of a task."""

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


@runtime_checkable
class Measure(Protocol):
    """What the runner asks of a measure: metrics and series of the record."""

    def measure(self, subject: EvaluationTarget) -> MeasureResult: ...


@dataclasses.dataclass(frozen=True)
class Several:
    """Several measures of the same compressed model, one after the other."""

    measures: Sequence[Measure]

    def measure(self, subject: EvaluationTarget) -> MeasureResult:
        parts = [part.measure(subject) for part in self.measures]
        found = {name: value for own, _ in parts for name, value in own.items()}
        return found, {name: values for _, own in parts for name, values in own.items()}


def require(measure: Measure) -> None:
    """Raises ValueError if a package that a measure needs is not installed: without it nothing can be measured."""
    for part in parts_of(measure):
        try:
            errors.require(f"measure={type(part).__name__}", getattr(part, "NEEDS", ()), getattr(part, "EXTRA", "eval"))
        except errors.MissingPackage as missing:
            raise ValueError(str(missing)) from None


def check(measure: Measure, windows: Int[Tensor, "windows length"]) -> None:
    """Raises ValueError if a measure asks for more than these test windows are."""
    for part in parts_of(measure):
        getattr(part, "check", lambda _: None)(windows)


def check_number(asked: int, windows: Int[Tensor, "windows length"]) -> None:
    if not 1 <= asked <= len(windows):
        raise ValueError(f"measure.windows={asked} must be between 1 and the {len(windows)} test windows")


def check_length(tokens: int, windows: Int[Tensor, "windows length"]) -> None:
    if tokens > windows.shape[1]:
        raise ValueError(f"measure.prompt_tokens + measure.new_tokens exceed the window of {windows.shape[1]}")


def parts_of(measure: Measure) -> Sequence[Measure]:
    return measure.measures if isinstance(measure, Several) else [measure]
