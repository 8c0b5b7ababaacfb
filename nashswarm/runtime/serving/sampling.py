"""Choose a token by its logits, and tell how probable it was."""

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

FEW = 256  # candidates that are sorted first: often they hold the probability that top_p asks for


@dataclasses.dataclass(frozen=True)
class Scored:
    """A token with its natural log-probability, and the most probable tokens in its place with theirs.

    The first token of a text follows nothing: its ``logprob`` is None.
    """

    token: int
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()


def sample(
    logits: Float[Tensor, " vocabulary"],
    temperature: float,
    top_p: float,
    generator: torch.Generator,
) -> int:
    """Draw a token at a temperature, out of the fewest tokens whose probabilities sum to ``top_p``.

    A temperature of 0 takes the most probable token; so does a ``top_p`` of 0.
    """
    if temperature == 0 or top_p == 0:
        return int(logits.argmax())
    scaled = (logits.double() - logits.max()) / temperature  # subtracted first: a low temperature must not overflow
    probabilities = scaled.softmax(-1)
    if top_p == 1:
        return int(torch.multinomial(probabilities, 1, generator=generator))
    kept, tokens = probabilities.topk(min(FEW, len(probabilities)))
    if float(kept.sum()) < top_p:
        kept, tokens = probabilities.sort(descending=True)
    kept = torch.where(kept.cumsum(-1) - kept < top_p, kept, 0)
    return int(tokens[torch.multinomial(kept, 1, generator=generator)])


def score(
    logits: Float[Tensor, " vocabulary"],
    token: int,
    alternatives: int,
) -> Scored:
    """Return the log-probability of a token, and the ``alternatives`` most probable ones in its place."""
    logprobs = logits.float().log_softmax(-1)
    best = logprobs.topk(min(alternatives, len(logprobs)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return Scored(token, float(logprobs[token]), tuple(pairs))
