"""Measure the memory of generation, find the longest text within a limit, and pin weights in memory."""

from typing import Any

import torch
from torch import Tensor

from nashswarm import memory
from nashswarm.packed.matrix import PackedMatrix

TRIES = 4  # lengths to try between one that fits and one that does not


def weight_tensors(model: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors of the packed matrices, and all others that the model holds; shared ones once."""
    matrices = [module for module in model.modules() if isinstance(module, PackedMatrix)]
    packed = [part for matrix in matrices for part in (*tensors(matrix), *matrix.derived())]
    pointers = {part.data_ptr() for part in packed}
    return packed, [part for part in tensors(model) if part.data_ptr() not in pointers]


def tensors(module: Any) -> list[Tensor]:
    """Return all parameters and buffers, shared ones once."""
    return list({part.data_ptr(): part for part in (*module.parameters(), *module.buffers())}.values())


@torch.no_grad()
def token_bytes(model: Any) -> int | None:
    """Return the bytes of keys and values that the cache holds per token, or None for a model without such a cache."""
    cache = getattr(model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=True), "past_key_values", None)
    parts = [getattr(layer, side, None) for layer in getattr(cache, "layers", ()) for side in ("keys", "values")]
    sizes = [part.nbytes for part in parts if isinstance(part, Tensor)]
    return sum(sizes) if parts and len(sizes) == len(parts) else None


def peak_bytes(model: Any, tokens: int) -> int:
    """Measure the peak memory in bytes of this process while the model reads ``tokens`` − 1 tokens and generates one.

    Raises ValueError if the system does not report the peak.
    """
    ids = torch.zeros(1, tokens - 1, dtype=torch.long)
    memory.trim_heap()
    if not memory.reset_peak():
        raise ValueError("this system does not tell how much a process has held: leave out --memory-mb")
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, pad_token_id=0)
    peak = memory.peak_bytes()
    memory.trim_heap()
    return peak


def longest_text(model: Any, limit: int, window: int) -> tuple[int, int]:
    """Find the longest text, ``window`` tokens at most, for which this process stays within ``limit`` bytes.

    Returns the tokens and the peak in bytes.  Lengths are tried, because the peak cannot be computed.  Raises
    ValueError if not even two tokens fit.
    """
    smallest = peak_bytes(model, 2)
    if smallest > limit:
        raise ValueError(
            f"the process holds {1e-6 * smallest:.0f} MB with a text of two tokens, more than the limit of "
            f"{1e-6 * limit:.0f} MB: take a smaller model, or allow more"
        )
    fits, over = (2, smallest), (2, smallest)
    while over[1] <= limit and over[0] < window:  # from below: a longer text could exhaust the machine's memory
        fits, tokens = over, min(2 * over[0], window)
        over = (tokens, peak_bytes(model, tokens))
    if over[1] <= limit:
        return over
    for attempt in range(TRIES):  # by interpolation, then by bisection: memory grows faster than linearly
        share = 0.5 if attempt % 2 else (limit - fits[1]) / (over[1] - fits[1])
        tokens = fits[0] + max(1, int(share * (over[0] - fits[0])))
        if tokens >= over[0]:
            break
        peak = peak_bytes(model, tokens)
        fits, over = ((tokens, peak), over) if peak <= limit else (fits, (tokens, peak))
    return fits


def pin(model: Any) -> int:
    """Lock all weights in memory, so that they are never swapped out, and return their bytes.

    Raises ValueError if the system does not allow it.
    """
    parts = [part for group in weight_tensors(model) for part in group if part.nbytes]
    try:
        for part in parts:
            memory.pin(part.data_ptr(), part.nbytes)
    except OSError as error:
        raise ValueError(
            f"{sum(part.nbytes for part in parts):,} bytes of weights cannot be pinned ({error.strerror}): raise the "
            "limit on locked memory (ulimit -l), or leave out --pin"
        ) from error
    return sum(part.nbytes for part in parts)
