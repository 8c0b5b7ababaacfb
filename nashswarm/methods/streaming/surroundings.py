"""Run everything of a model but its decoder blocks: what a block is called with, and what the head reads.

Blocks are replaced by stubs, so that a pass costs next to nothing, and nothing has to be stored between units: masks,
positions and rotations are those that the model itself makes.
"""

import contextlib
import copy
import dataclasses
import functools
import math
import mmap
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig

from nashswarm.methods.streaming import conversion

HIDDEN = "hidden_states"
PROBE_TOKENS = 4
PLAIN = (Tensor, type(None), bool, int, float, str, torch.dtype, torch.device, tuple)  # no block can write into these


@dataclasses.dataclass(frozen=True)
class Structure:
    """What compression by layer knows of an architecture.

    ``embedding`` and ``head``: the modules of tokens and of logits, whose matrices are one if ``tied``.  ``blocks``:
    the decoder blocks in order.  ``returned``: the length of the tuple that the model expects each of them to return,
    0 if it expects the hidden states themselves.  ``width``: numbers that a token has between blocks.
    """

    embedding: str
    head: str
    tied: bool
    blocks: tuple[str, ...]
    returned: int
    width: int


class Reached(BaseException):
    """Ends a pass where all is known that was asked for; no handler of errors in a model catches it."""


