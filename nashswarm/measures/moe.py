"""What is measured of a trained mixture of experts: quality and load, the table of the quick validation, and where the
time of routing goes.  Times are medians over repeats, contestants interleaved in one process."""

import copy
import dataclasses
import functools
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from nashswarm import api
from nashswarm.measures.measure import MeasureResult
from nashswarm.measures.size import resident_bytes
from nashswarm.measures.timing import wait
from nashswarm.models import evaluation
from nashswarm.moe import load, store
from nashswarm.moe.loss import implied_prices
from nashswarm.moe.model import FeedForward, Mixture, MoeForCausalLM, MoeSource
from nashswarm.moe.router.nash_swarm import CongestionRouter, NashSwarmRouter
from nashswarm.moe.routing import Routing, regrets
from nashswarm.moe.training import Trained
from nashswarm.progress import Track

WARM_UP = 3
FLOAT_BYTES = 4
CALIBRATION = 64  # windows of the training text
FOLLOWED = 4  # windows between two moves of prices: after longer ones they overshoot


@dataclasses.dataclass(frozen=True)
class MoeSubject:
    """A trained model, the windows that judge it, and some of those it was trained on."""

    trained: Trained
    windows: Int[Tensor, "windows length"]
    calibration: Int[Tensor, "calibration length"]
    track: Track

    @property
    def model(self) -> MoeForCausalLM:
        return self.trained.model


@dataclasses.dataclass(frozen=True)
class Routed:
    """NLL, load and time of a model on text that it was not trained on.

    ``nll`` in nats per token, by window; ``max_violation``, ``load_gini``, ``load_cv``, ``dead_experts`` of all the
    text, prices standing as training left them; ``nll_following``, ``max_violation_following``: where the router moves
    them after every ``FOLLOWED`` windows; ``dropped``: share of assignments; ``regret_mean`` and ``regret_max`` of
    tokens over all experts at the prices that their batch implies, in units of affinity.  ``token_microseconds`` of the
    whole model and ``router_microseconds`` of one router, a token.  Then ``served_tokens`` are read one by one, experts
    coming from a file into memory that holds ``resident`` of their bytes: ``resident_hits``, ``nll_served``,
    ``served_tokens_per_second``, and the same with ``_without`` the residency term.  ``windows``: the first ones of
    those that judge; null: all.
    """

    batch_size: int = 16
    windows: int | None = None
    repeats: int = 20
    served_tokens: int = 512
    resident: float = 0.5

    def __post_init__(self) -> None:
        _check_sizes(self, "batch_size", "windows", "repeats", "served_tokens")
        if not 0 < self.resident <= 1:
            raise ValueError(f"measure.resident={self.resident} must be above 0 and at most 1")

    def measure(self, subject: MoeSubject) -> MeasureResult:
        model, windows = subject.model, subject.windows[: self.windows]
        found, series = judged(model, windows, self.batch_size, subject.track)
        batch = windows[: self.batch_size]
        [seconds] = timed([lambda: model(input_ids=batch)], self.repeats, batch.device)
        found["token_microseconds"] = 1e6 * seconds / batch.numel()
        found["active_parameters"] = model.active_parameters
        found["looks_ahead"] = float(model.config.settings().looks_ahead)
        routers = model.routers()
        if routers:
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(batch.numel(), model.config.hidden_size, generator=generator).to(batch.device)
            [seconds] = timed([lambda: routers[0](x)], self.repeats, x.device)
            found["router_microseconds"] = 1e6 * seconds / len(x)
        if any(router.follows for router in routers):
            following, _ = judged(copy.deepcopy(model), windows, FOLLOWED, subject.track, follow=True)
            found |= {f"{name}_following": following[name] for name in ("nll", "max_violation")}
        if routers and not found["looks_ahead"]:
            found |= self.served(model, windows)
        return found, series

    def served(self, model: MoeForCausalLM, windows: Int[Tensor, "windows length"]) -> dict[str, float]:
        """Experts from a store, with the residency term and, where the router has one, without it, window by window in
        turn."""
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "experts.safetensors"
            store.save(model, path)
            suffixes = ("", "_without") if any(router.residency for router in model.routers()) else ("",)
            models = {suffix: self._from_store(model, path, bool(suffix)) for suffix in suffixes}
            nll = {suffix: [] for suffix in suffixes}  # type: dict[str, list[float]]
            spent = dict.fromkeys(suffixes, 0.0)
            for number, window in enumerate(windows):
                for suffix in suffixes[:: -1 if number % 2 else 1]:
                    own, _ = models[suffix]
                    wait(model.device)
                    started = time.perf_counter()
                    nll[suffix] += one_by_one(own, window, self.served_tokens - len(nll[suffix]))
                    spent[suffix] += time.perf_counter() - started
                if len(nll[""]) == self.served_tokens:
                    break
        found: dict[str, float] = {}
        for suffix, (_, held) in models.items():
            found |= {
                f"resident_hits{suffix}": held.hits / (held.hits + held.misses),
                f"nll_served{suffix}": float(np.mean(nll[suffix])),
                f"served_tokens_per_second{suffix}": len(nll[suffix]) / spent[suffix],
                f"served_bytes_read{suffix}": held.bytes_read,
            }
        return found

    def _from_store(
        self, model: MoeForCausalLM, path: pathlib.Path, without: bool
    ) -> tuple[MoeForCausalLM, store.ExpertStore]:
        """A copy of the model whose experts come from the file, and the store that holds some of them; ``without`` the
        residency term."""
        own = MoeForCausalLM(model.config).train(False).to(model.device)
        own.load_state_dict(model.state_dict())
        for router in own.routers() if without else ():
            router.residency = 0.0
        pools = sum(part.nbytes for name, part in own.named_parameters() if ".experts." in name)
        held = store.ExpertStore(path, int(self.resident * pools), model.device)
        store.serve(own, held)
        return own, held


