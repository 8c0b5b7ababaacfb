"""The quick validation of the earlier prototype, on a model that was trained: its size, quality and speed before and
after compression."""

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from nashswarm import api
from nashswarm.measures.measure import MeasureResult
from nashswarm.measures.moe.target import MoeMeasure, MoeTarget, check_sizes
from nashswarm.measures.size import resident_bytes
from nashswarm.measures.timing import WARM_UP, interleaved, seconds
from nashswarm.models import evaluation

FLOAT_BYTES = 4


@dataclasses.dataclass(frozen=True)
class QuickValidation(MoeMeasure):
    """The model as trained, and compressed by ``nash_lattice`` to ``bits`` stored bits per parameter.

    ``bytes_memory``: of the 32-bit floats.  ``bytes_file``, ``bytes_resident``: of the compressed model on disk and as
    it runs.  ``nll`` (nats per token), ``latency_ms`` (per batch) and ``tokens_per_second`` are those of the trained
    model and, with ``_quantized``, of the compressed one.  Experts are compressed like all other matrices; how often
    calibration tokens use them is part of their sensitivity.
    """

    batch_size: int = 8
    length: int = 32
    batches: int = 20
    bits: float = 3.0

    def __post_init__(self) -> None:
        check_sizes(self, "batch_size", "length", "batches")
        if self.length < 2:
            raise ValueError("measure.length=1 must be at least 2: the second token is predicted from the first")
        if not self.bits > 0:
            raise ValueError(f"measure.bits={self.bits} must be positive")

    @property
    def tokens(self) -> int:
        return self.batches * self.batch_size * self.length

    def check(self, windows: Int[Tensor, "windows length"], context: int) -> None:
        if self.length > context:
            raise ValueError(f"measure.length={self.length} exceeds model.context={context}")
        if windows.numel() < self.tokens:
            raise ValueError(f"the validation text has {windows.numel()} tokens; lower measure.batches")

    def measure(self, target: MoeTarget) -> MeasureResult:
        model = target.model
        self.check(target.windows, model.config.max_position_embeddings)
        windows = target.windows.flatten()[: self.tokens].view(-1, self.length)
        packed, report = api.compress(model, target.trained.tokenizer, "nash_lattice", target.calibration, self.bits)
        metrics = {
            "bytes_memory": float(FLOAT_BYTES * sum(part.numel() for part in model.parameters())),
            "bytes_file": report.bytes_file,
            "bits_per_weight_model": report.bits_per_weight_model,
            "bytes_resident": resident_bytes(packed),
            "active_parameters": model.active_parameters,
            "quantize_seconds": report.seconds,
        }
        series: dict[str, list[float]] = {}
        for suffix, version in (("", model), ("_quantized", packed)):
            by_window = evaluation.evaluate(version, windows, self.batch_size, track=target.track)
            metrics[f"nll{suffix}"] = evaluation.summarise(by_window)["nll"]
            series[f"nll{suffix}"] = by_window["nll"]
        series["tokens"] = [float(self.length - 1)] * len(windows)

        batches = windows.split(self.batch_size)
        warm_up = batches[:WARM_UP]
        turns = {
            "": _turns(model, [*warm_up, *batches]).__next__,
            "_quantized": _turns(packed, [*warm_up, *batches]).__next__,
        }
        with torch.no_grad():
            times = interleaved(turns, len(batches), len(warm_up))
        for suffix, by_batch in times.items():
            median = float(np.median(by_batch))
            metrics[f"latency_ms{suffix}"] = 1e3 * median
            metrics[f"tokens_per_second{suffix}"] = self.batch_size * self.length / median
        return metrics, series


def _turns(model: torch.nn.Module, batches: list[Int[Tensor, "batch length"]]) -> Iterator[float]:
    """Yield the seconds of one batch after the other."""
    for batch in batches:
        yield seconds(functools.partial(model, input_ids=batch), batch.device)
