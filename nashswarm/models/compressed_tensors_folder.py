"""Write and read folders in the format of compressed-tensors, which transformers and vLLM load.

Linear matrices hold signed codes in groups, packed by the package ``compressed-tensors`` itself; ``config.json`` says
which matrix has which scheme.  Everything else is stored in 16-bit floats.  vLLM computes q, k and v in one product,
and gate and up in another, and wants one scheme for all matrices of a product: ``products`` names them.
"""

import contextlib
import json
import logging
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from nashswarm.layers import Layer
from nashswarm.models.split_experts import ExpertLinear
from nashswarm.quant.signed_groups import SignedGroups
from nashswarm.records.files import write_folder

PACKAGE, FORMAT = "compressed-tensors", "pack-quantized"
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
WIDTHS = range(2, 9)  # bits of a code
SCHEME = re.compile(rf"int([{WIDTHS[0]}-{WIDTHS[-1]}])-g(\d+)")
TEXT = """---
library_name: transformers
tags: [nashswarm, compressed-tensors]
---

# {name}, in the format of compressed-tensors

Matrices chose their widths under one price of a byte; `nashswarm inspect` on this folder lists them and what each could
still gain by another. transformers loads it (`pip install compressed-tensors`), and so does vLLM:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this folder")
```
"""


def parse_scheme(name: str) -> tuple[int, int]:
    """Return the bits of a code and the columns of a group.  Raises ValueError for what is no scheme.

    >>> parse_scheme("int4-g128")
    (4, 128)
    """
    found = SCHEME.fullmatch(name)
    if found is None or not int(found[2]):
        raise ValueError(f"{name!r} is no scheme: write intB-gN, B from 2 to 8 bits and N columns, such as int4-g128")
    return int(found[1]), int(found[2])


def products(model: Any, layers: Sequence[Layer]) -> list[list[Layer]]:
    """Return the matrices that the format can hold, those together that vLLM multiplies by in one product.

    Embeddings and the head are left out.  Raises ValueError for a model without such matrices, and for one whose
    experts were split here, because transformers would not find them under these names.
    """
    if any(isinstance(module, ExpertLinear) for module in model.modules()):
        raise ValueError(f"a mixture with fused experts cannot be written for {PACKAGE}: leave --to out")
    head, found = model.get_output_embeddings(), dict[tuple[str, ...], list[Layer]]()
    for layer in layers:
        modules = [model.get_submodule(name) for name in layer.modules]
        if len(modules) > 1 or type(modules[0]) is not nn.Linear or modules[0] is head:
            continue
        parent, _, role = layer.name.rpartition(".")
        found.setdefault((parent, *next((roles for roles in TOGETHER if role in roles), (role,))), []).append(layer)
    if not found:
        raise ValueError(
            f"{PACKAGE} packs Linear matrices alone, of which {type(model).__name__} has none: write it with --to gguf "
            "or leave --to out"
        )
    return list(found.values())


