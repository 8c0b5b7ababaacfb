"""Who computes what: tokens choose experts as players choose resources of a congestion game.

A token pays ``price_e − affinity_te`` for expert e and takes the k cheapest.  Its affinity is the product of what sets
it apart from the mean of earlier batches with the expert's centroid: what all tokens share draws them nowhere.  The
prices are those at which every expert would be wanted equally often, solved on tokens of earlier batches and fixed
before a token is routed, so that none sees the future.  The flock limits a token to the experts whose centroids are
nearest, at distances less a price of entry by which every expert belongs to equally many flocks, and what lies in
memory already is a little cheaper.  Gates are softmaxes of affinity less price: an expert that all tokens like is dear
to all, and does not outweigh its partner in every sum.

The settings of every router are a frozen dataclass, ``build`` makes its module, and what all of them return is a
``Routing``.  Sources: congestion games, Rosenthal 1973; Switch Transformer, Fedus et al. 2022; expert choice, Zhou et
al. 2022; loss-free balancing, Wang et al. 2024; prices by order statistics: the auction of Bertsekas 1988, all experts
bidding at once.
"""

import dataclasses
import math
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from nashswarm import kernels
from nashswarm.models.experts import grouped
from nashswarm.moe.loss import LossWeights, implied_prices

Prices = Literal["equilibrium", "sign", "none"]
Search = Literal["exact", "leaders"]
DAMPING = 0.5  # of prices that all experts move at once
SPREADS = 4.0
ALIGNED = 4  # floats: a grouped product wants rows of whole 16 bytes


class Routing(NamedTuple):
    """What a router decided about some tokens.

    ``experts`` and ``gates``: of each token its k experts and their weights in the output; where ``tokens`` is given
    each row is one assignment of that token instead.  ``logits``: affinities to all experts, None where not all were
    scored.  ``prices``, ``resident``: of the experts, as they were fixed beforehand.  ``dropped``: assignments that
    found no room, whose gates are zero.  ``mean``: of the tokens.
    """

    experts: Int[Tensor, "rows k"]
    gates: Float[Tensor, "rows k"]
    logits: Float[Tensor, "tokens experts"] | None
    prices: Float[Tensor, " experts"]
    resident: Bool[Tensor, " experts"]
    dropped: Int[Tensor, ""] | int
    mean: Float[Tensor, " width"] | None = None
    tokens: Int[Tensor, " rows"] | None = None

    def loads(self) -> Float[Tensor, " experts"]:
        """How many assignments each expert got."""
        counts = torch.zeros_like(self.prices)
        return counts.index_add(0, self.experts.flatten(), (self.gates.detach() != 0).flatten().to(counts.dtype))


@dataclasses.dataclass(frozen=True)
class Dense:
    """No routing: one feed-forward network as wide as the k experts that a token would have had."""

    looks_ahead: ClassVar[bool] = False
    loss: LossWeights = dataclasses.field(default_factory=LossWeights)


@dataclasses.dataclass(frozen=True)
class TopK:
    """The k experts of the largest affinity, balanced by the loss alone (Fedus et al. 2022; gates as in Mixtral).

    ``capacity``: how many times its even share an expert takes at most, later tokens being dropped; null: no limit.
    """

    looks_ahead: ClassVar[bool] = False
    capacity: float | None = None
    loss: LossWeights = dataclasses.field(default_factory=lambda: LossWeights(balance=0.01))

    def __post_init__(self) -> None:
        _check_capacity(self.capacity)


@dataclasses.dataclass(frozen=True)
class LossFree:
    """A bias on sigmoid affinities, moved by ``rate`` against the sign of the excess load (Wang et al. 2024, eq. 3)."""

    looks_ahead: ClassVar[bool] = False
    rate: float = 0.001
    capacity: float | None = None
    loss: LossWeights = dataclasses.field(default_factory=LossWeights)

    def __post_init__(self) -> None:
        _check_capacity(self.capacity)


@dataclasses.dataclass(frozen=True)
class ExpertChoice:
    """Every expert takes its even share of the batch, the tokens of largest affinity (Zhou et al. 2022).  It looks
    ahead: whether a token is taken depends on later ones, so its NLL is not that of a causal model."""

    looks_ahead: ClassVar[bool] = True
    loss: LossWeights = dataclasses.field(default_factory=LossWeights)


