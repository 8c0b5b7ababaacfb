"""Measure how well a model predicts text, and how far a compressed model moved from the full one.

Protocol: text is cut into consecutive windows that do not overlap; in each window the model predicts all tokens but the
first.  ``nll`` is the mean negative log-likelihood in nats per token, perplexity is exp(nll).  ``kl`` is the mean
KL(full ‖ compressed) in nats per token.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from nashswarm.models.output_head import OutputHead
from nashswarm.progress import Track, no_track

BATCH = 8  # windows
LOGITS_AT_ONCE = 1 << 21  # compared in one step: what fits the processor's caches
LOGITS_IN_A_BATCH = 1 << 25  # with a large vocabulary, those of a few windows are as large as a model

PerWindow = dict[str, list[float]]
PerPosition = dict[str, Float[Tensor, "windows predicted"]]


@dataclasses.dataclass(frozen=True)
class Reference:
    """The full model's predictions for some windows, kept as the last states of the model.

    The logits are computed from ``states`` by ``head`` when they are needed: they are many times larger.
    ``cached_logits``: those of the first windows, or None.
    """

    states: Float[Tensor, "windows length width"]
    head: nn.Module
    cached_logits: Float[Tensor, "cached length vocabulary"] | None = None

    def logits(self, window: int, positions: slice) -> Float[Tensor, "positions vocabulary"]:
        """Return the full model's logits at some positions of one window."""
        if self.cached_logits is not None and window < len(self.cached_logits):
            return self.cached_logits[window, positions]
        logits: Tensor = self.head(self.states[window, positions])
        return logits

    def with_cached_logits(self, windows: int) -> "Reference":
        """Return a copy that keeps the logits of the first windows, for callers that compare with them repeatedly."""
        with torch.no_grad():
            return dataclasses.replace(self, cached_logits=self.head(self.states[:windows]))


@torch.no_grad()
def compute_reference(
    model: Any, windows: Int[Tensor, "windows length"], batch_size: int, track: Track = no_track
) -> Reference:
    """Run the full model once over ``windows`` and keep what its predictions follow from."""
    head = OutputHead(model)
    states = [head.run(batch)[0] for batch in track(_batches(model, windows, batch_size), "full model")]
    return Reference(torch.cat(states), head)


def evaluate(
    model: Any,
    windows: Int[Tensor, "windows length"],
    batch_size: int = BATCH,
    full: Reference | None = None,
    track: Track = no_track,
) -> PerWindow:
    """Compute ``nll`` and ``tokens`` of each window; with ``full`` also ``nll_full``, ``kl`` and ``top1_agreement``.

    Values are means over the predicted tokens of the window.
    """
    return window_means(evaluate_positions(model, windows, batch_size, full, track))


