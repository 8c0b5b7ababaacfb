"""Prices at which all experts are in equal demand: the auction of Bertsekas 1988, all experts bidding at once."""

import torch
from jaxtyping import Float
from torch import Tensor

DAMPING = 0.5  # of each bid, as all prices move at once
SPREADS = 4.0  # largest price, in standard deviations of the affinities


def equilibrium(
    affinities: Float[Tensor, "tokens experts"], k: int, start: Float[Tensor, " experts"], sweeps: int
) -> Float[Tensor, " experts"]:
    """Return prices at which tokens that take the k largest of ``affinities − price`` use all experts equally often, as
    closely as ``sweeps`` rounds from ``start`` get.

    In each round every expert bids the price at which exactly its even share of tokens would choose it, the prices of
    the others given: a price between the margins of the last token that fits and of the first that does not.  The
    margin of a token is its affinity for this expert less the utility of the expert that it would give up for it.  All
    experts bid at once, so a bid moves a price by ``DAMPING`` of the difference.

    An affinity of −inf closes an expert to a token.  Prices are relative: their mean is zero.  Experts that are open to
    too few tokens would undercut each other without end, so prices are clamped to ``SPREADS`` standard deviations of
    the affinities.
    """
    tokens, experts = affinities.shape
    if k == experts:
        return torch.zeros_like(start)
    share = min(max(round(tokens * k / experts), 1), tokens - 1)
    price = start.clone()
    bound = SPREADS * affinities[affinities.isfinite()].std()
    for _ in range(sweeps):
        utility = affinities - price
        best = utility.topk(k + 1).values
        rival = best[:, k - 1 : k].where(utility < best[:, k - 1 : k], best[:, k:])  # the k-th best of the others
        margins = affinities - rival
        least = margins.where(margins.isfinite(), torch.inf).amin(0)  # at this price all tokens come that may
        edge = margins.where(margins.isfinite(), least).topk(share + 1, dim=0).values[-2:].mean(0)
        price = price + DAMPING * (edge.where(edge.isfinite(), price) - price)
        price = (price - price.mean()).clamp(-bound, bound)
    return price