@torch.no_grad()
def judged(
    model: MoeForCausalLM,
    windows: Int[Tensor, "windows length"],
    batch_size: int,
    track: Track,
    follow: bool = False,
) -> MeasureResult:
    """NLL, loads, drops and regrets on these windows; the loads of each layer as a series.  ``follow``: move the prices
    of ``model`` after each batch, which the next one sees."""
    series: dict[str, list[float]] = {"nll": [], "tokens": []}
    loads: list[Tensor] = []
    dropped, regret = 0, [torch.zeros(0)]
    congestion = model.config.settings().loss.congestion
    for batch in track(windows.split(batch_size), "evaluating"):
        answer = model(input_ids=batch)
        logits, targets = answer.logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten()
        nll = functional.cross_entropy(logits, targets, reduction="none").double().view(len(batch), -1)
        series["nll"] += nll.mean(1).tolist()
        series["tokens"] += [float(nll.shape[1])] * len(batch)
        routings: Sequence[Routing] = answer.routings or ()
        loads = [one.loads().double() + (loads[place] if loads else 0) for place, one in enumerate(routings)]
        dropped += sum(int(one.dropped) for one in routings)
        for one in routings:
            if one.tokens is None and one.logits is not None:
                regret.append(regrets(one.logits, one.experts, implied_prices(one, congestion)).cpu())
        if follow:
            model.follow(routings)
    found = evaluation.summarise(series)
    if loads:
        table = torch.stack(loads).cpu().numpy()
        found |= load.summarise(table) | {"dropped": dropped / (float(table.sum()) + dropped)}
        series |= {f"load_{place}": row.tolist() for place, row in enumerate(table)}
    if len(everyone := torch.cat(regret)):
        found |= {"regret_mean": float(everyone.mean()), "regret_max": float(everyone.max())}
    return found, series


@torch.no_grad()
def one_by_one(model: MoeForCausalLM, window: Int[Tensor, " length"], tokens: int) -> list[float]:
    """The NLL of each of the first ``tokens`` predictions at most, every token read by itself."""
    found, past = [], None
    for place in range(min(len(window) - 1, tokens)):
        answer = model(input_ids=window[None, place : place + 1], past_key_values=past, use_cache=True)
        past = answer.past_key_values
        found.append(functional.cross_entropy(answer.logits[0, -1:].float(), window[place + 1 : place + 2]).item())
    return found


