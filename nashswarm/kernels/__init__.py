"""Products with packed matrices, and what tokens choose: one signature, the fastest path that the machine has.

All are operators of torch (``nashswarm::matmul``, ``rows``, …), which
``torch.compile`` and ``torch.export`` take as they are; through products gradients reach x.  ``direct`` is the same
product without the dispatcher, for calls of microseconds.  On the CPU the C++ library multiplies (``native``), on CUDA
Triton; without either the torch reference does.
"""

import dataclasses
import importlib.util
from typing import Any, cast

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from nashswarm.kernels import native, reference
from nashswarm.kernels.tiles import Tiles

ACTIVATIONS = tuple(native.DIGITS)
TRITON = importlib.util.find_spec("triton") is not None
PARTS = tuple(field.name for field in dataclasses.fields(Tiles) if field.type is not int)
WEIGHT = f"{''.join(f'Tensor {name}, ' for name in PARTS)}Tensor order, int rows, int columns, int group_size"

LIBRARY = torch.library.Library("nashswarm", "DEF")
LIBRARY.define(f"matmul(Tensor x, Tensor? bias, str activations, {WEIGHT}) -> Tensor")
LIBRARY.define(f"rows(Tensor ids, {WEIGHT}) -> Tensor")
LIBRARY.define("group(Tensor numbers, int size) -> (Tensor, Tensor, Tensor)")
LIBRARY.define("choose(Tensor scores, Tensor entry, Tensor price, int flock, int k) -> Tensor")


def matmul(
    x: Float[Tensor, "*batch columns"],
    tiles: Tiles,
    activations: str = "int8",
    bias: Float[Tensor, " rows"] | None = None,
) -> Float[Tensor, "*batch rows"]:
    """x Wᵀ + bias in the dtype of x; ``activations``: int8 rounds x to 8 bits group by group, float32 does not.

    The operator where something follows what is computed, and ``direct`` where nothing does.
    """
    if _followed(x) or (bias is not None and _followed(bias)):
        return cast(Tensor, torch.ops.nashswarm.matmul(x, bias, activations, *flat(tiles)))
    return direct(x, tiles, activations, bias)


def rows_of(tiles: Tiles, ids: Integer[Tensor, "*shape"]) -> Float[Tensor, "*shape columns"]:
    """The rows of the dequantized matrix that ``ids`` name, in float32."""
    if _followed(ids):
        return cast(Tensor, torch.ops.nashswarm.rows(ids, *flat(tiles)))
    return _rows(ids, tiles)


def choose(
    scores: Float[Tensor, "tokens experts"],
    entry: Float[Tensor, " experts"],
    price: Float[Tensor, " experts"],
    flock: int,
    k: int,
) -> Integer[Tensor, "tokens k"]:
    """The k experts of largest score − price among the ``flock`` of largest score − entry, largest first.

    Raises ValueError unless 1 ≤ k ≤ flock ≤ experts.
    """
    if not 1 <= k <= flock <= scores.shape[1]:
        raise ValueError(f"k={k} of a flock of {flock} out of {scores.shape[1]}: none may exceed the next")
    scores = scores.detach()
    if _followed(scores):
        return cast(Tensor, torch.ops.nashswarm.choose(scores, entry, price, flock, k))
    return _choose(scores, entry, price, flock, k)


def group(
    numbers: Integer[Tensor, " count"], size: int
) -> tuple[Integer[Tensor, " count"], Integer[Tensor, " count"], Integer[Tensor, " size"]]:
    """The order that sorts numbers below ``size``, equal ones as they stood; the place of each in it; and where those
    of each number end (int32)."""
    if _followed(numbers):
        return cast(tuple[Tensor, Tensor, Tensor], torch.ops.nashswarm.group(numbers, size))
    return _group(numbers, size)


