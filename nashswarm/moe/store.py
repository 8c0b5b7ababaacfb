"""Experts by their bytes: a memory-mapped file holds all of them, memory as many as a budget allows.

What was not used for longest goes first (LRU); every counter tells what really moved.
"""

import collections
import pathlib
from typing import Any

import safetensors
import safetensors.torch
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nashswarm.models.experts import Experts
from nashswarm.runtime.machine import machine

MATRICES = ("up_proj", "down_proj")
Key = tuple[str, int]  # a layer and the number of its expert


def last_level_cache() -> int:
    """Bytes of this machine's last cache before memory.  Raises ValueError where the system does not say."""
    here = machine()
    last = max(here.caches)
    if last in here.assumed:
        raise ValueError("this system does not tell the size of its caches: give budget_bytes")
    return here.caches[last]


def save(model: nn.Module, path: pathlib.Path) -> None:
    """Write the matrices of all fused experts of ``model``, by the names of their layers."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    tensors = {
        f"{name}.{part}": getattr(module, part).detach().contiguous()
        for name, module in layers.items()
        for part in MATRICES
    }
    safetensors.torch.save_file(tensors, path)


class ExpertStore:
    """The experts in a file of ``save``, ``budget_bytes`` of them in the memory of ``device`` at most (default: the
    last-level cache).

    ``hits``, ``misses``, ``evictions``: how often an expert was there, was read, went; ``bytes_read``: from the file.
    Raises ValueError for a budget that holds no expert.
    """

    def __init__(self, path: pathlib.Path, budget_bytes: int | None = None, device: torch.device | str = "cpu") -> None:
        self.budget_bytes = last_level_cache() if budget_bytes is None else budget_bytes
        self.device = torch.device(device)
        self._file = safetensors.safe_open(path, "pt").__enter__()  # type: ignore[no-untyped-call]
        self._slices = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118
        self.layers = sorted({name.rpartition(".")[0] for name in self._slices})
        self.experts = {layer: self._slices[f"{layer}.up_proj"].get_shape()[0] for layer in self.layers}
        self._held: collections.OrderedDict[Key, tuple[Tensor, ...]] = collections.OrderedDict()
        self.held_bytes = self.hits = self.misses = self.evictions = self.bytes_read = 0
        largest = max(sum(part.nbytes for part in self._read((layer, 0))) for layer in self.layers)
        if largest > self.budget_bytes:
            raise ValueError(f"a budget of {self.budget_bytes:,} bytes holds no expert of {largest:,} bytes")

    def fetch(self, layer: str, expert: int) -> tuple[Tensor, ...]:
        """The matrices of an expert, from memory or else from the file, and then others may have to go."""
        key = (layer, expert)
        if key in self._held:
            self.hits += 1
            self._held.move_to_end(key)
            return self._held[key]
        found = self._read(key)
        size = sum(part.nbytes for part in found)
        while self.held_bytes + size > self.budget_bytes:
            _, gone = self._held.popitem(last=False)
            self.held_bytes -= sum(part.nbytes for part in gone)
            self.evictions += 1
        self._held[key] = found
        self.held_bytes += size
        self.misses += 1
        self.bytes_read += size
        return found

    def resident(self, layer: str) -> Bool[Tensor, " experts"]:
        """Which experts of a layer are in memory."""
        found = torch.zeros(self.experts[layer], dtype=torch.bool)
        found[[expert for name, expert in self._held if name == layer]] = True
        return found

    def _read(self, key: Key) -> tuple[Tensor, ...]:
        return tuple(self._slices[f"{key[0]}.{part}"][key[1]].to(self.device, copy=True) for part in MATRICES)


class StoredExperts(nn.Module):
    """The experts of a layer that are fetched from a store as tokens ask for them; the router is told afterwards which
    are in memory, before it sees the next tokens."""

    def __init__(self, store: ExpertStore, layer: str, router: Any) -> None:
        super().__init__()
        self.store, self.layer = store, layer
        self._router = [router]  # no submodule: it stands beside
        router.resident.zero_()
        router.serving = True

    @torch.no_grad()
    def forward(
        self, x: Float[Tensor, "tokens width"], experts: Int[Tensor, "tokens k"], gates: Float[Tensor, "tokens k"]
    ) -> Float[Tensor, "tokens width"]:
        out = torch.zeros_like(x)
        for expert in dict.fromkeys(experts.flatten().tolist()):  # in the order in which they are asked for
            up, down = self.store.fetch(self.layer, expert)
            tokens, place = torch.where(experts == expert)
            made = Experts.act_fn(x[tokens] @ up.T) @ down.T
            out.index_add_(0, tokens, made * gates[tokens, place, None])
        self._router[0].resident.copy_(self.store.resident(self.layer))
        return out


def serve(model: nn.Module, store: ExpertStore) -> None:
    """Let every layer of ``model`` take its experts from ``store`` from now on; its own are let go."""
    for layer in store.layers:
        parent = model.get_submodule(layer.rpartition(".")[0])
        model.set_submodule(layer, StoredExperts(store, layer, parent.router))
