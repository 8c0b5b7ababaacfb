"""The measuring protocol of the earlier prototype, flaws included, so that what it published can be measured again.

The prototype's code is not kept; this module rebuilds it from its description.  Nothing should be measured like this:
every docstring names the flaw, and the audit (``scripts/audit.py``) sets an honest measure against each number.
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
from nashswarm.measures.measure import EvaluationTarget, MeasureResult
from nashswarm.measures.timing import seconds
from nashswarm.models import evaluation
from nashswarm.models.evaluation import BATCH
from nashswarm.quant.prototype import QUANTILES, quantize_by_magnitude
from nashswarm.records.statistics import interval

WIDTHS = (2, 3, 4, 8)  # bits; the actions of the game that random numbers were said to solve
UNTRAINED = 1000  # tokens in the vocabulary of the transformer that was never trained
RUNS = ("full", "adaptive", "uniform4", "full_again")  # timed one after the other, not interleaved
STEP, TOLERANCE = 0.9, 1e-3  # of the random replies; they alone give the published 66 iterations


@dataclasses.dataclass(frozen=True)
class Published:
    """The published protocol on the full model, and honest NLL and KL of the same two quantizers on the test windows.

    ``loss_…``, ``latency_ms_…``, ``process_growth_…``, ``router_microseconds_…`` and the replies are measured as
    published; ``nll_…`` and ``kl_…`` (nats per token) are not.  Suffixes: ``adaptive`` and ``uniform4``, the two
    quantizers.

    ``draws`` disjoint sets of ``paragraphs`` are scored, each padded to ``tokens``.  ``samples``: of each latency.
    ``experts``, ``routed_tokens``: sizes of the router.
    """

    paragraphs: int = 50
    tokens: int = 64
    draws: int = 10
    samples: int = 15
    experts: int = 8
    routed_tokens: int = 512

    def measure(self, target: EvaluationTarget) -> MeasureResult:
        full = target.full
        batches = padded(target.text, target.tokenizer, self.paragraphs, self.tokens, self.draws)
        schemes = {"adaptive": quantized(full, adaptive), "uniform4": quantized(full, one_grid)}
        models = {"full": full, **schemes}

        first = batches[0][0]
        growth = {f"process_growth_{name}": process_growth(models[name.split("_")[0]], first) for name in RUNS}
        losses = {name: [padded_loss(model, *batch) for batch in batches] for name, model in models.items()}
        metrics = {f"loss_{name}": draws[0] for name, draws in losses.items()} | growth
        metrics["padding_share"] = 1 - float(batches[0][1].float().mean())
        series = {
            f"loss_change_{name}": [
                loss / loss_full - 1 for loss, loss_full in zip(losses[name], losses["full"], strict=True)
            ]
            for name in schemes
        }

        for name in RUNS:
            series[f"latency_ms_{name}"] = latencies(models[name.split("_")[0]], first[:1], self.samples)
            metrics[f"latency_ms_{name}"] = float(np.mean(series[f"latency_ms_{name}"]))

        for name, model in schemes.items():
            windows = evaluation.evaluate(model, target.windows, BATCH, target.reference(BATCH), target.track)
            summary = evaluation.summarise(windows)
            deltas = [nll - nll_full for nll, nll_full in zip(windows["nll"], windows["nll_full"], strict=True)]
            for metric, values in (("kl", windows["kl"]), ("nll_delta", deltas)):
                low, high = interval(values)
                metrics |= {
                    f"{metric}_{name}": summary[metric],
                    f"{metric}_{name}_low": low,
                    f"{metric}_{name}_high": high,
                }
        metrics |= {"nll_full": summary["nll"] - summary["nll_delta"], "tokens": summary["tokens"]}

        series["loss_untrained"] = [untrained_loss(seed, self.paragraphs, self.tokens) for seed in range(self.draws)]
        metrics |= self.routing(full.get_input_embeddings().weight.detach().cpu().float())
        metrics |= replies(full.get_output_embeddings().weight.detach().cpu().float())
        return metrics, series

    def routing(self, states: Float[Tensor, "rows width"]) -> dict[str, float]:
        """Return microseconds per token of the prototype's router and of plain top-k, two experts each.

        The rows of a matrix stand for centroids and tokens.  Flaw: the best of all samples is reported.
        """
        centroids, tokens = states[: self.experts], states[self.experts : self.experts + self.routed_tokens]
        best = {
            name: min(seconds(functools.partial(router, tokens, centroids)) for _ in range(self.samples))
            for name, router in (("loops", route_by_loops), ("top_k", route))
        }
        return {f"router_microseconds_{name}": 1e6 * spent / len(tokens) for name, spent in best.items()}


def adaptive(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """Quantize by the published scheme: the largest tenth of the weights at 8 bits, two tenths at 4, the rest at 2.

    Flaw: the shares are constants, so the scheme adapts to nothing and counts 3 bits of 32 for every model.
    """
    return quantize_by_magnitude(weight, QUANTILES).dequantize()


def one_grid(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """Quantize by the published baseline: 4 bits on one min-max grid for the whole matrix.

    Flaw: uniform quantization in use has one grid per group of weights.
    """
    return round_to_grid(weight.reshape(1, -1), 4).reshape(weight.shape)


def round_to_grid(rows: Float[Tensor, "rows size"], bits: int) -> Float[Tensor, "rows size"]:
    """Round every row to its own grid of 2**bits values between its minimum and its maximum."""
    low, high = rows.aminmax(dim=1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(rows.dtype).tiny)
    return low + step * ((rows - low) / step).round()


def quantized(model: Any, scheme: Callable[[Tensor], Tensor]) -> Any:
    """Return a copy of the model whose ``nn.Linear`` weights went through ``scheme``.

    Flaws: weights are floats again, so nothing is smaller or faster; all other matrices, ``Conv1D`` among them, are
    skipped in silence.
    """
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for module in changed.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(scheme(module.weight.detach().cpu().float()))
    return changed


Padded = tuple[Int[Tensor, "paragraphs tokens"], Int[Tensor, "paragraphs tokens"]]


def padded(text: str, tokenizer: Any, paragraphs: int, tokens: int, draws: int) -> list[Padded]:
    """Return ``draws`` consecutive sets of paragraphs, cut or padded to ``tokens``, each with its mask (1: text).

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
    encoded = [tokenizer(piece, verbose=False)["input_ids"][:tokens] for piece in pieces]
    ids = torch.tensor([piece + [padding] * (tokens - len(piece)) for piece in encoded])
    mask = torch.tensor([[1] * len(piece) + [0] * (tokens - len(piece)) for piece in encoded])
    return list(zip(ids.split(paragraphs), mask.split(paragraphs), strict=True))


