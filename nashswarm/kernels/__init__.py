"""Products with packed matrices, and routing of tokens to experts, on the fastest path that the machine has.

``matmul``, ``rows_of``, ``route`` and ``group`` are torch operators (``nashswarm::matmul``, ``trellis_matmul``, …), so
that ``torch.compile`` and ``torch.export`` accept them.  Gradients flow from products to x, and from gates to scores.
``direct`` is the same product without torch's dispatcher, for calls that take microseconds.

``tiles`` lays out a packed matrix, ``trellis`` and ``trellis_codes`` a trellis-coded one, ``path_form`` lattice paths.
``native``, ``trellis_native``, ``encoder`` and ``path_encoder`` call the C++ library (``csrc``); ``triton_kernels`` and
``triton_trellis`` are for CUDA; ``reference``, ``trellis_reference``, ``encoder_reference``, ``path_encoder_reference``
test them.  ``decoder`` has whole passes through a model; ``python -m nashswarm.kernels`` measures products.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from nashswarm.kernels import native, reference, trellis_native, trellis_reference
from nashswarm.kernels.tiles import Tiles
from nashswarm.kernels.trellis import Trellis

ACTIVATIONS = tuple(native.DIGITS)
TRITON = importlib.util.find_spec("triton") is not None
# The tensors of Tiles, and how operators declare a matrix: these tensors, the order of the tiles, and the sizes.
PARTS = tuple(field.name for field in dataclasses.fields(Tiles) if field.type is not int)
WEIGHT = f"{''.join(f'Tensor {name}, ' for name in PARTS)}Tensor order, int rows, int columns, int group_size"
TRELLIS = "Tensor content, Tensor starts, int rows, int columns"  # how operators declare a trellis-coded matrix

LIBRARY = torch.library.Library("nashswarm", "DEF")
LIBRARY.define(f"matmul(Tensor x, Tensor? bias, str activations, {WEIGHT}) -> Tensor")
LIBRARY.define(f"rows(Tensor ids, {WEIGHT}) -> Tensor")
LIBRARY.define(f"trellis_matmul(Tensor x, Tensor? bias, str activations, {TRELLIS}) -> Tensor")
LIBRARY.define(f"trellis_rows(Tensor ids, {TRELLIS}) -> Tensor")
LIBRARY.define("group(Tensor numbers, int size) -> (Tensor, Tensor, Tensor)")
LIBRARY.define("route(Tensor scores, Tensor entry, Tensor cost, Tensor price, int flock, int k) -> (Tensor, Tensor)")


def matmul(
    x: Float[Tensor, "*batch columns"],
    matrix: Tiles | Trellis,
    activations: str = "int8",
    bias: Float[Tensor, " rows"] | None = None,
) -> Float[Tensor, "*batch rows"]:
    """Compute x Wᵀ + bias in the dtype of x.

    ``activations="int8"`` rounds x to 8 bits, group by group; ``"float32"`` does not.  Raises ValueError if x does not
    fit the matrix or is on another device.
    """
    if _needs_dispatch(x, *(() if bias is None else (bias,))):
        operator = torch.ops.nashswarm.trellis_matmul if isinstance(matrix, Trellis) else torch.ops.nashswarm.matmul
        return cast(Tensor, operator(x, bias, activations, *operator_arguments(matrix)))
    return direct(x, matrix, activations, bias)


def rows_of(matrix: Tiles | Trellis, ids: Integer[Tensor, "*shape"]) -> Float[Tensor, "*shape columns"]:
    """Return the rows ``ids`` of the dequantized matrix, in float32.

    Raises IndexError for a row that does not exist.
    """
    if _needs_dispatch(ids):
        operator = torch.ops.nashswarm.trellis_rows if isinstance(matrix, Trellis) else torch.ops.nashswarm.rows
        return cast(Tensor, operator(ids, *operator_arguments(matrix)))
    return _rows(ids, matrix)


def route(
    scores: Float[Tensor, "tokens experts"],
    entry: Float[Tensor, " experts"],
    cost: Float[Tensor, " experts"],
    price: Float[Tensor, " experts"],
    flock: int,
    k: int,
) -> tuple[Integer[Tensor, "tokens k"], Float[Tensor, "tokens k"]]:
    """Choose k experts for each token; return their numbers and their gates.

    The ``flock`` experts of the largest score − entry are candidates.  The k of them with the largest score − cost are
    chosen, in descending order.  Their gates are the softmax of score − price over the chosen experts, or over all
    experts if k is 1.  Raises ValueError unless 1 ≤ k ≤ flock ≤ experts.
    """
    if not 1 <= k <= flock <= scores.shape[1]:
        raise ValueError(f"k={k} of a flock of {flock} out of {scores.shape[1]}: none may exceed the next")
    if _needs_dispatch(scores):
        return cast(tuple[Tensor, Tensor], torch.ops.nashswarm.route(scores, entry, cost, price, flock, k))
    return _route(scores, entry, cost, price, flock, k)


def group(
    numbers: Integer[Tensor, " count"], size: int
) -> tuple[Integer[Tensor, " count"], Integer[Tensor, " count"], Integer[Tensor, " size"]]:
    """Sort assignments by their number below ``size``, for example the expert that each goes to.

    Returns the indices that sort them (stably), the place of each in the sorted order, and where the run of each number
    ends in it (int32).  Raises ValueError for a number that is not below ``size``.
    """
    if _needs_dispatch(numbers):
        return cast(tuple[Tensor, Tensor, Tensor], torch.ops.nashswarm.group(numbers, size))
    return _group(numbers, size)


def direct(
    x: Float[Tensor, "*batch columns"],
    matrix: Tiles | Trellis,
    activations: str = "int8",
    bias: Float[Tensor, " rows"] | None = None,
) -> Float[Tensor, "*batch rows"]:
    """Compute ``matmul`` without torch's dispatcher: no gradients, and invisible to compilers."""
    if activations not in ACTIVATIONS:
        raise ValueError(f"unknown activations {activations!r}: choose {' or '.join(ACTIVATIONS)}")
    device = (matrix.content if isinstance(matrix, Trellis) else matrix.payload).device
    if x.size(-1) != matrix.columns:
        raise ValueError(f"x has {x.size(-1)} columns and the packed matrix {matrix.columns}: give x as many")
    if x.device != device:
        raise ValueError(f"x is on {x.device} and the packed matrix on {device}: move one to the other")
    floats = x if x.dtype is torch.float32 and x.is_contiguous() else x.float().contiguous()
    offset = bias if bias is None else bias.float().contiguous()
    if x.is_cpu and native.path() != native.SLOW:
        if isinstance(matrix, Trellis):
            product = trellis_native.matmul(floats, matrix, activations, offset)
        else:
            product = native.matmul(floats, matrix, activations, offset)
        return product if x.dtype is torch.float32 else product.to(x.dtype)
    flat = floats.view(-1, matrix.columns)
    if x.is_cuda and TRITON:
        from nashswarm.kernels import triton_kernels as tiled
        from nashswarm.kernels import triton_trellis as coded

        product = coded.matmul(flat, matrix) if isinstance(matrix, Trellis) else tiled.matmul(flat, matrix)
    elif isinstance(matrix, Trellis):
        product = trellis_reference.matmul(flat, matrix, activations)
    else:
        product = reference.matmul(flat, matrix, activations)
    if offset is not None:
        product += offset
    return product.view(*x.shape[:-1], matrix.rows).to(x.dtype)


