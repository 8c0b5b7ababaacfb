"""How well a model predicts text, and how far it moved from the full model.

Protocol: consecutive windows that do not overlap, each predicting all its tokens but the first; ``nll`` in nats per
token, perplexity = exp(nll); ``kl`` = mean KL(full ‖ compressed) in nats per token.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from nashswarm.progress import Track, no_track

LOGITS_AT_ONCE = 1 << 23  # compared together: those of a long window and a large vocabulary are as large as a model

PerWindow = dict[str, list[float]]


@dataclasses.dataclass(frozen=True)
class Reference:
    """What the full model says about some windows: the states that its head reads, from which its logits follow.
    ``spoken``: those of the first windows, where they are kept."""

    states: Float[Tensor, "windows length width"]
    head: nn.Module
    spoken: Float[Tensor, "some length vocabulary"] | None = None

    def logits(self, window: int, positions: slice) -> Float[Tensor, "positions vocabulary"]:
        """The full model's logits at some positions of one window."""
        if self.spoken is not None and window < len(self.spoken):
            return self.spoken[window, positions]
        logits: Tensor = self.head(self.states[window, positions])
        return logits

    def spoken_out(self, windows: int) -> "Reference":
        """With the logits of the first windows kept, for those who ask again and again."""
        with torch.no_grad():
            return dataclasses.replace(self, spoken=self.head(self.states[:windows]))


@torch.no_grad()
def reference(
    model: Any, windows: Int[Tensor, "windows length"], batch_size: int, track: Track = no_track
) -> Reference:
    """Run the full model once over ``windows``.

    Raises ValueError if the model's logits are not what its output embeddings make of their input.
    """
    head = model.get_output_embeddings()
    states: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, arguments: states.append(arguments[0].detach()))
    try:
        for batch in track(windows.split(batch_size), "full model"):
            logits = model(input_ids=batch).logits
    finally:
        handle.remove()
    if not torch.allclose(head(states[-1]), logits, atol=1e-3):
        raise ValueError("the logits of this architecture are not its head's output: KL cannot be measured")
    return Reference(torch.cat(states), head)


