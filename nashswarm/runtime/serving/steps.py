"""Compute the logits of several texts in one pass of a model of transformers, each text with a cache of its own.

Every row of a batch is a text of its own length.  Linear layers take all rows at once, which is where a batch saves
time.  Attention is computed text by text on unpadded keys and values, as if the text were alone.  So a text's tokens do
not depend on which other texts share its steps, and memory is the sum of the texts.
"""

import functools
import inspect
import logging
import sys
import threading
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nashswarm.packed import native_forward
from nashswarm.packed.cache import GrowingLayer, GrowingWindowLayer, growing

USUAL = ("eager", "sdpa")  # attention functions that a batched step calls row by row
BY_ROWS = "_by_rows"  # ends the names of those that do
PROBES = ((1, 2, 3, 4, 5), (3, 1, 2))  # texts that a batched step is tried on
TOLERANCE = 0.1  # of what the context changes: rounded activations turn rounding of sums into more than that of sums
PIECE = 64  # tokens of a prompt that are read at once

log = logging.getLogger(__name__)
_lock = threading.Lock()  # a batched step sets the model's attention function for as long as it runs


@runtime_checkable
class Stepper(Protocol):
    """What an engine needs of a model.  A cache is whatever ``start`` returns; it is freed with its last reference.

    ``piece``: tokens of a prompt that are read at once; others wait for so long.
    """

    piece: int

    def start(self) -> Any:
        """Return the cache of a text without tokens."""

    def read(self, cache: Any, tokens: Sequence[int], every: bool) -> Float[Tensor, "positions vocabulary"]:
        """Append ``tokens`` to a text; return the logits after each of them (``every``), or after the last."""

    def step(self, caches: Sequence[Any], tokens: Sequence[int]) -> Float[Tensor, "texts vocabulary"]:
        """Append one token to each text; return the logits after it."""

    def extend(
        self, caches: Sequence[Any], pieces: Sequence[Sequence[int]]
    ) -> Float[Tensor, "texts vocabulary"] | None:
        """Append a piece to each text in passes that they share; return the logits after each piece.

        Returns None, and appends nothing, if pieces of several tokens take a pass each.  After an error nothing is
        appended either.
        """


class ModuleStepper:
    """Steps of a causal language model of transformers: natively where the library knows it, else on its modules.

    ``batched``: whether one pass computes all texts of a step; otherwise it takes a pass for each.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        names = inspect.signature(type(model).forward).parameters
        self.cuts = "logits_to_keep" in names
        self.held = "past_key_values" if "past_key_values" in names else "cache_params"  # the latter: state spaces
        self.piece = PIECE
        self.batched = "position_ids" in names and _can_batch(self)
        if not self.batched:
            self.piece = sys.maxsize  # some can only begin with many tokens, not go on with them
            log.warning("the layers of %s do not batch texts: steps compute one at a time", type(model).__name__)

    def start(self) -> DynamicCache:
        cache = DynamicCache(config=self.model.config)
        cache.layers = [growing(layer) for layer in cache.layers]
        return cache

    @torch.no_grad()
    def read(self, cache: DynamicCache, tokens: Sequence[int], every: bool) -> Float[Tensor, "positions vocabulary"]:
        keep = {} if every or not self.cuts else {"logits_to_keep": 1}
        ids = torch.tensor([tokens], device=self.model.device)
        with _lock:
            logits = self.model(input_ids=ids, use_cache=True, **{self.held: cache}, **keep).logits[0]
        return logits if every else logits[-1:]

    @torch.no_grad()
    def step(self, caches: Sequence[DynamicCache], tokens: Sequence[int]) -> Float[Tensor, "texts vocabulary"]:
        alone = len(caches) == 1 or not self.batched
        return self.step_alone(caches, tokens) if alone else self.step_batched(caches, tokens)

    @torch.no_grad()
    def extend(
        self, caches: Sequence[DynamicCache], pieces: Sequence[Sequence[int]]
    ) -> Float[Tensor, "texts vocabulary"] | None:
        return native_forward.extend(self.model, caches, pieces) if self.batched else None

    def step_alone(self, caches: Sequence[DynamicCache], tokens: Sequence[int]) -> Float[Tensor, "texts vocabulary"]:
        """Append one token to each text in a pass of its own."""
        return torch.cat([self.read(cache, [token], False) for cache, token in zip(caches, tokens, strict=True)])

    def step_batched(self, caches: Sequence[DynamicCache], tokens: Sequence[int]) -> Float[Tensor, "texts vocabulary"]:
        """Append one token to each text in one pass; right only for models that ``batched`` was found true for."""
        if (logits := native_forward.extend(self.model, caches, [[token] for token in tokens])) is not None:
            return logits
        config, device = self.model.config, self.model.device
        lengths = [cache.get_seq_length() for cache in caches]
        with _lock:
            usual = config._attn_implementation
            config._attn_implementation = usual + BY_ROWS
            try:
                return self.model(
                    input_ids=torch.tensor(tokens, device=device)[:, None],
                    position_ids=torch.tensor(lengths, device=device)[:, None],
                    past_key_values=RowCaches(caches, max(lengths)),
                    use_cache=True,
                ).logits[:, -1]
            finally:
                config._attn_implementation = usual


class RowCaches(Cache):
    """The caches of several texts as one cache, whose row r is the text r."""

    def __init__(self, caches: Sequence[DynamicCache], longest: int) -> None:
        super().__init__(layers=[])
        self.caches, self.longest = caches, longest

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.longest

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append a column to each text; the keys that return carry those of all columns, which have no common shape."""
        columns = zip(self.caches, key_states.split(1), value_states.split(1), strict=True)
        rows = [cache.update(key, value, layer_idx) for cache, key, value in columns]
        key_states.rows = rows  # type: ignore[attr-defined]
        return key_states, value_states


def attend_by_rows(
    usual: str, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **options: Any
) -> tuple[Tensor, None]:
    """Compute attention row by row with the ``usual`` function, each with the keys and values of its own text."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attend: Any = ALL_ATTENTION_FUNCTIONS.get_interface(usual, eager)  # type: ignore[arg-type]
    rows = zip(query.split(1), key.rows, strict=True)  # type: ignore[attr-defined]
    return torch.cat([attend(module, one, *held, None, **options)[0] for one, held in rows]), None


def _can_batch(stepper: ModuleStepper) -> bool:
    """Try a batched step on two short texts: are its logits those of the texts alone?

    Sliding windows are cut by the cache; layers that choose their keys by a mask in another way need that mask.
    """
    try:
        if not all(isinstance(layer, GrowingLayer | GrowingWindowLayer) for layer in stepper.start().layers):
            return False
        if "chunked_attention" in (getattr(stepper.model.config, "layer_types", None) or ()):
            return False
        last = [text[-1] for text in PROBES]
        with torch.no_grad():
            blind = torch.cat([stepper.read(stepper.start(), [token], False) for token in last])
            found = []
            for step in (stepper.step_alone, stepper.step_batched):
                caches = [stepper.start() for _ in PROBES]
                for cache, text in zip(caches, PROBES, strict=True):
                    stepper.read(cache, text[:-1], False)
                found.append(step(caches, last))
    except Exception as error:  # whatever a model of another build raises
        log.debug("a batched step failed", exc_info=error)
        return False
    alone, together = found
    return bool((together - alone).abs().max() <= TOLERANCE * (blind - alone).abs().max())


for name in USUAL:
    ALL_ATTENTION_FUNCTIONS.register(name + BY_ROWS, functools.partial(attend_by_rows, name))