def can_run_natively(*parts: Tensor) -> bool:
    """Return whether the C++ library can compute with these tensors: plain float32 on the CPU, without gradients."""
    return (
        not _needs_dispatch(*parts)
        and all(part.is_cpu and part.dtype is torch.float32 for part in parts)
        and native.path() != native.SLOW
    )


def _needs_dispatch(*parts: Tensor) -> bool:
    """Return whether autograd, a compiler or a function transform has to see the operation."""
    return (
        torch.compiler.is_compiling()
        or any(type(part) not in (Tensor, torch.nn.Parameter) for part in parts)
        or (torch.is_grad_enabled() and any(part.requires_grad for part in parts))
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def operator_arguments(matrix: Tiles | Trellis) -> tuple[Any, ...]:
    """Return the matrix as arguments of the torch operators of its form."""
    if isinstance(matrix, Trellis):
        return matrix.content, matrix.starts, matrix.rows, matrix.columns
    return *(getattr(matrix, name) for name in PARTS), matrix.order, matrix.rows, matrix.columns, matrix.group_size


def _tiles(*arguments: Any) -> Tiles:
    """Return the tiles of ``operator_arguments``, without computing their order again."""
    *parts, order, rows, columns, group_size = arguments
    tiles = object.__new__(Tiles)
    sizes = {"rows": rows, "columns": columns, "group_size": group_size, "_order": order}
    tiles.__dict__.update(sizes, **dict(zip(PARTS, parts, strict=True)))
    return tiles


def _trellis(content: Tensor, starts: Tensor, rows: int, columns: int) -> Trellis:
    """Return what kernels read of the matrix of ``operator_arguments``, without checking its bytes again."""
    trellis = object.__new__(Trellis)
    trellis.__dict__.update(content=content, starts=starts, rows=rows, columns=columns)
    return trellis


def _rows(ids: Tensor, matrix: Tiles | Trellis) -> Tensor:
    if ids.is_cpu and native.path() != native.SLOW:
        whole = ids.long().contiguous()
        return trellis_native.rows_of(matrix, whole) if isinstance(matrix, Trellis) else native.rows_of(matrix, whole)
    if isinstance(matrix, Trellis):
        return trellis_reference.rows_of(matrix, ids.flatten()).view(*ids.shape, matrix.columns)
    return reference.rows_of(matrix, ids.flatten()).view(*ids.shape, matrix.columns)


def _route(scores: Tensor, entry: Tensor, cost: Tensor, price: Tensor, flock: int, k: int) -> tuple[Tensor, Tensor]:
    if can_run_natively(scores, entry, cost, price):
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


def _trellis_matmul_operator(x: Tensor, bias: Tensor | None, activations: str, *flat: Any) -> Tensor:
    return direct(x, _trellis(*flat), activations, bias)


def _trellis_rows_operator(ids: Tensor, *flat: Any) -> Tensor:
    return _rows(ids, _trellis(*flat))


def _route_operator(scores: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _route(scores.detach(), *rest)


LIBRARY.impl("matmul", _matmul_operator, "CompositeExplicitAutograd")
LIBRARY.impl("rows", _rows_operator, "CompositeExplicitAutograd")
LIBRARY.impl("trellis_matmul", _trellis_matmul_operator, "CompositeExplicitAutograd")
LIBRARY.impl("trellis_rows", _trellis_rows_operator, "CompositeExplicitAutograd")
LIBRARY.impl("group", _group, "CompositeExplicitAutograd")
LIBRARY.impl("route", _route_operator, "CompositeExplicitAutograd")


def _sizes(flat: Sequence[Any]) -> list[int]:
    """Return the arguments of an operator after the tensors: rows, columns and, of tiles, the group size."""
    return [each for each in flat if not isinstance(each, Tensor)]


def _fake_matmul(x: Tensor, bias: Tensor | None, activations: str, *flat: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], _sizes(flat)[0])


def _fake_rows(ids: Tensor, *flat: Any) -> Tensor:
    return ids.new_empty(*ids.shape, _sizes(flat)[1], dtype=torch.float32)


def _fake_group(numbers: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(numbers), torch.empty_like(numbers), numbers.new_empty(size, dtype=torch.int32)


def _fake_route(
    scores: Tensor, entry: Tensor, cost: Tensor, price: Tensor, flock: int, k: int
) -> tuple[Tensor, Tensor]:
    kind = torch.result_type(scores, price)
    return scores.new_empty(len(scores), k, dtype=torch.int64), scores.new_empty(len(scores), k, dtype=kind)


def _save_for_gradients(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, _, *flat = inputs
    ctx.sizes = _sizes(flat)
    ctx.save_for_backward(*flat[: -len(ctx.sizes)])


def _gradients(rows_of_form: str, ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of x (gradient · W) and of the bias (the sum); the weight has none."""
    x = bias = None
    if ctx.needs_input_grad[0]:
        rows = ctx.sizes[0]
        all_rows = torch.arange(rows, device=gradient.device)
        weight = getattr(torch.ops.nashswarm, rows_of_form)(all_rows, *ctx.saved_tensors, *ctx.sizes)
        x = gradient @ weight.to(gradient.dtype)
    if ctx.needs_input_grad[1]:
        bias = gradient.reshape(-1, gradient.shape[-1]).sum(0)
    return x, bias, None, *(None for _ in (*ctx.saved_tensors, *ctx.sizes))


def _save_for_gate_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    scores, _, _, price, _, k = inputs
    ctx.shape = scores.shape
    ctx.save_for_backward(scores - price if k == 1 else scores.new_empty(0), *output)
    ctx.mark_non_differentiable(output[0])


def _gate_gradients(ctx: Any, _: Tensor | None, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradient of the scores: that of a softmax over the chosen experts, or over all experts if k is 1."""
    logits, chosen, gates = ctx.saved_tensors
    zeros = torch.zeros(ctx.shape, dtype=gates.dtype, device=gates.device)
    shares = zeros.scatter(1, chosen, gates) if chosen.shape[1] > 1 else logits.softmax(1)
    weighted = gates * gradient
    return zeros.scatter(1, chosen, weighted) - weighted.sum(1, keepdim=True) * shares, None, None, None, None, None


for _prefix in ("", "trellis_"):
    torch.library.register_fake(f"nashswarm::{_prefix}matmul")(_fake_matmul)
    torch.library.register_fake(f"nashswarm::{_prefix}rows")(_fake_rows)
    _backward = functools.partial(_gradients, f"{_prefix}rows")
    torch.library.register_autograd(f"nashswarm::{_prefix}matmul", _backward, setup_context=_save_for_gradients)
torch.library.register_fake("nashswarm::group")(_fake_group)
torch.library.register_fake("nashswarm::route")(_fake_route)
torch.library.register_autograd("nashswarm::route", _gate_gradients, setup_context=_save_for_gate_gradients)
