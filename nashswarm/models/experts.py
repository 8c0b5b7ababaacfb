"""Experts of a layer: feed-forward networks, of which each token uses k.

Assignments of tokens to experts are sorted by expert, and one grouped product per matrix computes all of them.  Where
the matrices are small and no gradient is wanted, the C++ library keeps them in cache and computes whole experts.
Fused experts hold their matrices in two tensors of three dimensions, as in the models of transformers
(``split_experts`` splits both).
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations import moe as _registered  # noqa: F401  the grouped product that compilers can trace

from nashswarm import kernels
from nashswarm.kernels import native

FEW = 8  # assignments that the C++ library computes faster, whatever the size of the matrices
SMALL = 1 << 18  # weights of a matrix that stays in cache beside a tile of tokens
TILED = ("avx512vbmi", "avx512", "avx2")  # paths of the C++ library whose tiles fill wide registers


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
        if kernels.can_run_natively(x, self.up_proj, self.down_proj, gates):
            tiled = self.up_proj[0].numel() <= SMALL and native.path() in TILED
            if tiled or len(flat) <= FEW:
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