@dataclasses.dataclass(frozen=True)
class NashSwarmRouter:
    """The whole method; each part is a switch.

    ``prices``: ``equilibrium``, where each expert bids for its even share of a batch in ``sweeps`` rounds and the price
    follows the bids by steps that shrink to ``price_rate``; ``sign``, by steps of ``price_rate``; or ``none``.
    ``flock``: how many nearest experts a token may choose among; null: all.  ``search``: ``exact`` scores all centroids
    to find them, ``leaders`` the means of groups of ``flock`` experts and then the members of one group.
    ``follow``: by how much 1,000 tokens raise the price of an expert that is used twice as much as the mean, where
    prices follow what is read after training.  ``residency``: by how much an expert in memory is cheaper while experts
    are served from a store, in units of affinity; ``resident``: the share of a layer's expert bytes that memory is
    taken to hold in training.  ``capacity``: as in TopK.
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
        _check_capacity(self.capacity)
        for name, value, choices in (("prices", self.prices, Prices), ("search", self.search, Search)):
            if value not in get_args(choices):
                raise ValueError(f"unknown method.{name} {value!r}: choose {', '.join(get_args(choices))}")
        if self.search == "leaders" and (self.flock is None or self.prices == "equilibrium"):
            raise ValueError("method.search=leaders needs method.flock and, as not all is scored, method.prices=sign")
        if not 0 < self.resident <= 1 or not 0 < self.price_rate <= 1 or self.sweeps < 1 or self.follow < 0:
            raise ValueError(
                f"method.resident={self.resident} and method.price_rate={self.price_rate} must be above 0 and at most "
                f"1, method.sweeps={self.sweeps} at least 1, method.follow={self.follow} not negative"
            )


Settings = Dense | TopK | LossFree | ExpertChoice | NashSwarmRouter


class Router(nn.Module):
    """A centroid and a price for every expert.  ``settle`` moves prices after a batch of training, never within it."""

    price: Tensor
    entry: Tensor
    centre: Tensor
    resident: Tensor
    last_use: Tensor
    settled: Tensor

    def __init__(self, settings: Any, width: int, experts: int, k: int) -> None:
        super().__init__()
        if not 1 <= k <= experts:
            raise ValueError(f"model.top_k={k} is not between 1 and model.experts={experts}")
        flock = getattr(settings, "flock", None)
        if flock is not None and flock < k:
            raise ValueError(f"method.flock={flock} is smaller than model.top_k={k}: no token would find its experts")
        self.settings, self.k = settings, k
        self.serving = False  # from a store, so that it matters what lies in memory
        self.weight = nn.Parameter(torch.randn(experts, width) / math.sqrt(width))
        self.register_buffer("price", torch.zeros(experts))
        self.register_buffer("entry", torch.zeros(experts))
        self.register_buffer("centre", torch.zeros(width))
        self.register_buffer("resident", torch.zeros(experts, dtype=torch.bool))
        self.register_buffer("last_use", torch.full((experts,), -1, dtype=torch.int64))
        self.register_buffer("settled", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Float[Tensor, "tokens width"]) -> Routing:
        if isinstance(self.settings, ExpertChoice):
            return self._chosen_by_experts(x)
        if getattr(self.settings, "search", "exact") == "leaders" and self.settings.flock < len(self.weight):
            return self._by_leaders(x)
        if isinstance(self.settings, NashSwarmRouter):
            logits = self.affinities(x)
            return self._routing(*self.cheapest(logits), logits, x)
        logits = functional.linear(x, self.weight)
        if isinstance(self.settings, LossFree):
            scores = logits.sigmoid()
            experts = top(scores - self.price, self.k)
            chosen = scores.gather(1, experts)
            gates = chosen / chosen.sum(1, keepdim=True)
        else:
            experts = top(logits, self.k)
            gates = self._gates(logits, experts)
        return self._routing(experts, gates, logits, x)

    def affinities(self, x: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens experts"]:
        return functional.linear(x, self.weight, -self.weight.mv(self.centre))

    def cheapest(
        self, logits: Float[Tensor, "tokens experts"]
    ) -> tuple[Int[Tensor, "tokens k"], Float[Tensor, "tokens k"]]:
        """The k best experts of each token's flock, prices and residency counted, and their gates."""
        return kernels.route(logits, self.entry, self._cost(), self.price, self._flock(), self.k)

    def _flock(self) -> int:
        """How many experts a token chooses among."""
        count = len(self.price)
        return min(self.settings.flock or count, count)

    def _cost(self) -> Float[Tensor, " experts"]:
        return self.price - self.settings.residency * self.resident if self.serving else self.price

    def _gates(self, logits: Tensor, experts: Tensor) -> Float[Tensor, "tokens k"]:
        """Softmax over all that were scored, made to sum to one over the chosen k; of a single one its share of all."""
        chosen = logits.gather(1, experts)
        return chosen.softmax(1) if self.k > 1 else (chosen - logits.logsumexp(1, keepdim=True)).exp()

    def _routing(self, experts: Tensor, gates: Tensor, logits: Tensor | None, x: Tensor) -> Routing:
        dropped: Tensor | int = 0
        capacity = getattr(self.settings, "capacity", None)
        if capacity is not None:
            room = math.ceil(capacity * experts.numel() / len(self.price))
            taken = functional.one_hot(experts.flatten(), len(self.price)).cumsum(0)
            place = taken.gather(1, experts.flatten()[:, None]).view_as(experts)  # first come, first served
            gates, dropped = gates * (place <= room), (place > room).sum()
        mean = x.detach().mean(0) if self.training else None
        return Routing(experts, gates, logits, self.price, self.resident, dropped, mean)

    def _by_leaders(self, x: Float[Tensor, "tokens width"]) -> Routing:
        """Groups of ``flock`` experts with a leader each, the mean of their centroids; a token scores the leaders and
        the members of the best one's group alone.  Work per token grows with experts / flock + flock."""
        size, count = self.settings.flock, len(self.weight)
        groups = -(-count // size)
        members = (torch.arange(groups * size, device=x.device) % count).view(groups, size)
        leaders = self.weight[members].mean(1)
        cost, x = self._cost(), x - self.centre
        group = (functional.linear(x, leaders).detach() - cost[members].mean(1)).argmax(1)  # tokens
        order, _, ends = kernels.group(group, groups)
        padded = functional.pad(members, (0, -size % ALIGNED))
        found = grouped(x[order], self.weight[padded].transpose(1, 2), ends)
        near = torch.empty_like(found).index_copy(0, order, found)[:, :size]  # tokens, flock
        place = top(near.detach() - cost[members][group], self.k)
        experts = members[group].gather(1, place)
        return self._routing(experts, self._gates(near - self.price[members][group], place), None, x + self.centre)

    def _chosen_by_experts(self, x: Float[Tensor, "tokens width"]) -> Routing:
        logits = functional.linear(x, self.weight)
        share = max(len(x) * self.k // len(self.weight), 1)
        gates, tokens = logits.softmax(1).T.topk(share)  # experts, share
        experts = torch.arange(len(self.weight), device=x.device)[:, None].expand_as(tokens)
        return Routing(
            experts.reshape(-1, 1), gates.reshape(-1, 1), logits, self.price, self.resident, 0, None, tokens.flatten()
        )

    @torch.no_grad()
    def settle(self, routing: Routing, step: float | None = None) -> None:
        """Move prices toward equal load and remember which experts were used last: what the next batch will see.

        ``step``: how far toward the solved prices, by default 1/√(batches so far), at least ``price_rate``.
        """
        settings = self.settings
        if isinstance(settings, LossFree | NashSwarmRouter):
            share: float = step or max(getattr(settings, "price_rate", 0.0), (int(self.settled) + 1) ** -0.5)
            rule = "sign" if isinstance(settings, LossFree) else settings.prices
            rate = settings.rate if isinstance(settings, LossFree) else settings.price_rate
            if rule == "sign":
                loads = routing.loads()
                self.price += rate * (loads - loads.mean()).sign()
            elif rule == "equilibrium":
                assert isinstance(settings, NashSwarmRouter) and routing.logits is not None
                wanted = routing.logits
                if self._flock() < len(self.price):
                    self.entry += share * (equilibrium(wanted, self._flock(), self.entry, settings.sweeps) - self.entry)
                    near = (wanted - self.entry).topk(self._flock(), sorted=False).indices
                    wanted = wanted.where(torch.zeros_like(wanted, dtype=torch.bool).scatter(1, near, True), -torch.inf)
                solved = equilibrium(wanted, self.k, self.price, settings.sweeps)
                self.price += share * (solved - self.price)
        if isinstance(settings, NashSwarmRouter):
            if routing.mean is not None and settings.prices != "none":
                moved = share * (routing.mean - self.centre)
                self.centre += moved
                for prices in (self.price, self.entry):
                    prices -= self.weight @ moved  # so that nobody's choice changes by it
            held = max(int(settings.resident * len(self.price)), 1)
            self.resident.copy_(self.recent(routing.experts, held))
        self.settled += 1

    @torch.no_grad()
    def follow(self, routing: Routing) -> None:
        """Move prices after a batch that is read, not trained on, as its crowds do: each token more than an even share
        makes an expert dearer.  Prices so keep the sum of all that exceeded the mean, and a text of other tokens than
        the model was trained on uses all experts alike in the long run."""
        if not self.follows:
            return
        if isinstance(self.settings, LossFree):
            self.settle(routing)
        else:
            dearer = implied_prices(routing, self.settings.follow * len(routing.experts) / 1000) - self.price
            for prices in (self.price, self.entry):
                prices += dearer

    @property
    def follows(self) -> bool:
        """Whether there are prices to move."""
        return isinstance(self.settings, LossFree) or getattr(self.settings, "prices", "none") != "none"

    def recent(self, experts: Int[Tensor, "tokens k"], held: int) -> Bool[Tensor, " experts"]:
        """The ``held`` experts that were used last: what an LRU holds after these tokens, one after the other."""
        flat = experts.flatten()
        clock = self.last_use.max() + 1 + torch.arange(len(flat), device=flat.device)
        self.last_use.scatter_reduce_(0, flat, clock, "amax")
        found = torch.zeros_like(self.resident)
        found[self.last_use.topk(held).indices] = True
        return found & (self.last_use >= 0)


def top(utility: Float[Tensor, "tokens experts"], k: int) -> Int[Tensor, "tokens k"]:
    """The indices of the k largest of every row, largest first."""
    return utility.topk(k).indices


def equilibrium(
    wanted: Float[Tensor, "tokens experts"], k: int, start: Float[Tensor, " experts"], sweeps: int
) -> Float[Tensor, " experts"]:
    """Prices at which tokens that take the k largest of ``wanted − price`` use all experts alike, as far as so many
    rounds come.

    In a round each expert names the price at which exactly its even share of tokens would take it, all others' prices
    given: between the margins of the last token that fits and of the first that does not.  A token's margin is what it
    gains by this expert over the best that it leaves for it.  All experts bid at once, so their moves are damped.
    Prices are relative: their mean is zero.  Experts that too few tokens may take would undercut each other without
    end, so no price goes beyond ``SPREADS`` standard deviations of ``wanted``.
    """
    tokens, experts = wanted.shape
    if k == experts:
        return torch.zeros_like(start)
    share = min(max(round(tokens * k / experts), 1), tokens - 1)
    price = start.clone()
    bound = SPREADS * wanted[wanted.isfinite()].std()
    for _ in range(sweeps):
        utility = wanted - price
        best = utility.topk(k + 1).values
        rival = best[:, k - 1 : k].where(utility < best[:, k - 1 : k], best[:, k:])  # the k-th best of the others
        margins = wanted - rival
        least = margins.where(margins.isfinite(), torch.inf).amin(0)  # at it all tokens come that may
        edge = margins.where(margins.isfinite(), least).topk(share + 1, dim=0).values[-2:].mean(0)
        price = price + DAMPING * (edge.where(edge.isfinite(), price) - price)
        price = (price - price.mean()).clamp(-bound, bound)
    return price


def regrets(
    logits: Float[Tensor, "tokens experts"], experts: Int[Tensor, "tokens k"], prices: Float[Tensor, " experts"]
) -> Float[Tensor, " tokens"]:
    """How much each token could still gain by other experts at these prices, in units of affinity; none is negative."""
    utility = logits - prices
    best = utility.topk(experts.shape[1]).values.sum(1)
    return (best - utility.gather(1, experts).sum(1)).clamp(min=0)


def _check_capacity(capacity: float | None) -> None:
    if capacity is not None and capacity <= 0:
        raise ValueError(f"method.capacity={capacity} must be positive, or null for no limit")
