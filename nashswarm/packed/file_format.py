"""The files of a compressed checkpoint: convert matrices and other tensors to bytes, and back.

The weight of a compressed matrix is stored under its usual name as a row of bytes: trellis tiles (``kernels.trellis``),
packed tiles or entropy-coded codes.
The code tables that all entropy-coded matrices share are stored as ``code_tables``.  A few bytes, ``_padding``, put
trellis tiles on cache lines where the file is mapped into memory, unless it is sharded.  All other tensors (norms,
biases, excluded matrices) are floats of 16 or 32 bits.  ``config.json`` holds the version of the format and a checksum
over all tensors, however many files they are spread over.
"""

import copy
import json
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from jaxtyping import UInt8
from torch import Tensor
from transformers.utils.quantization_config import QuantizationConfigMixin

from nashswarm.kernels import trellis
from nashswarm.kernels.trellis import Trellis
from nashswarm.models.matrices import FLOATS, as_stored
from nashswarm.models.sources import CONFIG, WEIGHTS
from nashswarm.packed.matrix import PackedMatrix
from nashswarm.packed.modules import QUANTIZED, Activations
from nashswarm.quant.container import KINDS
from nashswarm.quant.entropy import CodeTables, decode_groups, decode_lattice
from nashswarm.quant.grid import QuantizedTensor
from nashswarm.quant.lattice import LatticeTensor
from nashswarm.quant.pack import unpack
from nashswarm.quant.path_entropy import decode_paths
from nashswarm.quant.prototype import KIND as PROTOTYPE
from nashswarm.quant.prototype import ClassedTensor

METHOD = "nashswarm"
VERSION = 1
TABLES = "code_tables"  # the key of the code tables beside the packed matrices
PADDING = "_padding"  # safetensors sorts by size of numbers, then by name: this is the first of all bytes
EMPTY = "packed_dtype"  # a parameter without numbers, of a model whose matrices are all packed and which has no others
PADDING_BYTES = 256  # that it may take, its entry in the header included
Decoded = LatticeTensor | QuantizedTensor | ClassedTensor
Bytes = UInt8[np.ndarray, " _"]


class NashSwarmConfig(QuantizationConfigMixin):
    """The section ``quantization_config`` of a checkpoint's ``config.json``.

    ``checksum``: crc32 over all tensors, in hexadecimal digits.  ``float_bits``: of every tensor that is not a
    compressed matrix; 32 where 16 cannot hold its numbers.  ``activations``: the type that inputs are rounded to inside
    products.

    Raises ValueError for ``float_bits`` that the format does not have.
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


def checkpoint_files(
    model: Any, packed: Mapping[str, Bytes], others: Mapping[str, Tensor], float_bits: int
) -> dict[str, bytes]:
    """Return the files of a compressed model by name, exactly as ``save_pretrained`` will write them.

    ``packed``: the bytes of each matrix by its name, and ``code_tables`` if there are any.  ``others``: the model's
    ``uncompressed_tensors``.
    """
    tensors = {_key(name): _as_tensor(content) for name, content in packed.items()}
    tensors = with_padding(tensors | to_stored_floats(others, float_bits))
    config = config_json(model.config, type(model).__name__, model.dtype, checksum(tensors), float_bits)
    return {WEIGHTS: safetensors.torch.save(tensors, {"format": "pt"}), CONFIG: config}


def config_json(config: Any, architecture: str, dtype: torch.dtype, checksum: str, float_bits: int) -> bytes:
    """Return the ``config.json`` of a compressed model whose tensors have this checksum."""
    compressed = copy.deepcopy(config)
    compressed.quantization_config = NashSwarmConfig(checksum=checksum, float_bits=float_bits).to_dict()
    compressed.architectures, compressed.dtype = [architecture], str(dtype).removeprefix("torch.")
    return compressed.to_json_string().encode()


def stored_tensors(model: Any, float_bits: int) -> dict[str, Tensor]:
    """Return the tensors of ``model``'s checkpoint: each packed matrix once as bytes, all others as floats."""
    tensors: dict[str, Tensor] = {}
    matrices: set[PackedMatrix] = set()
    packed_names: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QUANTIZED):
            packed_names.append(f"{name}.matrix.")
            if module.matrix not in matrices:
                matrices.add(module.matrix)
                tensors[_key(name)] = _as_tensor(module.matrix.encode())
    if tables := [matrix.tables for matrix in matrices if matrix.tables is not None]:
        tensors[TABLES] = _as_tensor(tables[0].pack())
    others: dict[int, tuple[str, Tensor]] = {}  # each shared tensor once
    for name, tensor in model.state_dict().items():
        if not name.startswith(tuple(packed_names)) and name != EMPTY:
            others.setdefault(tensor.data_ptr(), (name, tensor))
    return with_padding(tensors | to_stored_floats(dict(others.values()), float_bits))


