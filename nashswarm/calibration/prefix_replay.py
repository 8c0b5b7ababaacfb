"""Forward passes that skip the blocks before the first changed one, by replaying their recorded outputs."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn


class PrefixReplay:
    """Recorded outputs of the blocks of a model on some text.

    Blocks are the members of the model's outermost lists of modules.  ``run`` performs all forward passes over the
    text; it is called once, without gradients, to record the outputs.  A block that is not called exactly once in each
    pass, for example because layers share it, is never replayed, and neither are the blocks after it.
    """

    def __init__(self, model: Any, run: Callable[[], object]) -> None:
        self.model = model
        self.passes = 0
        self.outputs: dict[nn.Module, list[Any]] = {}
        hooks = [block.register_forward_hook(self._record) for stack in _stacks(model) for block in stack]
        hooks.append(model.register_forward_hook(self._count))
        try:
            with torch.no_grad():
                run()
        finally:
            for hook in hooks:
                hook.remove()

    def _record(self, block: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        self.outputs.setdefault(block, []).append(output)

    def _count(self, *call: Any) -> None:
        self.passes += 1

    @contextlib.contextmanager
    def skip_prefix(self, names: Iterable[str]) -> Iterator[None]:
        """Skip the blocks before the first one that contains one of the modules ``names``, during the context.

        The passes within must be those of ``run``, over the same text.  Nothing is skipped if a module is in no block,
        or if the modules are in several lists.
        """
        skipped = self._blocks_before(list(names))
        for block in skipped:
            block.forward = functools.partial(_next_output, iter(self.outputs[block]))
        try:
            yield
        finally:
            for block in skipped:
                del block.forward

    def _blocks_before(self, names: list[str]) -> list[nn.Module]:
        places = [_block_of(self.model, name) for name in names]
        blocks: list[nn.Module] = []
        if len({stack for stack, _ in places}) == 1 and (stack := places[0][0]) is not None:
            for block in list(stack)[: min(number for _, number in places)]:
                if len(self.outputs.get(block, [])) != self.passes:
                    break
                blocks.append(block)
        return blocks


def _stacks(model: nn.Module) -> Iterator[nn.ModuleList]:
    """Iterate over the outermost lists of modules."""
    for module in model.children():
        if isinstance(module, nn.ModuleList):
            yield module
        else:
            yield from _stacks(module)


def _block_of(model: nn.Module, name: str) -> tuple[nn.ModuleList | None, int]:
    """Return the outermost list of modules that contains a module, and its index there; (None, 0) if there is none."""
    module = model
    for part in name.split("."):
        if isinstance(module, nn.ModuleList):
            return module, int(part)
        module = module.get_submodule(part)
    return None, 0


def _next_output(outputs: Iterator[Any], *arguments: Any, **options: Any) -> Any:
    """Return the next recorded output, as a copy because the caller may modify it."""
    return copy.deepcopy(next(outputs))
