"""The negative log-likelihood (NLL) of a window, computed without holding all of its logits at a time."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn
from torch.nn import functional

Labels = Literal["model", "text"]
LOGITS_AT_ONCE = 1 << 22
TOKENS_AT_ONCE = 256  # of the vocabulary, among which a token is sampled by adding up their probabilities
NO_LABEL = -100  # of a position, as cross_entropy counts it


def summed_nll(
    model: Any, window: Integer[Tensor, " length"], generator: torch.Generator, labels: Labels = "model"
) -> Float[Tensor, ""]:
    """Compute the summed NLL of a window in nats, with labels sampled from the model or taken from the text.

    The output head runs on a few positions at a time, where the logits are nothing but its output.  Its gradients are
    computed at once, so that the hooks of the head are called before this function returns.
    """

    def label(logits: Float[Tensor, "some vocabulary"], first: int) -> Integer[Tensor, " some"]:
        if labels == "text":
            return window[first + 1 : first + 1 + len(logits)]
        return sample_tokens(logits, generator).to(logits.device)

    states, head = _before_head(model, window)
    size = max(LOGITS_AT_ONCE // len(model.get_output_embeddings().weight), 1)
    nll: Tensor = _BlockwiseNll.apply(states, head, label, size)  # type: ignore[no-untyped-call]
    return nll


@torch.no_grad()
def sample_tokens(
    logits: Float[Tensor, "positions vocabulary"], generator: torch.Generator
) -> Integer[Tensor, " positions"]:
    """Sample one token for each position, on the CPU.

    A uniform number is looked up in the cumulative distribution, first among groups of tokens and then within one.
    (``torch.multinomial`` would draw a number for every token of the vocabulary.)
    """
    uniform = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64)
    size = max(LOGITS_AT_ONCE // logits.shape[1], 1)
    return torch.cat(list(map(_invert, logits.split(size), uniform.split(size))))


def _invert(
    logits: Float[Tensor, "positions vocabulary"], uniform: Float[Tensor, "positions 1"]
) -> Integer[Tensor, " positions"]:
    """Return the token at which the cumulative distribution of each position passes a number between 0 and 1."""
    vocabulary = logits.shape[1]
    chances = logits.cpu().float()
    chances = (chances - chances.amax(1, keepdim=True)).exp_()
    if missing := -vocabulary % TOKENS_AT_ONCE:
        chances = functional.pad(chances, (0, missing))
    groups = chances.unflatten(1, (-1, TOKENS_AT_ONCE))
    sums = groups.sum(2).double().cumsum(1)
    wanted = uniform * sums[:, -1:]
    group = torch.searchsorted(sums, wanted, right=True).clamp(max=sums.shape[1] - 1)
    before = functional.pad(sums, (1, 0)).gather(1, group)
    within = groups[torch.arange(len(groups)), group[:, 0]].double().cumsum(1)
    token = torch.searchsorted(within, wanted - before, right=True).clamp(max=TOKENS_AT_ONCE - 1)
    return (group * TOKENS_AT_ONCE + token)[:, 0].clamp(max=vocabulary - 1)  # rounding may leave the last sum too low


class _HeadInputs(nn.Module):
    """Returns its input, in place of an output head, and keeps it."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.weight = head.weight  # whose dtype and device some models ask for
        self.bias = getattr(head, "bias", None)  # which some models tie to one of their own
        self.states: Tensor | None = None

    def forward(self, states: Tensor) -> Tensor:
        self.states = states
        return states


@contextlib.contextmanager
def _without_head(model: Any) -> Iterator[_HeadInputs]:
    """Let the model return the inputs of its output head instead of logits, during the context."""
    head = model.get_output_embeddings()
    inputs = _HeadInputs(head)
    model.set_output_embeddings(inputs)
    try:
        yield inputs
    finally:
        model.set_output_embeddings(head)


def _before_head(
    model: Any, window: Integer[Tensor, " length"]
) -> tuple[Float[Tensor, "length width"], Callable[[Tensor], Tensor]]:
    """Return the states of the model from which a function of each position computes the logits: the output head.

    A model that does more to its logits, such as scaling them, returns logits, and the function is the identity.
    """
    head = model.get_output_embeddings()
    with _without_head(model) as inputs:
        bare = False
        with torch.no_grad(), contextlib.suppress(Exception):  # a bias, for example, does not fit the states
            logits = model(input_ids=window[None, :1]).logits
            bare = inputs.states is not None and logits.data_ptr() == inputs.states.data_ptr()
        if bare:
            return model(input_ids=window[None]).logits[0], head
    return model(input_ids=window[None]).logits[0], nn.Identity()


class _BlockwiseNll(torch.autograd.Function):
    """The summed NLL of the labels of all positions but the last, whose gradient is computed together with it."""

    @staticmethod
    def forward(
        context: Any,
        states: Float[Tensor, "length width"],
        head: Callable[[Tensor], Tensor],
        label: Callable[[Tensor, int], Tensor],
        size: int,
    ) -> Float[Tensor, ""]:
        gradient, total = torch.empty_like(states), torch.zeros((), dtype=torch.float64)
        for first, block in zip(range(0, len(states), size), states.split(size), strict=True):
            with torch.enable_grad():
                part = block.detach().requires_grad_()
                logits = head(part)
                targets = torch.full((len(part),), NO_LABEL, device=logits.device)
                labelled = logits.detach()[: len(states) - 1 - first]
                targets[: len(labelled)] = label(labelled, first)
                nll = functional.cross_entropy(logits.float(), targets, ignore_index=NO_LABEL, reduction="sum")
                (gradient[first : first + size],) = torch.autograd.grad(nll, part)
            total += nll.detach().cpu()
        context.save_for_backward(gradient)
        return total.float()

    @staticmethod
    def backward(context: Any, factor: Float[Tensor, ""]) -> tuple[Tensor | None, ...]:
        (gradient,) = context.saved_tensors
        return factor.to(gradient) * gradient, None, None, None
