"""Routing as a congestion game (Rosenthal 1973): tokens are players, experts are resources, load raises prices.

A token pays ``price − affinity`` for an expert and takes the k cheapest experts of its flock.

- Affinity is the product of the expert's centroid with the token, less the running mean of all tokens: what all tokens
  share attracts them to no expert.
- Prices are those at which every expert would be chosen equally often (``equilibrium``).  They are solved on earlier
  batches and fixed before a token is routed, so that no token sees a later one.
- The flock of a token are the experts whose centroids are nearest, at distances corrected by a price of entry at which
  every expert belongs to equally many flocks.
- An expert that is already in memory is a little cheaper while experts are served from a store.
- Gates are softmaxes of affinity less price: an expert that all tokens like does not outweigh its partner in every sum.
"""

import dataclasses
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from nashswarm import kernels
from nashswarm.models.experts import grouped
from nashswarm.moe.loss import LossWeights, implied_prices
from nashswarm.moe.router.equilibrium import equilibrium
from nashswarm.moe.router.router import Router, check_capacity, softmax_gates
from nashswarm.moe.routing import Routing

Prices = Literal["equilibrium", "sign", "none"]
Search = Literal["exact", "leaders"]
ALIGNED = 4  # floats: a grouped product needs rows of whole 16 bytes


@dataclasses.dataclass(frozen=True)
class NashSwarmRouter:
    """Settings of the whole method; each part can be switched off.

    ``prices``: ``equilibrium``, solved on each batch in ``sweeps`` rounds and followed by steps that shrink to
    ``price_rate``; ``sign``, moved by steps of ``price_rate`` against the sign of the excess load; or ``none``.
    ``flock``: number of nearest experts that a token chooses among; None: all.  ``search``: ``exact`` scores all
    centroids to find them; ``leaders`` scores the means of groups of ``flock`` experts, then the members of one group.
    ``follow``: how much 1,000 tokens raise the price of an expert with twice the mean load, where prices follow a text
    that is evaluated.  ``residency``: how much cheaper an expert in memory is while experts are served from a store;
    both in units of affinity.  It does not pay (``experiments.benchmarks.residency``) and stays for the records of it.
    ``resident``: share of a layer's expert bytes that training assumes to be in memory.  ``capacity``: as in ``TopK``.
    """

    looks_ahead: ClassVar[bool] = False
    prices: Prices = "equilibrium"
    price_rate: float = 0.02
    sweeps: int = 3
    flock: int | None = 7
    search: Search = "exact"
    follow: float = 0.1
    residency: float = 0.1
    resident: float = 0.5
    capacity: float | None = None
    loss: LossWeights = dataclasses.field(
        default_factory=lambda: LossWeights(balance=0.01, cache=0.001, swarm=0.001, nash=0.001)
    )

    def __post_init__(self) -> None:
        check_capacity(self.capacity)
        for name, value, choices in (("prices", self.prices, Prices), ("search", self.search, Search)):
            if value not in get_args(choices):
                raise ValueError(f"unknown method.{name} {value!r}: choose {', '.join(get_args(choices))}")
        if self.search == "leaders" and (self.flock is None or self.prices == "equilibrium"):
            raise ValueError(
                "method.search=leaders needs method.flock and method.prices=sign: equilibrium prices need all scores"
            )
        if not 0 < self.resident <= 1 or not 0 < self.price_rate <= 1 or self.sweeps < 1 or self.follow < 0:
            raise ValueError(
                f"method.resident={self.resident} and method.price_rate={self.price_rate} must be above 0 and at most "
                f"1, method.sweeps={self.sweeps} at least 1, method.follow={self.follow} not negative"
            )

    def build(self, width: int, experts: int, k: int) -> "CongestionRouter":
        leaders = self.search == "leaders" and self.flock is not None and self.flock < experts
        return (LeaderRouter if leaders else CongestionRouter)(self, width, experts, k)


