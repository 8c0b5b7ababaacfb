"""Try out on one window, before calibration, which matrices it can reach.

A matrix stays as it is if the model does not call its module (the vision tower of a model that reads text, a pooler),
if the predictions do not depend on it, or if the module is more than a product.
"""

import contextlib
import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Integer
from torch import Tensor, nn

from nashswarm.calibration.moment_sums import start_gradients
from nashswarm.calibration.moments import Score
from nashswarm.calibration.nll import summed_nll
from nashswarm.layers import Layer
from nashswarm.models import evaluation
from nashswarm.models.kept import warn_of_large

NAMED = 3  # matrices that a message names before it counts the others
log = logging.getLogger(__name__)


def score_of(model: Any) -> Score:
    """Return the scalar whose gradients calibrate a model: the NLL, or a projection if it predicts no tokens."""
    return summed_nll if model.get_output_embeddings() is not None else evaluation.projection


def keep_unreached(
    model: Any, layers: tuple[Layer, ...], windows: Integer[Tensor, "windows length"]
) -> tuple[tuple[Layer, ...], dict[str, str]]:
    """Return the layers that calibration reaches, and why each of the others does not: name → reason.

    Warnings name the others and their share of all weights, and large parameters of unknown layout.  Raises ValueError
    in one sentence for a model that cannot be run or has no gradients, and if no layer is reached.
    """
    reasons = unreached(model, layers, windows[0])
    if len(reasons) == len(layers):
        raise ValueError(f"no matrix of this {type(model).__name__} can be calibrated: {next(iter(reasons.values()))}")
    kept = [layer for layer in layers if layer.name in reasons]
    if kept:
        share = sum(layer.parameters for layer in kept) / sum(layer.parameters for layer in layers)
        for reason in sorted(set(reasons.values())):
            names = [layer.name for layer in kept if reasons[layer.name] == reason]
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            log.warning("%s%s: %s, so kept at 16 bits", ", ".join(names[:NAMED]), more, reason)
        log.warning("matrices kept at 16 bits hold %.1f %% of the weights", 100 * share)
    warn_of_large(model)
    return tuple(layer for layer in layers if layer.name not in reasons), reasons


def unreached(model: Any, layers: Sequence[Layer], window: Integer[Tensor, " length"]) -> dict[str, str]:
    """Return why calibration cannot reach layers, by their names; empty if it reaches all.

    An expert counts as reached if another one of its mixture is, as no window reaches them all.
    """
    states: dict[str, str] = {}
    window = evaluation.without_padding(model, window)
    with _watched(model, [name for layer in layers for name in layer.modules], states):
        try:
            score_of(model)(model, window, torch.Generator().manual_seed(0)).backward()
        except Exception as error:  # of whatever the architecture does
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"{type(model).__name__} cannot be calibrated, {reason}") from error
    reached = {name for name, state in states.items() if state == "reached"}
    mixtures = {name.rpartition(".")[0].rpartition(".")[0] for name in reached if _routed(model, name)}
    reasons = {}
    for layer in layers:
        found = {states.get(name, "not used by the model on text") for name in layer.modules}
        routed = _routed(model, layer.name) and layer.name.rpartition(".")[0].rpartition(".")[0] in mixtures
        if others := found - {"reached"}:
            unknown = [reason for reason in others if reason.startswith("no product")]
            if unknown or ("reached" not in found and not routed):
                reasons[layer.name] = next(iter(unknown or others))
    return reasons


def is_product(module: Any, arguments: tuple[Any, ...], output: Any) -> bool:
    """Check whether the output of a Linear, Conv1D or Embedding has the shape of a product with its first argument."""
    width = module.embedding_dim if isinstance(module, nn.Embedding) else getattr(module, "out_features", None)
    width = getattr(module, "nf", width)
    return (
        isinstance(output, Tensor) and output.shape[-1] == width and bool(arguments) and torch.is_tensor(arguments[0])
    )


def _routed(model: Any, name: str) -> bool:
    return bool(getattr(model.get_submodule(name), "routed", False))


@contextlib.contextmanager
def _watched(model: Any, names: Sequence[str], states: dict[str, str]) -> Iterator[None]:
    """Note in ``states`` what becomes of each module during the context, without gradients of parameters."""

    def note(name: str, module: Any, arguments: tuple[Any, ...], output: Any) -> Any:
        if not torch.is_grad_enabled() or states.get(name, "").startswith("no product"):
            return output
        if not is_product(module, arguments, output):
            states[name] = "no product of its input alone"
            return output
        states.setdefault(name, "without effect on what the model predicts")
        if isinstance(module, nn.Embedding) or not output.requires_grad:
            output = start_gradients(output)
        output.register_hook(lambda gradient: states.__setitem__(name, "reached"))
        return output

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handles = [model.get_submodule(name).register_forward_hook(functools.partial(note, name)) for name in names]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        with evaluation.without_cache(model):
            yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trainable:
            parameter.requires_grad_()
