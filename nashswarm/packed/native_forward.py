"""The native pass as the ``forward`` of a model of transformers.

``natively`` gives a model with trellis-coded matrices a class of the same name, whose ``forward`` computes in the C++
library (``kernels.decoder``) what it knows, and leaves everything else to the modules.  The first time that it leaves
something to them, a warning says why.
"""

import functools
import inspect
import logging
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions, CausalLMOutputWithPast

from nashswarm.kernels import decoder, native
from nashswarm.packed.blocks import Description, UnknownPart
from nashswarm.packed.cache import Shape, append, reserve
from nashswarm.packed.matrix import TrellisMatrix

KNOWN = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "return_dict"}
FIRST = torch.zeros(1, dtype=torch.int64)  # the number of the first text, place or token

log = logging.getLogger(__name__)
_descriptions: "weakref.WeakKeyDictionary[Any, Description]" = weakref.WeakKeyDictionary()
_said: "weakref.WeakKeyDictionary[Any, set[str]]" = weakref.WeakKeyDictionary()


class NativeForward:
    """What ``natively`` adds to the class of a model, which comes after it among the bases."""

    def forward(self, *arguments: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():
            return super().forward(*arguments, **options)  # type: ignore[misc]
        kind: Any = type(self)
        given = dict(zip(_parameters(kind), arguments, strict=False)) | options
        try:
            return _forward(self, {name: value for name, value in given.items() if value is not None})
        except UnknownPart as unknown:
            _say(self, unknown)
        return super().forward(*arguments, **options)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _restored, (plain_class(self),), self.__dict__


def natively(model: Any) -> Any:
    """Let the C++ library compute the passes of a model that generates text and holds trellis-coded matrices."""
    plain: Any = type(model)
    if isinstance(model, NativeForward) or not getattr(plain, "can_generate", bool)():
        return model
    if any(isinstance(module, TrellisMatrix) for module in model.modules()):
        model.__class__ = _class_of(plain)
    return model


def by_modules(model: Any) -> Any:
    """Undo ``natively``."""
    if isinstance(model, NativeForward):
        model.__class__ = plain_class(model)
    return model


def plain_class(model: Any) -> Any:
    """Return the class of transformers that a model has, or had before ``natively``."""
    return type(model).__bases__[1] if isinstance(model, NativeForward) else type(model)


@functools.cache
def _class_of(plain: Any) -> Any:
    names = {name: getattr(plain, name) for name in ("__module__", "__qualname__", "__doc__")}
    made: Any = type(plain.__name__, (NativeForward, plain), names)
    made.forward = functools.wraps(plain.forward)(_unbound())
    return made


def _unbound() -> Any:
    """Return a new function, whose signature can be set."""

    def forward(self: Any, *arguments: Any, **options: Any) -> Any:
        return NativeForward.forward(self, *arguments, **options)

    return forward


def _restored(plain: Any) -> Any:
    made = _class_of(plain)
    return made.__new__(made)


@functools.cache
def _parameters(kind: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def describe(model: Any) -> Description:
    """Describe a model to the library; the description is kept until the model changes.  Raises UnknownPart."""
    known = _descriptions.get(model)
    if known is not None and known.unchanged():
        return known
    found = _descriptions[model] = Description(model)
    return found


def extend(
    model: Any, caches: Sequence[Any], pieces: Sequence[Sequence[int]]
) -> Float[Tensor, "texts vocabulary"] | None:
    """Append a piece, of one token or more, to each of several texts; return the logits after each piece.

    ``caches``: a ``DynamicCache`` for each text.  Texts share passes, and with them the products.  The logits are, bit
    for bit, those of a pass of each text alone.  Returns None where only the modules can compute it.  The caches count
    the new tokens once all passes are done: after an error the texts are what they were.
    """
    if not isinstance(model, NativeForward):
        return None
    try:
        description, activations = _ready(model)
        shape = Shape(1, description.struct.key_heads, description.struct.head_size)
        starts = [cache.get_seq_length() for cache in caches]
        tables = [_reserve(cache, len(piece), shape, description) for cache, piece in zip(caches, pieces, strict=True)]
    except UnknownPart as unknown:
        _say(model, unknown)
        return None
    turns = description.turns_of(max(start + len(piece) for start, piece in zip(starts, pieces, strict=True)))
    rows = []
    for own in _passes([len(piece) for piece in pieces]):
        columns = torch.tensor([
            (token, text, place)
            for text, (start, piece) in enumerate(zip(starts[own], pieces[own], strict=True))
            for place, token in enumerate(piece, start)
        ])  # fmt: skip
        ids, texts, places = columns.T.contiguous()
        tokens = decoder.Tokens(ids, texts, places, torch.zeros_like(texts), places)
        last = torch.tensor([len(piece) for piece in pieces[own]]).cumsum(0) - 1
        rows.append(decoder.forward(description.struct, tokens, torch.cat(tables[own]), turns, last, activations))
    for cache, piece in zip(caches, pieces, strict=True):
        append(cache, len(piece))
    return torch.cat(rows)


def _passes(sizes: Sequence[int]) -> Iterator[slice]:
    """Split texts with so many new tokens into passes: whole texts, since attention rounds a split one differently."""
    first = total = 0
    for number, size in enumerate(sizes):
        if first < number and total + size > decoder.TOKENS:
            yield slice(first, number)
            first, total = number, 0
        total += size
    yield slice(first, len(sizes))


def _say(model: Any, unknown: UnknownPart) -> None:
    """Warn that the modules compute, once for each reason."""
    said = _said.setdefault(model, set())
    if (reason := str(unknown)) and reason not in said:
        said.add(reason)
        log.warning("computed module by module, which is slower: %s", reason)


def _ready(model: Any) -> tuple[Description, str]:
    """Describe a model in a state that the library can compute, and how it rounds activations.  Raises UnknownPart."""
    if native.path() == native.SLOW or model.training:
        raise UnknownPart("")  # which the path has said, and training implies
    description = describe(model)
    if torch.is_grad_enabled() and any(weight.requires_grad for weight in description.weights):
        raise UnknownPart("gradients are wanted; call the model under torch.no_grad() if they are not")
    if description.watch.hooked():
        raise UnknownPart("there are hooks on its modules")
    config = model.config
    if config.output_attentions or config.output_hidden_states or not config.return_dict:
        raise UnknownPart("the config asks for attentions, hidden states or a tuple")
    if len(description.activations) > 1:
        raise UnknownPart("its matrices round their inputs differently")
    (activations,) = description.activations
    return description, activations


def _reserve(cache: Any, tokens: int, shape: Shape, description: Description) -> Tensor:
    """Make room in a cache and return its addresses.  Raises UnknownPart."""
    addresses = reserve(cache, tokens, shape, description.windows)
    if isinstance(addresses, str):
        raise UnknownPart(addresses)
    return addresses


def _forward(model: Any, given: dict[str, Any]) -> Any:
    """Compute a pass.  Raises UnknownPart for whatever only the modules know."""
    description, activations = _ready(model)
    for name, value in given.items():
        if name not in KNOWN and value is not False:
            raise UnknownPart(f"{name} is given")
    ids, keep = given.get("input_ids"), given.get("logits_to_keep", 0)
    if not (type(ids) is Tensor and ids.dim() == 2 and ids.dtype == torch.int64 and ids.is_cpu and ids.numel()):
        raise UnknownPart("the tokens are no matrix of integers on the CPU")
    if not isinstance(keep, int) or given.get("return_dict") is False:
        raise UnknownPart("logits of chosen positions, or a tuple, are asked for")
    cache, (batch, length) = given.get("past_key_values"), ids.shape
    kept = cache is not None or given.get("use_cache", model.config.use_cache)
    if cache is None:
        cache = DynamicCache(config=model.config)
    tokens, positions = _tokens(ids, cache.get_seq_length(), given)
    shape = Shape(batch, description.struct.key_heads, description.struct.head_size)
    addresses = _reserve(cache, length, shape, description)
    last = min(keep, length) if keep else length
    wanted = FIRST
    if batch * length > 1:
        wanted = torch.arange(batch * length).view(batch, length)[:, length - last :].flatten().contiguous()
    turns = description.turns_of(positions)
    logits = decoder.forward(description.struct, tokens, addresses, turns, wanted, activations).view(batch, last, -1)
    append(cache, length)
    output = CausalLMOutputWithPast if description.rotary is not None else CausalLMOutputWithCrossAttentions
    return output(logits=cast(Any, logits), past_key_values=cache if kept else None)


def _tokens(ids: Int64[Tensor, "batch length"], past: int, given: dict[str, Any]) -> tuple[decoder.Tokens, int]:
    """Describe tokens after ``past`` others, and return how many positions they need.

    Raises UnknownPart for masks that hide more than padding on the left.
    """
    batch, length = ids.shape
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    places = torch.tensor([past]) if length == 1 else torch.arange(past, past + length)
    firsts = FIRST.expand(batch) if batch > 1 else FIRST
    if mask is not None:
        if type(mask) is not Tensor or mask.shape != (batch, past + length):
            raise UnknownPart("the attention mask has another shape than the text")
        if not mask.all():
            seen = mask != 0
            firsts = (past + length) - seen.sum(1)
            if not torch.equal(seen, torch.arange(past + length) >= firsts[:, None]):
                raise UnknownPart("the attention mask hides more than padding on the left")
    if positions is None:
        needed = past + length
    elif type(positions) is not Tensor or positions.shape[-1] != length:
        raise UnknownPart("the positions have another shape than the tokens")
    elif mask is None and not torch.equal(positions.expand(batch, length), places.expand(batch, length)):
        raise UnknownPart("the positions do not count the tokens")  # transformers takes these for several texts
    else:
        positions = positions.long().expand(batch, length).reshape(-1).contiguous()
        needed = int(positions.max()) + 1
    if batch * length == 1:
        return decoder.Tokens(ids.view(1), FIRST, places, firsts, places if positions is None else positions), needed
    sequences = torch.arange(batch).repeat_interleave(length)
    firsts, places = firsts.repeat_interleave(length), places.repeat(batch)
    positions = places if positions is None else positions
    return decoder.Tokens(ids.reshape(-1).contiguous(), sequences, places, firsts, positions), needed