def stored_bytes(rows: int, columns: int, scheme: str | None) -> int:
    """Return the bytes of a matrix in a scheme, or in 16-bit floats, without the names of its tensors."""
    if scheme is None:
        return 2 * rows * columns
    bits, group = parse_scheme(scheme)
    return rows * (4 * -(-columns * bits // 32) + 2 * (columns // group)) + 16  # packed codes, scales, the shape


def other_bytes(model: Any, layers: Sequence[Layer], schemes: Sequence[str]) -> int:
    """Return the most bytes that files take beside the matrices of ``layers``: header, config, all other tensors."""
    names = {f"{layer.name}.weight" for layer in layers}
    config, total = _configured(model, dict.fromkeys((layer.name for layer in layers), None), schemes), 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    kept = {id(tensor) for tensor in model.parameters()} | {id(tensor) for tensor in model.buffers()}
    largest = [4 * sum(tensor.numel() for tensor in model.parameters())] * 2  # bytes, more than any offset
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in names:
            parts = ("packed", "scale", "shape")
            header |= {f"{name}_{part}": _entry([*tensor.shape], largest) for part in parts}
        elif id(tensor) in kept:
            kept.remove(id(tensor))  # tied tensors are stored once
            total += tensor.numel() * (2 if tensor.is_floating_point() else tensor.element_size())
            header[name] = _entry([*tensor.shape], largest)
    return total + 16 + len(json.dumps(header, separators=(",", ":"))) + len(config)


def write(
    model: Any,
    folder: pathlib.Path,
    matrices: Mapping[str, SignedGroups | None],
    tokenizer: Any = None,
    name: str = "A model",
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a model in one step, ``matrices`` packed; those that are None stay in 16-bit floats, as everything else.

    ``files``: further files of the folder.  Raises ValueError for a tensor that 16-bit floats cannot hold.
    """
    chosen = {name: scheme_name(matrix) if matrix is not None else None for name, matrix in matrices.items()}
    config = _configured(model, chosen, sorted({scheme for scheme in chosen.values() if scheme is not None}))
    state = _state(model, matrices)

    def fill(partial: pathlib.Path) -> None:
        model.save_pretrained(partial, state_dict=state, max_shard_size=1 << 62)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)

    contents = {CARD: TEXT.format(name=name).encode(), **(files or {}), CONFIG: config.encode()}
    write_folder(folder, contents, fill)


def scheme_name(matrix: SignedGroups) -> str:
    """Return the scheme of a matrix, as ``parse_scheme`` reads it."""
    return f"int{matrix.bits}-g{matrix.group_size}"


def is_one(folder: pathlib.Path) -> bool:
    """Whether a folder holds a model in this format."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        config = json.loads((folder / CONFIG).read_text())
        return (
            bool(config["quantization_config"]["quant_method"] == PACKAGE) if "quantization_config" in config else False
        )
    return False


def read_schemes(folder: pathlib.Path) -> dict[str, tuple[str | None, tuple[int, int]]]:
    """Return the scheme of each matrix, None in 16-bit floats, and its shape, as config and weights of a folder say.

    Raises ValueError for a folder whose files are damaged or do not go together.
    """
    try:
        groups = json.loads((folder / CONFIG).read_text())["quantization_config"]["config_groups"].values()
        with safetensors.safe_open(folder / WEIGHTS, "pt") as file:
            found = dict(_listed(file, groups))
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise ValueError(f"{folder} is damaged, copy it again: {error}") from error
    return found


def _listed(file: Any, groups: Any) -> Iterator[tuple[str, tuple[str | None, tuple[int, int]]]]:
    schemes = {
        target: f"int{group['weights']['num_bits']}-g{group['weights']['group_size']}"
        for group in groups
        for target in group["targets"]
    }
    for name, scheme in schemes.items():
        rows, columns = file.get_tensor(f"{name}.weight_shape").tolist()
        bits, group = parse_scheme(scheme)
        shapes = [file.get_slice(f"{name}.weight_{part}").get_shape() for part in ("packed", "scale")]
        if shapes != [[rows, -(-columns * bits // 32)], [rows, columns // group]]:
            raise ValueError(f"{name} is not packed as {scheme}")
        yield name, (scheme, (rows, columns))
    for key in file.keys():  # noqa: SIM118  it is no dict
        shape = file.get_slice(key).get_shape()
        if key.endswith(".weight") and len(shape) == 2:
            yield key.removesuffix(".weight"), (None, (shape[0], shape[1]))


def _state(model: Any, matrices: Mapping[str, SignedGroups | None]) -> dict[str, Tensor]:
    """Return the tensors of the files, tied ones as one, by the names that transformers loads them by."""
    from compressed_tensors.compressors import BaseCompressor

    packer = BaseCompressor.get_value_from_registry(FORMAT)
    state: dict[str, Tensor] = {}
    halves: dict[int, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        matrix = matrices.get(name.removesuffix(".weight"))
        if matrix is not None:
            given = {"weight": matrix.dequantize(), "weight_scale": matrix.scale.float()}
            packed = packer.compress(given, _scheme(scheme_name(matrix), []))
            state |= {f"{name.removesuffix('weight')}{key}": part for key, part in packed.items()}
            state[f"{name}_scale"] = matrix.scale
            continue
        if id(tensor) not in halves:
            half = tensor.detach().half() if tensor.is_floating_point() else tensor.detach()
            if half.is_floating_point() and not half.isfinite().all():
                raise ValueError(f"{name} does not fit 16-bit floats, so this model cannot be written for {PACKAGE}")
            halves[id(tensor)] = half
        state[name] = halves[id(tensor)]
    return state


def _scheme(name: str, targets: list[str]) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    bits, group = parse_scheme(name)
    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="group", group_size=group)
    return QuantizationScheme(targets=targets, weights=weights, format=FORMAT)


def _configured(model: Any, chosen: Mapping[str, str | None], schemes: Sequence[str]) -> str:
    """Return the config of the model with one group for each scheme, and all other Linear modules to be ignored."""
    from compressed_tensors.quantization import QuantizationConfig

    logging.getLogger(PACKAGE).setLevel(logging.WARNING)
    linear = [name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, nn.Linear)]
    groups = {
        f"group_{number}": _scheme(scheme, [name for name, own in chosen.items() if own == scheme])
        for number, scheme in enumerate(schemes)
    }
    quantization = QuantizationConfig(
        config_groups=groups, format=FORMAT, quantization_status="compressed",
        ignore=[name for name in linear if chosen.get(name) is None],
    )  # fmt: skip
    config = json.loads(model.config.to_json_string(use_diff=True))
    config |= {"architectures": [type(model).__name__], "dtype": str(torch.float16).removeprefix("torch.")}
    return json.dumps(config | {"quantization_config": quantization.model_dump(mode="json")}, indent=1) + "\n"


def _entry(shape: list[int], offsets: list[int]) -> dict[str, Any]:
    return {"dtype": "F16", "shape": shape, "data_offsets": offsets}