def direct(
    x: Float[Tensor, "*batch columns"],
    tiles: Tiles,
    activations: str = "int8",
    bias: Float[Tensor, " rows"] | None = None,
) -> Float[Tensor, "*batch rows"]:
    """``matmul`` as a bare call: without gradients, unseen by compilers."""
    if activations not in ACTIVATIONS:
        raise ValueError(f"unknown activations {activations!r}: choose {' or '.join(ACTIVATIONS)}")
    if x.size(-1) != tiles.columns:
        raise ValueError(f"x has {x.size(-1)} columns and the packed matrix {tiles.columns}: give x as many")
    if x.device != tiles.payload.device:
        raise ValueError(f"x is on {x.device} and the packed matrix on {tiles.payload.device}: move one to the other")
    single = x if x.dtype is torch.float32 and x.is_contiguous() else x.float().contiguous()
    offset = bias if bias is None else bias.float().contiguous()
    if x.is_cpu and native.path() != native.SLOW:
        answer = native.matmul(single, tiles, activations, offset)
        return answer if x.dtype is torch.float32 else answer.to(x.dtype)
    flat = single.view(-1, tiles.columns)
    if x.is_cuda and TRITON:
        from nashswarm.kernels import triton_kernels

        answer = triton_kernels.matmul(flat, tiles)
    else:
        answer = reference.matmul(flat, tiles, activations)
    if offset is not None:
        answer += offset
    return answer.view(*x.shape[:-1], tiles.rows).to(x.dtype)


def _followed(x: Tensor) -> bool:
    """Whether autograd, a compiler or a transform of functions has to see what is done with x."""
    return (
        torch.compiler.is_compiling()
        or (x.requires_grad and torch.is_grad_enabled())
        or type(x) not in (Tensor, torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def flat(tiles: Tiles) -> tuple[Any, ...]:
    """The tiles as arguments of the operators."""
    return *(getattr(tiles, name) for name in PARTS), tiles.order, tiles.rows, tiles.columns, tiles.group_size


def _tiles(*arguments: Any) -> Tiles:
    """The tiles that ``flat`` took apart; their order is not made anew."""
    *parts, order, rows, columns, group_size = arguments
    tiles = object.__new__(Tiles)
    sizes = {"rows": rows, "columns": columns, "group_size": group_size, "_order": order}
    tiles.__dict__.update(sizes, **dict(zip(PARTS, parts, strict=True)))
    return tiles


def _rows(ids: Tensor, tiles: Tiles) -> Tensor:
    if ids.is_cpu and native.path() != native.SLOW:
        return native.rows_of(tiles, ids.long().contiguous())
    return reference.rows_of(tiles, ids.flatten()).view(*ids.shape, tiles.columns)


def _choose(scores: Tensor, entry: Tensor, price: Tensor, flock: int, k: int) -> Tensor:
    if scores.is_cpu and scores.dtype is torch.float32 and native.path() != native.SLOW:
        return native.choose(scores.contiguous(), entry, price, flock, k)
    return reference.choose(scores, entry, price, flock, k)


def _group(numbers: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    if numbers.is_cpu and numbers.dtype is torch.int64 and native.path() != native.SLOW:
        return native.group(numbers.contiguous(), size)
    return reference.group(numbers, size)


def _matmul_operator(x: Tensor, bias: Tensor | None, activations: str, *flat: Any) -> Tensor:
    return direct(x, _tiles(*flat), activations, bias)


def _rows_operator(ids: Tensor, *flat: Any) -> Tensor:
    return _rows(ids, _tiles(*flat))


LIBRARY.impl("matmul", _matmul_operator, "CompositeExplicitAutograd")
LIBRARY.impl("rows", _rows_operator, "CompositeExplicitAutograd")
LIBRARY.impl("group", _group, "CompositeExplicitAutograd")
LIBRARY.impl("choose", _choose, "CompositeExplicitAutograd")


def _fake_matmul(x: Tensor, bias: Tensor | None, activations: str, *flat: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], flat[-3])


def _fake_rows(ids: Tensor, *flat: Any) -> Tensor:
    return ids.new_empty(*ids.shape, flat[-2], dtype=torch.float32)


def _fake_group(numbers: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(numbers), torch.empty_like(numbers), numbers.new_empty(size, dtype=torch.int32)


def _fake_choose(scores: Tensor, entry: Tensor, price: Tensor, flock: int, k: int) -> Tensor:
    return scores.new_empty(len(scores), k, dtype=torch.int64)


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
        bias = gradient.reshape(-1, gradient.shape[-1]).sum(0)
    return x, bias, None, *(None for _ in (*ctx.saved_tensors, *ctx.sizes))


torch.library.register_fake("nashswarm::matmul")(_fake_matmul)
torch.library.register_fake("nashswarm::rows")(_fake_rows)
torch.library.register_fake("nashswarm::group")(_fake_group)
torch.library.register_fake("nashswarm::choose")(_fake_choose)
torch.library.register_autograd("nashswarm::matmul", _gradients, setup_context=_keep)
