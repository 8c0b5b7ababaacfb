"""Make the file format known to transformers: ``save_pretrained`` and ``from_pretrained`` of compressed models.

Loading maps the files into memory.  The bytes of a trellis-coded matrix stay where they are mapped: they are read when
they are first used, and never copied.  All other rows of bytes are turned into tiles, none into floats.  Importing this
module registers the format (``file_format``) with transformers.
"""

import functools
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from nashswarm.layers import Layer
from nashswarm.models.matrices import MATRICES, round_to_stored, uncompressed_tensors
from nashswarm.models.split_experts import unfuse
from nashswarm.packed.file_format import (
    EMPTY,
    METHOD,
    PADDING,
    TABLES,
    VERSION,
    Bytes,
    NashSwarmConfig,
    checksum,
    decode,
    is_entropy_coded,
    shape_of,
    stored_tensors,
    verified_sizes,
)
from nashswarm.packed.matrix import PackedMatrix, as_held
from nashswarm.packed.modules import (
    QUANTIZED,
    dequantized,
    quantized,
    set_activations,
)
from nashswarm.packed.native_forward import by_modules, natively
from nashswarm.quant.entropy import CodeTables

log = logging.getLogger(__name__)

register_quantization_config(METHOD)(NashSwarmConfig)


@register_quantizer(METHOD)
class NashSwarmQuantizer(HfQuantizer):
    """The hooks by which transformers loads and saves compressed models."""

    requires_calibration = True  # so transformers refuses to compress while it loads
    quantization_config: NashSwarmConfig

    def validate_environment(self, *arguments: Any, **options: Any) -> None:
        if self.quantization_config.version != VERSION:
            raise ValueError(
                f"this model is stored in version {self.quantization_config.version} of the nashswarm format, this "
                f"program reads version {VERSION}; install the nashswarm that wrote it"
            )

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **options: Any) -> Any:
        """Check the files, and give every matrix that is stored as bytes an empty tensor of that many bytes."""
        unfuse(model)  # compressed experts are stored matrix by matrix
        self.shapes: dict[str, tuple[int, int]] = {}
        self.plain: dict[nn.Module, Any] = {}  # the weights, without values, whose place bytes have taken
        modules = dict(model.named_modules())
        prefix = f"{model.base_model_prefix}."
        paths = [pathlib.Path(path) for path in checkpoint_files or ()]
        for key, size in verified_sizes(paths, self.quantization_config.checksum).items():
            empty = torch.empty(size, dtype=torch.uint8, device="meta")
            if key in (TABLES, PADDING):
                model.register_buffer(key, empty)
                continue
            stem = key.removesuffix(".weight")
            name = next((name for name in (stem, stem.removeprefix(prefix), prefix + stem) if name in modules), None)
            if name is not None:  # transformers reports a matrix that this architecture does not have
                self.shapes[name] = _shape(modules[name])
                self.plain[modules[name]] = modules[name].weight
                modules[name].weight = nn.Parameter(empty, requires_grad=False)
        for module in modules.values():
            if isinstance(module, PreTrainedModel):
                module.__dict__["_init_weights"] = functools.partial(self._initialize, module._init_weights)
        return model

    def _initialize(self, initialize: Callable[[nn.Module], None], module: nn.Module) -> None:
        """Initialize what a module holds beside packed weights, as ``initialize`` does.

        Some architectures write into weights of any dtype, into those of the module's children, or ask for shapes.
        """
        held = {part: part.weight for part in (module, *module.children()) if part in self.plain}
        for part in held:
            part.weight = self.plain[part]
        initialize(module)
        for part, weight in held.items():
            part.weight = weight

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
        """Replace every module whose weight is a row of bytes."""
        self.plain = {}
        for module in model.modules():
            module.__dict__.pop("_init_weights", None)
        tables, _ = (model._buffers.pop(key, None) for key in (TABLES, PADDING))
        sharing: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            if isinstance(module, QUANTIZED):  # whose weight is decoded at every call
                continue
            if isinstance(module, MATRICES) and module.weight.dtype == torch.uint8:
                sharing.setdefault(id(module.weight), []).append(name)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    # transformers padded the bias of a tied head to the length of the row of bytes
                    module.bias.data = module.bias.data[: module.out_features]
        groups = [tuple(sorted(names, key=lambda name: name not in self.shapes)) for names in sharing.values()]
        packed = {names: model.get_submodule(names[0]).weight.detach().cpu().numpy() for names in groups}
        shapes = {names[0]: self.shapes[names[0]] for names in groups}
        _replace_matrices(model, packed, shapes, None if tables is None else tables.cpu().numpy())
        set_activations(model, self.quantization_config.activations)
        return natively(model)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors = stored_tensors(model, self.quantization_config.float_bits)
        self.quantization_config.checksum = checksum(tensors)
        model._weight_conversions = []  # renaming to an older checkpoint's keys would change the checksum
        return tensors, {}

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Return the model with plain floats of ``dtype``; by default the dtype that it computes in now, even if its
        config names another one."""
        dtype = dtype or model.dtype
        return super().dequantize(model, dtype).to(dtype)  # type: ignore[no-untyped-call]

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        by_modules(model)
        weights: dict[PackedMatrix, nn.Parameter] = {}
        for name, module in list(model.named_modules(remove_duplicate=False)):
            if isinstance(module, QUANTIZED):
                if module.matrix not in weights:
                    weights[module.matrix] = nn.Parameter(module.matrix.dequantize().to(dtype or model.dtype))
                model.set_submodule(name, dequantized(module, weights[module.matrix]))
        model.__dict__.pop("_weight_conversions", None)
        model._parameters.pop(EMPTY, None)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # the tensors beside the packed matrices: adapters, for example

    @property
    def is_compileable(self) -> bool:
        return True


def adopt(model: Any, layers: Sequence[Layer], packed: Mapping[str, Bytes], float_bits: int = 16) -> None:
    """Replace the matrices of ``layers`` in ``model`` by their packed bytes, in place.

    All other tensors are rounded to ``float_bits``.  From then on the model's ``save_pretrained`` writes the compressed
    model, and its ``dequantize`` gives floats back.  Raises ValueError for bytes that cannot be decoded.
    """
    round_to_stored(uncompressed_tensors(model, layers), float_bits)
    shapes = {layer.name: (layer.weight.shape[0], layer.weight.shape[1]) for layer in layers}
    _replace_matrices(model, {layer.modules: packed[layer.name] for layer in layers}, shapes, packed.get(TABLES))
    model.hf_quantizer = NashSwarmQuantizer(NashSwarmConfig(float_bits=float_bits))
    model.hf_quantizer.postprocess_model(model)
    natively(model)


def _replace_matrices(
    model: Any,
    packed: Mapping[tuple[str, ...], Bytes],
    shapes: Mapping[str, tuple[int, int]],
    packed_tables: Bytes | None,
) -> None:
    """Replace modules by packed ones where kernels can read the format, elsewhere their weights by decoded floats.

    A warning lists the matrices kept as floats.  The keys of ``packed`` are the modules that share a matrix; ``shapes``
    are those that the model expects.
    """
    tables = None if packed_tables is None else CodeTables.unpack(packed_tables)
    floats = (part.dtype for part in model.parameters() if part.is_floating_point())
    dtype, kept_as_floats = next(floats, model.config.dtype or torch.get_default_dtype()), []
    for names, content in packed.items():
        tensor = decode(names[0], content, tables)
        if shape_of(tensor) != shapes[names[0]]:
            raise ValueError(
                f"{names[0]} is stored as {_by(shape_of(tensor))}, the model has it as {_by(shapes[names[0]])}: "
                "weights and config.json belong to different models"
            )
        modules = [model.get_submodule(name) for name in names]
        matrix = as_held(tensor, is_entropy_coded(content), tables)
        if isinstance(matrix, Tensor):
            kept_as_floats.append(names[0])
            weight = matrix.to(dtype)
            shared = nn.Parameter(weight.T.contiguous() if isinstance(modules[0], Conv1D) else weight)
            for module in modules:
                module.weight = shared
            continue
        matrix.to(modules[0].weight.device)
        for name, module in zip(names, modules, strict=True):
            model.set_submodule(name, quantized(module, matrix, dtype))
    if not any(part.is_floating_point() for part in model.parameters()):  # transformers asks them for dtype and device
        model.register_parameter(EMPTY, nn.Parameter(torch.zeros(0, dtype=dtype), requires_grad=False))
    if kept_as_floats:
        log.warning(
            "kernels cannot read the format of %d matrices, kept as floats: %s",
            len(kept_as_floats), ", ".join(kept_as_floats),
        )  # fmt: skip


def _shape(module: nn.Module) -> tuple[int, int]:
    """Return (out, in)."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    rows, columns = weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
