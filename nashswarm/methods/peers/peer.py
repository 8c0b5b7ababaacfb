"""The method that compresses with another library, and the table of these libraries.

The bytes are those of the library's packed tensors, scales and zero points; the weights are what the library itself
decodes them to.
"""

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from nashswarm.calibration.context import CalibrationContext
from nashswarm.errors import Unsupported
from nashswarm.layers import Layer
from nashswarm.methods.method import Compressed
from nashswarm.methods.peers import auto_round, bitsandbytes, gguf, hqq, nncf, onnxruntime, quanto, torchao
from nashswarm.methods.peers.library import Library, Packed, pack_as_float16

LIBRARIES: Mapping[str, Library] = {
    "hqq": hqq.LIBRARY,
    "bitsandbytes": bitsandbytes.LIBRARY,
    "quanto": quanto.LIBRARY,
    "torchao": torchao.LIBRARY,
    "onnxruntime": onnxruntime.LIBRARY,
    "nncf": nncf.LIBRARY,
    "auto_round": auto_round.LIBRARY,
    "gguf": gguf.LIBRARY,
}
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Peer:
    """``bits`` for every weight by another library; only a library that tunes reads calibration text.

    ``group_size``: columns that share a scale; None where the library has one scale per row.  A layer whose shape the
    library cannot pack stays at 16 bits; the allocation and a warning in the log name it.
    """

    library: str = "hqq"
    bits: int = 4
    group_size: int | None = 64

    def __post_init__(self) -> None:
        if self.library not in LIBRARIES:
            raise ValueError(f"unknown method.library {self.library!r}: choose among {', '.join(LIBRARIES)}")
        formats = LIBRARIES[self.library].formats
        if self.bits not in formats:
            raise Unsupported(f"method.bits={self.bits}: {self.library} knows {_comma_separated(formats)} bits")
        if self.group_size not in formats[self.bits]:
            sizes = ("null" if size is None else size for size in formats[self.bits])
            raise ValueError(
                f"method.group_size={self.group_size}: {self.library} at {self.bits} bits knows "
                f"{_comma_separated(sizes)}"
            )

    def compress(self, context: CalibrationContext, rng: np.random.Generator) -> Compressed:
        """Pack every layer that fits the library, and the others as 16-bit floats.

        Raises MissingPackage if the library is not installed, Unsupported if it tunes language models and the model is
        none, and ValueError if no layer fits.
        """
        library = LIBRARIES[self.library]
        library.require(f"method.library={self.library}")
        if library.tune and (context.calibration is None or context.calibration[0].get_output_embeddings() is None):
            raise Unsupported(f"method.library={self.library} tunes models that predict text, which this one does not")
        bits = {layer.name: self.bits if library.fits(layer, self.group_size) else 16 for layer in context.layers}
        fitting = [layer for layer in context.layers if bits[layer.name] != 16]
        others = [layer for layer in context.layers if bits[layer.name] == 16]
        if not fitting:
            raise ValueError(f"{self.library} cannot pack any layer in groups of method.group_size={self.group_size}")
        if others:
            names = ", ".join(layer.name for layer in others)
            log.warning("%s cannot pack %d layers, kept at 16 bits: %s", self.library, len(others), names)
        packed_layers = {layer.name: pack_as_float16(layer.weight) for layer in others}
        packed_layers |= self._pack(library, context, fitting, rng)
        return Compressed(
            packed={name: packed_layers[name][0] for name in bits},
            weights={name: packed_layers[name][1] for name in bits},
            allocation="".join(f"{name} {width}\n" for name, width in bits.items()),
            code_bits=sum(bits[layer.name] * layer.parameters for layer in context.layers),
            metrics={"layers_at_16_bits": len(others)},
            foreign=self.library,
        )

    def _pack(
        self, library: Library, context: CalibrationContext, layers: Sequence[Layer], rng: np.random.Generator
    ) -> dict[str, Packed]:
        if library.pack is not None:
            track = context.track(layers, f"packing by {self.library}")
            return {layer.name: library.pack(layer.weight.clone(), self.bits, self.group_size) for layer in track}
        assert library.tune is not None and context.calibration is not None and self.group_size is not None
        return library.tune(*context.calibration, layers, self.bits, self.group_size, int(rng.integers(2**31)))


def _comma_separated(choices: Iterable[Any]) -> str:
    return ", ".join(map(str, choices))
