"""Products with packed matrices: one signature, the fastest path that the machine has.

``matmul`` and ``rows_of`` are operators of torch (``nashswarm::matmul``, ``nashswarm::rows``), which ``torch.compile``
and ``torch.export`` take as they are and through which gradients reach x.  ``direct`` is the same product without the
dispatcher, for calls of microseconds.  On the CPU the C++ library multiplies (``native``), on CUDA Triton; without
either the torch reference does.
"""

import dataclasses
from typing import Any, cast

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from nashswarm.kernels import native, reference
from nashswarm.kernels.tiles import Tiles

ACTIVATIONS = tuple(native.DIGITS)
PARTS = tuple(field.name for field in dataclasses.fields(Tiles) if field.type is not int)
WEIGHT = f"{''.join(f'Tensor {name}, ' for name in PARTS)}Tensor order, int rows, int columns, int group_size"

LIBRARY = torch.library.Library("nashswarm", "DEF")
LIBRARY.define(f"matmul(Tensor x, Tensor? bias, str activations, {WEIGHT}) -> Tensor")
LIBRARY.define(f"rows(Tensor ids, {WEIGHT}) -> Tensor")


def matmul(
    x: Float[Tensor, "*batch columns"],
    tiles: Tiles,
    activations: str = "int8",
    bias: Float[Tensor, " rows"] | None = None,
) -> Float[Tensor, "*batch rows"]:
    """x Wᵀ + bias in the dtype of x; ``activations``: int8 rounds x to 8 bits group by group, float32 does not."""
    return cast(Tensor, torch.ops.nashswarm.matmul(x, bias, activations, *_flat(tiles)))


def rows_of(tiles: Tiles, ids: Integer[Tensor, "*shape"]) -> Float[Tensor, "*shape columns"]:
    """The rows of the dequantized matrix that ``ids`` name, in float32."""
    return cast(Tensor, torch.ops.nashswarm.rows(ids, *_flat(tiles)))


def direct(
    x: Float[Tensor, "*batch columns"],
    tiles: Tiles,
    activations: str = "int8",
    bias: Float[Tensor, " rows"] | None = None,
) -> Float[Tensor, "*batch rows"]:
    """``matmul`` without the dispatcher: no gradients, no tracing."""
    if activations not in ACTIVATIONS:
        raise ValueError(f"unknown activations {activations!r}: choose {' or '.join(ACTIVATIONS)}")
    if x.shape[-1] != tiles.columns:
        raise ValueError(f"x has {x.shape[-1]} columns and the packed matrix {tiles.columns}: give x as many")
    batch = x.reshape(-1, tiles.columns).float()
    if x.is_cuda:
        from nashswarm.kernels import triton_kernels

        answer = triton_kernels.matmul(batch, tiles)
    elif x.is_cpu and native.path() != native.SLOW:
        answer = native.matmul(batch.contiguous(), tiles, activations, None if bias is None else bias.float().contiguous())
        bias = None
    else:
        answer = reference.matmul(batch, tiles, activations)
    if bias is not None:
        answer += bias
    return answer.to(x.dtype).view(*x.shape[:-1], tiles.rows)


def _flat(tiles: Tiles) -> tuple[Any, ...]:
    return *(getattr(tiles, name) for name in PARTS), tiles.order, tiles.rows, tiles.columns, tiles.group_size


def _tiles(*flat: Any) -> Tiles:
    *parts, order, rows, columns, group_size = flat
    tiles = Tiles(rows, columns, group_size, *parts)
    tiles.__dict__["order"] = order
    return tiles


def _matmul(x: Tensor, bias: Tensor | None, activations: str, *flat: Any) -> Tensor:
    return direct(x, _tiles(*flat), activations, bias)


def _rows(ids: Tensor, *flat: Any) -> Tensor:
    tiles = _tiles(*flat)
    if ids.is_cpu and native.path() != native.SLOW:
        found = native.rows_of(tiles, ids.flatten().long().contiguous())
    else:
        found = reference.rows_of(tiles, ids.flatten())
    return found.view(*ids.shape, tiles.columns)


for _name, _kernel in (("matmul", _matmul), ("rows", _rows)):
    LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")


@torch.library.register_fake("nashswarm::matmul")
def _fake_matmul(x: Tensor, bias: Tensor | None, activations: str, *flat: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], flat[-3])


@torch.library.register_fake("nashswarm::rows")
def _fake_rows(ids: Tensor, *flat: Any) -> Tensor:
    return ids.new_empty(*ids.shape, flat[-2], dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, _, *flat = inputs
    ctx.save_for_backward(*flat[:-3])
    ctx.sizes = flat[-3:]


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Of x: gradient · W; of the bias: the sum; the weight is fixed."""
    x = bias = None
    if ctx.needs_input_grad[0]:
        rows = ctx.sizes[0]
        every = torch.arange(rows, device=gradient.device)
        weight = torch.ops.nashswarm.rows(every, *ctx.saved_tensors, *ctx.sizes)
        x = gradient @ weight.to(gradient.dtype)
    if ctx.needs_input_grad[1]:
        bias = gradient.flatten(0, -2).sum(0)
    return x, bias, None, *(None for _ in (*ctx.saved_tensors, *ctx.sizes))


torch.library.register_autograd("nashswarm::matmul", _gradients, setup_context=_keep)
