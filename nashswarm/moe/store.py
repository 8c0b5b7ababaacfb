"""Experts that are served from a file: memory holds as many as a byte budget allows.

The least recently used expert is evicted first (LRU); counters report hits, misses, bytes read and the time of reads.
"""

import collections
import json
import mmap
import os
import pathlib
import time

import safetensors
import safetensors.torch
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nashswarm.models.experts import Experts
from nashswarm.moe.router.router import Router
from nashswarm.runtime.machine import read_machine

MATRICES = ("up_proj", "down_proj")
PAGE = 4096  # bytes to whose multiples direct reads are aligned
LENGTH = 8  # bytes of a safetensors file that tell the length of its header
Key = tuple[str, int]  # layer and number of the expert


def last_level_cache() -> int:
    """Return the bytes of this machine's last-level cache.  Raises ValueError if the system does not report it."""
    here = read_machine()
    last = max(here.caches)
    if last in here.assumed:
        raise ValueError("this system does not tell the size of its caches: give budget_bytes")
    return here.caches[last]


def save(model: nn.Module, path: pathlib.Path) -> None:
    """Write the matrices of all fused experts of ``model`` to a safetensors file, by layer name."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    tensors = {
        f"{name}.{part}": getattr(module, part).detach().contiguous()
        for name, module in layers.items()
        for part in MATRICES
    }
    safetensors.torch.save_file(tensors, path)


class ExpertStore:
    """The experts in a file that ``save`` wrote, at most ``budget_bytes`` of them in the memory of ``device``.

    The budget is by default the size of the last-level cache.  ``direct``: read around the system's own cache of
    files, in which a small file stays and no read would miss.  ``hits``, ``misses``, ``evictions``: number of experts
    that were in memory, were read from the file, and were dropped.  ``held_bytes``: in memory now.  ``bytes_read``:
    from the file; ``read_seconds``: waiting for them.  Raises ValueError for a budget that holds no expert, and for a
    file system without direct reads.
    """

    def __init__(
        self,
        path: pathlib.Path,
        budget_bytes: int | None = None,
        device: torch.device | str = "cpu",
        direct: bool = False,
    ) -> None:
        self.budget_bytes = last_level_cache() if budget_bytes is None else budget_bytes
        self.device = torch.device(device)
        self._file = safetensors.safe_open(path, "pt").__enter__()  # type: ignore[no-untyped-call]
        self._slices = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118
        self.layers = sorted({name.rpartition(".")[0] for name in self._slices})
        self.experts = {layer: self._slices[f"{layer}.up_proj"].get_shape()[0] for layer in self.layers}
        self._held: collections.OrderedDict[Key, tuple[Tensor, ...]] = collections.OrderedDict()
        self._direct = DirectFile(path) if direct else None
        self.held_bytes = self.hits = self.misses = self.evictions = self.bytes_read = 0
        self.read_seconds = 0.0
        largest = max(sum(part.nbytes for part in self._read((layer, 0))) for layer in self.layers)
        if largest > self.budget_bytes:
            raise ValueError(f"a budget of {self.budget_bytes:,} bytes holds no expert of {largest:,} bytes")

    def fetch(self, layer: str, expert: int) -> tuple[Tensor, ...]:
        """Return the matrices of an expert from memory, or read them from the file and evict others if needed."""
        key = (layer, expert)
        if key in self._held:
            self.hits += 1
            self._held.move_to_end(key)
            return self._held[key]
        started = time.perf_counter()
        matrices = self._read(key)
        self.read_seconds += time.perf_counter() - started
        size = sum(part.nbytes for part in matrices)
        while self.held_bytes + size > self.budget_bytes:
            _, evicted = self._held.popitem(last=False)
            self.held_bytes -= sum(part.nbytes for part in evicted)
            self.evictions += 1
        self._held[key] = matrices
        self.held_bytes += size
        self.misses += 1
        self.bytes_read += size
        return matrices

    def resident(self, layer: str) -> Bool[Tensor, " experts"]:
        """Return which experts of a layer are in memory."""
        resident = torch.zeros(self.experts[layer], dtype=torch.bool)
        resident[[expert for name, expert in self._held if name == layer]] = True
        return resident

    def _read(self, key: Key) -> tuple[Tensor, ...]:
        if self._direct is not None:
            return tuple(self._direct.read(f"{key[0]}.{part}", key[1]).to(self.device) for part in MATRICES)
        return tuple(self._slices[f"{key[0]}.{part}"][key[1]].to(self.device, copy=True) for part in MATRICES)


class DirectFile:
    """A safetensors file of float32 tensors, of which single matrices are read from the disk itself (``O_DIRECT``)."""

    def __init__(self, path: pathlib.Path) -> None:
        with path.open("rb") as file:
            header = int.from_bytes(file.read(LENGTH), "little")
            self._tensors = json.loads(file.read(header))
        self._start = LENGTH + header
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_DIRECT)
        except (AttributeError, OSError) as error:
            raise ValueError(f"{path.parent} has no direct reads ({error}): choose a folder on a disk") from None

    def read(self, name: str, number: int) -> Tensor:
        """Read one matrix of a tensor of three dimensions into memory of its own."""
        about = self._tensors[name]
        _, *shape = about["shape"]
        size = 4 * shape[0] * shape[1]
        first = self._start + about["data_offsets"][0] + number * size
        before = first % PAGE
        pages = mmap.mmap(-1, -(-(before + size) // PAGE) * PAGE)
        if os.preadv(self._file, [pages], first - before) < before + size:
            raise OSError(f"the file of experts ends within {name}: write it again")
        return torch.frombuffer(pages, dtype=torch.float32, offset=before, count=size // 4).view(*shape)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)


class StoredExperts(nn.Module):
    """The experts of a layer, fetched from a store in the order in which tokens use them.

    After each batch the router learns which experts are in memory; the next batch may prefer them.
    """

    def __init__(self, store: ExpertStore, layer: str, router: Router) -> None:
        super().__init__()
        self.store, self.layer = store, layer
        self._router = [router]  # in a list, so that it does not become a submodule
        router.resident.zero_()
        router.serving = True

    @torch.no_grad()
    def forward(
        self, x: Float[Tensor, "tokens width"], experts: Int[Tensor, "tokens k"], gates: Float[Tensor, "tokens k"]
    ) -> Float[Tensor, "tokens width"]:
        out = torch.zeros_like(x)
        for expert in dict.fromkeys(experts.flatten().tolist()):  # in the order of use
            up, down = self.store.fetch(self.layer, expert)
            tokens, place = torch.where(experts == expert)
            outputs = Experts.act_fn(x[tokens] @ up.T) @ down.T
            out.index_add_(0, tokens, outputs * gates[tokens, place, None])
        self._router[0].resident.copy_(self.store.resident(self.layer))
        return out


def serve(model: nn.Module, store: ExpertStore) -> None:
    """Replace the experts of every layer of ``model`` by those of ``store``, in place."""
    for layer in store.layers:
        router = model.get_submodule(f"{layer.rpartition('.')[0]}.router")
        assert isinstance(router, Router)
        model.set_submodule(layer, StoredExperts(store, layer, router))
