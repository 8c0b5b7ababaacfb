"""Run everything of a model but its decoder blocks: what a block is called with, and what the head reads.

Blocks are replaced by stubs, so that a pass costs next to nothing, and nothing has to be stored between units: masks,
positions and rotations are those that the model itself makes.
"""

import copy
import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nashswarm.methods.streaming import conversion

log = logging.getLogger(__name__)
HIDDEN = "hidden_states"
PROBE_TOKENS = 4


@dataclasses.dataclass(frozen=True)
class Structure:
    """What compression by layer knows of an architecture.

    ``embedding`` and ``head``: the modules of tokens and of logits, whose matrices are one if ``tied``.  ``blocks``:
    the decoder blocks in order.  ``in_tuples``: whether the model expects each of them to return a tuple.  ``width``:
    numbers that a token has between blocks.
    """

    embedding: str
    head: str
    tied: bool
    blocks: tuple[str, ...]
    in_tuples: bool
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

    def run(self, block: nn.Module, hidden: Float[Tensor, "length width"]) -> Float[Tensor, "length width"]:
        """Return what ``block`` makes of other hidden states, the other arguments staying as they are."""
        states = hidden.unsqueeze(0)
        if self.arguments:
            outputs = block(states, *self.arguments[1:], **self.options)
        else:
            outputs = block(**self.options | {HIDDEN: states})
        return (outputs if isinstance(outputs, Tensor) else outputs[0])[0]


class Surroundings:
    """A model whose blocks are stubs that return what they are given."""

    def __init__(self, model: Any, blocks: Sequence[str], head: str, in_tuples: bool) -> None:
        self.model, self.in_tuples, self.count = model, in_tuples, len(blocks)
        self.stop: int | None = None
        self.last: Tensor | None = None
        self.reached: Any = None
        for number, name in enumerate(blocks):
            model.get_submodule(name).forward = functools.partial(self._visit, number)
        model.get_submodule(head).forward = self._read_head

    def call(self, ids: Int[Tensor, " length"], number: int) -> Call:
        """Return what block ``number`` is called with where the model reads ``ids``."""
        self.stop, self.last = number, None
        reached: Call = self._pass(ids)
        return reached

    def head_inputs(
        self, ids: Int[Tensor, " length"], states: Float[Tensor, "length width"]
    ) -> Float[Tensor, "length hidden"]:
        """Return what the head reads where the last block returns ``states``."""
        self.stop, self.last = None, states.unsqueeze(0)
        reached: Tensor = self._pass(ids)
        return reached[0]

    @torch.no_grad()
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
        states = call.hidden if self.last is None or number + 1 < self.count else self.last
        return (states,) if self.in_tuples else states

    def _read_head(self, inputs: Tensor) -> Tensor:
        self.reached = inputs
        raise Reached


class _Probe(Surroundings):
    """Surroundings whose stubs return random states, and check that the next stub gets them as they are."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.sent: list[Tensor] = []
        self.handed: list[set[int]] = []
        self.generator = torch.Generator().manual_seed(0)

    def _visit(self, number: int, *arguments: Any, **options: Any) -> Any:
        hidden = Call(arguments, options).hidden
        is_next = number == len(self.sent) and hidden.ndim == 3 and hidden.shape[:2] == (1, PROBE_TOKENS)
        if not is_next or (self.sent and not torch.equal(hidden, self.sent[-1])):
            raise LookupError(f"block {number} reads something else than the outputs of the block before it")
        self.handed.append({id(part) for part in (*arguments, *options.values()) if _can_be_written(part)})
        if number and self.handed[0] & self.handed[number]:
            raise LookupError(f"block {number} is handed what block 0 may have written")
        self.sent.append(torch.randn(hidden.shape, generator=self.generator))
        return (self.sent[-1],) if self.in_tuples else self.sent[-1]


def probe(model: Any, blocks: Sequence[str], head: str, in_tuples: bool) -> int | None:
    """Return the numbers that a token has between ``blocks``; None if they do not run one after another.

    ``model`` has no memory and is not changed: what is outside of its blocks is run with zeros.
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
    prober = _Probe(trial, blocks, head, in_tuples)
    try:
        conversion.initialize_buffers(trial, trial, inside)
        prober._pass(torch.arange(1, PROBE_TOKENS + 1))
    except Exception as error:  # of an architecture that does not fit, in any part of its code
        log.debug("blocks %s: %r", blocks[0], error)
        return None
    return prober.sent[0].shape[-1] if len(prober.sent) == len(blocks) else None


def load(
    fused: Any,
    shards: Mapping[str, Tensor],
    keys: Mapping[str, Sequence[str]],
    structure: Structure,
    ids: Int[Tensor, " tokens"],
    rows: Float[Tensor, "tokens width"],
) -> Surroundings:
    """Return the surroundings of the blocks of ``fused`` with their weights from ``shards``.

    ``keys``: the names in the checkpoint by the parameter that is made of them.  ``rows``: those of the embedding for
    the tokens ``ids``, the only ones that will be read; the memory of the others is never touched.
    """
    model = copy.deepcopy(fused)
    inside = tuple(f"{name}." for name in structure.blocks)
    matrices = f"{structure.embedding}.weight", f"{structure.head}.weight"
    wanted = [key for name in keys if not name.startswith(inside) and name not in matrices for key in keys[name]]
    conversion.load(model, {key: conversion.Unread(shards, key) for key in wanted})
    embedding = model.get_submodule(structure.embedding)
    table = torch.from_numpy(np.zeros(tuple(embedding.weight.shape), np.float32))
    table[ids] = rows
    embedding.weight = _initialized(table)
    conversion.initialize_buffers(model, model, _modules(model, structure.blocks))
    return Surroundings(model.requires_grad_(False), structure.blocks, structure.head, structure.in_tuples)


def _modules(model: nn.Module, names: Sequence[str]) -> set[nn.Module]:
    """Return all modules in the modules ``names``."""
    return {module for name in names for module in model.get_submodule(name).modules()}


def _initialized(values: Tensor) -> nn.Parameter:
    """Return a parameter that transformers does not initialize again."""
    parameter = nn.Parameter(values, requires_grad=False)
    setattr(parameter, conversion.INITIALIZED, True)
    return parameter


def _can_be_written(part: Any) -> bool:
    """Check whether a block could leave something in an argument for a later block."""
    plain = (Tensor, type(None), bool, int, float, str, torch.dtype, torch.device, tuple)
    return not isinstance(part, plain)
