"""Bytes that loaded models hold in memory."""

import dataclasses
from typing import Any

from nashswarm.measures.measure import EvaluationTarget, MeasureResult
from nashswarm.runtime import memory_limit


@dataclasses.dataclass(frozen=True)
class Size:
    """Bytes in memory of the packed model, ``bytes_resident``, and of the full one, ``bytes_resident_full``.

    The models are loaded but not run; every record has the bytes of the file anyway.
    """

    def measure(self, target: EvaluationTarget) -> MeasureResult:
        full, packed = (resident_bytes(model) for model in (target.full, target.packed()))
        return {"bytes_resident": packed, "bytes_resident_full": full}, {}


def resident_bytes(model: Any) -> int:
    """Return the bytes of all parameters and buffers of a loaded model, shared ones once.

    A module that holds weights outside torch says how many bytes they are in an attribute ``weight_bytes``.
    """
    torch_bytes = sum(part.nbytes for part in memory_limit.tensors(model))
    return torch_bytes + sum(getattr(module, "weight_bytes", 0) for module in model.modules())