@dataclasses.dataclass(frozen=True)
class QuickValidation:
    """The table of the earlier prototype, of a trained model: ``bytes_memory`` of its 32-bit floats, ``bytes_file``
    once compressed to ``bits`` per parameter, ``bytes_resident`` of the compressed model as it runs, ``nll`` before
    and after (``nll_quantized``), milliseconds per batch and tokens per second of both.  Experts are players like all
    other matrices, their traffic in calibration a part of their sensitivity."""

    batch_size: int = 8
    length: int = 32
    batches: int = 20
    bits: float = 3.0

    def __post_init__(self) -> None:
        _check_sizes(self, "batch_size", "length", "batches")
        if self.length < 2:
            raise ValueError("measure.length=1 must be at least 2: the second token is predicted from the first")
        if not self.bits > 0:
            raise ValueError(f"measure.bits={self.bits} must be positive")

    @property
    def tokens(self) -> int:
        return self.batches * self.batch_size * self.length

    def measure(self, subject: MoeSubject) -> MeasureResult:
        check(self, subject.windows)
        windows = subject.windows.flatten()[: self.tokens].view(-1, self.length)
        packed, report = api.compress(
            subject.model, subject.trained.tokenizer, "nash_swarm", subject.calibration, self.bits
        )
        found = {
            "bytes_memory": float(FLOAT_BYTES * sum(part.numel() for part in subject.model.parameters())),
            "bytes_file": report.bytes_file,
            "bits_per_weight_model": report.bits_per_weight_model,
            "bytes_resident": resident_bytes(packed),
            "active_parameters": subject.model.active_parameters,
            "quantize_seconds": report.seconds,
        }
        series: dict[str, list[float]] = {}
        batches = windows.split(self.batch_size)
        warm_up = batches[:WARM_UP]
        for suffix, model in (("", subject.model), ("_quantized", packed)):
            seen = evaluation.evaluate(model, windows, self.batch_size, track=subject.track)
            found[f"nll{suffix}"] = evaluation.summarise(seen)["nll"]
            series[f"nll{suffix}"] = seen["nll"]
        series["tokens"] = [float(self.length - 1)] * len(windows)
        models = {"": subject.model, "_quantized": packed}
        spent = {suffix: [] for suffix in models}  # type: dict[str, list[float]]
        with torch.no_grad():
            for batch in (*warm_up, *batches):
                for suffix, model in models.items():
                    wait(batch.device)
                    started = time.perf_counter()
                    model(input_ids=batch)
                    wait(batch.device)
                    spent[suffix].append(time.perf_counter() - started)
        for suffix, times in spent.items():
            median = float(np.median(times[len(warm_up) :]))
            found[f"latency_ms{suffix}"] = 1e3 * median
            found[f"tokens_per_second{suffix}"] = self.batch_size * self.length / median
        return found, series


