"""How much memory a model takes while it writes, how long a text fits within a limit, and weights that stay there."""

from typing import Any

import torch
from torch import Tensor

from nashswarm import memory
from nashswarm.packed.modules import PackedMatrix

TRIES = 4  # of lengths between one that fits and twice it


def weights(model: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors of the packed matrices, and all others that the model holds; shared ones once."""
    matrices = [module for module in model.modules() if isinstance(module, PackedMatrix)]
    packed = [part for matrix in matrices for part in (*tensors(matrix), matrix.tiles.order)]
    known = {part.data_ptr() for part in packed}
    return packed, [part for part in tensors(model) if part.data_ptr() not in known]


def tensors(module: Any) -> list[Tensor]:
    """All parameters and buffers, shared ones once."""
    return list({part.data_ptr(): part for part in (*module.parameters(), *module.buffers())}.values())


@torch.no_grad()
def token_bytes(model: Any) -> int | None:
    """Of the cache, for each token of a text: keys and values of every layer; None for a model without such a cache."""
    cache = getattr(model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=True), "past_key_values", None)
    parts = [getattr(layer, side, None) for layer in getattr(cache, "layers", ()) for side in ("keys", "values")]
    held = [part.nbytes for part in parts if isinstance(part, Tensor)]
    return sum(held) if parts and len(held) == len(parts) else None


def peak(model: Any, tokens: int) -> int:
    """The most bytes that this process held while the model read a text, of so many tokens with the one that it wrote
    then.  Raises ValueError where the system does not tell."""
    ids = torch.zeros(1, tokens - 1, dtype=torch.long)
    memory.trim_heap()
    if not memory.reset_peak():
        raise ValueError("this system does not tell how much a process has held: leave out --memory-mb")
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, pad_token_id=0)
    held = memory.peak_bytes()
    memory.trim_heap()
    return held


def longest(model: Any, limit: int, window: int) -> tuple[int, int]:
    """The longest text, ``window`` tokens at most, with which this process holds no more than ``limit`` bytes, and what
    it holds then; tried, not computed.

    Raises ValueError if not even two tokens fit.
    """
    least = peak(model, 2)
    if least > limit:
        raise ValueError(
            f"the process holds {1e-6 * least:.0f} MB with a text of two tokens, more than the limit of "
            f"{1e-6 * limit:.0f} MB: take a smaller model, or allow more"
        )
    fits, over = (2, least), (2, least)
    while over[1] <= limit and over[0] < window:  # from below: more than the limit may be more than there is
        fits, tokens = over, min(2 * over[0], window)
        over = (tokens, peak(model, tokens))
    if over[1] <= limit:
        return over
    for number in range(TRIES):  # in proportion, then halfway: memory grows faster than texts do
        part = 0.5 if number % 2 else (limit - fits[1]) / (over[1] - fits[1])
        tokens = fits[0] + max(1, int(part * (over[0] - fits[0])))
        if tokens >= over[0]:
            break
        held = peak(model, tokens)
        fits, over = ((tokens, held), over) if held <= limit else (fits, (tokens, held))
    return fits


def pin(model: Any) -> int:
    """Keep all weights in memory, whatever else the machine runs: their bytes.  Raises ValueError if the system does
    not let this process."""
    parts = [part for group in weights(model) for part in group if part.nbytes]
    try:
        for part in parts:
            memory.pin(part.data_ptr(), part.nbytes)
    except OSError as error:
        raise ValueError(
            f"{sum(part.nbytes for part in parts):,} bytes of weights cannot be pinned ({error.strerror}): raise the "
            "limit on locked memory (ulimit -l), or leave out --pin"
        ) from error
    return sum(part.nbytes for part in parts)
