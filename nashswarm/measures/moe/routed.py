"""Quality, load, time and serving of a trained mixture of experts, on text that it was not trained on."""

import copy
import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional

from nashswarm.measures.measure import MeasureResult
from nashswarm.measures.moe.target import MoeMeasure, MoeTarget, check_sizes
from nashswarm.measures.timing import medians, timed
from nashswarm.models import evaluation
from nashswarm.moe import load, store
from nashswarm.moe.loss import implied_prices
from nashswarm.moe.model import MoeForCausalLM
from nashswarm.moe.routing import Routing, regrets
from nashswarm.progress import Track

FOLLOWED = 4  # windows between two moves of prices; after longer batches prices overshoot


@dataclasses.dataclass(frozen=True)
class Routed(MoeMeasure):
    """NLL, load and time of a model, first with all experts in memory, then served from a file.

    ``nll``: nats per token, also by window.  ``max_violation``, ``load_gini``, ``load_cv``, ``dead_experts``: load over
    all windows at the prices that training left.  ``nll_following``, ``max_violation_following``: the same where the
    router moves its prices after every ``FOLLOWED`` windows.  ``dropped``: share of all assignments.  ``regret_mean``,
    ``regret_max``: regret of tokens over all experts at the prices that their batch implies, in units of affinity.
    ``token_microseconds``, ``router_microseconds``: time per token of the model and of one router.

    Served: ``served_tokens`` are read one by one while memory holds ``resident`` of the expert bytes.
    ``resident_hits``: share of experts found in memory.  ``nll_served``, ``served_tokens_per_second``,
    ``served_bytes_read``, and all four with ``_without`` the router's preference for experts in memory.

    ``windows``: number of test windows; None: all.
    """

    batch_size: int = 16
    windows: int | None = None
    repeats: int = 20
    served_tokens: int = 512
    resident: float = 0.5

    def __post_init__(self) -> None:
        check_sizes(self, "batch_size", "windows", "repeats", "served_tokens")
        if not 0 < self.resident <= 1:
            raise ValueError(f"measure.resident={self.resident} must be above 0 and at most 1")

    def measure(self, target: MoeTarget) -> MeasureResult:
        model, windows = target.model, target.windows[: self.windows]
        metrics, series = evaluate(model, windows, self.batch_size, target.track)
        batch = windows[: self.batch_size]
        times = medians({"model": lambda: model(input_ids=batch)}, self.repeats, batch.device)
        metrics["token_microseconds"] = 1e6 * times["model"] / batch.numel()
        metrics["active_parameters"] = model.active_parameters
        metrics["looks_ahead"] = float(model.config.settings().looks_ahead)
        routers = model.routers()
        if routers:
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(batch.numel(), model.config.hidden_size, generator=generator).to(batch.device)
            times = medians({"router": lambda: routers[0](x)}, self.repeats, x.device)
            metrics["router_microseconds"] = 1e6 * times["router"] / len(x)
        if any(router.follows for router in routers):
            moving = copy.deepcopy(model)
            following, _ = evaluate(moving, windows, FOLLOWED, target.track, moving.follow)
            metrics |= {f"{name}_following": following[name] for name in ("nll", "max_violation")}
        if routers and not metrics["looks_ahead"]:
            metrics |= self.served(model, windows)
        return metrics, series

    def served(self, model: MoeForCausalLM, windows: Int[Tensor, "windows length"]) -> dict[str, float]:
        """Return the metrics of serving the experts from a store: with the preference for experts in memory and, where
        the router has one, without it.  The two models alternate, window by window."""
        suffixes = ("", "_without") if any(router.residency for router in model.routers()) else ("",)
        nll: dict[str, list[float]] = {suffix: [] for suffix in suffixes}
        spent = dict.fromkeys(suffixes, 0.0)  # seconds
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "experts.safetensors"
            store.save(model, path)
            models = {suffix: self._from_store(model, path, bool(suffix)) for suffix in suffixes}
            for number, window in enumerate(windows):
                for suffix in suffixes[:: -1 if number % 2 else 1]:
                    served, _ = models[suffix]
                    read = functools.partial(one_by_one, served, window, self.served_tokens - len(nll[suffix]))
                    window_nll, seconds = timed(read, model.device)
                    nll[suffix] += window_nll
                    spent[suffix] += seconds
                if len(nll[""]) == self.served_tokens:
                    break
        metrics: dict[str, float] = {}
        for suffix, (_, experts) in models.items():
            metrics |= {
                f"resident_hits{suffix}": experts.hits / (experts.hits + experts.misses),
                f"nll_served{suffix}": float(np.mean(nll[suffix])),
                f"served_tokens_per_second{suffix}": len(nll[suffix]) / spent[suffix],
                f"served_bytes_read{suffix}": experts.bytes_read,
            }
        return metrics

    def _from_store(
        self, model: MoeForCausalLM, path: pathlib.Path, without: bool
    ) -> tuple[MoeForCausalLM, store.ExpertStore]:
        """Return a copy of the model that reads its experts from the file at ``path``, and the store that reads them.

        ``without``: switch the preference for experts in memory off.
        """
        served = MoeForCausalLM(model.config).train(False).to(model.device)
        served.load_state_dict(model.state_dict())
        for router in served.routers() if without else ():
            router.residency = 0.0
        expert_bytes = sum(part.nbytes for name, part in served.named_parameters() if ".experts." in name)
        experts = store.ExpertStore(path, int(self.resident * expert_bytes), model.device)
        store.serve(served, experts)
        return served, experts


