"""Keys and values of a native pass, in the layers of transformers' ``DynamicCache``.

transformers appends to a cache by copying all of it.  Here a block's keys and values lie in one tensor with room for
more tokens, which a pass writes to; ``keys`` and ``values`` of a layer are views of it.  Whatever else transformers
does with a layer (beam search, cropping, a step by the modules) replaces these views by tensors of its own, which the
next native pass takes over.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from nashswarm.kernels import decoder

ROOM = 64  # tokens, at least, that a growing cache gets room for


class Storage:
    """The keys and values of all blocks for ``length`` tokens of ``batch`` sequences, with room for more.

    ``windows``: the tokens that a block attends to, or 0 for all.  Of a block with a window no more is kept than it can
    still attend to.  ``intact``: no layer has tensors of its own.
    """

    def __init__(self, batch: int, heads: int, size: int, windows: Sequence[int], length: int = 0) -> None:
        self.batch, self.heads, self.size, self.windows = batch, heads, size, list(windows)
        self.length, self.room, self.intact = length, 0, True
        empty = torch.empty(batch, heads, 0, size)
        self.keys, self.values = [empty] * len(self.windows), [empty] * len(self.windows)
        self.shifts = [length] * len(self.windows)
        self.addresses: decoder.Cache | None = None

    def reserve(self, tokens: int) -> decoder.Cache:
        """Make room for so many more tokens, and return the addresses."""
        if self.addresses is None or self.room < tokens:
            for number in range(len(self.windows)):
                self._grow(number, tokens)
            shapes = [keys.shape[2] for keys in self.keys]
            self.room = min(
                (capacity + shift - self.length for capacity, shift in zip(shapes, self.shifts, strict=True)), default=0
            )
            keys, values = (torch.tensor([part.data_ptr() for part in side]) for side in (self.keys, self.values))
            self.addresses = decoder.Cache(
                keys,
                values,
                torch.tensor(shapes), torch.tensor(self.shifts),
            )  # fmt: skip
        return self.addresses

    def append(self, tokens: int) -> None:
        """Count tokens that a pass has written."""
        self.length += tokens
        self.room -= tokens

    def view(self, parts: list[Tensor], number: int) -> Tensor:
        """Return what a layer of transformers would hold of a block: with a window, all but one of its tokens."""
        first = self._first(number) - self.shifts[number]
        return parts[number][:, :, first : self.length - self.shifts[number]]

    def _first(self, number: int) -> int:
        window = self.windows[number]
        return max(self.shifts[number], self.length - window + 1 if window else 0)

    def _grow(self, number: int, tokens: int) -> None:
        first = self._first(number)
        held = self.length - first
        capacity = held + max(tokens, ROOM, held // 4)
        for parts in (self.keys, self.values):
            grown = torch.empty(self.batch, self.heads, capacity, self.size)
            grown[:, :, :held] = self.view(parts, number)
            parts[number] = grown
        self.shifts[number] = first


class _Shared:
    """What both kinds of layers have in common: their tensors are views, until they are given their own."""

    def attach(self, storage: Storage, number: int) -> None:
        self.storage, self.number = storage, number
        self.own: dict[str, Any] | None = None
        self.dtype, self.device = torch.float32, torch.device("cpu")

    @property
    def keys(self) -> Tensor | None:
        return self.storage.view(self.storage.keys, self.number) if self.own is None else self.own["keys"]

    @keys.setter
    def keys(self, tensor: Tensor | None) -> None:
        self.detach()["keys"] = tensor

    @property
    def values(self) -> Tensor | None:
        return self.storage.view(self.storage.values, self.number) if self.own is None else self.own["values"]

    @values.setter
    def values(self, tensor: Tensor | None) -> None:
        self.detach()["values"] = tensor

    @property
    def cumulative_length(self) -> int:
        return int(self.storage.length if self.own is None else self.own["cumulative_length"])

    @cumulative_length.setter
    def cumulative_length(self, length: int) -> None:
        self.detach()["cumulative_length"] = length

    def detach(self) -> dict[str, Any]:
        """Return the tensors of its own, which are those of the storage at first."""
        if self.own is None:
            self.own = {"keys": self.keys, "values": self.values, "cumulative_length": self.storage.length}
            self.storage.intact = False
        return self.own


class SharedLayer(_Shared, DynamicLayer):
    """A layer without a window."""

    def __init__(self, storage: Storage, number: int) -> None:
        self.attach(storage, number)
        self.is_initialized = True


class SharedWindowLayer(_Shared, DynamicSlidingWindowLayer):
    """A layer with a window."""

    def __init__(self, storage: Storage, number: int) -> None:
        self.attach(storage, number)
        self.is_initialized = True
        self.sliding_window = storage.windows[number]
        self._sliding_window_tensor = torch.tensor(self.sliding_window)
        self.record_past = False


def storage_of(cache: Any, batch: int, heads: int, size: int, windows: Sequence[int]) -> Storage | str:
    """Return the storage behind a cache, whose layers are replaced if they have none, or the reason why it has none."""
    if type(cache) is not DynamicCache or cache.offloading:
        return f"keys and values are in a {type(cache).__name__}, not in a DynamicCache"
    layers: list[Any] = cache.layers
    if layers and isinstance(layers[0], _Shared):
        storage = layers[0].storage
        if storage.intact and storage.batch == batch and len(layers) == len(windows):
            return storage
    if len(layers) not in (0, len(windows)):
        return f"the cache has {len(layers)} layers, the model {len(windows)}"
    kinds = (DynamicLayer, DynamicSlidingWindowLayer, SharedLayer, SharedWindowLayer)
    lengths = {layer.get_seq_length() for layer in layers}
    if any(type(layer) not in kinds or getattr(layer, "record_past", False) for layer in layers) or len(lengths) > 1:
        return "the cache has layers of another kind than dynamic ones"
    storage = Storage(batch, heads, size, windows, length := max(lengths, default=0))
    for number, layer in enumerate(layers if length else ()):
        held = layer.keys.shape[2]
        if layer.keys.shape != (batch, heads, held, size) or layer.keys.dtype != torch.float32 or not layer.keys.is_cpu:
            return f"the cache holds keys of shape {tuple(layer.keys.shape)} in {layer.keys.dtype}"
        storage.keys[number], storage.values[number] = layer.keys, layer.values
        storage.shifts[number] = length - held
    cache.layers = [
        (SharedWindowLayer if window else SharedLayer)(storage, number) for number, window in enumerate(windows)
    ]
    cache.layer_class_to_replicate = None
    return storage