@torch.no_grad()
def evaluate(
    model: Any,
    windows: Int[Tensor, "windows length"],
    batch_size: int,
    full: Reference | None = None,
    track: Track = no_track,
) -> PerWindow:
    """Per window: ``nll`` and ``tokens``; against ``full`` also ``nll_full``, ``kl`` and ``top1_agreement``."""
    found: PerWindow = {"nll": [], "tokens": []}
    if full is not None:
        found |= {"nll_full": [], "kl": [], "top1_agreement": []}
    last = windows.shape[1] - 1
    for number, batch in enumerate(track(windows.split(batch_size), "evaluating")):
        for offset, (window, logits) in enumerate(zip(batch, model(input_ids=batch).logits, strict=True)):
            size = max(LOGITS_AT_ONCE // logits.shape[1], 1)
            parts = []
            for start in range(0, last, size):
                positions = slice(start, min(start + size, last))
                truth = None if full is None else full.logits(number * batch_size + offset, positions)
                parts.append(_by_position(logits[positions], window[1:][positions], truth))
            found["tokens"].append(last)
            for name in parts[0]:
                found[name].append(torch.cat([part[name] for part in parts]).mean().item())
    return found


def _by_position(
    logits: Float[Tensor, "positions vocabulary"],
    targets: Int[Tensor, " positions"],
    full: Float[Tensor, "positions vocabulary"] | None,
) -> dict[str, Float[Tensor, " positions"]]:
    """What ``evaluate`` finds at each position."""
    log_p = logits.float().log_softmax(-1)
    found = {"nll": -log_p.gather(1, targets[:, None])}
    if full is not None:
        log_full = full.float().log_softmax(-1)
        found["nll_full"] = -log_full.gather(1, targets[:, None])
        found["kl"] = functional.kl_div(log_p, log_full, reduction="none", log_target=True).sum(-1)
        found["top1_agreement"] = log_p.argmax(-1) == log_full.argmax(-1)
    return {name: values.flatten().cpu().double() for name, values in found.items()}


@torch.no_grad()
def continuations(
    model: Any, prompts: Int[Tensor, "windows length"], new_tokens: int, batch_size: int, track: Track = no_track
) -> Int[Tensor, "windows new_tokens"]:
    """What a model writes after each prompt, always its most likely token."""
    found = []
    for tokens in track(prompts.split(batch_size), "continuing"):
        past, written = None, []
        for _ in range(new_tokens):
            answer = model(input_ids=tokens, past_key_values=past, use_cache=True)
            tokens, past = answer.logits[:, -1:].argmax(-1), answer.past_key_values
            written.append(tokens)
        found.append(torch.cat(written, 1))
    return torch.cat(found)


def unpadded(model: Any, window: Int[Tensor, " length"]) -> Int[Tensor, " tokens"]:
    """A window without its padding; of a model that predicts tokens, the window as it is."""
    pad = getattr(model.config, "pad_token_id", None)
    if pad is None or model.get_output_embeddings() is not None:
        return window
    return window[window != pad]


def classify(model: Any, windows: Int[Tensor, "windows length"]) -> Any:
    """What a model makes of windows whose padding it does not see."""
    pad = getattr(model.config, "pad_token_id", None)
    if pad is None or not (padding := windows == pad).any():
        return model(input_ids=windows)
    longest = int((~padding).sum(1).max())
    return model(input_ids=windows[:, :longest], attention_mask=(~padding[:, :longest]).long())


def embed(model: Any, windows: Int[Tensor, "windows length"]) -> Float[Tensor, "windows width"]:
    """The answer of a model without a vocabulary as a vector of unit length: the roots of a classifier's probabilities,
    or the mean over positions of an encoder's last states; of a model that answers with one number, that number."""
    answer = classify(model, windows)
    if "logits" in answer:
        logits: Tensor = answer.logits.float()
        return logits if logits.shape[1] == 1 else logits.softmax(-1).sqrt()
    return functional.normalize(answer.last_hidden_state.float().mean(1), dim=1)


@torch.no_grad()
def embed_all(model: Any, windows: Int[Tensor, "windows length"], batch_size: int) -> Float[Tensor, "windows width"]:
    """What a model without a vocabulary makes of the windows."""
    return torch.cat([embed(model, batch) for batch in windows.split(batch_size)])


def distance(full: Float[Tensor, "windows width"], own: Float[Tensor, "windows width"]) -> float:
    """Mean 1 − cosine of what two models without a vocabulary make of windows; of numbers, half the squared
    difference."""
    return float((full - own).double().square().sum()) / 2 / len(full)


def projection(model: Any, window: Int[Tensor, " length"], generator: torch.Generator) -> Float[Tensor, ""]:
    """√T · v·z with v ~ N(0, I) and z the ``embed`` of the window's T tokens: since 1 − cosine = ½ E[(v·Δz)²], its
    gradients give a damage per position that is the 1 − cosine of the window; of windows of several lengths, their mean
    by length."""
    tokens = unpadded(model, window)
    embedding = embed(model, tokens.unsqueeze(0))[0]
    direction = torch.randn(len(embedding), generator=generator).to(embedding)
    return math.sqrt(len(tokens)) * (direction @ embedding)


def token_mean(values: Sequence[float], tokens: Sequence[float]) -> float:
    """The mean over tokens of per-window means.

    >>> token_mean([1.0, 4.0], [2, 1])
    2.0
    """
    return sum(value * count for value, count in zip(values, tokens, strict=True)) / sum(tokens)


def summarise(windows: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Metrics of the record from per-window values: means over tokens, and ``nll_delta`` against the full model."""
    tokens = windows["tokens"]
    names = [name for name in ("nll", "kl", "top1_agreement") if name in windows]
    means = {name: token_mean(windows[name], tokens) for name in names} | {"tokens": sum(tokens)}
    if "nll_full" in windows:
        means["nll_delta"] = means["nll"] - token_mean(windows["nll_full"], tokens)
    return means
