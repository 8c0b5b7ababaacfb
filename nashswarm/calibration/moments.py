"""What calibration text says about every weight matrix, in one forward and one backward pass per window.

For a matrix that multiplies: ``H = E[x xᵀ]`` of its inputs and ``f = E[g²]`` of its outputs, g being the gradient, at
each position, of the window's summed NLL.  For a matrix that is looked up: how often each row is, and f of its outputs.
Together they give the second-order damage of an error E, in nats per token (Hassibi & Stork 1993; K-FAC with a diagonal
output factor, Kim et al. 2025):  ``D(E) = ½ Σ_o f_o · e_oᵀ H e_o``.

An error in a weight acts on all positions of a window at once, and where attention mixes them their gradients do not
add up independently.  ``coupled`` is f with that taken in: ``E[‖G_o‖²] / (T · tr H)`` with G_o the gradient of the
window's summed NLL with respect to row o of the weight; the two agree when positions are independent.  The same
taken the other way, ``E[GᵀG]`` with the trace of H, is ``coupled_inputs``: which inputs meet large gradients.

An expert of a mixture sees only the tokens that were sent to it, and an error in it costs nothing elsewhere: its inputs
count by its traffic, the share of positions that it saw.

A model that is judged by something else brings its own scalar score of a window.  Wherever the expectation of the
squared change of the score is twice the damage that is meant, D is that damage per position.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn
from torch.nn import functional

from nashswarm.layers import Moments
from nashswarm.progress import Track, no_track

Labels = Literal["model", "text"]
Score = Callable[[Any, Tensor, torch.Generator], Tensor]
DRAWN_AT_ONCE = 128  # positions


class _Sums:
    """Running sums of one module on the CPU, fed by hooks: matrices in float32, as each window's part of them, vectors
    in float64."""

    def __init__(self, module: nn.Module, head: bool) -> None:
        self.module, self.head = module, head
        self.positions = 0
        self.inputs: Tensor | None = None
        self.outputs: Tensor | None = None
        self.rows: Tensor | None = None
        self.columns: Tensor | None = None

    def see(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        """Forward hook: add the inputs, and wait for the gradient of the output."""
        outputs = output.shape[-1]
        inputs = None
        if isinstance(module, nn.Embedding):
            output = output.detach().requires_grad_()
            rows, positions = module.num_embeddings, output.numel() // outputs
            if type(module).forward is nn.Embedding.forward:
                seen = torch.bincount(arguments[0].flatten().cpu(), minlength=rows).double()
            else:  # a position table that works out its own indices: all rows alike
                seen = torch.full((rows,), positions / rows, dtype=torch.float64)
        else:
            inputs = arguments[0].detach().float().flatten(0, -2)
            positions = len(inputs)
            seen = (inputs.T @ inputs).cpu()
        self.positions += positions
        self.inputs = _added(self.inputs, seen)
        output.register_hook(functools.partial(self.see_gradient, inputs))
        return output

    def see_gradient(self, inputs: Tensor | None, gradient: Tensor) -> None:
        """Backward hook: add the squared gradients of the outputs, and those of the weight's rows."""
        gradients = gradient.detach().float().flatten(0, -2)
        self.outputs = _added(self.outputs, gradients.square().sum(0).cpu().double())
        if inputs is not None and not self.head:
            of_weight = gradients.T @ inputs
            self.rows = _added(self.rows, of_weight.square().sum(1).cpu().double())
            self.columns = _added(self.columns, (of_weight.T @ of_weight).cpu())

    def moments(self) -> Moments:
        """The means.  Add-one smoothing of an embedding's counts, and of the head's gradients, keeps tokens that
        calibration never saw from costing nothing."""
        assert self.inputs is not None and self.outputs is not None
        inputs, outputs = self.inputs.div_(self.positions), self.outputs / self.positions
        if self.inputs.ndim == 1:
            inputs = (inputs * self.positions + 1) / (self.positions + len(inputs))
        if self.head:
            outputs = (self.outputs + 1) / (self.positions + len(outputs))
        trace = float(inputs.diagonal().double().sum()) if inputs.ndim == 2 else 0.0
        inputs = inputs.float()
        if self.rows is None or self.columns is None:
            return Moments(inputs, outputs.float(), outputs.float(), inputs.clone())
        gradient = float(self.columns.diagonal().double().sum())
        if not trace or not gradient:  # nothing comes in, or nothing that goes out matters
            return Moments(inputs, outputs.float(), torch.zeros_like(outputs).float(), inputs.clone())
        coupled = self.rows / (self.positions * trace)
        return Moments(inputs, outputs.float(), coupled.float(), self.columns.mul_(trace / gradient))


