"""Compressed models as Hugging Face checkpoints: ``save_pretrained`` and ``from_pretrained`` through transformers.

The weight of a compressed matrix is stored under its usual name as a row of bytes, packed tiles or entropy-coded codes;
the code tables that all entropy-coded matrices share stand beside it as ``code_tables``, and everything else (norms,
biases) is 16-bit floats.  Loading maps the file into memory and turns each row of bytes into tiles, never into floats.
``config.json`` carries the version of the format and a checksum over all tensors, whatever files they are spread over.

Importing this module makes the format known to transformers.
"""

import copy
import json
import logging
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from jaxtyping import UInt8
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from nashswarm.layers import Layer
from nashswarm.models.experts import unfuse
from nashswarm.models.matrices import MATRICES, round_others, uncompressed_tensors
from nashswarm.models.sources import CONFIG, WEIGHTS
from nashswarm.packed.modules import (
    Activations,
    PackedMatrix,
    QuantizedEmbedding,
    QuantizedLinear,
    dequantized,
    packable,
    quantized,
    set_activations,
)
from nashswarm.quant.entropy import KINDS, CodeTables, decode_groups, decode_lattice
from nashswarm.quant.grid import QuantizedTensor
from nashswarm.quant.lattice import LatticeTensor
from nashswarm.quant.pack import unpack
from nashswarm.quant.prototype import KIND as PUBLISHED
from nashswarm.quant.prototype import ClassedTensor

METHOD = "nashswarm"
VERSION = 1
TABLES = "code_tables"  # their name beside the packed matrices
FLOATS = {16: torch.float16, 32: torch.float32}
Decoded = LatticeTensor | QuantizedTensor | ClassedTensor
Bytes = UInt8[np.ndarray, " _"]

log = logging.getLogger(__name__)


@register_quantization_config(METHOD)
class NashSwarmConfig(QuantizationConfigMixin):
    """What ``config.json`` says of the format.

    ``checksum``: crc32 over all tensors.  ``float_bits``: of everything but the compressed matrices.  ``activations``:
    what inputs are rounded to inside products.
    """

    quant_method: str  # type: ignore[assignment]

    def __init__(
        self,
        version: int = VERSION,
        checksum: str = "00000000",
        float_bits: int = 16,
        activations: Activations = "int8",
        quant_method: str = METHOD,
    ) -> None:
        self.quant_method, self.version, self.checksum = quant_method, version, checksum
        self.float_bits, self.activations = float_bits, activations
        if float_bits not in FLOATS:
            raise ValueError(
                f"config.json says float_bits={float_bits}; the format knows {' and '.join(map(str, FLOATS))}"
            )


@register_quantizer(METHOD)
class NashSwarmQuantizer(HfQuantizer):
    """How transformers loads and saves compressed models."""

    requires_calibration = True  # so transformers refuses to compress while it loads
    quantization_config: NashSwarmConfig

    def validate_environment(self, *arguments: Any, **options: Any) -> None:
        if self.quantization_config.version != VERSION:
            raise ValueError(
                f"this model is stored in version {self.quantization_config.version} of the nashswarm format, this "
                f"program reads version {VERSION}; install the nashswarm that wrote it"
            )

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **options: Any) -> Any:
        """Check the files, and give every matrix that is stored as bytes room for them."""
        unfuse(model)  # compressed experts are stored matrix by matrix
        self.shapes: dict[str, tuple[int, int]] = {}
        modules = dict(model.named_modules())
        prefix = f"{model.base_model_prefix}."
        sizes = check_files([pathlib.Path(path) for path in checkpoint_files or ()], self.quantization_config.checksum)
        for key, size in sizes.items():
            empty = torch.empty(size, dtype=torch.uint8, device="meta")
            if key == TABLES:
                model.register_buffer(TABLES, empty)
                continue
            stem = key.removesuffix(".weight")
            name = next((name for name in (stem, stem.removeprefix(prefix), prefix + stem) if name in modules), None)
            if name is not None:  # else a part that this architecture lacks, which transformers reports
                self.shapes[name] = _shape(modules[name])
                modules[name].weight = nn.Parameter(empty, requires_grad=False)
        return model

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
        """Turn the bytes of every matrix into tiles."""
        tables = model._buffers.pop(TABLES, None)
        sharing: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            if isinstance(module, MATRICES) and module.weight.dtype == torch.uint8:
                sharing.setdefault(id(module.weight), []).append(name)
                if isinstance(module, nn.Linear) and module.bias is not None:  # tying padded it to the row of bytes
                    module.bias.data = module.bias.data[: module.out_features]
        groups = [tuple(sorted(names, key=lambda name: name not in self.shapes)) for names in sharing.values()]
        packed = {names: model.get_submodule(names[0]).weight.detach().cpu().numpy() for names in groups}
        shapes = {names[0]: self.shapes[names[0]] for names in groups}
        _place(model, packed, shapes, None if tables is None else tables.cpu().numpy())
        set_activations(model, self.quantization_config.activations)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors = stored(model, self.quantization_config.float_bits)
        self.quantization_config.checksum = checksum(tensors)
        model._weight_conversions = []  # no names of older checkpoints, under which the checksum would be another
        return tensors, {}

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """The model with plain floats, all of them of ``dtype``; by default of that it computes in now, whatever its
        config says."""
        wanted = dtype or model.dtype
        return super().dequantize(model, wanted).to(wanted)  # type: ignore[no-untyped-call]

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        found: dict[PackedMatrix, nn.Parameter] = {}
        for name, module in list(model.named_modules(remove_duplicate=False)):
            if isinstance(module, (QuantizedLinear, QuantizedEmbedding)):
                if module.matrix not in found:
                    found[module.matrix] = nn.Parameter(module.matrix.dequantize().to(dtype or model.dtype))
                model.set_submodule(name, dequantized(module, found[module.matrix]))
        model.__dict__.pop("_weight_conversions", None)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # what stands beside the packed matrices: adapters, for example

    @property
    def is_compileable(self) -> bool:
        return True