@torch.no_grad()
def padded_loss(model: Any, ids: Int[Tensor, "paragraphs tokens"], mask: Int[Tensor, "paragraphs tokens"]) -> float:
    """Return the loss as published, in nats per token.

    Flaw: labels are the ids themselves, so predicting padding after padding counts as much as predicting a word.
    """
    device = next(model.parameters()).device
    losses = [
        len(part) * model(input_ids=part, attention_mask=part_mask, labels=part).loss.item()
        for part, part_mask in zip(ids.to(device).split(BATCH), mask.to(device).split(BATCH), strict=True)
    ]
    return sum(losses) / len(ids)


@torch.no_grad()
def latencies(model: Any, ids: Int[Tensor, "1 tokens"], samples: int) -> list[float]:
    """Return the milliseconds of single forward passes.

    Flaws: models are timed one after the other, not interleaved; the clock does not wait for an accelerator; kernels
    are those of 32-bit floats whatever the model is said to be.
    """
    ids = ids.to(next(model.parameters()).device)
    return [1e3 * seconds(lambda: model(input_ids=ids)) for _ in range(samples)]


@torch.no_grad()
def process_growth(model: Any, ids: Int[Tensor, "paragraphs tokens"]) -> float:
    """Return by how many bytes the process grew while the model ran.

    Flaw: this is what the allocator happened to do; it was published as memory of the model and, under another name, as
    cache misses.
    """
    before = process_bytes()
    output = model(input_ids=ids.to(next(model.parameters()).device)[:BATCH])
    grown = process_bytes() - before
    del output
    return float(grown)


def process_bytes() -> int:
    """Return the resident set of this process in bytes; 0 where the system does not tell."""
    statistics = pathlib.Path("/proc/self/statm")
    return int(statistics.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statistics.exists() else 0


def untrained_loss(seed: int, paragraphs: int, tokens: int) -> float:
    """Return the loss in nats of a small transformer that was never trained, on random tokens.

    Flaw: it is ln 1000 plus the luck of the first weights, and was published as the loss of a compressed model.
    """
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
    """Return the two experts of every token.

    Flaw: it loops over tokens and experts, through NumPy and back.
    """
    chosen = []
    for token in tokens:
        scores = [float(np.dot(token.numpy(), centroid.numpy())) for centroid in centroids]
        chosen.append(np.argsort(scores)[::-1][:2].tolist())
    return torch.tensor(chosen)


def route(tokens: Float[Tensor, "tokens width"], centroids: Float[Tensor, "experts width"]) -> Int[Tensor, "tokens 2"]:
    """Return the two experts of every token, by one product and top-k."""
    return (tokens @ centroids.T).topk(2).indices


def random_replies(
    costs: Float[np.ndarray, "players actions"], rng: np.random.Generator
) -> tuple[Int[np.ndarray, " players"], int]:
    """Return the profile in which the prototype's "best replies" end, and the number of iterations.

    Flaw: replies are random numbers and ``costs`` is never read; the step shrinks until it counts as convergence, after
    66 iterations whatever the game.
    """
    strategies = np.full(costs.shape, 1 / costs.shape[1])
    step, iterations = 1.0, 0
    while step >= TOLERANCE:
        step, iterations = STEP * step, iterations + 1
        strategies += step * (rng.dirichlet(np.ones(costs.shape[1]), len(costs)) - strategies)
    return strategies.argmax(1), iterations


def replies(weight: Float[Tensor, "rows width"], players: int = 1000) -> dict[str, float]:
    """Return how good random replies are in a real game, where rows choose widths at a price that leaves the choice
    open.

    ``best_reply_share``: share of players that have nothing to gain; a blind choice among four gives a quarter.
    ``reply_regret``: largest regret, in units of the mean stake.  ``solved_…``: the same for true best replies from the
    same profile.
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
    """Return the cost of every width for every row: its squared error plus its bits at the median price of a bit."""
    errors = torch.stack([(weight - round_to_grid(weight, bits)).square().sum(1) for bits in WIDTHS], 1)
    damages = errors.double().numpy()
    price = float(np.median((damages[:, 1] - damages[:, 2]) / (WIDTHS[2] - WIDTHS[1])))
    return damages + price * np.array(WIDTHS)
