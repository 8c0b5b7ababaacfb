"""Split the fused experts of mixtures into linear layers, so that each matrix can be compressed and run packed.

transformers fuses the matrices of all experts of a layer into tensors of three dimensions.  ``unfuse`` knows their
layouts: gate and up stacked or interleaved, stored as they are or transposed, with biases or without, with experts that
return their input, experts that all see every token, and single matrices by expert (JetMoe).  What has another layout
is left alone, and stays at 16 bits.
"""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nashswarm import kernels
from nashswarm.models.experts import gather_gated


class ExpertLinear(nn.Linear):
    """A matrix of one expert; ``routed`` marks that it sees only the tokens that are routed to it."""

    routed = True


class Expert(nn.Module):
    """The matrices of one expert as linear layers, for example ``expert_up`` (the gate stacked above, if it has one)
    and ``expert_down``; transformers does not fuse modules of these names when it loads a checkpoint."""

    def __init__(
        self, matrices: Mapping[str, tuple[Tensor, Tensor | None]], kind: type[nn.Linear] = ExpertLinear
    ) -> None:
        super().__init__()
        for name, (weight, bias) in matrices.items():
            linear = kind(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = _copied(weight)
            if bias is not None:
                linear.bias = _copied(bias)
            self.add_module(f"expert_{name}", linear)


class SplitExperts(nn.ModuleList):
    """The experts of a layer, of which each token uses k, as modules; a norm of their outputs comes after them."""

    def __init__(self, fused: Any) -> None:
        up, transposed = "gate_up_proj" if hasattr(fused, "gate_up_proj") else "up_proj", _is(fused, "is_transposed")
        super().__init__(
            Expert(_matrices(fused, {"up": up, "down": "down_proj"}, number, transposed))
            for number in range(len(fused.down_proj))
        )
        self.experts = len(self)
        self.identities = getattr(fused, "zero_expert_num", None) or 0  # numbered after the others
        if _is(fused, "has_post_expert_norm"):
            self.post_expert_norm = fused.post_expert_norm
        self._activate: Callable[[Tensor], Tensor] = _Activation(fused)

    def forward(
        self, hidden_states: Tensor, top_k_index: Int[Tensor, "tokens k"], top_k_weights: Float[Tensor, "tokens k"]
    ) -> Tensor:
        k, flat = top_k_index.shape[1], top_k_index.flatten()
        order, places, last = kernels.group(flat, self.experts + self.identities)
        ends = last.tolist()
        x, parts = hidden_states.flatten(0, -2).index_select(0, order // k), []
        expert: Any
        for expert, (start, end) in zip(self, zip([0, *ends[:-1]], ends, strict=True), strict=False):
            if start < end:
                parts.append(expert.expert_down(self._activate(expert.expert_up(x[start:end]))))
        out = torch.cat(parts) if parts else x[:0]
        if "post_expert_norm" in self._modules:
            out = self.post_expert_norm(out)
        out = torch.cat([out, x[len(out) :]])  # of the identities
        return gather_gated(out, places, top_k_weights).to(hidden_states.dtype).view_as(hidden_states)


class ScaledExperts(nn.ModuleList):
    """Experts that all see every token, scaled by its gate, which is 0 where another expert was chosen (Llama 4)."""

    def __init__(self, fused: Any) -> None:
        names = {"up": "gate_up_proj", "down": "down_proj"}
        super().__init__(Expert(_matrices(fused, names, number, True)) for number in range(len(fused.down_proj)))
        self._activate: Callable[[Tensor], Tensor] = _Activation(fused)

    def forward(self, hidden_states: Float[Tensor, "assignments width"]) -> Float[Tensor, "assignments width"]:
        parts = []
        expert: Any
        for expert, x in zip(self, hidden_states.chunk(len(self)), strict=True):
            chosen = x.any(-1).nonzero()[:, 0]  # there are no biases: zeros give zeros
            out = expert.expert_down(self._activate(expert.expert_up(x[chosen])))
            parts.append(torch.zeros_like(x).index_copy(0, chosen, out.to(x.dtype)))
        return torch.cat(parts)


class SplitLinear(nn.ModuleList):
    """One matrix by expert, for rows that are sorted by expert (JetMoe)."""

    def __init__(self, fused: Any) -> None:
        super().__init__(Expert({"matrix": (weight, None)}) for weight in fused.weight)

    def forward(self, inputs: Float[Tensor, "rows in"], expert_size: Sequence[int]) -> Float[Tensor, "rows out"]:
        parts = zip(self.children(), inputs.split(expert_size), strict=True)
        return torch.cat([expert.get_submodule("expert_matrix")(x) for expert, x in parts if len(x)])


class SharedExperts(nn.ModuleList):
    """Experts that every token uses, with a weight of its own for each (Inkling)."""

    def __init__(self, fused: Any) -> None:
        names = {name: f"{name}_proj" for name in ("gate", "up", "down")}
        super().__init__(
            Expert(_matrices(fused, names, number, False), nn.Linear) for number in range(len(fused.down_proj))
        )
        self._activation = _Activation(fused)

    def forward(self, hidden_states: Tensor, gammas: Float[Tensor, "*tokens experts"]) -> Tensor:
        total = torch.zeros_like(hidden_states, dtype=torch.float32)
        expert: Any
        for expert, gamma in zip(self, gammas.view(*hidden_states.shape[:-1], -1).unbind(-1), strict=True):
            hidden = self._activation.fused.act_fn(expert.expert_gate(hidden_states)) * expert.expert_up(hidden_states)
            total = total + expert.expert_down(hidden * gamma[..., None])
        return total.to(hidden_states.dtype)


class _Activation:  # no module: its tensors would be stored
    """What a fused module computes between the two matrices of an expert."""

    def __init__(self, fused: Any) -> None:
        self.fused = copy.copy(fused)
        self.fused.__dict__ = fused.__dict__ | {"_parameters": {}, "_buffers": {}}

    def __call__(self, x: Tensor) -> Tensor:
        if not getattr(self.fused, "has_gate", True):
            return self.fused.act_fn(x)
        if hasattr(self.fused, "_apply_gate"):
            return self.fused._apply_gate(x)
        gate, up = x.chunk(2, -1)
        return self.fused.act_fn(gate) * up


def unfuse(model: nn.Module) -> list[str]:
    """Give every matrix of all fused experts a linear layer of its own, in place.

    Returns the names of the modules that were split.  Experts of an unknown layout stay as they are.
    """
    split = []
    for name, module in list(model.named_modules()):
        kind = _kind_of(module)
        if kind is not None:
            model.set_submodule(name, kind(module))
            split.append(name)
    return split


def _kind_of(module: nn.Module) -> Callable[[nn.Module], nn.Module] | None:
    """Return what takes the place of a module, or None if it holds no fused experts of a known layout."""
    fused = {name for name, part in module._parameters.items() if part is not None and part.ndim == 3}
    if not fused:
        return None
    arguments = list(inspect.signature(type(module).forward).parameters)[1:]
    if "down_proj" in fused and (hasattr(module, "has_gate") or hasattr(module, "identity_expert")):
        return SplitExperts
    if fused == {"gate_up_proj", "down_proj"} and len(arguments) == 1:
        return ScaledExperts
    if fused == {"weight"} and arguments == ["inputs", "expert_size"]:
        return SplitLinear
    if fused == {"gate_proj", "up_proj", "down_proj"} and arguments == ["hidden_states", "gammas"]:
        return SharedExperts
    return None


def _matrices(
    fused: Any, names: Mapping[str, str], number: int, transposed: bool
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Return weights (out, in) and biases, if there are any, of one expert; ``names``: where ``fused`` has them."""
    matrices = {}
    for name, tensor in names.items():
        weight, bias = getattr(fused, tensor)[number], getattr(fused, f"{tensor}_bias", None)
        matrices[name] = (weight.T if transposed else weight, None if bias is None else bias[number])
    return matrices


def _is(fused: Any, name: str) -> bool:
    return bool(getattr(fused, name, False))


def _copied(part: Tensor) -> nn.Parameter:
    copied = part.detach().clone(memory_format=torch.contiguous_format)
    return nn.Parameter(copied, requires_grad=part.requires_grad)