def with_padding(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a file, with bytes before trellis-coded matrices that put these on cache lines.

    Products are then 3 to 6 percent faster (AVX-512).  Files without such matrices stay as they are.
    """
    if not any(part[:3].tolist() == list(trellis.MAGIC[:3]) for part in tensors.values() if part.dtype == torch.uint8):
        return dict(tensors)
    size = 1
    while beyond := _end_of_padding(dict(tensors) | {PADDING: torch.empty(size, dtype=torch.uint8)}) % trellis.LINE:
        size += trellis.LINE - beyond
    return dict(tensors) | {PADDING: torch.zeros(size, dtype=torch.uint8)}


def _end_of_padding(tensors: Mapping[str, Tensor]) -> int:
    """Return where the padding ends in the safetensors file that holds these tensors."""
    end, padded, header = 0, 0, {"__metadata__": {"format": "pt"}}
    for name in sorted(tensors, key=lambda name: (-tensors[name].itemsize, name)):
        part, start = tensors[name], end
        end += part.nbytes
        dtype = f"{str(part.dtype).removeprefix('torch.')[0].upper()}{8 * part.itemsize}"
        header[name] = {"dtype": dtype, "shape": list(part.shape), "data_offsets": [start, end]}  # type: ignore[dict-item]
        padded = end if name == PADDING else padded
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + padded


def decode(name: str, content: Bytes, tables: CodeTables | None) -> Decoded | Trellis:
    """Decode the matrix ``name`` from its stored bytes, whichever format they have.

    A trellis-coded matrix is not decoded: the result is a view of the bytes.  Raises ValueError if the bytes
    cannot be read.
    """
    kind = content[:4].tobytes()
    try:
        if kind[:3] == trellis.MAGIC[:3]:  # of any version
            with torch.inference_mode(False):  # a matrix loaded in inference mode may be used in training
                return trellis.parse(_as_tensor(content))
        if kind in (KINDS["lattice"], KINDS["paths"]):
            if tables is None:
                raise ValueError(f"the file lacks {TABLES}")
            return (decode_lattice if kind == KINDS["lattice"] else decode_paths)(content, tables)
        if kind == KINDS["groups"]:
            return decode_groups(content)
        return ClassedTensor.unpack(content) if kind == PROTOTYPE else unpack(content)
    except ValueError as error:
        raise ValueError(f"{name} cannot be read: {error}") from error


def shape_of(tensor: Decoded | Trellis) -> tuple[int, int]:
    """Return (out, in) of a decoded matrix."""
    rows, columns = (tensor.rows, tensor.columns) if isinstance(tensor, Trellis) else tensor.codes.shape
    return rows, columns


def is_entropy_coded(content: Bytes) -> bool:
    """Check whether the bytes of a matrix are entropy-coded."""
    return content[:4].tobytes() in KINDS.values()


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Return the crc32 over names, dtypes, shapes and contents in hexadecimal digits; the order does not matter."""
    crc = 0
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.flatten().view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def verified_sizes(paths: Sequence[pathlib.Path], expected: str) -> dict[str, int]:
    """Check the files of a checkpoint against a checksum, and return the number of bytes of each packed tensor.

    Raises ValueError if a file cannot be read or the checksum of all tensors is not the ``expected`` one.
    """
    tensors: dict[str, Tensor] = {}
    for path in paths:
        try:
            tensors |= safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is cut short or damaged ({error}); copy it again") from error
        if not _plain_header(path):
            raise ValueError(f"the header of {path} is not as save_pretrained writes it: damaged; copy it again")
    if (actual := checksum(tensors)) != expected:
        raise ValueError(
            f"the checksum of {', '.join(map(str, paths))} is {actual}, not {expected}: damaged, or not the files that "
            "belong to this config.json; copy the whole folder again"
        )
    return {name: len(part) for name, part in tensors.items() if part.dtype == torch.uint8 and part.ndim == 1}


def sizes_of(file_bytes: int, packed_bytes: int, packed_weights: int, parameters: int) -> dict[str, float]:
    """Return the size metrics of a record.

    ``bytes_file``: bytes of weights and config on disk, ``file_bytes``.  ``bits_per_weight``: stored bits per weight of
    the compressed matrices, from ``packed_bytes`` and ``packed_weights``.  ``bits_per_weight_model``: bits on disk per
    parameter of the whole model, everything counted.  ``compression``: the share that is saved of 32-bit floats.

    >>> sizes_of(file_bytes=100, packed_bytes=75, packed_weights=200, parameters=250)
    {'bytes_file': 100, 'bits_per_weight': 3.0, 'bits_per_weight_model': 3.2, 'compression': 0.9}
    """
    return {
        "bytes_file": file_bytes,
        "bits_per_weight": 8 * packed_bytes / packed_weights,
        "bits_per_weight_model": 8 * file_bytes / parameters,
        "compression": 1 - file_bytes / (4 * parameters),
    }


def to_stored_floats(tensors: Mapping[str, Tensor], float_bits: int) -> dict[str, Tensor]:
    """Return the tensors with floats of ``float_bits`` bits, as ``matrices.as_stored`` does."""
    return {name: as_stored(part, float_bits).detach() for name, part in tensors.items()}


def _plain_header(path: pathlib.Path) -> bool:
    """Check that the header of a safetensors file holds the tensors alone, formatted as safetensors writes it.

    Readers skip blanks and metadata, so a changed byte there would go unnoticed.
    """
    with path.open("rb") as file:
        text = file.read(int.from_bytes(file.read(8), "little")).decode()
    header = json.loads(text)
    plain = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
    return text.rstrip(" ") == plain and header.get("__metadata__") == {"format": "pt"}


def _as_tensor(content: Bytes) -> UInt8[Tensor, " _"]:
    """Return the bytes as a tensor, copied only if they are read-only."""
    return torch.from_numpy(np.require(content, requirements="W"))


def _key(name: str) -> str:
    """Return the key of a packed matrix in the file."""
    return name if name == TABLES else f"{name}.weight"
