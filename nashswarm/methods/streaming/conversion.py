"""From the names and layouts of a checkpoint to those of the modules, as transformers itself converts them.

A checkpoint on the hub may hold its tensors under older names, or every expert of a mixture apart, where the modules of
transformers have one fused tensor.
"""

import copy
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, initialization
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from nashswarm.models.checks import quiet_transformers
from nashswarm.models.split_experts import unfuse

INITIALIZED = "_is_hf_initialized"  # the mark by which transformers knows what it must not initialize again


class Unread:
    """A tensor of a checkpoint that is read when it is sliced, which is how transformers reads."""

    def __init__(self, shards: Mapping[str, Tensor], key: str) -> None:
        self.shards, self.key = shards, key

    def __getitem__(self, part: Any) -> Tensor:
        return self.shards[self.key][part]


def targets(model: Any, keys: Iterable[str]) -> dict[str, str]:
    """Return, for every name in a checkpoint, the parameter of ``model`` that it becomes or becomes a part of.

    Where one tensor becomes several parameters it is the first of them.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    expected = model.state_dict()
    found = {}
    for key in keys:
        name, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, expected)
        if name not in expected and key in expected:
            name, _ = rename_source_key(key, [], [], model.base_model_prefix, expected)
        found[key] = name
    return found


def load(model: Any, tensors: Mapping[str, Any], device: str = "cpu") -> Any:
    """Load tensors of a checkpoint into ``model`` in place, in its own dtypes; return what is missing or misfits."""
    config = LoadStateDictConfig(
        device_map={"": device},
        dtype=torch.float32,
        weight_mapping=get_model_conversion_mapping(model),  # type: ignore[arg-type]
    )
    with quiet_transformers():
        info, _ = convert_and_load_state_dict_in_model(model, dict(tensors), config)
    return info


def loaded_block(fused: Any, name: str, shards: Mapping[str, Tensor], keys: Mapping[str, Sequence[str]]) -> nn.Module:
    """Return the module ``name`` of ``fused`` with its weights, its experts split; ``fused`` stays without memory."""
    empty = copy.deepcopy(fused.get_submodule(name))
    wanted = [key for part in keys if part.startswith(f"{name}.") for key in keys[part]]
    try:
        load(fused, {key: Unread(shards, key) for key in wanted})
        block: nn.Module = fused.get_submodule(name)
    finally:
        fused.set_submodule(name, empty)
    initialize_buffers(owner(fused, name), block)
    unfuse(block)
    return block.eval().requires_grad_(False)


@torch.no_grad()
def initialize_buffers(model: Any, part: nn.Module, skipped: Collection[nn.Module] = ()) -> None:
    """Compute the buffers of ``part`` that no checkpoint holds, as ``model`` initializes them.

    ``skipped``: modules in ``part`` that stay without memory.  Raises LookupError for a buffer that stays unknown.
    """
    computed: list[Tensor] = []
    for module in part.modules():
        if module not in skipped:
            module.__dict__.pop(INITIALIZED, None)
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device.type == "meta":
                    module._buffers[name] = values = torch.zeros_like(buffer, device="cpu")
                    if buffer.is_floating_point() and buffer.numel() and name in module._non_persistent_buffers_set:
                        computed.append(values.fill_(math.nan))
    with initialization.guard_torch_init_functions(), torch.random.fork_rng(devices=[]):
        _initialize(model, part, skipped)
    if any(buffer.isnan().all() for buffer in computed):
        raise LookupError("their buffers cannot be computed one block at a time")


def _initialize(model: Any, part: nn.Module, skipped: Collection[nn.Module]) -> None:
    if part not in skipped:
        model = part if isinstance(part, PreTrainedModel) else model
        for child in part.children():
            _initialize(model, child, skipped)
        model._init_weights(part)


def owner(model: Any, name: str) -> Any:
    """Return the innermost model of transformers that holds the module ``name``."""
    parts = name.split(".")
    above = [model.get_submodule(".".join(parts[:end])) for end in range(len(parts))]
    return [module for module in above if isinstance(module, PreTrainedModel)][-1]