@torch.no_grad()
def evaluate_positions(
    model: Any,
    windows: Int[Tensor, "windows length"],
    batch_size: int = BATCH,
    full: Reference | None = None,
    track: Track = no_track,
) -> PerPosition:
    """Compute ``nll`` at each position but the last; with ``full`` also ``nll_full``, ``kl`` and ``top1_agreement``."""
    rows: dict[str, list[Tensor]] = {}
    predicted = windows.shape[1] - 1
    for batch in track(_batches(model, windows, batch_size), "evaluating"):
        for window, logits in zip(batch, model(input_ids=batch).logits, strict=True):
            number = len(rows.get("nll", ()))
            size = max(LOGITS_AT_ONCE // logits.shape[1], 1)
            parts = []
            for start in range(0, predicted, size):
                positions = slice(start, min(start + size, predicted))
                full_logits = None if full is None else full.logits(number, positions)
                parts.append(_by_position(logits[positions], window[1:][positions], full_logits))
            for name in parts[0]:
                rows.setdefault(name, []).append(torch.cat([part[name] for part in parts]))
    return {name: torch.stack(values) for name, values in rows.items()}


def _batches(
    model: Any, windows: Int[Tensor, "windows length"], batch_size: int
) -> tuple[Int[Tensor, "some length"], ...]:
    """Split windows into batches of ``batch_size``, or smaller ones where their logits would be too many."""
    head = model.get_output_embeddings()
    size = head.out_features if isinstance(head, nn.Linear) else len(head.weight)  # a packed weight would be decoded
    logits = size * windows.shape[1]
    return windows.split(min(batch_size, max(LOGITS_IN_A_BATCH // logits, 1)))


def window_means(positions: PerPosition) -> PerWindow:
    """Return the mean of each value over the positions of a window, and how many these are, as ``tokens``."""
    means = {name: [row.mean().item() for row in values] for name, values in positions.items()}
    windows, predicted = positions["nll"].shape
    return means | {"tokens": [predicted] * windows}


def distribution(
    kl: Float[Tensor, "windows predicted"],
    windows: Int[Tensor, "windows length"],
    calibration: Int[Tensor, "calibration length"] | None,
) -> dict[str, float]:
    """Return median and 99th percentile of the KL at single positions, in nats.

    With the windows of ``calibration`` also ``kl_unseen``, the mean where the model reads or predicts a token that
    does not occur in them, and ``unseen_tokens``, how many positions these are; neither if there are none.
    """
    metrics = {"kl_median": float(kl.median()), "kl_p99": float(kl.flatten().kthvalue(-(-99 * kl.numel() // 100))[0])}
    if calibration is not None:
        unseen = ~torch.isin(windows.cpu(), calibration.cpu())
        at = unseen[:, :-1] | unseen[:, 1:]
        if at.any():
            metrics |= {"kl_unseen": float(kl[at].mean()), "unseen_tokens": float(at.sum())}
    return metrics


def _by_position(
    logits: Float[Tensor, "positions vocabulary"],
    targets: Int[Tensor, " positions"],
    full: Float[Tensor, "positions vocabulary"] | None,
) -> dict[str, Float[Tensor, " positions"]]:
    """Compute the metrics of ``evaluate`` at each position."""
    log_p = logits.float().log_softmax(-1)
    metrics = {"nll": -log_p.gather(1, targets[:, None])}
    if full is not None:
        log_full = full.float().log_softmax(-1)
        metrics["nll_full"] = -log_full.gather(1, targets[:, None])
        metrics["kl"] = functional.kl_div(log_p, log_full, reduction="none", log_target=True).sum(-1)
        metrics["top1_agreement"] = log_p.argmax(-1) == log_full.argmax(-1)
    return {name: values.flatten().cpu().double() for name, values in metrics.items()}


@torch.no_grad()
def continue_greedily(
    model: Any, prompts: Int[Tensor, "windows length"], new_tokens: int, batch_size: int, track: Track = no_track
) -> Int[Tensor, "windows new_tokens"]:
    """Generate ``new_tokens`` tokens after each prompt, always the most likely one."""
    batches = []
    for tokens in track(prompts.split(batch_size), "continuing"):
        cache, generated = None, []
        for _ in range(new_tokens):
            output = model(input_ids=tokens, past_key_values=cache, use_cache=True)
            tokens, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
            generated.append(tokens)
        batches.append(torch.cat(generated, 1))
    return torch.cat(batches)


@contextlib.contextmanager
def without_cache(model: Any) -> Iterator[None]:
    """Let forward passes over whole windows keep no keys, values or states for later tokens, during the context.

    States that modules keep all the same lose their graphs after it.
    """
    config = getattr(model, "config", None)
    parts = [] if config is None else [config, config.get_text_config()]
    caching = [part for part in parts if getattr(part, "use_cache", False)]
    for part in caching:
        part.use_cache = False
    try:
        yield
    finally:
        for part in caching:
            part.use_cache = True
        for module in model.modules():
            for name, value in vars(module).items():
                if isinstance(value, Tensor) and value.grad_fn is not None:
                    setattr(module, name, value.detach())


def without_padding(model: Any, window: Int[Tensor, " length"]) -> Int[Tensor, " tokens"]:
    """Remove the padding of a window; windows of a model that predicts tokens have none and are returned unchanged."""
    pad = getattr(getattr(model, "config", None), "pad_token_id", None)
    if pad is None or model.get_output_embeddings() is not None:
        return window
    return window[window != pad]


def classify(model: Any, windows: Int[Tensor, "windows length"]) -> Any:
    """Return the output of a model for padded windows, with padding hidden by the attention mask."""
    pad = getattr(model.config, "pad_token_id", None)
    if pad is None or not (padding := windows == pad).any():
        return model(input_ids=windows)
    longest = int((~padding).sum(1).max())
    return model(input_ids=windows[:, :longest], attention_mask=(~padding[:, :longest]).long())


def embed(model: Any, windows: Int[Tensor, "windows length"]) -> Float[Tensor, "windows width"]:
    """Return the output of a model without a vocabulary as one vector per window.

    A classifier gives the square roots of its probabilities, an encoder the normalized mean of its last hidden states:
    both have unit length.  A regression model gives its number.
    """
    output = classify(model, windows)
    if "logits" in output:
        logits: Tensor = output.logits.float()
        return logits if logits.shape[1] == 1 else logits.softmax(-1).sqrt()
    return functional.normalize(output.last_hidden_state.float().mean(1), dim=1)


@torch.no_grad()
def embed_all(
    model: Any, windows: Int[Tensor, "windows length"], batch_size: int = BATCH
) -> Float[Tensor, "windows width"]:
    """Compute ``embed`` of all windows, batch by batch; one by one for a model without a token for padding."""
    if getattr(model.config, "pad_token_id", None) is None:  # some classifiers find the last token of each row by it
        batch_size = 1
    return torch.cat([embed(model, batch) for batch in windows.split(batch_size)])


def embedding_distance(full: Float[Tensor, "windows width"], compressed: Float[Tensor, "windows width"]) -> float:
    """Return the mean of 1 − cosine between the embeddings of two models; of numbers, half the squared difference."""
    return float((full - compressed).double().square().sum()) / 2 / len(full)


def projection(model: Any, window: Int[Tensor, " length"], generator: torch.Generator) -> Float[Tensor, ""]:
    """Return √T · v·z with v ~ N(0, I) and z the ``embed`` of the window's T tokens.

    Since 1 − cosine = ½ E[(v·Δz)²], the gradients of this number give a damage per position that adds up to the
    1 − cosine of the window.  For windows of several lengths that is the mean weighted by length.
    """
    tokens = without_padding(model, window)
    embedding = embed(model, tokens.unsqueeze(0))[0]
    direction = torch.randn(len(embedding), generator=generator).to(embedding)
    return math.sqrt(len(tokens)) * (direction @ embedding)


def token_mean(values: Sequence[float], tokens: Sequence[float]) -> float:
    """Return the mean over all tokens, from the means of windows.

    >>> token_mean([1.0, 4.0], [2, 1])
    2.0
    """
    return sum(value * count for value, count in zip(values, tokens, strict=True)) / sum(tokens)


def summarise(windows: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Compute the metrics of a record: means over tokens, and ``nll_delta`` = nll − nll_full."""
    tokens = windows["tokens"]
    names = [name for name in ("nll", "kl", "top1_agreement") if name in windows]
    means = {name: token_mean(windows[name], tokens) for name in names} | {"tokens": sum(tokens)}
    if "nll_full" in windows:
        means["nll_delta"] = means["nll"] - token_mean(windows["nll_full"], tokens)
    return means
