"""Running sums of what a module reads and of the gradients at its outputs, gathered by hooks, and their means."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nashswarm.calibration.moments_table import MomentsTable, PackedMoments, SymmetricMatrix
from nashswarm.calibration.token_frequencies import smoothed


class MomentSums:
    """Running sums of one module, updated by hooks, on the CPU: matrices in float32, vectors in float64.

    ``head``: whether its outputs are the logits of tokens.  ``zipf``: whether its rows are of tokens.  ``known``: the
    moments whose inputs stay, so that gradients alone are summed.  ``recomputing``: whether the module is called only
    to have its activations again.  ``calls``: its inputs in the present window.
    Modules that had the same inputs in all windows share ``inputs``.
    """

    def __init__(
        self, module: nn.Module, head: bool, zipf: bool, known: PackedMoments | None, recomputing: Callable[[], bool]
    ) -> None:
        self.module, self.head, self.zipf, self.known, self.recomputing = module, head, zipf, known, recomputing
        self.routed: bool = getattr(module, "routed", False)  # a matrix of one expert
        self.positions = 0
        self.calls: list[Tensor] = []
        self.inputs: SymmetricMatrix | None = None
        self.energy = 0.0  # of the inputs: the sum of their squares
        self.counts: Tensor | None = None
        self.outputs: Tensor | None = None
        self.rows: Tensor | None = None
        self.columns: SymmetricMatrix | None = None
        self.awaited = 0
        self.weight_gradient: Tensor | None = None

    @property
    def used(self) -> bool:
        """Whether the module was called, and gradients came back."""
        return bool(self.positions) and self.outputs is not None

    def add_inputs(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        """Forward hook: keep the inputs, and register a hook on the gradient of the output."""
        if not torch.is_grad_enabled():
            return output
        if isinstance(module, nn.Embedding) or not output.requires_grad:
            output = start_gradients(output)  # in both passes: a block must keep the same tensors in both
        if self.recomputing():
            return output
        held: list[Tensor] = []
        if isinstance(module, nn.Embedding):
            rows, positions = module.num_embeddings, output.numel() // output.shape[-1]
            if type(module).forward is nn.Embedding.forward:
                counts = torch.bincount(arguments[0].flatten().cpu(), minlength=rows).double()
            else:  # a position table that computes its own indices: count all rows alike
                counts = torch.full((rows,), positions / rows, dtype=torch.float64)
            self.counts = counts if self.counts is None else self.counts.add_(counts)
        else:
            inputs = arguments[0].detach()
            positions = inputs.numel() // inputs.shape[-1]
            if self.known is None:
                self.calls.append(inputs)
            else:
                self.energy += float(torch.linalg.vector_norm(inputs.float()).square())
            if not self.head:
                held.append(inputs)
                self.awaited += 1
        self.positions += positions
        output.register_hook(functools.partial(self.add_gradient, held))
        return output

    def add_gradient(self, held: list[Tensor], gradient: Tensor) -> None:
        """Backward hook: add the squared gradients of the outputs, and the gradient of the weight.

        ``held``: the inputs, which are let go.
        """
        gradients = _by_position(gradient.detach())
        self.outputs = _add(self.outputs, gradients.square().sum(0))
        if held:
            part = gradients.T @ _by_position(held.pop())
            self.weight_gradient = part if self.weight_gradient is None else self.weight_gradient.add_(part)
            self.awaited -= 1
            if not self.awaited:
                self.end_window()

    def end_window(self) -> None:
        """Add the squared gradients of the rows and columns of the weight, over all calls in the window."""
        if self.weight_gradient is not None:
            self.rows = _add(self.rows, torch.linalg.vector_norm(self.weight_gradient, dim=1).square())
            if self.known is None:
                if self.columns is None:
                    self.columns = SymmetricMatrix.zeros(self.weight_gradient.shape[1])
                self.columns.add_gram(self.weight_gradient)
        self.awaited, self.weight_gradient = 0, None

    def moments(self, tokens: int) -> PackedMoments:
        """Return the means, of inputs over all ``tokens`` and of squared gradients over the positions of the module.

        A module that is called several times for each token, or for one token of a window, therefore counts as often as
        an error in it acts.  ``inputs`` are a mean already.

        The counts of an embedding and the squared gradients of the output head are smoothed: otherwise
        errors in tokens that calibration text does not contain would cost nothing.
        """
        assert self.outputs is not None
        outputs = (self.outputs / self.positions).float()
        if self.head:
            outputs = smoothed(self.outputs, self.positions, self.zipf).float()
        if self.known is not None:
            rows = None if self.rows is None else (self.rows / max(self.energy, torch.finfo().tiny)).float()
            return dataclasses.replace(self.known, outputs=outputs, coupled=outputs if rows is None else rows)
        if self.inputs is None:
            assert self.counts is not None
            shares = (smoothed(self.counts, self.positions, self.zipf) * (self.positions / tokens)).float()
            return PackedMoments(shares, outputs, outputs, shares)
        if self.rows is None or self.columns is None:
            return PackedMoments(self.inputs, outputs, outputs, self.inputs)
        trace, gradient = self.inputs.trace(), self.columns.trace()
        if not trace or not gradient:  # no inputs, or no gradients
            return PackedMoments(self.inputs, outputs, torch.zeros_like(outputs), self.inputs)
        self.columns.entries.mul_(trace / gradient)
        return PackedMoments(self.inputs, outputs, (self.rows / (tokens * trace)).float(), self.columns)


def start_gradients(output: Tensor) -> Tensor:
    """Return the values of ``output`` as a tensor from which gradients are taken, and which may be changed in place."""
    return output.detach().requires_grad_().clone()


def _by_position(values: Tensor) -> Float[Tensor, "positions width"]:
    return values.float().flatten(0, -2)


def _add(total: Tensor | None, part: Tensor) -> Tensor:
    return part.cpu().double() if total is None else total.add_(part.cpu())


def add_inputs(sums: Iterable[MomentSums]) -> None:
    """Add the inputs of a window, once for all modules that always had the same ones."""
    groups: dict[tuple[Any, ...], list[MomentSums]] = {}
    for part in sums:
        if part.calls or part.inputs is not None:
            seen = (
                id(part.inputs),
                part.routed,
                *((call.data_ptr(), call.shape, call.stride()) for call in part.calls),
            )
            groups.setdefault(seen, []).append(part)
    shared: set[int] = set()
    for (before, *_), group in groups.items():
        total = group[0].inputs
        if total is None:
            total = SymmetricMatrix.zeros(group[0].calls[0].shape[-1])
        elif before in shared:  # no longer the same inputs
            total = total.clone()
        shared.add(before)
        for part in group:
            part.inputs = total
    for group in groups.values():
        for call in group[0].calls:
            assert group[0].inputs is not None
            group[0].inputs.add_gram(_by_position(call))
        for part in group:
            part.calls.clear()


def mean_moments(sums: Mapping[str, MomentSums], tokens: int) -> MomentsTable:
    """Return the means over so many ``tokens``, of the modules that were called and reached by gradients.

    The sums of inputs are turned into means in place, and shared.
    """
    table, means = MomentsTable(), set[int]()
    for name, part in sums.items():
        if not part.used:
            continue
        if part.inputs is not None and id(part.inputs) not in means:
            part.inputs.entries.div_(tokens)
            means.add(id(part.inputs))
        table.data[name] = part.moments(tokens)
    return table
