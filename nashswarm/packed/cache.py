"""Keys and values that grow in place, in the layers of transformers' ``DynamicCache``.

transformers appends to a cache by copying all of it.  Here a layer's keys and values lie in tensors with room for more
tokens, which a native pass or a step by the modules writes to; ``keys`` and ``values`` are views of them.  Whatever
else transformers does with a layer (beam search, cropping, recording the past) replaces these views by tensors of its
own, which the next pass takes over.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

BLOCK = 64  # tokens by which room grows
SPARE = 8  # of so many tokens held, room for one more is made: a text is not copied too often


class Shape(NamedTuple):
    """The shape of the keys and values of a block, without the tokens."""

    batch: int
    heads: int
    size: int


class Addresses:
    """Where the layers of a cache lie, for the C++ library.  ``room``: tokens that fit until one of them must move."""

    def __init__(self) -> None:
        self.room = 0
        self.shape: Shape | None = None
        self.table: Int64[Tensor, "sequences blocks 4"] = torch.empty(0, 0, 4, dtype=torch.int64)

    def __reduce__(self) -> Any:
        return Addresses, ()  # those of a copy are others


class _Growing:
    """What layers with and without a window have in common.

    ``_room``: keys and values, with columns to come; the first column is that of the token ``shift``.  ``_own``: the
    tensors that transformers has set instead, if any.
    """

    window = 0  # tokens that a token attends to, with itself; 0: all
    length = shift = 0
    addresses: Addresses | None = None
    record_past = False
    _room: Sequence[Tensor] = ()
    _own: dict[str, Any] | None = None

    @property
    def keys(self) -> Tensor | None:
        return self._view(0) if self._own is None else self._own["keys"]

    @keys.setter
    def keys(self, tensor: Tensor | None) -> None:
        self._detach()["keys"] = tensor

    @property
    def values(self) -> Tensor | None:
        return self._view(1) if self._own is None else self._own["values"]

    @values.setter
    def values(self, tensor: Tensor | None) -> None:
        self._detach()["values"] = tensor

    def get_seq_length(self) -> int:
        if self._own is None:
            return self.length
        return int(super().get_seq_length())  # type: ignore[misc]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append what the modules computed; return all that the new tokens attend to."""
        if not self.get_seq_length():
            self.lazy_initialization(key_states, value_states)  # type: ignore[attr-defined]
        if self.record_past or key_states.requires_grad:
            updated: tuple[Tensor, Tensor] = super().update(key_states, value_states)  # type: ignore[misc]
            return updated
        self.attach()
        first, tokens = self._first(), key_states.shape[-2]
        self.reserve(tokens, key_states, value_states)
        self._forget_addresses()
        place = self.length - self.shift
        for room, part in zip(self._room, (key_states, value_states), strict=True):
            room[..., place : place + tokens, :] = part
        self.length += tokens
        keys, values = (room[..., first - self.shift : place + tokens, :] for room in self._room)
        return keys, values

    def attach(self) -> None:
        """Take over the tensors that transformers has set."""
        if self._own is None:
            return
        keys, values, length = self._own.values()
        held = 0 if keys is None or not keys.numel() else keys.shape[-2]
        self._own, self._room = None, [keys, values] if held else []
        self.length = length if self.window else held
        self.shift = self.length - held

    def reserve(self, tokens: int, keys: Tensor, values: Tensor) -> None:
        """Make room for so many more tokens.  Tensors are like ``keys`` and ``values``, whatever their length."""
        if self._room and self.spare >= tokens:
            return
        first = self._first()
        held = self.length - first
        columns = -(-(held + tokens + held // SPARE) // BLOCK) * BLOCK
        grown = [part.new_empty(*part.shape[:-2], columns, part.shape[-1]) for part in (keys, values)]
        for room, old in zip(grown, self._room, strict=False):
            room[..., :held, :] = old[..., first - self.shift : self.length - self.shift, :]
        self._room, self.shift = grown, first

    @property
    def spare(self) -> int:
        """Return the tokens that still find room."""
        return self._room[0].shape[-2] + self.shift - self.length

    def _first(self) -> int:
        """Return the first token that the next one may attend to, or that a crop may bring back."""
        kept = not self.window or self.record_past
        return self.shift if kept else max(self.shift, self.length - self.window + 1)

    def _view(self, side: int) -> Tensor | None:
        columns = slice(self._first() - self.shift, self.length - self.shift)
        return self._room[side][..., columns, :] if self._room else None

    def _detach(self) -> dict[str, Any]:
        """Return the tensors of its own, which are views of the room at first."""
        if self._own is None:
            self._own = {"keys": self.keys, "values": self.values, "length": self.length}
            self._forget_addresses()
        return self._own

    def _forget_addresses(self) -> None:
        if self.addresses is not None:
            self.addresses.room = 0


class GrowingLayer(_Growing, DynamicLayer):
    """A layer without a window."""


class GrowingWindowLayer(_Growing, DynamicSlidingWindowLayer):
    """A layer with a window: no more is kept than the next token can still attend to."""

    def __init__(self, window: int) -> None:
        self.window = window
        super().__init__(window)

    def activate_past_recording(self) -> None:
        self._detach()  # what is kept from now on begins with what is held
        super().activate_past_recording()  # type: ignore[no-untyped-call]

    @property
    def cumulative_length(self) -> int:
        return int(self.length if self._own is None else self._own["length"])

    @cumulative_length.setter
    def cumulative_length(self, length: int) -> None:
        self._detach()["length"] = length


def growing(layer: Any) -> Any:
    """Return a layer that holds nothing yet as one that grows in place, if its kind is known; else itself."""
    if type(layer) is DynamicLayer:
        return GrowingLayer()  # type: ignore[no-untyped-call]
    return GrowingWindowLayer(layer.sliding_window) if type(layer) is DynamicSlidingWindowLayer else layer


def reserve(cache: Any, tokens: int, shape: Shape, windows: Sequence[int]) -> Int64[Tensor, "sequences blocks 4"] | str:
    """Make room in a cache and return its addresses for ``decoder.forward``, or the reason why it has none.

    ``windows``: by block, 0 for none.  Layers that do not grow in place are replaced by such.
    """
    if type(cache) is not DynamicCache or cache.offloading:
        return f"keys and values are in a {type(cache).__name__}, not in a DynamicCache"
    layers: list[Any] = cache.layers
    known = getattr(layers[0], "addresses", None) if layers else None
    if known is not None and known.room >= tokens and known.shape == shape and len(layers) == len(windows):
        return cast(Tensor, known.table)
    if len(layers) not in (0, len(windows)):
        return f"the cache has {len(layers)} layers, the model {len(windows)}"
    kinds = (DynamicLayer, DynamicSlidingWindowLayer, GrowingLayer, GrowingWindowLayer)
    if any(type(layer) not in kinds for layer in layers) or len({layer.get_seq_length() for layer in layers}) > 1:
        return "the cache has layers of another kind than dynamic ones"
    like, replaced = torch.empty(*shape[:2], 0, shape.size), []
    for number, window in enumerate(windows):
        layer = _taken_over(layers[number] if layers else None, window)
        held = layer._room[0] if layer._room else like
        if held.shape != (*shape[:2], held.shape[-2], shape.size) or held.dtype != torch.float32 or not held.is_cpu:
            return f"the cache holds keys of shape {tuple(held.shape)} in {held.dtype}"
        replaced.append(layer)
    addresses, rows = Addresses(), []
    for layer in replaced:
        layer.reserve(tokens, like, like)
        layer.addresses, layer.dtype, layer.device, layer.is_initialized = addresses, like.dtype, like.device, True
        keys, values = layer._room
        rows.append((keys.data_ptr(), values.data_ptr(), keys.shape[-2], layer.shift))
    one = torch.tensor(rows).view(len(rows), 4)
    addresses.table = one.repeat(shape.batch, 1, 1)
    bytes_of_sequence = one[:, 2:3] * (shape.heads * shape.size * like.element_size())
    addresses.table[..., :2] += torch.arange(shape.batch)[:, None, None] * bytes_of_sequence
    addresses.shape, addresses.room = shape, min((layer.spare for layer in replaced), default=0)
    cache.layers, cache.layer_class_to_replicate = replaced, None
    return addresses.table


def append(cache: Any, tokens: int) -> None:
    """Count tokens that a native pass has written to a cache with addresses."""
    for layer in cache.layers:
        layer.length += tokens
    if cache.layers:
        cache.layers[0].addresses.room -= tokens


def _taken_over(layer: Any, window: int) -> Any:
    """Return a growing layer with this window and the tokens of a layer, if there is one."""
    if isinstance(layer, _Growing) and layer.window == window:
        layer.attach()
        return layer
    made: Any = GrowingWindowLayer(window) if window else GrowingLayer()  # type: ignore[no-untyped-call]
    if layer is not None and (length := layer.get_seq_length()):
        made.record_past = getattr(layer, "record_past", False)
        made._own = {"keys": layer.keys, "values": layer.values, "length": length}
    made.attach()
    return made