class CongestionRouter(Router):
    """Routes each token to the k cheapest experts of its flock, all centroids scored.

    ``flock``: number of experts that a token chooses among.
    """

    settles = True

    def __init__(self, settings: NashSwarmRouter, width: int, experts: int, k: int) -> None:
        super().__init__(width, experts, k, settings.capacity)
        if settings.flock is not None and settings.flock < k:
            raise ValueError(
                f"method.flock={settings.flock} is smaller than model.top_k={k}: no token would find its experts"
            )
        self.settings, self.residency = settings, settings.residency
        self.follows, self.solves = settings.prices != "none", settings.prices == "equilibrium"
        self.flock = min(settings.flock or experts, experts)

    def forward(self, x: Float[Tensor, "tokens width"]) -> Routing:
        logits = self.affinities(x)
        return self.dispatch(*self.cheapest(logits), logits, x)

    def affinities(self, x: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens experts"]:
        """Return the products of centroids and tokens, the running mean subtracted from the tokens."""
        return functional.linear(x, self.weight, -self.weight.mv(self.centre))

    def cheapest(
        self, logits: Float[Tensor, "tokens experts"]
    ) -> tuple[Int[Tensor, "tokens k"], Float[Tensor, "tokens k"]]:
        """Return the k cheapest experts of each token's flock, residency included, and their gates."""
        return kernels.route(logits, self.entry, self.costs(), self.price, self.flock, self.k)

    def costs(self) -> Float[Tensor, " experts"]:
        """Return the prices; while serving, less ``residency`` for experts in memory."""
        return self.price - self.residency * self.resident if self.serving else self.price

    @torch.no_grad()
    def settle(self, routing: Routing, step: float | None = None) -> None:
        """Move prices toward equal load and note which experts memory would hold; the next batch sees both.

        ``step``: fraction of the way to the solved prices; by default 1/√(batches so far), at least ``price_rate``.
        """
        settings = self.settings
        share = step or max(settings.price_rate, (int(self.settled) + 1) ** -0.5)
        if settings.prices == "sign":
            loads = routing.loads()
            self.price += settings.price_rate * (loads - loads.mean()).sign()
        elif settings.prices == "equilibrium":
            assert routing.logits is not None
            self.solve(routing.logits, share)
        if routing.mean is not None and settings.prices != "none":
            moved = share * (routing.mean - self.centre)
            self.centre += moved
            for prices in (self.price, self.entry):
                prices -= self.weight @ moved  # so that no token's choice changes
        held = max(int(settings.resident * len(self.price)), 1)
        self.resident.copy_(self.recent(routing.experts, held))
        super().settle(routing, step)

    @torch.no_grad()
    def solve(self, affinities: Float[Tensor, "tokens experts"], share: float) -> None:
        """Move prices of entry and prices by ``share`` of the way to their equilibrium on these tokens."""
        if self.flock < len(self.price):
            solved = equilibrium(affinities, self.flock, self.entry, self.settings.sweeps)
            self.entry += share * (solved - self.entry)
            nearest = (affinities - self.entry).topk(self.flock, sorted=False).indices
            members = torch.zeros_like(affinities, dtype=torch.bool).scatter(1, nearest, True)
            affinities = affinities.where(members, -torch.inf)
        solved = equilibrium(affinities, self.k, self.price, self.settings.sweeps)
        self.price += share * (solved - self.price)

    @torch.no_grad()
    def follow(self, routing: Routing) -> None:
        """Raise the price of every expert in proportion to its excess load in a batch that was evaluated."""
        if self.follows:
            change = implied_prices(routing, self.settings.follow * len(routing.experts) / 1000) - self.price
            for prices in (self.price, self.entry):
                prices += change

    def recent(self, experts: Int[Tensor, "tokens k"], held: int) -> Bool[Tensor, " experts"]:
        """Return which ``held`` experts were used last: what an LRU cache holds after these tokens in their order."""
        flat = experts.flatten()
        clock = self.last_use.max() + 1 + torch.arange(len(flat), device=flat.device)
        self.last_use.scatter_reduce_(0, flat, clock, "amax")
        recent = torch.zeros_like(self.resident)
        recent[self.last_use.topk(held).indices] = True
        return recent & (self.last_use >= 0)


class LeaderRouter(CongestionRouter):
    """Routes each token within one group of ``flock`` experts, so that the work per token is ``experts / flock +
    flock`` scores.

    The leader of a group is the mean of its centroids.  A token scores all leaders, then the members of the best one's
    group alone; logits are None, as most experts are not scored.
    """

    def forward(self, x: Float[Tensor, "tokens width"]) -> Routing:
        size, count = self.flock, len(self.weight)
        groups = -(-count // size)
        members = (torch.arange(groups * size, device=x.device) % count).view(groups, size)
        leaders = self.weight[members].mean(1)
        costs, x = self.costs(), x - self.centre
        group = (functional.linear(x, leaders).detach() - costs[members].mean(1)).argmax(1)  # tokens
        order, _, ends = kernels.group(group, groups)
        padded = functional.pad(members, (0, -size % ALIGNED))
        by_group = grouped(x[order], self.weight[padded].transpose(1, 2), ends)
        affinities = torch.empty_like(by_group).index_copy(0, order, by_group)[:, :size]  # tokens, members
        place = (affinities.detach() - costs[members][group]).topk(self.k).indices
        gates = softmax_gates(affinities - self.price[members][group], place)
        return self.dispatch(members[group].gather(1, place), gates, None, x + self.centre)