def _added(total: Tensor | None, part: Tensor) -> Tensor:
    """``total`` with ``part`` added in place: a second copy of all sums would not fit."""
    return part if total is None else total.add_(part)


@contextlib.contextmanager
def _watched(model: Any, names: Sequence[str]) -> Iterator[dict[str, _Sums]]:
    head = model.get_output_embeddings()
    modules = {name: model.get_submodule(name) for name in names}
    sums = {name: _Sums(module, module is head) for name, module in modules.items()}
    wanted_gradient = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handles = [model.get_input_embeddings().register_forward_hook(lambda *call: call[-1].requires_grad_())]
    handles += [watch.module.register_forward_hook(watch.see) for watch in sums.values()]
    for parameter in wanted_gradient:
        parameter.requires_grad_(False)
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
        for parameter in wanted_gradient:
            parameter.requires_grad_()


def summed_nll(
    model: Any, window: Integer[Tensor, " length"], generator: torch.Generator, labels: Labels = "model"
) -> Float[Tensor, ""]:
    """The summed NLL of a window's next tokens, in nats: of tokens drawn from the model or of the text's own."""
    logits = model(input_ids=window.unsqueeze(0)).logits[0, :-1]
    targets = sample_tokens(logits.detach(), generator).to(logits.device) if labels == "model" else window[1:]
    return functional.cross_entropy(logits.float(), targets, reduction="sum")


def sample_tokens(
    logits: Float[Tensor, "positions vocabulary"], generator: torch.Generator
) -> Integer[Tensor, " positions"]:
    """A token of every position, on the CPU: where a number drawn from 0 to 1 falls in the cumulative distribution.
    (``torch.multinomial`` draws a number for every token of the vocabulary.)"""
    heights = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64)
    found = [
        torch.searchsorted(part.cpu().double().softmax(-1).cumsum_(-1), height, right=True)
        for part, height in zip(logits.split(DRAWN_AT_ONCE), heights.split(DRAWN_AT_ONCE), strict=True)
    ]
    return torch.cat(found)[:, 0].clamp(max=logits.shape[1] - 1)  # the sum may fall short of 1 by rounding


def calibrate(
    model: Any,
    names: Sequence[str],
    windows: Integer[Tensor, "windows length"],
    generator: torch.Generator,
    labels: Labels = "model",
    track: Track = no_track,
    score: Score | None = None,
) -> dict[str, Moments]:
    """Moments of every module in ``names``, averaged over all positions of ``windows``.

    ``labels``: the next tokens that the NLL is taken of are drawn from the model (``"model"``, the true Fisher) or are
    those of the text (``"text"``, the empirical one).  ``score``: a scalar of model, window and generator, random or
    not, whose gradient takes the place of the NLL's.  Raises ValueError for a module that the model never uses.
    """
    score = score or functools.partial(summed_nll, labels=labels)
    model.eval()
    with _watched(model, names) as sums:
        for window in track(list(windows), "calibrating"):
            score(model, window, generator).backward()
    found = {name: watch.moments() for name, watch in sums.items() if watch.positions and watch.outputs is not None}
    traffic = {name: sums[name].positions / windows.numel() for name in found if _routed(sums[name].module)}
    for name, watch in sums.items():
        if _routed(watch.module) and name not in found:
            found[name] = _of_siblings(name, found, windows.numel())
    found |= {name: _seen_by(found[name], share) for name, share in traffic.items()}
    if unused := [name for name in names if name not in found]:
        raise ValueError(f"the model never uses {', '.join(unused)}: leave them out by model.exclude, or exclude=")
    return found


def _routed(module: nn.Module) -> bool:
    """Whether it is a matrix of one expert."""
    return getattr(module, "routed", False)


def _seen_by(moments: Moments, share: float) -> Moments:
    """Moments over all positions of which a module saw this share."""
    return dataclasses.replace(moments, inputs=share * moments.inputs, coupled_inputs=share * moments.coupled_inputs)


def _of_siblings(name: str, found: dict[str, Moments], positions: int) -> Moments:
    """Of an expert that no token was sent to: the mean of its layer's other experts, seen at one position, so that it
    costs little and not nothing."""
    stem, _, role = name.rpartition(".")
    layer = stem.rpartition(".")[0]
    others = [
        moments for other, moments in found.items() if other.startswith(f"{layer}.") and other.endswith(f".{role}")
    ]
    if not others:
        raise ValueError(f"no expert of {layer} was ever used: give more calibration text")
    parts = (field.name for field in dataclasses.fields(Moments))
    mean = Moments(*(torch.stack([getattr(one, part) for one in others]).mean(0) for part in parts))
    return _seen_by(mean, 1 / positions)
