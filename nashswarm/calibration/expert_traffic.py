"""Experts of a mixture as a compression method may know them: their prices, their traffic, and what other prices do.

The price of an expert is a buffer ``price`` of its router: tokens take the experts of the largest affinity less price.
Models of other libraries keep none, and have no prices here.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from nashswarm.calibration.missing_moments import mixture_of
from nashswarm.layers import Moments
from nashswarm.models.evaluation import without_padding
from nashswarm.models.matrices import is_router

Prices = Mapping[str, Float[Tensor, " experts"]]


@dataclasses.dataclass(frozen=True)
class RoutedExperts:
    """What a method may ask about the experts of a model.

    - ``prices``: those of the full model, by the name of the buffer; empty if its routers keep none.
    - ``traffic(prices)`` returns the share of calibration tokens that each expert's matrices see at these prices, by
      module name.
    - ``moments(prices)`` returns ``zipf_moments`` of the model at other prices.
    - ``heldout_kl(weights, prices)`` returns the KL from the full model on held-out calibration text, of the model with
      these layer weights and prices, in nats per token.
    """

    prices: Prices
    traffic: Callable[[Prices], Mapping[str, float]]
    moments: Callable[[Prices], Mapping[str, Moments]]
    heldout_kl: Callable[[Mapping[str, Tensor], Prices], float]


def routed_experts(
    full: Any,
    candidate: Callable[[], Any],
    modules: Sequence[str],
    windows: Integer[Tensor, "windows length"],
    moments: Callable[[], Mapping[str, Moments]],
    heldout_kl: Callable[[Mapping[str, Tensor], int | None], float],
) -> RoutedExperts:
    """Return what a method may know of the experts of the ``full`` model.

    ``candidate``: returns the copy of the model whose divergence ``heldout_kl`` measures.  ``moments``: takes those of
    the full model as it is.  ``windows``: of calibration text.
    """

    def traffic_at(prices: Prices) -> Mapping[str, float]:
        with at_prices(full, prices):
            return measure_traffic(full, modules, windows)

    def moments_at(prices: Prices) -> Mapping[str, Moments]:
        with at_prices(full, prices):
            return moments()

    def heldout_kl_at(weights: Mapping[str, Tensor], prices: Prices) -> float:
        with at_prices(candidate(), prices):
            return heldout_kl(weights, None)

    own = {name: price.clone() for name, price in prices_of(full).items()}
    return RoutedExperts(own, traffic_at, moments_at, heldout_kl_at)


def prices_of(model: nn.Module) -> dict[str, Float[Tensor, " experts"]]:
    """Return the prices that routers of a model keep, by the name of the buffer; they are not copied."""
    named = ((name.rpartition("."), buffer) for name, buffer in model.named_buffers())
    return {f"{module}.price": buffer for (module, _, own), buffer in named if own == "price" and is_router(module)}


@torch.no_grad()
def set_prices(model: nn.Module, prices: Prices) -> None:
    """Copy prices into the routers of a model, in place."""
    own = prices_of(model)
    for name, price in prices.items():
        own[name].copy_(price)


@contextlib.contextmanager
def at_prices(model: nn.Module, prices: Prices) -> Iterator[None]:
    """Give the routers of a model these prices during the context, and their own ones after it."""
    own = {name: price.clone() for name, price in prices_of(model).items() if name in prices}
    set_prices(model, prices)
    try:
        yield
    finally:
        set_prices(model, own)


def measure_traffic(model: Any, modules: Sequence[str], windows: Integer[Tensor, "windows length"]) -> dict[str, float]:
    """Return the share of the tokens of ``windows`` that reach each of these modules.

    Modules that are no matrix of a routed expert are left out; an expert without tokens counts as seen by one, as its
    moments do (``missing_moments``).
    """
    seen, tokens = count_routed(model, modules, windows)
    return {name: max(count, 1) / tokens for name, count in seen.items()}


@torch.no_grad()
def count_routed(
    model: Any, modules: Sequence[str], windows: Integer[Tensor, "windows length"]
) -> tuple[dict[str, int], int]:
    """Return how many tokens reach each of these modules that is a matrix of a routed expert, and how many are read."""
    routed = {name: model.get_submodule(name) for name in modules}
    seen = {name: 0 for name, module in routed.items() if getattr(module, "routed", False)}

    def count(name: str) -> Callable[..., None]:
        def add(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            seen[name] += arguments[0].numel() // arguments[0].shape[-1]

        return add

    hooks = [routed[name].register_forward_pre_hook(count(name)) for name in seen]
    tokens = 0
    try:
        for window in windows:
            real = without_padding(model, window)
            model(input_ids=real[None])
            tokens += len(real)
    finally:
        for hook in hooks:
            hook.remove()
    return seen, tokens


def without_traffic(moments: Mapping[str, Moments], traffic: Mapping[str, float]) -> dict[str, Moments]:
    """Return moments by which every expert counts as if it saw the mean traffic of its mixture.

    The moments of an expert are means over all tokens, so that its traffic is a factor of them.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name in traffic:
        groups.setdefault((mixture_of(name), name.rpartition(".")[2]), []).append(name)
    blind = {name: moments[name] for name in moments}
    for names in groups.values():
        mean = sum(traffic[name] for name in names) / len(names)
        for name in names:
            scale, own = mean / traffic[name], blind[name]
            blind[name] = dataclasses.replace(own, inputs=scale * own.inputs, coupled_inputs=scale * own.coupled_inputs)
    return blind
