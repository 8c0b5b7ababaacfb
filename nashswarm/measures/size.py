"""Bytes in the file and in memory."""

import dataclasses
from typing import Any

from nashswarm.measures.measure import EvaluationTarget, MeasureResult
from nashswarm.runtime import memory_limit


@dataclasses.dataclass(frozen=True)
class Size:
    """Bytes alone: of the file, and of all that the loaded models hold in memory.  Nothing is run."""

    def measure(self, subject: EvaluationTarget) -> MeasureResult:
        full, own = (resident_bytes(model) for model in (subject.full, subject.packed()))
        return {"bytes_resident": own, "bytes_resident_full": full}, {}


def resident_bytes(model: Any) -> int:
    """Bytes of all parameters and buffers of a loaded model, shared ones once; a contestant that keeps its weights out
    of torch's sight says how many they are as ``weight_bytes``."""
    held = sum(part.nbytes for part in memory_limit.tensors(model))
    return held + sum(getattr(module, "weight_bytes", 0) for module in model.modules())