@dataclasses.dataclass(frozen=True)
class RoutingTime:
    """Where the time of routing goes, in microseconds a token: random tokens, the trained model's width.

    ``route_<version>_<experts>``: ``plain`` softmax and top-k, the ``flock`` with prices, its ``leaders``, and
    ``first``, the loops over tokens of a first version.  ``share_<component>``: of the parts of the flock's routing,
    ``scores`` and ``choice`` with its gates.
    ``layer_…``: a whole layer against the dense one of equal active size, as the ratio of their times at a batch of 1
    and of all.
    """

    tokens: int = 2048
    experts: Sequence[int] = (8, 64, 256, 1024)
    repeats: int = 30

    def __post_init__(self) -> None:
        _check_sizes(self, "tokens", "repeats")
        if min(self.experts, default=0) < 1:
            raise ValueError(f"measure.experts=[{','.join(map(str, self.experts))}] must be numbers of at least 1")

    def measure(self, subject: MoeSubject) -> MeasureResult:
        config, device = subject.model.config, subject.model.device
        width, k = config.hidden_size, config.num_experts_per_tok
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.tokens, width, generator=generator).to(device)
        found: dict[str, float] = {}
        for count in subject.track(list(self.experts), "timing"):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                exact = NashSwarmRouter().build(width, count, k)
                leaders = NashSwarmRouter(prices="sign", search="leaders").build(width, count, k)
            exact.price.normal_(generator=generator)
            exact, leaders = exact.to(device), leaders.to(device)
            versions: dict[str, Callable[[], Any]] = {
                "plain": functools.partial(plain_top_k, x, exact.weight, k),
                "flock": functools.partial(exact, x),
                "leaders": functools.partial(leaders, x),
            }
            spent = dict(zip(versions, timed(list(versions.values()), self.repeats, device), strict=True))
            found |= {f"route_{name}_{count}": 1e6 * seconds / len(x) for name, seconds in spent.items()}
            few = x[: max(self.tokens // 16, 1)]
            first = timed([functools.partial(first_version, few, exact)], 3, device)[0]
            found[f"route_first_{count}"] = 1e6 * first / len(few)
            found |= {f"{name}_{count}": share for name, share in shares(exact, x, self.repeats).items()}
            found |= {f"{name}_{count}": ratio for name, ratio in self.layer(config, count, x).items()}
        return found, {}

    def layer(self, config: Any, count: int, x: Float[Tensor, "tokens width"]) -> dict[str, float]:
        """How many times the dense layer's time the mixture takes."""
        source = MoeSource(
            width=config.hidden_size, layers=1, experts=count, top_k=config.num_experts_per_tok,
            expert_width=config.moe_intermediate_size,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            small = source.build(NashSwarmRouter(), 8, 0).config
            router = NashSwarmRouter().build(small.hidden_size, count, small.num_experts_per_tok)
            mixture, dense = Mixture(small, router).eval(), FeedForward(small).eval()
        found = {}
        mixture, dense = mixture.to(x.device), dense.to(x.device)
        for batch in (1, len(x)):
            tokens = x[None, :batch]
            both = [functools.partial(part, tokens) for part in (mixture, dense)]
            own, other = timed(both, self.repeats, x.device)
            found[f"layer_ratio_batch_{batch}"] = own / other
        return found


def shares(router: CongestionRouter, x: Float[Tensor, "tokens width"], repeats: int) -> dict[str, float]:
    """The shares of the time of the flock's routing that its components take, each run by itself."""
    logits = router.affinities(x)
    parts: Mapping[str, Callable[[], Any]] = {
        "scores": lambda: router.affinities(x),
        "choice": lambda: router.cheapest(logits),
    }
    spent = timed(list(parts.values()), repeats, x.device)
    return {f"share_{name}": seconds / sum(spent) for name, seconds in zip(parts, spent, strict=True)}


def plain_top_k(
    x: Float[Tensor, "tokens width"], weight: Float[Tensor, "experts width"], k: int
) -> tuple[Tensor, Tensor]:
    """What everybody does: softmax over all experts, the k largest, made to sum to one."""
    gates, experts = functional.linear(x, weight).softmax(1).topk(k)
    return experts, gates / gates.sum(1, keepdim=True)


def first_version(x: Float[Tensor, "tokens width"], router: CongestionRouter) -> tuple[Tensor, Tensor]:
    """The same routing, one token and one expert at a time: what the first version was, and what tests compare with."""
    k, flock = router.k, router.flock
    prices, entry = router.price.tolist(), router.entry.tolist()
    chosen, gates = [], []
    for token in x:
        apart = token - router.centre
        affinity = [float(apart @ centroid) for centroid in router.weight.detach()]
        candidates = sorted(range(len(affinity)), key=lambda expert: entry[expert] - affinity[expert])[:flock]
        best = sorted(candidates, key=lambda expert: prices[expert] - affinity[expert])[:k]
        paid = [affinity[expert] - prices[expert] for expert in best]
        weights = np.exp(np.array(paid) - max(paid))
        chosen.append(best)
        gates.append((weights / weights.sum()).tolist())
    return torch.tensor(chosen), torch.tensor(gates)


def _check_sizes(measure: Any, *names: str) -> None:
    """Raises ValueError that names all of these fields below 1; None is no number."""
    given = {name: getattr(measure, name) for name in names}
    if wrong := [f"measure.{name}={value}" for name, value in given.items() if value is not None and value < 1]:
        raise ValueError(f"{', '.join(wrong)} must be at least 1")


@torch.no_grad()
def timed(contestants: Sequence[Callable[[], Any]], repeats: int, device: torch.device) -> list[float]:
    """The median seconds of each, run in turn, until ``device`` has finished."""
    spent: list[list[float]] = [[] for _ in contestants]
    for _ in range(repeats + WARM_UP):
        for times, contestant in zip(spent, contestants, strict=True):
            wait(device)
            started = time.perf_counter()
            contestant()
            wait(device)
            times.append(time.perf_counter() - started)
    return [float(np.median(times[WARM_UP:])) for times in spent]


MoeMeasure = Routed | QuickValidation | RoutingTime


def check(measure: MoeMeasure, windows: Int[Tensor, "windows length"]) -> None:
    """Raises ValueError if a measure asks for more than these windows are."""
    if isinstance(measure, QuickValidation) and windows.numel() < measure.tokens:
        raise ValueError(f"the validation text has {windows.numel()} tokens; lower measure.batches")
