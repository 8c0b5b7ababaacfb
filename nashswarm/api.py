"""Compress a model that is in memory: ``nashswarm.compress``."""

import copy
import dataclasses
import logging
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from jaxtyping import Integer
from torch import Tensor

from nashswarm import errors
from nashswarm.calibration import texts
from nashswarm.calibration.cache import Cache
from nashswarm.calibration.session import CalibrationSession
from nashswarm.data import corpus, hub
from nashswarm.methods.fixed_width import FixedWidth
from nashswarm.methods.gptq import Gptq
from nashswarm.methods.method import Method
from nashswarm.methods.nash_archive.settings import NashArchive
from nashswarm.methods.nash_lattice.settings import NashLattice
from nashswarm.methods.nash_swarm.settings import Effort, NashSwarm
from nashswarm.methods.uniform import Uniform
from nashswarm.models import architecture, checks, matrices, sources
from nashswarm.models.split_experts import unfuse
from nashswarm.packed import checkpoint
from nashswarm.packed.account import TensorEntry, account, sizes_in

METHODS = {
    "nash_swarm": NashSwarm,
    "nash_lattice": NashLattice,
    "nash_archive": NashArchive,
    "fixed_width": FixedWidth,
    "gptq": Gptq,
    "uniform": Uniform,
}
WITH_EFFORT = tuple(name for name, method in METHODS.items() if hasattr(method, "effort"))
log = logging.getLogger(__name__)
LONGEST_WINDOW = 512  # tokens; longer ones cost memory and teach little more
MOST_BITS = 16  # of a game; those that round to one width know which they have
OPTIONS = {  # what messages call by its key in a configuration
    "method.bits": "bits=",
    "method.effort": "effort=",
    "model.exclude": "exclude=",
    "dataset.source": "calibration=",
    "dataset.path": "calibration=",
    "dataset.sequence_length": "windows of tokens as calibration=",
}
Windows = Integer[Tensor, "windows length"]


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of a model.

    ``bytes_file``: of its checkpoint, tokenizer and model card aside.  ``compression``: the share that is saved of the
    bytes that 32-bit floats take.  ``bits_per_weight``: stored bits of the compressed matrices;
    ``bits_per_weight_model``: of the whole model, per parameter, everything counted.  ``regret_max``: the most that any
    player could still gain by changing alone, in nats per token (None for a method without a game).  ``allocation``:
    one line a layer.  ``metrics``: all else that the method reports.  ``seconds``: all of it took.  ``tensors``: what
    became of every tensor; their parameters add up to the model's, their bytes to ``bytes_file``.
    """

    bytes_file: int
    compression: float
    bits_per_weight: float
    bits_per_weight_model: float
    regret_max: float | None
    allocation: str
    metrics: Mapping[str, float]
    seconds: float
    tensors: tuple[TensorEntry, ...] = dataclasses.field(repr=False)


def compress(
    model: transformers.PreTrainedModel,
    tokenizer: Any = None,
    method: str | Method = "nash_swarm",
    calibration: str | pathlib.Path | Windows | Mapping[str, Windows] | None = None,
    bits: float = 3.0,
    exclude: Sequence[str] = (),
    seed: int = 0,
    effort: Effort = "default",
) -> tuple[Any, Report]:
    """Return a compressed copy of ``model`` that computes on packed weights, and a report of it.

    The model itself stays as it is.  On a CPU the copy computes in float32, where kernels and blocks are
    fastest, elsewhere in the model's dtype; ``.to(dtype)`` changes it, and ``save_pretrained`` keeps it.

    ``tokenizer``: by default the one that the model came with.  ``method``: ``nash_swarm``, ``nash_lattice``,
    ``nash_archive``, ``fixed_width``, ``gptq``, ``uniform``, or an instance of any method, which then has its own
    ``bits``.
    ``calibration``: text, a path of a text file or folder, token windows, or the name of a source (``embedded``,
    ``code``, ``own``, ``hub``, or several joined by ``+``); by default the hub's text if it can be reached, else text
    that the model samples itself, with the embedded one in both cases (``calibration.texts``).  Padded windows are a
    mapping of ``input_ids`` and ``attention_mask``, as tokenizers return it; a model that predicts tokens then reads
    the real tokens joined, in windows as long as the longest row.  ``bits``: stored bits
    per parameter of the whole model (for ``gptq`` and ``uniform`` the nominal width).  ``exclude``: names or patterns
    of matrices to leave at 16 bits.  ``effort``: of ``nash_swarm``, ``quick`` for a single pass without a game,
    ``best`` for four times as many windows, where the text has them; of ``nash_lattice``, ``best`` for settings that
    held-out text selects.

    Raises ValueError in one sentence for anything that does not fit together.
    """
    with errors.in_words_of(OPTIONS), checks.plain_torch():
        return _compress(model, tokenizer, method_of(method, bits, effort), calibration, exclude, seed)


def _compress(
    model: Any, tokenizer: Any, chosen: Method, calibration: Any, exclude: Sequence[str], seed: int
) -> tuple[Any, Report]:
    started = time.monotonic()
    if not isinstance(model, transformers.PreTrainedModel):
        raise ValueError(
            f"nashswarm compresses models of transformers, not a {type(model).__name__}; of a PeftModel, what "
            "merge_and_unload() returns"
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("the model is quantized already; call model.dequantize() first or start from the full model")
    checks.check_model(model)
    architecture.check(type(model), model.config)
    architecture.check_embedding(model)
    windows, about = _windows(model, tokenizer, calibration)
    rng = np.random.default_rng(seed)
    drawn = corpus.draw_windows(windows.to(model.device), None, None, rng, corpus.most_windows(chosen))
    if model.device.type == "cpu" and model.dtype != torch.float32:
        log.warning("the compressed copy computes in float32 on a CPU; .to(%s) turns it back", model.dtype)
    full = copy.deepcopy(model).float().eval()
    if about is not None:
        full.config.calibration = texts.about(*about, drawn[0])
    unfuse(full)
    layers = matrices.find_layers(full, exclude)
    session = CalibrationSession(full, layers, *drawn, int(rng.integers(2**31)), Cache(None, {}))
    result = chosen.compress(session.context(), rng)
    compressed = session.candidate_model
    if model.device.type != "cpu":
        compressed.to(model.dtype)
    files, sizes = session.store(result.packed, result.weights, result.float_bits, prices=result.prices)
    checkpoint.adopt(compressed, session.layers, result.packed, result.float_bits)
    return compressed, Report(
        bytes_file=int(sizes["bytes_file"]),
        compression=sizes["compression"],
        bits_per_weight=sizes["bits_per_weight"],
        bits_per_weight_model=sizes["bits_per_weight_model"],
        regret_max=result.metrics.get("regret_max"),
        allocation=result.allocation,
        metrics=dict(result.metrics),
        seconds=time.monotonic() - started,
        tensors=account(compressed, sizes_in(files[sources.WEIGHTS]), int(sizes["bytes_file"])),
    )


def method_of(method: str | Method, bits: Any, effort: Effort = "default") -> Method:
    """Return the method of that name at ``bits``; an instance of a method is returned as it is.

    Raises ValueError for an unknown name, and for an effort of a method that has none.
    """
    if effort != "default" and method not in WITH_EFFORT:
        raise ValueError(f"the effort {effort} is of {' and '.join(WITH_EFFORT)}, given by name: leave the effort out")
    if not isinstance(method, str):
        return method
    if isinstance(bits, bool) or not isinstance(bits, int | float):
        raise ValueError(f"method.bits={bits!r} is no number")
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: choose {', '.join(METHODS)}, or give a method's value")
    whole = method in ("gptq", "uniform")
    if whole and not float(bits).is_integer():
        raise ValueError(f"method.bits={bits}: {method} gives every weight the same whole number of bits")
    if not whole and not 0 < bits <= MOST_BITS:
        raise ValueError(f"method.bits={bits} must be above 0 and at most {MOST_BITS}, as many as the full model has")
    settings = {"effort": effort} if method in WITH_EFFORT else {}
    return METHODS[method](bits=int(bits) if whole else bits, **settings)


def window_length(path: str) -> int | None:
    """Return the tokens of a calibration window for the model at ``path``: its maximum, ``LONGEST_WINDOW`` at most.

    None if its config cannot be read; whoever loads the model then says why.
    """
    if not pathlib.Path(path).exists():
        if not sources.may_be_on_hub(path):
            return None
        hub.use_cache_if_unreachable()
    try:
        longest = sources.max_tokens(sources.read_config(path))
    except (OSError, ValueError):
        return None
    return min(longest or LONGEST_WINDOW, LONGEST_WINDOW)


def _windows(model: Any, tokenizer: Any, calibration: Any) -> tuple[Windows, tuple[str, str] | None]:
    """Token windows to calibrate with, and the source and text that they were cut from, if there is one."""
    if isinstance(calibration, Mapping):
        if missing := {"input_ids", "attention_mask"} - set(calibration):
            raise ValueError(f"calibration lacks {' and '.join(sorted(missing))}, which padded windows have")
        calibration = _without_padding(calibration["input_ids"], calibration["attention_mask"], model)
    if isinstance(calibration, Tensor):
        _check(calibration, model, tokenizer)
        return calibration, None
    if not isinstance(calibration, str | pathlib.Path | None):
        raise ValueError(f"calibration must be text or token windows, not a {type(calibration).__name__}")
    if tokenizer is None:
        if not model.name_or_path:
            raise ValueError("the model does not say where it comes from: give its tokenizer, or token windows")
        tokenizer = transformers.AutoTokenizer.from_pretrained(model.name_or_path)
    longest = sources.LoadedModel(model, tokenizer).window_length(None)
    source, text = _text(model, tokenizer, calibration)
    windows = corpus.begun_windows(text, tokenizer, min(longest, LONGEST_WINDOW), "calibration")
    checks.check_tokens(windows, model, tokenizer)
    return windows, (source, text)


def _without_padding(tokens: Any, mask: Any, model: Any) -> Windows:
    """Return padded windows without their padding, or with it on the right where the model reads one text at a time.

    Raises ValueError for a mask that does not fit the tokens, and for a model that needs padding but names none.
    """
    if not isinstance(tokens, Tensor) or not isinstance(mask, Tensor) or tokens.ndim != 2 or mask.shape != tokens.shape:
        raise ValueError("calibration: input_ids and attention_mask must be tensors of one shape (windows, length)")
    real = mask.bool()
    if real.all():
        return tokens
    lengths = real.sum(1).tolist()
    if model.get_output_embeddings() is not None:
        joined, width = tokens[real], max(lengths)
        return joined[: len(joined) // width * width].view(-1, width) if width else tokens[:0]
    pad = getattr(model.config, "pad_token_id", None)
    if pad is None:
        raise ValueError("the model's config names no pad_token_id: set it, or give windows without padding")
    rows = [row[kept] for row, kept in zip(tokens, real, strict=True) if kept.any()]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)


def _text(model: Any, tokenizer: Any, calibration: str | pathlib.Path | None) -> tuple[str, str]:
    """Name of the source of a calibration text, and the text."""
    if isinstance(calibration, str) and not set(texts.parts_of(calibration)) <= set(texts.KNOWN):
        return "text", texts.excerpt(calibration, texts.FILE_BYTES)
    own = None
    if model.get_output_embeddings() is not None and model.can_generate():
        own = texts.own_of(model, tokenizer)
    default = "embedded" if sources.is_own(model.name_or_path) else texts.AUTO
    asked = default if calibration is None else str(calibration)
    source = texts.resolve(texts.checked(asked, "calibration="), own is not None)
    texts.announce(source, asked, "calibration=")
    return source, texts.read(source, own)


def _check(windows: Tensor, model: Any, tokenizer: Any) -> None:
    """Raises ValueError unless the model can read these windows, and one of them can be held out."""
    if windows.ndim != 2 or windows.is_floating_point() or len(windows) < 2:
        raise ValueError(
            f"calibration must be token ids of shape (windows, length) with at least 2 windows, not "
            f"{tuple(windows.shape)} of {windows.dtype}"
        )
    if windows.shape[1] < 2:
        raise ValueError("a window needs at least 2 tokens, the second to be predicted from the first")
    longest = architecture.max_window(model)
    if longest is not None and windows.shape[1] > longest:
        raise ValueError(f"windows of {windows.shape[1]} tokens are longer than the model's maximum of {longest}")
    checks.check_tokens(windows, model, tokenizer)