@torch.no_grad()
def evaluate(
    model: MoeForCausalLM,
    windows: Int[Tensor, "windows length"],
    batch_size: int,
    track: Track,
    follow: Callable[[Sequence[Routing]], None] | None = None,
) -> MeasureResult:
    """Return NLL, load, drops and regrets on these windows; series: NLL by window, and the load of every layer.

    ``follow``: called with the routings of each batch, to move the prices of ``model``; the next batch sees them.
    """
    series: dict[str, list[float]] = {"nll": [], "tokens": []}
    loads: list[Tensor] = []  # by layer
    dropped, regret = 0, [torch.zeros(0)]
    congestion = model.config.settings().loss.congestion
    for batch in track(windows.split(batch_size), "evaluating"):
        output = model(input_ids=batch)
        logits, targets = output.logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten()
        nll = functional.cross_entropy(logits, targets, reduction="none").double().view(len(batch), -1)
        series["nll"] += nll.mean(1).tolist()
        series["tokens"] += [float(nll.shape[1])] * len(batch)
        routings: Sequence[Routing] = output.routings or ()
        loads = [one.loads().double() + (loads[layer] if loads else 0) for layer, one in enumerate(routings)]
        dropped += sum(int(one.dropped) for one in routings)
        for one in routings:
            if one.tokens is None and one.logits is not None:
                regret.append(regrets(one.logits, one.experts, implied_prices(one, congestion)).cpu())
        if follow is not None:
            follow(routings)
    metrics = evaluation.summarise(series)
    if loads:
        table = torch.stack(loads).cpu().numpy()
        metrics |= load.summarise(table) | {"dropped": dropped / (float(table.sum()) + dropped)}
        series |= {f"load_{layer}": row.tolist() for layer, row in enumerate(table)}
    if len(by_token := torch.cat(regret)):
        metrics |= {"regret_mean": float(by_token.mean()), "regret_max": float(by_token.max())}
    return metrics, series


@torch.no_grad()
def one_by_one(model: MoeForCausalLM, window: Int[Tensor, " length"], tokens: int) -> list[float]:
    """Return the NLL of the first ``tokens`` predictions at most, in nats; every token is a forward pass of its own."""
    nll, cache = [], None
    for place in range(min(len(window) - 1, tokens)):
        output = model(input_ids=window[None, place : place + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        nll.append(functional.cross_entropy(output.logits[0, -1:].float(), window[place + 1 : place + 2]).item())
    return nll
