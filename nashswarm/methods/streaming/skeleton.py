"""A model without memory: which of its modules are the decoder blocks, and what is stored together."""

import dataclasses
import logging
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from nashswarm.methods.streaming import surroundings
from nashswarm.methods.streaming.surroundings import Structure
from nashswarm.models.matrices import is_router
from nashswarm.models.split_experts import unfuse

log = logging.getLogger(__name__)
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"))  # read one input
LEAVE_OUT = "leave --by-layer out, which compresses the model as a whole in memory"
EMBEDDING, BLOCK, REST = "embedding", "block", "rest"


@dataclasses.dataclass(frozen=True)
class Unit:
    """What is compressed and stored together.

    ``modules``: its names, for records.  ``tensors``: the names of its tensors.  ``matrices``: the modules in it whose
    weights are compressed; those of one tuple read the same input.
    """

    kind: str
    modules: tuple[str, ...]
    tensors: tuple[str, ...]
    matrices: tuple[tuple[str, ...], ...]


_structures: "weakref.WeakKeyDictionary[nn.Module, Structure]" = weakref.WeakKeyDictionary()


def skeleton(config: Any) -> Any:
    """Return the model of a config without memory, every expert a module of its own.

    Raises ValueError unless it is a decoder of plain floats whose blocks run one after another.
    """
    model = with_fused_experts(config)
    structure = _structure(model)
    unfuse(model)
    _structures[model] = structure
    return model


def with_fused_experts(config: Any) -> Any:
    """Return the model of a config without memory, with the modules of transformers."""
    mapping = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    kind: Any = mapping.get(type(config), None)
    named = (config.architectures or [getattr(kind, "__name__", config.model_type)])[0]
    is_part = kind is not None and config.get_text_config() is not config and not isinstance(config, kind.config_class)
    if kind is None or named != kind.__name__ or is_part:  # the class of a multimodal model's text alone
        article = f"a {named} with a config of {config.model_type!r}"
        raise ValueError(f"compress by layer knows decoders, and this is {article}: {LEAVE_OUT}")
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("the checkpoint is quantized already: start from the full model")
    for attention in ("sdpa", "eager"):
        config._attn_implementation = attention
        try:
            with torch.device("meta"):
                return kind._from_config(config, dtype=torch.float32).eval()
        except ValueError:  # the architecture does not know this attention
            if attention == "eager":
                raise


def structure_of(model: Any) -> Structure:
    """Return what is known of a model that ``skeleton`` made."""
    return _structures[model]


def _structure(model: Any) -> Structure:
    names = {module: name for name, module in model.named_modules()}
    name, head = type(model).__name__, model.get_output_embeddings()
    try:
        embedding = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        embedding = None
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise ValueError(f"compress by layer needs one embedding and one head, which a {name} lacks: {LEAVE_OUT}")
    lists = [
        part for part in model.modules() if isinstance(part, nn.ModuleList) and any(True for _ in part.parameters())
    ]
    inner = {module for part in lists for module in part.modules() if module is not part}
    outermost = {
        names[part]: sum(weight.numel() for weight in part.parameters()) for part in lists if part not in inner
    }
    reason = "there are none"
    for chosen in sorted(outermost, key=lambda part: -outermost[part]):
        blocks = tuple(names[block] for block in model.get_submodule(chosen))
        others = [part for part in outermost if part != chosen]
        for returned in range(3):
            try:
                width = surroundings.probe(model, blocks, others, names[head], returned)
                _check_unshared(model, blocks)
            except LookupError as error:
                reason = f"{error}"
            except Exception as error:  # any, of code that gets another type than it expects
                log.debug("blocks %s in tuples of %d: %r", chosen, returned, error)
            else:
                tied = head.weight is embedding.weight
                return Structure(names[embedding], names[head], tied, blocks, returned, width)
    raise ValueError(f"the decoder blocks of a {name} do not simply run one after another ({reason}): {LEAVE_OUT}")


def _check_unshared(model: Any, blocks: Sequence[str]) -> None:
    """Raise LookupError if a block shares weights with another module."""
    unit_of = {f"{block}.": block for block in blocks}
    sharing: dict[int, set[str]] = {}
    for name, part in model.state_dict(keep_vars=True).items():
        unit = next((block for prefix, block in unit_of.items() if name.startswith(prefix)), "")
        sharing.setdefault(id(part), set()).add(unit)
    for name, other in getattr(model, "all_tied_weights_keys", {}).items():
        units_of_both = [next((b for p, b in unit_of.items() if part.startswith(p)), "") for part in (name, other)]
        sharing[len(sharing)] = set(units_of_both)
    if any(len(found) > 1 for found in sharing.values()):
        raise LookupError("they share weights")


def units(model: Any) -> list[Unit]:
    """Return what is compressed and stored together, in order; a tied embedding is the head, in the last unit."""
    structure, tensors = structure_of(model), tensors_of(model)
    names_of = {block: [name for name in tensors if name.startswith(f"{block}.")] for block in structure.blocks}
    matrices: dict[str, list[str]] = {block: [] for block in structure.blocks}
    for block in structure.blocks:
        for name, module in model.get_submodule(block).named_modules(prefix=block):
            if f"{name}.weight" in tensors and is_matrix(name, module):
                matrices[block].append(name)
    listed = [Unit(BLOCK, (block,), tuple(names_of[block]), _groups(matrices[block])) for block in structure.blocks]
    others = [name for name in tensors if not name.startswith(tuple(f"{block}." for block in structure.blocks))]
    last = structure.embedding if structure.tied else structure.head
    if not structure.tied:
        first = [name for name in others if name.startswith(f"{structure.embedding}.")]
        listed.insert(0, Unit(EMBEDDING, (structure.embedding,), tuple(first), ((structure.embedding,),)))
        others = [name for name in others if name not in first]
    owners = dict.fromkeys(name.rpartition(".")[0] for name in others if not name.startswith(f"{last}."))
    return [*listed, Unit(REST, (*owners, last), tuple(others), ((last,),))]


def is_matrix(name: str, module: nn.Module) -> bool:
    """Check whether a module in a block is compressed: Linear or Conv1D, and neither a router nor a gate of experts."""
    weight = getattr(module, "weight", None)
    dense = isinstance(module, (nn.Linear, Conv1D)) and isinstance(weight, Tensor) and weight.ndim == 2
    return dense and weight is not None and bool(weight.numel()) and not is_router(name) and not name.endswith(".gate")


def shape_of(module: Any) -> tuple[int, int]:
    """Return (out, in) of a matrix."""
    rows, columns = module.weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def weight_of(module: Any) -> Tensor:
    """Return the weight of a matrix as (out, in)."""
    weight: Tensor = module.weight
    return weight.T if isinstance(module, Conv1D) else weight


def tensors_of(model: Any) -> dict[str, Tensor]:
    """Return the tensors that a checkpoint of the model holds: shared ones once, under their first name."""
    first = {id(part): name for name, part in reversed(model.state_dict(keep_vars=True).items())}
    return {name: part for name, part in model.state_dict(keep_vars=True).items() if first[id(part)] == name}


def _groups(names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Return the matrices of a block, those together that read the same input."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        owner, _, leaf = name.rpartition(".")
        together = next((leaves for leaves in TOGETHER if leaf in leaves), (leaf,))
        groups.setdefault((owner, *together), []).append(name)
    return tuple(map(tuple, groups.values()))
