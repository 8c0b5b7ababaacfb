"""The stages of a compression run: load, quantize, finetune, measure, and the table of its layers.

``run`` calls them in this order.  ``certify`` and benchmarks load alone: ``reopen`` loads what made a saved model.
"""

import copy
import dataclasses
import functools
import pathlib
import re
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from omegaconf import DictConfig
from torch import Tensor

from nashswarm.calibration.cache import Cache
from nashswarm.calibration.session import CalibrationSession
from nashswarm.calibration.texts import CalibrationText, about
from nashswarm.data import corpus, glue
from nashswarm.experiment.plan import Plan, config_again, plan
from nashswarm.layers import Layer
from nashswarm.measures.measure import EvaluationTarget, Measure, MeasureResult, check
from nashswarm.measures.quality import of_quality
from nashswarm.memory import peak_bytes, trim_heap
from nashswarm.methods import distillation
from nashswarm.methods.method import Compressed, Method
from nashswarm.models import checks, classifier, evaluation, matrices, sources
from nashswarm.models.output_head import OutputHead
from nashswarm.packed import checkpoint
from nashswarm.progress import show_progress
from nashswarm.records.provenance import code_digest

CONSTANT = ("tokens", "unseen_tokens", "examples")  # metrics that no training moves
FINETUNE_STREAM = 1  # of random numbers, so that those of the method stay as they are without it


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A model and its texts, ready to be compressed and measured.

    ``session``: the full model with its calibration and held-out windows.  ``pool``: the windows that both were drawn
    from.  ``test``, ``test_text``: what is measured on.  ``truth``: the labels of test examples, of a task of GLUE.
    ``rng``: random numbers of the method.
    """

    session: CalibrationSession
    tokenizer: Any
    pool: Int[Tensor, "windows length"]
    test: Int[Tensor, "test_windows length"]
    test_text: str
    truth: glue.Truth | None
    cache: Cache
    rng: np.random.Generator
    seed: int

    def reference(self, batch_size: int) -> evaluation.Reference:
        """Compute the full model's last states on the test windows, or read them from the cache."""
        full = self.session.full

        def compute() -> dict[str, Tensor]:
            return {"states": evaluation.compute_reference(full, self.test, batch_size, show_progress).states.cpu()}

        states = self.cache("baseline", {"batch_size": batch_size}, compute)["states"].to(self.test.device)
        return evaluation.Reference(states, OutputHead(full))


def load(config: DictConfig, planned: Plan) -> LoadedRun:
    """Load the model, cut the texts into windows and draw those that calibrate.

    Raises ValueError for a model that cannot be loaded, a text that is too short, or windows that a measure cannot use.
    """
    source, dataset, texts = planned.source, planned.dataset, planned.texts
    rng = np.random.default_rng(config.seed)
    cut, truth = corpus.begun_windows, None
    if isinstance(dataset, glue.Glue):
        cut, truth = glue.example_windows, dataset.truth(texts["test"])
        loaded = classifier.fine_tuned(
            dataset, source, texts["calibration"], planned.device, planned.dtype, pathlib.Path(config.cache)
        )
    else:
        loaded = sources.load(source, planned.device, planned.dtype)
    trim_heap()  # files that were read and converted
    layers = matrices.find_layers(loaded.model, source.exclude)
    length = loaded.window_length(dataset.sequence_length)
    pool, test = (
        cut(texts[purpose], loaded.tokenizer, length, purpose).to(planned.device) for purpose in ("calibration", "test")
    )
    for windows in (pool, test):
        checks.check_tokens(windows, loaded.model, loaded.tokenizer)
    test = corpus.first_windows(test, dataset.test_windows, "test")
    check(planned.measure, test)
    calibration, holdout = corpus.draw_windows(
        pool, dataset.calibration_windows, dataset.holdout_windows, rng, corpus.most_windows(planned.method)
    )
    if isinstance(dataset, CalibrationText):
        loaded.model.config.calibration = about(dataset.source, texts["calibration"], calibration)
    label_seed = int(rng.integers(2**31))
    key = {name: planned.identity[name] for name in ("model", "dataset", "dtype", "device", "threads")}
    key |= {"length": length, "torch": torch.__version__, "code": code_digest()}
    cache = Cache(pathlib.Path(config.cache) if getattr(planned.method, "cache", True) else None, key)
    session = CalibrationSession(
        loaded.model, layers, calibration, holdout, label_seed, cache.with_key({"seed": config.seed})
    )
    return LoadedRun(session, loaded.tokenizer, pool, test, texts["test"], truth, cache, rng, int(config.seed))


