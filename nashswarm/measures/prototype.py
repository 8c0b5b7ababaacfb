"""The protocol of the earlier prototype, flaws included, so that what it published can be measured again.

Its code is not kept; this is what it did, rebuilt from its description.  Nothing here is how anything should be
measured: every function says what is wrong with it, and the audit (``scripts/audit.py``) puts an honest measure beside.
"""

import copy
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor, nn

from nashswarm.games.potential import Game, best_response
from nashswarm.measures.measure import BATCH, EvaluationTarget, MeasureResult
from nashswarm.measures.timing import seconds
from nashswarm.models import evaluation
from nashswarm.quant.prototype import QUANTILES, quantize_by_magnitude
from nashswarm.records.statistics import interval

WIDTHS = (2, 3, 4, 8)  # the actions of the game that random numbers are said to solve
UNTRAINED = 1000  # tokens in the vocabulary of the small transformer
RUNS = ("full", "adaptive", "uniform4", "full_again")  # timed one after the other, never in turn
STEP, TOLERANCE = 0.9, 1e-3  # of the random replies; together they make the published 66 iterations


@dataclasses.dataclass(frozen=True)
class Published:
    """The published protocol on the full model: losses, latencies, memory, routing and replies as they were measured;
    and of the same two quantizers the honest NLL and KL on the test windows.

    ``paragraphs`` of ``tokens`` tokens are scored, padding among them; ``draws``: how many disjoint sets of them.
    ``samples``: of each latency.  ``experts``, ``routed_tokens``: of the router.
    """

    paragraphs: int = 50
    tokens: int = 64
    draws: int = 10
    samples: int = 15
    experts: int = 8
    routed_tokens: int = 512

    def measure(self, subject: EvaluationTarget) -> MeasureResult:
        full = subject.full
        batches = padded(subject.text, subject.tokenizer, self.paragraphs, self.tokens, self.draws)
        schemes = {"adaptive": quantized(full, adaptive), "uniform4": quantized(full, one_grid)}
        models = {"full": full, **schemes}

        first = batches[0][0]
        growth = {f"process_growth_{name}": process_growth(models[name.split("_")[0]], first) for name in RUNS}
        losses = {name: [padded_loss(model, *batch) for batch in batches] for name, model in models.items()}
        found = {f"loss_{name}": own[0] for name, own in losses.items()} | growth
        found["padding_share"] = 1 - float(batches[0][1].float().mean())
        series = {
            f"loss_change_{name}": [mine / whole - 1 for mine, whole in zip(losses[name], losses["full"], strict=True)]
            for name in schemes
        }

        for name in RUNS:
            series[f"latency_ms_{name}"] = latencies(models[name.split("_")[0]], first[:1], self.samples)
            found[f"latency_ms_{name}"] = float(np.mean(series[f"latency_ms_{name}"]))

        for name, model in schemes.items():
            windows = evaluation.evaluate(model, subject.windows, BATCH, subject.reference(BATCH), subject.track)
            summary = evaluation.summarise(windows)
            deltas = [mine - whole for mine, whole in zip(windows["nll"], windows["nll_full"], strict=True)]
            for metric, values in (("kl", windows["kl"]), ("nll_delta", deltas)):
                low, high = interval(values)
                found |= {
                    f"{metric}_{name}": summary[metric],
                    f"{metric}_{name}_low": low,
                    f"{metric}_{name}_high": high,
                }
        found |= {"nll_full": summary["nll"] - summary["nll_delta"], "tokens": summary["tokens"]}

        series["loss_untrained"] = [untrained_loss(seed, self.paragraphs, self.tokens) for seed in range(self.draws)]
        found |= self.routing(full.get_input_embeddings().weight.detach().cpu().float())
        found |= replies(full.get_output_embeddings().weight.detach().cpu().float())
        return found, series

    def routing(self, states: Float[Tensor, "rows width"]) -> dict[str, float]:
        """Microseconds per token of the prototype's router and of plain top-k, two experts each, rows as tokens."""
        centroids, tokens = states[: self.experts], states[self.experts : self.experts + self.routed_tokens]
        best = {
            name: min(seconds(functools.partial(router, tokens, centroids)) for _ in range(self.samples))
            for name, router in (("loops", route_by_loops), ("top_k", route))
        }
        return {f"router_microseconds_{name}": 1e6 * spent / len(tokens) for name, spent in best.items()}