class Call:
    """The arguments that a block is called with."""

    def __init__(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.arguments, self.options = arguments, options

    @property
    def hidden(self) -> Tensor:
        """Return the hidden states of one window."""
        hidden: Tensor = self.arguments[0] if self.arguments else self.options[HIDDEN]
        return hidden

    def run(self, block: nn.Module, hidden: Float[Tensor, "length *width"]) -> Float[Tensor, "length *width"]:
        """Return what ``block`` makes of other hidden states, the other arguments staying as they are."""
        states = hidden.unsqueeze(0)
        if self.arguments:
            outputs = block(states, *self.arguments[1:], **self.options)
        else:
            outputs = block(**self.options | {HIDDEN: states})
        return (outputs if isinstance(outputs, Tensor) else outputs[0])[0]


class Surroundings:
    """A model whose blocks are stubs that return what they are given.

    The stubs know it by a weak reference, so that its memory is freed with the last use, and not when Python next
    looks for cycles.
    """

    def __init__(self, model: Any, blocks: Sequence[str], head: str, returned: int) -> None:
        self.model, self.returned, self.count = model, returned, len(blocks)
        self.stop: int | None = None
        self.last: Tensor | None = None
        self.reached: Any = None
        me = weakref.ref(self)
        for number, name in enumerate(blocks):
            model.get_submodule(name).forward = functools.partial(_visit_block, me, number)
        model.get_submodule(head).forward = functools.partial(_visit_head, me)

    @torch.no_grad()
    def call(self, ids: Int[Tensor, " length"], number: int) -> Call:
        """Return what block ``number`` is called with where the model reads ``ids``."""
        self.stop, self.last = number, None
        reached: Call = self._pass(ids)
        return reached

    def embedded(self, ids: Int[Tensor, " length"]) -> Float[Tensor, "length *width"]:
        """Return the states that the first block reads, with the graph that they come from."""
        self.stop, self.last = 0, None
        with torch.enable_grad():
            reached: Call = self._pass(ids)
            return reached.hidden[0]

    def open_head(self, weight: Float[Tensor, "vocabulary hidden"]) -> None:
        """Give the head this weight, so that the model returns logits from now on."""
        head = self.model.get_output_embeddings()
        del head.forward  # that of the stub
        head.weight = _initialized(weight)

    def end_in(self, states: Float[Tensor, "length *width"]) -> None:
        """Let the last block return ``states`` from now on, with their graph; of fewer tokens, the first of them."""
        self.stop, self.last = None, states.unsqueeze(0)

    @torch.no_grad()
    def head_inputs(
        self, ids: Int[Tensor, " length"], states: Float[Tensor, "length *width"]
    ) -> Float[Tensor, "length hidden"]:
        """Return what the head reads where the last block returns ``states``."""
        self.end_in(states)
        reached: Tensor = self._pass(ids)
        return reached[0]

    def _pass(self, ids: Int[Tensor, " length"]) -> Any:
        try:
            self.model(input_ids=ids.unsqueeze(0), use_cache=False)
        except Reached:
            reached, self.reached = self.reached, None
            return reached
        raise ValueError(f"a {type(self.model).__name__} did not run as it was expected to")

    def _visit(self, number: int, *arguments: Any, **options: Any) -> Any:
        call = Call(arguments, options)
        if number == self.stop:
            self.reached = call
            raise Reached
        states = call.hidden
        if self.last is not None and number + 1 == self.count:
            states = self.last[:, : states.shape[1]]
        return self._as_returned(states)

    def _as_returned(self, states: Tensor, beside: Any = None) -> Any:
        return (states, beside)[: self.returned] if self.returned else states

    def _read_head(self, inputs: Tensor) -> Tensor:
        self.reached = inputs
        raise Reached


def _visit_block(surroundings: "weakref.ref[Surroundings]", number: int, *arguments: Any, **options: Any) -> Any:
    around = surroundings()
    assert around is not None
    return around._visit(number, *arguments, **options)


def _visit_head(surroundings: "weakref.ref[Surroundings]", inputs: Tensor) -> Any:
    around = surroundings()
    assert around is not None
    return around._read_head(inputs)


def _can_be_written(part: Any) -> bool:
    """Check whether a block could leave something in an argument for the next block; tables are only read."""
    table = isinstance(part, dict) and bool(part) and all(isinstance(value, PLAIN) for value in part.values())
    return not table and not isinstance(part, (*PLAIN, PreTrainedConfig))


class _Probe(Surroundings):
    """Surroundings whose stubs return random states, and check that the next stub gets them and nothing else."""

    def __init__(self, model: Any, blocks: Sequence[str], head: str, returned: int, independent: bool) -> None:
        super().__init__(model, blocks, head, returned)
        self.independent = independent
        self.sent: list[Tensor] = []
        self.written: set[int] = set()
        self.beside = object()
        self.generator = torch.Generator().manual_seed(0)

    def _visit(self, number: int, *arguments: Any, **options: Any) -> Any:
        hidden = Call(arguments, options).hidden
        if number != len(self.sent):
            raise LookupError("their order is another one")
        if hidden.shape[:2] != (1, PROBE_TOKENS):
            raise LookupError(f"hidden states have the shape {tuple(hidden.shape)}")
        if self.sent and not torch.equal(hidden, self.sent[-1]):
            raise LookupError("a block reads something else than the outputs of the block before it")
        given = (*arguments, *options.values())
        writable = {id(part) for part in given if _can_be_written(part)}
        if any(part is self.beside for part in given) or (self.written & writable and not self.independent):
            raise LookupError("a block hands more than its outputs on")
        self.written |= writable
        self.sent.append(torch.randn(hidden.shape, generator=self.generator))
        return self._as_returned(self.sent[-1], self.beside)


def probe(model: Any, blocks: Sequence[str], others: Sequence[str], head: str, returned: int) -> int:
    """Return the numbers that a token has between ``blocks``, in tuples of length ``returned``.

    ``model`` has no memory and is not changed: what is outside of its blocks is run with zeros.  Raises LookupError if
    the blocks do not run one after another, each on the outputs of the one before it, or if modules in one of the lists
    ``others`` run as well, and any other error if the model expects tuples of another length.
    """
    trial = copy.deepcopy(model)
    inside = _modules(trial, blocks)
    for module in set(trial.modules()) - inside:
        for name, part in module._parameters.items():
            if part is not None:  # zeros that all lie in one place
                module._parameters[name] = _initialized(torch.zeros((), dtype=part.dtype).expand(part.shape))
        for name in module._buffers.keys() - module._non_persistent_buffers_set:
            buffer = module._buffers[name]
            module._buffers[name] = None if buffer is None else torch.zeros_like(buffer, device="cpu")
    shared = getattr(model.config.get_text_config(), "num_kv_shared_layers", None)
    prober = _Probe(trial, blocks, head, returned, independent=shared == 0)
    for name in others:
        for part in trial.get_submodule(name):
            part.register_forward_pre_hook(_refuse_to_run)
    conversion.initialize_buffers(trial, trial, inside)
    with torch.no_grad():
        prober._pass(torch.arange(1, PROBE_TOKENS + 1))
    if len(prober.sent) != len(blocks):
        raise LookupError(f"{len(prober.sent)} of {len(blocks)} blocks run")
    for name in blocks:
        block = trial.get_submodule(name)
        conversion.initialize_buffers(conversion.owner(trial, name), block)
    return prober.sent[0].numel() // PROBE_TOKENS


def _refuse_to_run(module: nn.Module, arguments: Any) -> None:
    raise LookupError("there are several lists of them")


def load(
    fused: Any,
    shards: Mapping[str, Tensor],
    keys: Mapping[str, Sequence[str]],
    structure: Structure,
    ids: Int[Tensor, " tokens"],
    rows: Float[Tensor, "tokens hidden"],
) -> Surroundings:
    """Return the surroundings of the blocks of ``fused`` with their weights from ``shards``.

    ``keys``: the names in the checkpoint by the parameter that is made of them.  ``rows``: those of the embedding for
    the tokens ``ids``, the only ones that will be read; the others take no memory.
    """
    model = copy.deepcopy(fused)
    inside = tuple(f"{name}." for name in structure.blocks)
    matrices = f"{structure.embedding}.weight", f"{structure.head}.weight"
    wanted = [key for name in keys if not name.startswith(inside) and name not in matrices for key in keys[name]]
    conversion.load(model, {key: conversion.Unread(shards, key) for key in wanted})
    embedding = model.get_submodule(structure.embedding)
    table = _unwritten(embedding.weight.shape)
    table[ids] = rows
    embedding.weight = _initialized(table)
    conversion.initialize_buffers(model, model, _modules(model, structure.blocks))
    return Surroundings(model.requires_grad_(False), structure.blocks, structure.head, structure.returned)


def _unwritten(shape: torch.Size) -> Float[Tensor, "tokens hidden"]:
    """Return zeros of which only those pages take memory that are written.

    Huge pages are declined: a row in each of them would fill the table.
    """
    pages = mmap.mmap(-1, 4 * math.prod(shape), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):  # where there are none
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.float32).view(shape)


def _modules(model: nn.Module, names: Sequence[str]) -> set[nn.Module]:
    """Return all modules in the modules ``names``."""
    return {module for name in names for module in model.get_submodule(name).modules()}


def _initialized(values: Tensor) -> nn.Parameter:
    """Return a parameter that transformers does not initialize again."""
    parameter = nn.Parameter(values, requires_grad=False)
    setattr(parameter, conversion.INITIALIZED, True)
    return parameter
