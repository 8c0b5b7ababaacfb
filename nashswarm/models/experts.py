"""Experts of a layer: feed-forward networks, of which each token uses k.

Assignments of tokens to experts are sorted by expert, and one grouped product per matrix computes all of them.  Fused
experts hold their matrices in two tensors of three dimensions, as in the models of transformers.  ``unfuse`` gives
every matrix a linear layer of its own, so that it can be compressed; it also works for Mixtral, DeepSeek and other
models of transformers with the same layout.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations import moe as _registered  # noqa: F401  the grouped product that compilers can trace

from nashswarm import kernels
from nashswarm.kernels import native

FEW = 8  # assignments that are computed one by one, without sorting


class Experts(nn.Module):
    """The fused experts of a layer: ``up_proj`` (experts, hidden, width) and ``down_proj`` (experts, width, hidden)."""

    has_gate, has_bias, is_transposed = False, False, False

    def __init__(self, experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(experts, hidden, width) / math.sqrt(width))
        self.down_proj = nn.Parameter(torch.randn(experts, width, hidden) / math.sqrt(hidden))

    @staticmethod
    def act_fn(x: Tensor) -> Tensor:
        return functional.gelu(x, approximate="tanh")

    def forward(
        self, x: Float[Tensor, "tokens width"], experts: Int[Tensor, "tokens k"], gates: Float[Tensor, "tokens k"]
    ) -> Float[Tensor, "tokens width"]:
        """Return the sum of each token's expert outputs, weighted by its gates."""
        k, flat = experts.shape[1], experts.flatten()
        if len(flat) <= FEW and kernels.can_run_natively(x, self.up_proj, self.down_proj, gates):
            parts = (part.contiguous() for part in (x, self.up_proj, self.down_proj, experts.long(), gates))
            return native.experts(*parts)
        order, places, ends = kernels.group(flat, len(self.up_proj))
        hidden = self.act_fn(grouped(x.index_select(0, order // k), self.up_proj.transpose(1, 2), ends))
        out = grouped(hidden, self.down_proj.transpose(1, 2), ends)
        return gather_gated(out, places, gates)


def grouped(
    x: Float[Tensor, "assignments in"], weights: Float[Tensor, "experts in out"], ends: Int[Tensor, " experts"]
) -> Float[Tensor, "assignments out"]:
    """Return each row times the matrix of its expert; rows are sorted by expert, ``ends`` are where experts end.

    Under ``torch.compile`` it is the product of transformers, as torch's own cannot be traced in float32.
    """
    if torch.compiler.is_compiling():
        product: Tensor = torch.ops.transformers.grouped_mm_fallback(x, weights, ends)
        return product
    return functional.grouped_mm(x, weights, offs=ends)


def gather_gated(
    out: Float[Tensor, "assignments width"], places: Int[Tensor, " assignments"], gates: Float[Tensor, "tokens k"]
) -> Float[Tensor, "tokens width"]:
    """Return the gated sum of each token's k assignments, which are the rows ``places`` of ``out``."""
    if kernels.can_run_natively(out, gates):
        return native.sums(out.contiguous(), places, gates.contiguous())
    return functional.embedding_bag(places.view_as(gates), out, per_sample_weights=gates.to(out.dtype), mode="sum")


class ExpertLinear(nn.Linear):
    """A matrix of one expert; ``routed`` marks that it sees only the tokens that are routed to it."""

    routed = True


class Expert(nn.Module):
    """The matrices of one expert as linear layers ``expert_up`` (the gate stacked above, if it has one) and
    ``expert_down``; transformers does not fuse modules of these names when it loads a checkpoint."""

    def __init__(self, up: Tensor, down: Tensor) -> None:
        super().__init__()
        for name, weight in (("expert_up", up), ("expert_down", down)):
            linear = ExpertLinear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
            self.add_module(name, linear)


class SplitExperts(nn.ModuleList):
    """The experts of a layer as modules, so that each matrix can be compressed and run on packed weights."""

    def __init__(self, fused: Any) -> None:
        up = fused.gate_up_proj if fused.has_gate else fused.up_proj
        super().__init__(
            Expert(*(part.T if fused.is_transposed else part for part in pair))
            for pair in zip(up, fused.down_proj, strict=True)
        )
        self._activate: Callable[[Tensor], Tensor] = _Activation(fused)

    def forward(
        self, hidden_states: Tensor, top_k_index: Int[Tensor, "tokens k"], top_k_weights: Float[Tensor, "tokens k"]
    ) -> Tensor:
        k, flat = top_k_index.shape[1], top_k_index.flatten()
        order, places, last = kernels.group(flat, len(self))
        ends = last.tolist()
        x, parts = hidden_states.flatten(0, -2).index_select(0, order // k), []
        expert: Any
        for expert, (start, end) in zip(self, zip([0, *ends[:-1]], ends, strict=True), strict=True):
            if start < end:
                parts.append(expert.expert_down(self._activate(expert.expert_up(x[start:end]))))
        return gather_gated(torch.cat(parts), places, top_k_weights).to(hidden_states.dtype).view_as(hidden_states)


class _Activation:  # a class, as lambdas cannot be copied or pickled
    """The activation between the two matrices of an expert, as the fused module computes it, without its tensors."""

    def __init__(self, fused: Any) -> None:
        self.act_fn, self.gate = fused.act_fn, type(fused)._apply_gate if fused.has_gate else None
        for name in ("limit", "alpha", "swiglu_limit", "swiglu_alpha", "gate_limit"):
            if hasattr(fused, name):
                setattr(self, name, getattr(fused, name))

    def __call__(self, x: Tensor) -> Tensor:
        return self.act_fn(x) if self.gate is None else self.gate(self, x)


def is_fused(module: nn.Module) -> bool:
    """Return whether a module holds the matrices of several experts in tensors of three dimensions."""
    parts = [getattr(module, name, None) for name in ("gate_up_proj", "up_proj", "down_proj")]
    return parts[2] is not None and all(part is None or getattr(part, "ndim", 0) == 3 for part in parts)


def unfuse(model: nn.Module) -> list[str]:
    """Give every matrix of all fused experts a linear layer of its own, in place, and return the names of the modules
    that were split.

    Raises ValueError for experts with biases, and for a layout that the module does not describe.
    """
    fused = [name for name, module in model.named_modules() if is_fused(module)]
    if unknown := [name for name in fused if not _readable(model.get_submodule(name))]:
        raise ValueError(f"the experts of {', '.join(unknown)} are fused in a way that cannot be taken apart (biases?)")
    for name in fused:
        model.set_submodule(name, SplitExperts(model.get_submodule(name)))
    return fused


def _readable(module: Any) -> bool:
    known = all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "act_fn"))
    return known and not module.has_bias and not getattr(module, "has_post_expert_norm", False)
