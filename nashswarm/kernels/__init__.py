"""Products with packed matrices, and what tokens choose: one signature, the fastest path that the machine has.

``matmul``, ``rows_of``, ``route`` and ``group`` are operators of torch (``nashswarm::matmul``, …), which
``torch.compile`` and ``torch.export`` take as they are; gradients reach x through products, scores through gates.
``direct`` is the same product without the dispatcher, for calls of microseconds.  On the CPU the C++ library computes
(``native``), products on CUDA Triton; without either the torch reference does.
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
LIBRARY.define("route(Tensor scores, Tensor entry, Tensor cost, Tensor price, int flock, int k) -> (Tensor, Tensor)")


def matmul(
    x: Float[Tensor, "*batch columns"],
    tiles: Tiles,
    activations: str = "int8",
    bias: Float[Tensor, " rows"] | None = None,
) -> Float[Tensor, "*batch rows"]:
    """x Wᵀ + bias in the dtype of x; ``activations``: int8 rounds x to 8 bits group by group, float32 does not.

    The operator where something follows what is computed, and ``direct`` where nothing does.
    """
    if _followed(x, *(() if bias is None else (bias,))):
        return cast(Tensor, torch.ops.nashswarm.matmul(x, bias, activations, *operator_arguments(tiles)))
    return direct(x, tiles, activations, bias)


def rows_of(tiles: Tiles, ids: Integer[Tensor, "*shape"]) -> Float[Tensor, "*shape columns"]:
    """The rows of the dequantized matrix that ``ids`` name, in float32."""
    if _followed(ids):
        return cast(Tensor, torch.ops.nashswarm.rows(ids, *operator_arguments(tiles)))
    return _rows(ids, tiles)


def route(
    scores: Float[Tensor, "tokens experts"],
    entry: Float[Tensor, " experts"],
    cost: Float[Tensor, " experts"],
    price: Float[Tensor, " experts"],
    flock: int,
    k: int,
) -> tuple[Integer[Tensor, "tokens k"], Float[Tensor, "tokens k"]]:
    """The k experts of largest score − cost among the ``flock`` of largest score − entry, largest first, and their
    gates: softmaxes of score − price over the k, or of a single one its share of all.

    Raises ValueError unless 1 ≤ k ≤ flock ≤ experts.
    """
    if not 1 <= k <= flock <= scores.shape[1]:
        raise ValueError(f"k={k} of a flock of {flock} out of {scores.shape[1]}: none may exceed the next")
    if _followed(scores):
        return cast(tuple[Tensor, Tensor], torch.ops.nashswarm.route(scores, entry, cost, price, flock, k))
    return _route(scores, entry, cost, price, flock, k)


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


def native_floats(*parts: Tensor) -> bool:
    """Whether the C++ library may compute with these floats by their addresses."""
    return (
        not _followed(*parts)
        and all(part.is_cpu and part.dtype is torch.float32 for part in parts)
        and native.path() != native.SLOW
    )


def _followed(*parts: Tensor) -> bool:
    """Whether autograd, a compiler or a transform of functions has to see what is done with these."""
    return (
        torch.compiler.is_compiling()
        or any(type(part) not in (Tensor, torch.nn.Parameter) for part in parts)
        or (torch.is_grad_enabled() and any(part.requires_grad for part in parts))
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def operator_arguments(tiles: Tiles) -> tuple[Any, ...]:
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


def _route(scores: Tensor, entry: Tensor, cost: Tensor, price: Tensor, flock: int, k: int) -> tuple[Tensor, Tensor]:
    if native_floats(scores, entry, cost, price):
        return native.route(scores.contiguous(), entry.contiguous(), cost.contiguous(), price.contiguous(), flock, k)
    return reference.route(scores, entry, cost, price, flock, k)


def _group(numbers: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    if numbers.is_cpu and numbers.dtype is torch.int64 and native.path() != native.SLOW:
        return native.group(numbers.contiguous(), size)
    return reference.group(numbers, size)


def _matmul_operator(x: Tensor, bias: Tensor | None, activations: str, *flat: Any) -> Tensor:
    return direct(x, _tiles(*flat), activations, bias)


def _rows_operator(ids: Tensor, *flat: Any) -> Tensor:
    return _rows(ids, _tiles(*flat))


def _route_operator(scores: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _route(scores.detach(), *rest)


LIBRARY.impl("matmul", _matmul_operator, "CompositeExplicitAutograd")
LIBRARY.impl("rows", _rows_operator, "CompositeExplicitAutograd")
LIBRARY.impl("group", _group, "CompositeExplicitAutograd")
LIBRARY.impl("route", _route_operator, "CompositeExplicitAutograd")


def _fake_matmul(x: Tensor, bias: Tensor | None, activations: str, *flat: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], flat[-3])


def _fake_rows(ids: Tensor, *flat: Any) -> Tensor:
    return ids.new_empty(*ids.shape, flat[-2], dtype=torch.float32)


def _fake_group(numbers: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(numbers), torch.empty_like(numbers), numbers.new_empty(size, dtype=torch.int32)


def _fake_route(
    scores: Tensor, entry: Tensor, cost: Tensor, price: Tensor, flock: int, k: int
) -> tuple[Tensor, Tensor]:
    kind = torch.result_type(scores, price)
    return scores.new_empty(len(scores), k, dtype=torch.int64), scores.new_empty(len(scores), k, dtype=kind)


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


def _keep_gates(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    scores, _, _, price, _, k = inputs
    ctx.shape = scores.shape
    ctx.save_for_backward(scores - price if k == 1 else scores.new_empty(0), *output)
    ctx.mark_non_differentiable(output[0])


def _gate_gradients(ctx: Any, _: Tensor | None, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Of the scores: those of a softmax, over the chosen or, where one was chosen, over all."""
    paid, chosen, gates = ctx.saved_tensors
    none = torch.zeros(ctx.shape, dtype=gates.dtype, device=gates.device)
    shares = none.scatter(1, chosen, gates) if chosen.shape[1] > 1 else paid.softmax(1)
    weighed = gates * gradient
    return none.scatter(1, chosen, weighed) - weighed.sum(1, keepdim=True) * shares, None, None, None, None, None


torch.library.register_fake("nashswarm::matmul")(_fake_matmul)
torch.library.register_fake("nashswarm::rows")(_fake_rows)
torch.library.register_fake("nashswarm::group")(_fake_group)
torch.library.register_fake("nashswarm::route")(_fake_route)
torch.library.register_autograd("nashswarm::matmul", _gradients, setup_context=_keep)
torch.library.register_autograd("nashswarm::route", _gate_gradients, setup_context=_keep_gates)
