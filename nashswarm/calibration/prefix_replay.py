"""Forward passes of a model of which some late block changed: the blocks before it answer as they did before."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn


class PrefixReplay:
    """The answers of a model's blocks, the parts of its lists of modules, on some text.

    ``run``: all forward passes over that text, done without gradients.  A block that answers more or less than once a
    pass, as where layers share it, is never replayed, nor are those after it.
    """

    def __init__(self, model: Any, run: Callable[[], object]) -> None:
        self.model = model
        self.passes = 0
        self.answers: dict[nn.Module, list[Any]] = {}
        hooks = [block.register_forward_hook(self._see) for stack in _stacks(model) for block in stack]
        hooks.append(model.register_forward_hook(self._count))
        try:
            with torch.no_grad():
                run()
        finally:
            for hook in hooks:
                hook.remove()

    def _see(self, block: nn.Module, arguments: tuple[Any, ...], answer: Any) -> None:
        self.answers.setdefault(block, []).append(answer)

    def _count(self, *call: Any) -> None:
        self.passes += 1

    @contextlib.contextmanager
    def skip_prefix(self, names: Iterable[str]) -> Iterator[None]:
        """Within it, the same passes over the same text compute nothing before the first block that holds one of the
        modules ``names``; where one of them lies in no block, or they lie in several lists, everything."""
        skipped = self._before(list(names))
        for block in skipped:
            block.forward = functools.partial(_next, iter(self.answers[block]))
        try:
            yield
        finally:
            for block in skipped:
                del block.forward

    def _before(self, names: list[str]) -> list[nn.Module]:
        places = [_place(self.model, name) for name in names]
        found: list[nn.Module] = []
        if len({stack for stack, _ in places}) == 1 and (stack := places[0][0]) is not None:
            for block in list(stack)[: min(number for _, number in places)]:
                if len(self.answers.get(block, [])) != self.passes:
                    break
                found.append(block)
        return found


def _stacks(model: nn.Module) -> Iterator[nn.ModuleList]:
    """Its outermost lists of modules."""
    for module in model.children():
        if isinstance(module, nn.ModuleList):
            yield module
        else:
            yield from _stacks(module)


def _place(model: nn.Module, name: str) -> tuple[nn.ModuleList | None, int]:
    """The outermost list that a module lies in, and where; or no list."""
    module = model
    for part in name.split("."):
        if isinstance(module, nn.ModuleList):
            return module, int(part)
        module = module.get_submodule(part)
    return None, 0


def _next(answers: Iterator[Any], *arguments: Any, **options: Any) -> Any:
    """The next of the remembered answers, as a copy: who gets it may change it."""
    return copy.deepcopy(next(answers))