def reopen(about: Mapping[str, Any], paths: Mapping[str, str | None]) -> LoadedRun:
    """Load again what made a saved model, from its ``about``, with as many threads as were used then.

    ``paths``: where model and dataset lie today, if elsewhere.  Raises ValueError if either is another one now.
    """
    config = config_again(about, paths)
    torch.set_num_threads(about["record"]["config"]["threads"])
    return load(config, plan(config))


def quantize(loaded: LoadedRun, method: Method) -> tuple[Compressed, dict[str, float]]:
    """Compress the layers: the result, and the seconds and peak bytes of the process that this took."""
    started = time.monotonic()
    result = method.compress(loaded.session.context(), loaded.rng)
    return result, {
        "quantize_seconds": time.monotonic() - started,
        "quantize_peak_bytes": float(peak_bytes()),
    }


def finetune(
    loaded: LoadedRun, result: Compressed, settings: distillation.Recovery, measure: Measure
) -> tuple[Compressed, MeasureResult]:
    """Train the compressed model within its format: the result after it, and metrics and series of the training.

    Size and quality before training are metrics with ``_before`` in their names.
    """
    session = loaded.session
    untouched = copy.deepcopy(session.candidate_model)  # in the precision that candidate weights have
    _, sizes = session.store(result.packed, result.weights, result.float_bits, prices=result.prices)
    metrics = {"bytes_file_before": float(sizes["bytes_file"])}
    for part in of_quality(measure):
        before, _ = part.measure(evaluation_target(loaded, result))
        metrics |= {_before(name): value for name, value in before.items() if name not in CONSTANT}
    session.candidate_model = untouched
    held_out = (loaded.pool[:, None] == session.holdout).all(-1).any(1)
    started = time.monotonic()
    trained = distillation.recover(
        session, result, loaded.pool[~held_out], settings, np.random.default_rng((loaded.seed, FINETUNE_STREAM))
    )
    metrics |= trained.metrics | {"finetune_seconds": time.monotonic() - started}
    return trained.result, (metrics, trained.series)


def evaluation_target(loaded: LoadedRun, result: Compressed) -> EvaluationTarget:
    """Return what is measured: the candidate model, on which ``session.store`` has put the result."""
    session = loaded.session
    compressed, layers = session.candidate_model, session.layers
    names = [name for layer in layers for name in layer.modules]

    def pack() -> Any:
        if result.foreign is not None:
            raise ValueError(f"what {result.foreign} packs does not run here: only measure=quality is for it")
        shared = {id(module.weight): module.weight for module in map(compressed.get_submodule, names)}
        model = copy.deepcopy(compressed, shared)  # whose matrices are replaced, not copied
        checkpoint.adopt(model, layers, result.packed, result.float_bits)
        return model

    return EvaluationTarget(
        session.full, compressed, functools.cache(pack), loaded.test, loaded.reference, show_progress,
        loaded.tokenizer, layers, result.weights, result.damage, loaded.test_text, loaded.truth, session.calibration,
    )  # fmt: skip


def layer_table(layers: tuple[Layer, ...], result: Compressed) -> list[dict[str, Any]]:
    """Return one row per weight matrix: shape, bytes, bits per weight, predicted damage in nats per token."""
    return [
        {
            "name": layer.name,
            "role": layer.role,
            "rows": layer.weight.shape[0],
            "columns": layer.weight.shape[1],
            "parameters": layer.parameters,
            "bytes": len(result.packed[layer.name]),
            "bits_per_weight": 8 * len(result.packed[layer.name]) / layer.parameters,
        }
        | ({"damage": result.damage[layer.name]} if layer.name in result.damage else {})
        for layer in layers
    ]


def _before(name: str) -> str:
    """Return the name of a metric of the model before it was trained.

    >>> _before("kl"), _before("kl_low")
    ('kl_before', 'kl_before_low')
    """
    return re.sub(r"(_low|_high)?$", r"_before\1", name, count=1)
