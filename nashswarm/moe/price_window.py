"""Prices from a causal window: even on the tokens that a router has just read, and paid by those that it reads next."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nashswarm.moe.router.router import Router
from nashswarm.moe.routing import Routing


class PriceWindow:
    """The affinities of the last ``tokens`` tokens that a router has read.

    Training leaves prices that are even on its own text.  On another text a window solves for prices on what was read,
    from the solution before.  A window that is part full moves the prices of training by that part of the way.  There
    is no step size: the length of the window alone trades noise in prices against lag behind the
    text.  A token never pays a price that depends on itself or on later tokens.

    Raises ValueError for a router that cannot solve for prices, or a window of less than one token.
    """

    def __init__(self, router: Router, tokens: int) -> None:
        if not router.solves:
            raise ValueError(f"a {type(router).__name__} with these settings does not solve for prices")
        if tokens < 1:
            raise ValueError(f"a window of {tokens} tokens is empty: give it at least 1")
        self.router, self.tokens = router, tokens
        self._trained = (router.price.clone(), router.entry.clone())
        self._solved: tuple[Tensor, ...] = self._trained
        self._read: Tensor | None = None

    @torch.no_grad()
    def follow(self, routing: Routing) -> None:
        """Add the tokens of a batch to the window and set the prices of the router for the next batch."""
        assert routing.logits is not None
        read = routing.logits if self._read is None else torch.cat([self._read, routing.logits])
        self._read = read[-self.tokens :].clone()
        prices = (self.router.price, self.router.entry)
        for own, solved in zip(prices, self._solved, strict=True):
            own.copy_(solved)
        self.router.solve(self._read, 1.0)
        self._solved = tuple(own.clone() for own in prices)
        for own, trained in zip(prices, self._trained, strict=True):
            own.copy_(trained.lerp(own, len(self._read) / self.tokens))


def follow_windows(windows: Sequence[PriceWindow], routings: Sequence[Routing]) -> None:
    """Let the window of each layer follow the routing of that layer."""
    for window, routing in zip(windows, routings, strict=True):
        window.follow(routing)