def adopt(model: Any, layers: Sequence[Layer], packed: Mapping[str, Bytes], float_bits: int = 16) -> None:
    """Put the packed matrices of ``layers`` in the place of the model's own; what stands beside them is rounded to
    ``float_bits``.  From then on the model's ``save_pretrained`` writes the compressed model, and its ``dequantize``
    gives floats back.

    Raises ValueError for bytes that cannot be decoded.
    """
    round_others(uncompressed_tensors(model, layers), float_bits)
    shapes = {layer.name: (layer.weight.shape[0], layer.weight.shape[1]) for layer in layers}
    _place(model, {layer.modules: packed[layer.name] for layer in layers}, shapes, packed.get(TABLES))
    model.hf_quantizer = NashSwarmQuantizer(NashSwarmConfig(float_bits=float_bits))
    model.hf_quantizer.postprocess_model(model)


def files(model: Any, packed: Mapping[str, Bytes], others: Mapping[str, Tensor], float_bits: int) -> dict[str, bytes]:
    """The checkpoint of a compressed model, file by file, as ``save_pretrained`` will write it: from its packed
    matrices (by name; ``code_tables`` where there are any) and its ``other_tensors``."""
    tensors = {_key(name): torch.from_numpy(content.copy()) for name, content in packed.items()}
    tensors |= rounded(others, float_bits)
    config = described(model.config, type(model).__name__, model.dtype, checksum(tensors), float_bits)
    return {WEIGHTS: safetensors.torch.save(tensors, {"format": "pt"}), CONFIG: config}


def described(config: Any, architecture: str, dtype: torch.dtype, found: str, float_bits: int) -> bytes:
    """The ``config.json`` of a compressed model whose tensors have the checksum ``found``."""
    own = copy.deepcopy(config)
    own.quantization_config = NashSwarmConfig(checksum=found, float_bits=float_bits).to_dict()
    own.architectures, own.dtype = [architecture], str(dtype).removeprefix("torch.")
    return own.to_json_string().encode()


def stored(model: Any, float_bits: int) -> dict[str, Tensor]:
    """The tensors of a checkpoint of ``model``: the bytes of each packed matrix once, and everything else as floats."""
    tensors: dict[str, Tensor] = {}
    seen: set[PackedMatrix] = set()
    packed: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (QuantizedLinear, QuantizedEmbedding)):
            packed.append(f"{name}.matrix.")
            if module.matrix not in seen:
                seen.add(module.matrix)
                tensors[_key(name)] = torch.from_numpy(module.matrix.stored().copy())
    if tables := [matrix.tables for matrix in seen if matrix.tables is not None]:
        tensors[TABLES] = torch.from_numpy(tables[0].pack().copy())
    others: dict[int, tuple[str, Tensor]] = {}  # each shared tensor once
    for name, part in model.state_dict().items():
        if not name.startswith(tuple(packed)):
            others.setdefault(part.data_ptr(), (name, part))
    return tensors | rounded(dict(others.values()), float_bits)


