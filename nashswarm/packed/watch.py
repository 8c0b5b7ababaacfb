"""Notice that a model was changed since it was described to the native pass.

A step checks this before every token.  The check reads memory that nothing else reads, and waits for it, so it looks at
as little as it can.
"""

import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.utils.hooks import RemovableHandle

from nashswarm.packed.matrix import Counted

CAPTURE = "transformers.utils.output_capturing"  # the module of hooks that record hidden states
Link = tuple[dict[str, Any], str, Any]  # a dictionary of a module, and what it holds under a name


class Watch:
    """What a model held when it was described.

    Packed modules, which are most, count their changes: they are looked at only where the count has grown.
    """

    def __init__(self, model: nn.Module, links: Sequence[Link], weights: Sequence[Tensor]) -> None:
        """Watch the modules of a model, and some of their tensors."""
        modules = list(model.modules())
        counted = [module for module in modules if isinstance(module, Counted)]
        others = [module for module in modules if not isinstance(module, Counted)]
        self._changes = Counted.changes
        self._counted = _by_part([
            link
            for module in counted
            for held in (module._modules, module._buffers)
            for link in ((held, name, part) for name, part in held.items())
        ])  # fmt: skip
        children = [(module._modules, *child) for module in others for child in module._modules.items()]
        self._others = _by_part([*children, *links])
        self._weights, self._pointers = weights, [weight.data_ptr() for weight in weights]
        self._hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._hooks += [torch_modules._global_forward_hooks, torch_modules._global_forward_pre_hooks]
        self._handles = -1  # of hooks, that torch had given out when there were none here

    def count_changes(self) -> bool:
        """Return whether packed modules were changed since the last call."""
        changes, self._changes = self._changes, Counted.changes
        return changes != self._changes

    def unmoved(self, packed: bool) -> bool:
        """Check that every module and every tensor is where it was; ``packed``: also those of packed modules."""
        if packed and not _unmoved(*self._counted):
            return False
        return _unmoved(*self._others) and self._pointers == [weight.data_ptr() for weight in self._weights]

    def hooked(self) -> bool:
        """Check for hooks other than those that transformers leaves behind once it was asked for hidden states.

        Torch numbers all hooks that it registers, so that nothing is looked at where there is no new one.
        """
        handles = RemovableHandle.next_id
        if self._handles == handles:
            return False
        if any(
            getattr(hook, "__module__", None) != CAPTURE for hooks in self._hooks if hooks for hook in hooks.values()
        ):
            return True
        self._handles = handles
        return False


def _by_part(links: Sequence[Link]) -> tuple[list[dict[str, Any]], list[str], list[Any]]:
    return [held for held, _, _ in links], [name for _, name, _ in links], [part for _, _, part in links]


def _unmoved(dicts: Sequence[dict[str, Any]], names: Sequence[str], held: Sequence[Any]) -> bool:
    """Check that dictionaries hold the same objects as before under these names."""
    return all(map(operator.is_, map(dict.get, dicts, names), held))