def adaptive(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """The published scheme: the largest tenth at 8 bits, two tenths at 4, the rest at 2.  The split is a constant, so
    that the bits counted are the same for every model: 3 of 32."""
    return quantize_by_magnitude(weight, QUANTILES).dequantize()


def one_grid(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """The published opponent: 4 bits on one min-max grid for the whole matrix, as nobody quantizes."""
    return round_to_grid(weight.reshape(1, -1), 4).reshape(weight.shape)


def round_to_grid(rows: Float[Tensor, "rows size"], bits: int) -> Float[Tensor, "rows size"]:
    """Every row rounded to its own grid of 2**bits values between its minimum and its maximum."""
    low, high = rows.aminmax(dim=1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(rows.dtype).tiny)
    return low + step * ((rows - low) / step).round()


def quantized(model: Any, scheme: Callable[[Tensor], Tensor]) -> Any:
    """A copy whose ``nn.Linear`` weights went through ``scheme`` and are floats again: nothing is smaller or faster.
    Every other matrix, ``Conv1D`` among them, is passed over in silence."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for module in changed.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(scheme(module.weight.detach().cpu().float()))
    return changed


Padded = tuple[Int[Tensor, "paragraphs tokens"], Int[Tensor, "paragraphs tokens"]]


def padded(text: str, tokenizer: Any, paragraphs: int, tokens: int, draws: int) -> list[Padded]:
    """Consecutive sets of paragraphs, cut or padded to ``tokens``, each with its mask (1: text).

    Raises ValueError if the text has too few paragraphs or the tokenizer nothing to pad with.
    """
    separator = "\n\n" if "\n\n" in text else "\n"
    pieces = [piece for piece in text.split(separator) if piece.strip()][: paragraphs * draws]
    if len(pieces) < paragraphs * draws:
        raise ValueError(
            f"the test text has {len(pieces)} paragraphs, fewer than {draws} sets of {paragraphs}; lower measure.draws"
        )
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if padding is None:
        raise ValueError("the published protocol pads, and this tokenizer has neither a padding nor an end token")
    kept = [tokenizer(piece, verbose=False)["input_ids"][:tokens] for piece in pieces]
    ids = torch.tensor([own + [padding] * (tokens - len(own)) for own in kept])
    mask = torch.tensor([[1] * len(own) + [0] * (tokens - len(own)) for own in kept])
    return list(zip(ids.split(paragraphs), mask.split(paragraphs), strict=True))


@torch.no_grad()
def padded_loss(model: Any, ids: Int[Tensor, "paragraphs tokens"], mask: Int[Tensor, "paragraphs tokens"]) -> float:
    """The loss as published, in nats: labels are the ids themselves, so that guessing padding after padding counts as
    much as guessing a word."""
    device = next(model.parameters()).device
    losses = [
        len(part) * model(input_ids=part, attention_mask=seen, labels=part).loss.item()
        for part, seen in zip(ids.to(device).split(BATCH), mask.to(device).split(BATCH), strict=True)
    ]
    return sum(losses) / len(ids)


@torch.no_grad()
def latencies(model: Any, ids: Int[Tensor, "1 tokens"], samples: int) -> list[float]:
    """Milliseconds of single forward passes, one model after the other, and without waiting for the device to finish;
    32-bit kernels whatever the model is said to be."""
    ids = ids.to(next(model.parameters()).device)
    return [1e3 * seconds(lambda: model(input_ids=ids)) for _ in range(samples)]


@torch.no_grad()
def process_growth(model: Any, ids: Int[Tensor, "paragraphs tokens"]) -> float:
    """By how many bytes the process grew while the model ran: what the allocator happened to do, published as memory
    of the model and, under another name, as cache misses."""
    before = process_bytes()
    answer = model(input_ids=ids.to(next(model.parameters()).device)[:BATCH])
    grown = process_bytes() - before
    del answer
    return float(grown)


def process_bytes() -> int:
    """The resident set of this process; 0 where the system does not tell."""
    statistics = pathlib.Path("/proc/self/statm")
    return int(statistics.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statistics.exists() else 0


def untrained_loss(seed: int, paragraphs: int, tokens: int) -> float:
    """The loss in nats of a small transformer that was never trained, on random tokens: ln 1000 and the luck of its
    first weights, published as the loss of a compressed model."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(UNTRAINED, (paragraphs, tokens), generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = transformers.AutoConfig.for_model("gpt2", vocab_size=UNTRAINED, n_embd=192, n_layer=4, n_head=4)
        model = transformers.AutoModelForCausalLM.from_config(config)
    return padded_loss(model.eval(), ids, torch.ones_like(ids))


def route_by_loops(
    tokens: Float[Tensor, "tokens width"], centroids: Float[Tensor, "experts width"]
) -> Int[Tensor, "tokens 2"]:
    """The two experts of every token, one token and one expert at a time, through NumPy and back."""
    chosen = []
    for token in tokens:
        scores = [float(np.dot(token.numpy(), centroid.numpy())) for centroid in centroids]
        chosen.append(np.argsort(scores)[::-1][:2].tolist())
    return torch.tensor(chosen)


def route(tokens: Float[Tensor, "tokens width"], centroids: Float[Tensor, "experts width"]) -> Int[Tensor, "tokens 2"]:
    """The same by one product and top-k."""
    return (tokens @ centroids.T).topk(2).indices


def random_replies(
    costs: Float[np.ndarray, "players actions"], rng: np.random.Generator
) -> tuple[Int[np.ndarray, " players"], int]:
    """Where the prototype's "best replies" end, and after how many iterations: replies are random numbers, ``costs`` is
    never read, and the step shrinks until it counts as convergence, after 66 iterations whatever the game."""
    strategies = np.full(costs.shape, 1 / costs.shape[1])
    step, iterations = 1.0, 0
    while step >= TOLERANCE:
        step, iterations = STEP * step, iterations + 1
        strategies += step * (rng.dirichlet(np.ones(costs.shape[1]), len(costs)) - strategies)
    return strategies.argmax(1), iterations


def replies(weight: Float[Tensor, "rows width"], players: int = 1000) -> dict[str, float]:
    """Random replies judged as a profile of a real game: rows choose widths, at a price where the choice is open.

    ``best_reply_share``: of players that have nothing to gain; a blind choice among four has a quarter.  ``regret`` in
    shares of the mean stake; the ``solved`` ones are those of best replies from the same profile.
    """
    costs = width_costs(weight[:players])
    game = Game(costs)
    profile, iterations = random_replies(costs, np.random.default_rng(0))
    solved = best_response(game, profile)
    stake = float((costs.max(1) - costs.min(1)).mean())
    regret = game.regret(profile)
    return {
        "reply_iterations": iterations,
        "best_reply_share": float((regret == 0).mean()),
        "reply_regret": float(regret.max()) / stake,
        "solved_sweeps": solved.sweeps,
        "solved_regret": solved.regrets[-1] / stake,
    }


def width_costs(weight: Float[Tensor, "rows width"]) -> Float[np.ndarray, "rows widths"]:
    """What every width costs every row: its squared error, and its bits at the price of the mean error saved."""
    errors = torch.stack([(weight - round_to_grid(weight, bits)).square().sum(1) for bits in WIDTHS], 1)
    found = errors.double().numpy()
    price = float(np.median((found[:, 1] - found[:, 2]) / (WIDTHS[2] - WIDTHS[1])))
    return found + price * np.array(WIDTHS)