def decode(name: str, content: Bytes, tables: CodeTables | None) -> Decoded:
    """The matrix ``name`` from its stored bytes, whatever their format.  Raises ValueError if they cannot be read."""
    kind = content[:4].tobytes()
    try:
        if kind == KINDS["lattice"]:
            if tables is None:
                raise ValueError(f"the file lacks {TABLES}")
            return decode_lattice(content, tables)
        if kind == KINDS["groups"]:
            return decode_groups(content)
        return ClassedTensor.unpack(content) if kind == PUBLISHED else unpack(content)
    except ValueError as error:
        raise ValueError(f"{name} cannot be read: {error}") from error


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """crc32 over names, dtypes, shapes and contents, in hexadecimal digits, whatever the order of the tensors."""
    found = 0
    for name in sorted(tensors):
        part = tensors[name].detach().cpu().contiguous()
        found = zlib.crc32(f"{name} {part.dtype} {tuple(part.shape)}".encode(), found)
        found = zlib.crc32(part.flatten().view(torch.uint8).numpy().data, found)
    return f"{found:08x}"


def check_files(paths: Sequence[pathlib.Path], expected: str) -> dict[str, int]:
    """The name and size of every tensor that is a row of bytes.

    Raises ValueError if a file cannot be read or their checksum is not the ``expected`` one.
    """
    tensors: dict[str, Tensor] = {}
    for path in paths:
        try:
            tensors |= safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is cut short or damaged ({error}); copy it again") from error
        if not _plain_header(path):
            raise ValueError(f"the header of {path} is not as save_pretrained writes it: damaged; copy it again")
    if (found := checksum(tensors)) != expected:
        raise ValueError(
            f"the checksum of {', '.join(map(str, paths))} is {found}, not {expected}: damaged, or not the files that "
            "belong to this config.json; copy the whole folder again"
        )
    return {name: len(part) for name, part in tensors.items() if part.dtype == torch.uint8 and part.ndim == 1}


def _plain_header(path: pathlib.Path) -> bool:
    """Whether a safetensors header says nothing beyond the tensors, in the one way that it is written: readers pass
    over blanks and metadata, where a changed byte would go unseen."""
    with path.open("rb") as file:
        text = file.read(int.from_bytes(file.read(8), "little")).decode()
    found = json.loads(text)
    plain = json.dumps(found, separators=(",", ":"), ensure_ascii=False)
    return text.rstrip(" ") == plain and found.get("__metadata__") == {"format": "pt"}


def _place(
    model: Any,
    packed: Mapping[tuple[str, ...], Bytes],
    shapes: Mapping[str, tuple[int, int]],
    packed_tables: Bytes | None,
) -> None:
    """Packed modules where kernels can read the format; elsewhere the floats that it stands for, and a line that says
    so.  The keys of ``packed`` are modules that share a matrix, ``shapes`` those that the model expects."""
    tables = None if packed_tables is None else CodeTables.unpack(packed_tables)
    dtype, floats = model.dtype, []
    for names, content in packed.items():
        tensor = decode(names[0], content, tables)
        if tuple(tensor.codes.shape) != shapes[names[0]]:
            raise ValueError(
                f"{names[0]} is stored as {_by(tensor.codes.shape)}, the model has it as {_by(shapes[names[0]])}: "
                "weights and config.json belong to different models"
            )
        modules = [model.get_submodule(name) for name in names]
        if isinstance(tensor, ClassedTensor) or not packable(tensor):
            floats.append(names[0])
            weight = tensor.dequantize().to(dtype)
            shared = nn.Parameter(weight.T.contiguous() if isinstance(modules[0], Conv1D) else weight)
            for module in modules:
                module.weight = shared
            continue
        matrix = PackedMatrix(tensor, content[:4].tobytes() in KINDS.values(), tables).to(modules[0].weight.device)
        for name, module in zip(names, modules, strict=True):
            model.set_submodule(name, quantized(module, matrix, dtype))
    if floats:
        log.warning("kernels cannot read the format of %d matrices, kept as floats: %s", len(floats), ", ".join(floats))


def rounded(others: Mapping[str, Tensor], float_bits: int) -> dict[str, Tensor]:
    """The tensors as they are stored.  Raises ValueError for one that 16-bit floats cannot hold."""
    kind = FLOATS[float_bits]
    rounded = {name: (part.to(kind) if part.is_floating_point() else part).detach() for name, part in others.items()}
    if lost := [name for name, part in rounded.items() if not part.isfinite().all() and others[name].isfinite().all()]:
        raise ValueError(f"{', '.join(lost)} does not fit {float_bits}-bit floats")
    return rounded


def _key(name: str) -> str:
    """The name of a packed matrix in the file."""
    return name if name == TABLES else f"{name}.weight"


def _shape(module: nn.Module) -> tuple[int, int]:
    """(out, in)"""
    weight = module.weight
    assert isinstance(weight, Tensor)
    rows, columns = weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
