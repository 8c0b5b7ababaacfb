"""Second moments of every weight matrix, from one forward and one backward pass per window of calibration text.

Let x be the input of a matrix at a position, and g the gradient of the window's summed negative log-likelihood (NLL) in
its output there.  A matrix that multiplies has ``H = E[x xᵀ]`` and ``f = E[g²]``; a matrix that is looked up has the
frequency of each row in place of H.  They give the damage of an error E to second order, in nats per token (Hassibi &
Stork 1993; K-FAC with a diagonal output factor, Kim et al. 2025):  ``D(E) = ½ Σ_o f_o · e_oᵀ H e_o``.

An error in a weight acts on all positions of a window at once.  Attention mixes positions, so their gradients are not
independent.  ``coupled`` is an f that accounts for this: ``E[‖G_o‖²] / (T · tr H)``, with G_o the gradient of the NLL
of a window of T tokens in row o of the weight.  It equals f if positions are independent.  ``coupled_inputs`` does the
same for H: ``E[GᵀG]``, scaled to the trace of H.

An expert of a mixture sees only the tokens routed to it, and an error in it costs nothing elsewhere.  Its H is
therefore multiplied by its traffic, the share of positions that it saw.

A model that is not judged by the NLL brings its own score, a scalar function of a window.  D is then the damage per
position, provided that the expected squared change of the score is twice the damage.
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
SAMPLED_AT_ONCE = 128  # positions


class _MomentSums:
    """Running sums of one module, updated by hooks, on the CPU: matrices in float32, vectors in float64."""

    def __init__(self, module: nn.Module, head: bool) -> None:
        self.module, self.head = module, head
        self.positions = 0
        self.inputs: Tensor | None = None
        self.outputs: Tensor | None = None
        self.rows: Tensor | None = None
        self.columns: Tensor | None = None

    def add_inputs(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        """Forward hook: add the inputs, and register a hook on the gradient of the output."""
        outputs = output.shape[-1]
        inputs = None
        if isinstance(module, nn.Embedding):
            output = output.detach().requires_grad_()
            rows, positions = module.num_embeddings, output.numel() // outputs
            if type(module).forward is nn.Embedding.forward:
                window_inputs = torch.bincount(arguments[0].flatten().cpu(), minlength=rows).double()
            else:  # a position table that computes its own indices: count all rows alike
                window_inputs = torch.full((rows,), positions / rows, dtype=torch.float64)
        else:
            inputs = arguments[0].detach().float().flatten(0, -2)
            positions = len(inputs)
            window_inputs = (inputs.T @ inputs).cpu()
        self.positions += positions
        self.inputs = _add(self.inputs, window_inputs)
        output.register_hook(functools.partial(self.add_gradient, inputs))
        return output

    def add_gradient(self, inputs: Tensor | None, gradient: Tensor) -> None:
        """Backward hook: add the squared gradients of the outputs, and of the rows and columns of the weight."""
        gradients = gradient.detach().float().flatten(0, -2)
        self.outputs = _add(self.outputs, gradients.square().sum(0).cpu().double())
        if inputs is not None and not self.head:
            weight_gradient = gradients.T @ inputs
            self.rows = _add(self.rows, weight_gradient.square().sum(1).cpu().double())
            self.columns = _add(self.columns, (weight_gradient.T @ weight_gradient).cpu())

    def moments(self) -> Moments:
        """Return the means over positions.

        The counts of an embedding and the squared gradients of the output head get add-one smoothing: otherwise errors
        in tokens that calibration text does not contain would cost nothing.
        """
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
        if not trace or not gradient:  # no inputs, or no gradients
            return Moments(inputs, outputs.float(), torch.zeros_like(outputs).float(), inputs.clone())
        coupled = self.rows / (self.positions * trace)
        return Moments(inputs, outputs.float(), coupled.float(), self.columns.mul_(trace / gradient))


def _add(total: Tensor | None, part: Tensor) -> Tensor:
    """Add ``part`` to ``total`` in place, because a second copy of all sums may not fit into memory."""
    return part if total is None else total.add_(part)


@contextlib.contextmanager
def _moment_hooks(model: Any, names: Sequence[str]) -> Iterator[dict[str, _MomentSums]]:
    """Collect the sums of these modules during the context, with the gradients of all parameters switched off."""
    head = model.get_output_embeddings()
    modules = {name: model.get_submodule(name) for name in names}
    sums = {name: _MomentSums(module, module is head) for name, module in modules.items()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handles = [model.get_input_embeddings().register_forward_hook(lambda *call: call[-1].requires_grad_())]
    handles += [part.module.register_forward_hook(part.add_inputs) for part in sums.values()]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trainable:
            parameter.requires_grad_()


def summed_nll(
    model: Any, window: Integer[Tensor, " length"], generator: torch.Generator, labels: Labels = "model"
) -> Float[Tensor, ""]:
    """Compute the summed NLL of a window in nats, with labels sampled from the model or taken from the text."""
    logits = model(input_ids=window.unsqueeze(0)).logits[0, :-1]
    targets = sample_tokens(logits.detach(), generator).to(logits.device) if labels == "model" else window[1:]
    return functional.cross_entropy(logits.float(), targets, reduction="sum")


def sample_tokens(
    logits: Float[Tensor, "positions vocabulary"], generator: torch.Generator
) -> Integer[Tensor, " positions"]:
    """Sample one token for each position, on the CPU.

    A uniform number is looked up in the cumulative distribution.  (``torch.multinomial`` would draw a number for every
    token of the vocabulary.)
    """
    uniform = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64)
    tokens = [
        torch.searchsorted(part.cpu().double().softmax(-1).cumsum_(-1), numbers, right=True)
        for part, numbers in zip(logits.split(SAMPLED_AT_ONCE), uniform.split(SAMPLED_AT_ONCE), strict=True)
    ]
    return torch.cat(tokens)[:, 0].clamp(max=logits.shape[1] - 1)  # rounding may leave the last sum below 1


def calibrate(
    model: Any,
    names: Sequence[str],
    windows: Integer[Tensor, "windows length"],
    generator: torch.Generator,
    labels: Labels = "model",
    track: Track = no_track,
    score: Score | None = None,
) -> dict[str, Moments]:
    """Compute the moments of the modules in ``names``, averaged over all positions of ``windows``.

    ``labels`` are sampled from the model (``"model"``, for the true Fisher information) or taken from the text
    (``"text"``, for the empirical one).  ``score``, a function of model, window and generator, replaces the NLL as the
    scalar whose gradient is taken.  Raises ValueError for a module that the model never uses.
    """
    score = score or functools.partial(summed_nll, labels=labels)
    model.eval()
    with _moment_hooks(model, names) as sums:
        for window in track(list(windows), "calibrating"):
            score(model, window, generator).backward()
    moments = {name: part.moments() for name, part in sums.items() if part.positions and part.outputs is not None}
    traffic = {name: sums[name].positions / windows.numel() for name in moments if _routed(sums[name].module)}
    for name, part in sums.items():
        if _routed(part.module) and name not in moments:
            moments[name] = _mean_of_siblings(name, moments, windows.numel())
    moments |= {name: _scale_inputs(moments[name], share) for name, share in traffic.items()}
    if unused := [name for name in names if name not in moments]:
        raise ValueError(f"the model never uses {', '.join(unused)}: leave them out by model.exclude, or exclude=")
    return moments


def _routed(module: nn.Module) -> bool:
    """Return whether the module is a matrix of one expert."""
    return getattr(module, "routed", False)


def _scale_inputs(moments: Moments, share: float) -> Moments:
    """Return the mean over all positions, given the mean over the ``share`` of them that the module saw."""
    return dataclasses.replace(moments, inputs=share * moments.inputs, coupled_inputs=share * moments.coupled_inputs)


def _mean_of_siblings(name: str, moments: dict[str, Moments], positions: int) -> Moments:
    """Return moments for an expert that no token was routed to: the mean of the other experts of its layer.

    They count as seen at one position, so that errors in the expert cost little but not nothing.
    """
    stem, _, role = name.rpartition(".")
    layer = stem.rpartition(".")[0]
    others = [part for other, part in moments.items() if other.startswith(f"{layer}.") and other.endswith(f".{role}")]
    if not others:
        raise ValueError(f"no expert of {layer} was ever used: give more calibration text")
    fields = (field.name for field in dataclasses.fields(Moments))
    mean = Moments(*(torch.stack([getattr(other, field) for other in others]).mean(0) for field in fields))
    return _scale_inputs(mean, 1 / positions)
