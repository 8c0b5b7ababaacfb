"""Steps of the tiny model that a test can hold, and the slow way to generate."""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from nashswarm.runtime.serving.steps import ModuleStepper


class Gate:
    """Steps of a model that wait until ``open`` is set; it is cleared as the ``pause``-th begins.

    ``sizes``: of the batches.  ``broken``: tokens that cannot be read.
    """

    def __init__(self, stepper: Any) -> None:
        self.stepper, self.open = stepper, threading.Event()
        self.entered, self.pause, self.piece = 0, 0, stepper.piece
        self.sizes: list[int] = []
        self.broken: list[int] | None = None

    def start(self) -> Any:
        return self.stepper.start()

    def read(self, cache: Any, tokens: Sequence[int], every: bool) -> Any:
        self._enter()
        if list(tokens) == self.broken:
            raise RuntimeError("out of memory")
        return self.stepper.read(cache, tokens, every)

    def step(self, caches: Sequence[Any], tokens: Sequence[int]) -> Any:
        self.sizes.append(len(caches))
        self._enter()
        return self.stepper.step(caches, tokens)

    def extend(self, caches: Sequence[Any], pieces: Sequence[Sequence[int]]) -> Any:
        return None  # each text is read alone, and then a step enters

    def _enter(self) -> None:
        self.entered += 1
        if self.entered == self.pause:
            self.open.clear()
        assert self.open.wait(60)


@pytest.fixture
def gate(tiny: Any) -> Iterator[Gate]:
    """Steps of the tiny model, held until the test opens them."""
    held = Gate(ModuleStepper(tiny))
    yield held
    held.open.set()


@pytest.fixture
def greedy(tiny: Any) -> Callable[[Sequence[int], int], list[int]]:
    """The slow way: tokens and how many to add → the most probable ones, without a cache, up to the end of a text."""

    def generated(ids: Sequence[int], count: int) -> list[int]:
        tokens = list(ids)
        with torch.no_grad():
            while len(tokens) < len(ids) + count and (len(tokens) == len(ids) or tokens[-1] != 0):
                tokens.append(int(tiny(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
        return tokens[len(ids) :]

    return generated
