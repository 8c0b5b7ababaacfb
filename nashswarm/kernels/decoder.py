"""A forward pass through the blocks of a language model in the C++ library, without Python between its products.

The structs are those of csrc/decoder.h, with addresses as integers.  Whoever fills them keeps the tensors alive and
checks that their shapes fit; ``nashswarm.packed.blocks`` does so for models of transformers.
"""

import ctypes
import dataclasses

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from nashswarm.kernels import native, trellis_native

TOKENS = 64  # of a pass, at most; a longer text takes several
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2}
NORMS = ("before_attention", "after_attention", "before_inner", "after_inner", "query", "key")
NO_MEMORY, NO_TOKEN = 1, 2  # what the library returns


def _fields(integers: str = "", addresses: str = "") -> list[tuple[str, type]]:
    return [
        *((name, ctypes.c_int64) for name in integers.split()),
        *((name, ctypes.c_uint64) for name in addresses.split()),
    ]


class Matrix(ctypes.Structure):
    """A trellis-coded matrix; without ``content`` there is none."""

    _fields_ = _fields(addresses="content starts bias")


class Norm(ctypes.Structure):
    """A layer norm or a norm of root mean squares; without ``weight`` there is none.  ``offset``: of weights."""

    _fields_ = [*_fields(addresses="weight bias"), ("offset", ctypes.c_float), ("reserved", ctypes.c_float)]


class Table(ctypes.Structure):
    """An embedding of so many ``rows``, trellis-coded or as floats."""

    _fields_ = [("matrix", Matrix), *_fields("rows", "floats")]


class Block(ctypes.Structure):
    """Attention and two layers after it.  ``window``: 0 if a token attends to all before it."""

    _fields_ = [
        ("attention", Matrix * 3),
        ("output", Matrix),
        ("inner", Matrix * 2),
        ("down", Matrix),
        *((name, Norm) for name in NORMS),
        ("window", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("reserved", ctypes.c_float),
    ]


class Model(ctypes.Structure):
    """A model: its sizes, its embeddings, its blocks and its head.

    ``joint_norms``: norms of queries and keys take all heads together.  ``clip``: of queries, keys and values.  A cap c
    makes c · tanh(x / c) of a score or a logit.  0: none.
    """

    _fields_ = [
        *_fields("blocks hidden heads key_heads head_size rotated inner vocabulary gated activation layer_norm"),
        *_fields("joint_norms"),
        ("epsilon", ctypes.c_float),
        ("head_epsilon", ctypes.c_float),
        ("embedding_scale", ctypes.c_float),
        ("clip", ctypes.c_float),
        ("score_cap", ctypes.c_float),
        ("logit_cap", ctypes.c_float),
        ("tokens", Table),
        ("places", Table),
        ("norm", Norm),
        ("head", Matrix),
        ("block", ctypes.c_uint64),
    ]


class Pass(ctypes.Structure):
    """The tokens of a pass, the cache, and where logits go."""

    _fields_ = [
        *_fields("count", "ids sequences places firsts positions cosines sines caches"),
        *_fields("wanted", "wanted_tokens logits"),
    ]


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Tokens, those of a sequence side by side and in their order.

    ``places``: in their sequences, of which the cache holds all before.  ``firsts``: the first place of the sequence
    that is no padding.  ``positions``: which rotations and embeddings of positions take.
    """

    ids: Int64[Tensor, " tokens"]
    sequences: Int64[Tensor, " tokens"]
    places: Int64[Tensor, " tokens"]
    firsts: Int64[Tensor, " tokens"]
    positions: Int64[Tensor, " tokens"]


def forward(
    model: Model,
    tokens: Tokens,
    caches: Int64[Tensor, "sequences blocks 4"],
    turns: tuple[Float32[Tensor, "positions half"], Float32[Tensor, "positions half"]] | None,
    wanted: Int64[Tensor, " wanted"],
    activations: str,
) -> Float32[Tensor, "wanted vocabulary"]:
    """Return the logits of the ``wanted`` tokens, and append the keys and values of all tokens to the caches.

    ``caches``: of every sequence in every block, the addresses of its keys and values, each
    [key head][capacity][head size], the capacity, and the place in the sequence of the first key.  ``turns``: cosines
    and sines of the rotations, for every position.  Raises IndexError for a token or a position that the model does not
    have, and MemoryError.
    """
    logits = torch.empty(wanted.numel(), model.vocabulary)
    parts = [part.data_ptr() for part in (tokens.ids, tokens.sequences, tokens.places, tokens.firsts, tokens.positions)]
    cosines, sines = (0, 0) if turns is None else (part.data_ptr() for part in turns)
    count, done = tokens.ids.numel(), 0
    step = trellis_native.library_with_tables().nashswarm_decoder_pass
    for first in range(0, count, TOKENS):
        number = min(TOKENS, count - first)
        own = wanted
        if count > TOKENS:
            own = wanted[(wanted >= first) & (wanted < first + number)] - first
        job = Pass(
            number, *(part + 8 * first for part in parts), cosines, sines, caches.data_ptr(),
            own.numel(), own.data_ptr(), logits.data_ptr() + 4 * done * model.vocabulary,
        )  # fmt: skip
        failed = step(
            ctypes.byref(model), ctypes.byref(job), native.DIGITS[activations], torch.get_num_threads(),
            native.PATHS[native.path()],
        )  # fmt: skip
        if failed == NO_MEMORY:
            raise MemoryError(f"no memory is left for a pass of {number} tokens")
        if failed:
            what, table, ids = (
                ("token", model.tokens, tokens.ids)
                if failed == NO_TOKEN
                else ("position", model.places, tokens.positions)
            )
            raise IndexError(f"there is no {what} {int(ids.max())}: the model has {table.rows}, numbered from 0")
        done += own.numel()
    return logits
