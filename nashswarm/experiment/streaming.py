"""Compress a folder that is larger than memory, or tell beforehand what that takes: the option ``--by-layer``."""

import dataclasses
import pathlib
from typing import Any

import numpy as np
import torch
import transformers

from nashswarm.calibration.texts import CalibrationText
from nashswarm.data import corpus
from nashswarm.experiment import streaming_forecast
from nashswarm.methods.streaming import compress, forecast, priced, shards, skeleton
from nashswarm.methods.streaming.settings import ByLayer, ByPrice
from nashswarm.models import shapes, sources
from nashswarm.progress import show_progress


def compress_by_layer(
    model: pathlib.Path,
    out: pathlib.Path,
    text: corpus.StdlibDocs | CalibrationText,
    settings: ByLayer | ByPrice,
    windows: int,
    length: int | None,
    seed: int,
) -> dict[str, Any]:
    """Compress the folder ``model`` into ``out``, one decoder block in memory: its metrics.

    ``settings``: of gptq or of nash_swarm, whose seeds are drawn here, as those of the method on a whole model are.
    Calibrates on so many ``windows`` of ``text``, of ``length`` tokens each (None: the model's maximum).
    Raises ValueError for settings that do not fit the model, and where the memory is too small for one block.
    """
    source = shards.open_source(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    window_length = sources.LoadedModel(source.model, tokenizer).window_length(length)
    pool = corpus.begun_windows(text.text("calibration"), tokenizer, window_length, "calibration")
    rng = np.random.default_rng(seed)
    drawn, _ = corpus.draw_windows(pool, windows, 1, rng)
    try:
        if isinstance(settings, ByLayer):
            return compress.compress(source, tokenizer, drawn, out, settings, show_progress)
        label_seed, seed = (int(rng.integers(2**31)) for _ in range(2))
        seeded = dataclasses.replace(settings, label_seed=label_seed, seed=seed)
        return priced.compress_at_price(source, tokenizer, drawn, out, seeded, show_progress)
    except (MemoryError, RuntimeError) as error:  # torch raises the latter for want of memory
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        raise ValueError(
            "the memory is too small for a block and its statistics; --plan tells what it takes, and what is finished "
            "is kept for the same command elsewhere"
        ) from error


def forecast_by_layer(model: str, settings: ByLayer | ByPrice, windows: int, length: int | None) -> dict[str, Any]:
    """Forecast bytes, seconds and memory of ``compress_by_layer``.

    ``model``: a folder with a config, or a name of ``shapes.LARGE``.  Raises ValueError for anything else.
    """
    if (pathlib.Path(model) / sources.CONFIG).is_file():
        config = transformers.AutoConfig.from_pretrained(model)
    elif model in shapes.LARGE:
        config = transformers.AutoConfig.for_model(**shapes.LARGE[model])
    else:
        raise ValueError(f"{model} holds no {sources.CONFIG}, and no shape is known by that name")
    empty = skeleton.skeleton(config)
    window_length = sources.LoadedModel(empty, None).window_length(length)
    asked = {"model": model, "windows": [windows, window_length], "threads": torch.get_num_threads()}
    if isinstance(settings, ByPrice):
        at_price = streaming_forecast.rates(settings)
        told = streaming_forecast.forecast(empty, settings, windows, window_length, at_price)
        return {"method": "nash_swarm"} | asked | told
    rates = forecast.rates(settings)
    expected = forecast.forecast(empty, settings, windows, window_length, rates)
    return {"method": "gptq"} | asked | dataclasses.asdict(expected) | {"rates": dataclasses.asdict(rates)}
