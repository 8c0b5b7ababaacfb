"""Compression by layer at one price: the rates of all tiles of a model that is larger than memory.

Four passes over the blocks, one of them in memory: forward, which keeps the hidden states between blocks; backward,
which keeps the gradients there and the damage that every tile expects; then the price at which all tiles take the bytes
that were asked for; and the codes at these rates, for which the moments of each block are computed a second time.
A step of any pass ends with files that are written whole, and a run that was killed resumes after the last of them.
"""

import dataclasses
import logging
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Int
from torch import Tensor

from nashswarm.methods.streaming import compress, steps, tiles
from nashswarm.methods.streaming.budget import bytes_for_tiles, parameters_of
from nashswarm.methods.streaming.layout import Layout, tiled_layout
from nashswarm.methods.streaming.settings import ByPrice
from nashswarm.methods.streaming.shards import Source
from nashswarm.methods.streaming.skeleton import structure_of, units
from nashswarm.methods.streaming.steps import OUTER, Run
from nashswarm.models import kept
from nashswarm.progress import Track, no_track

FORWARD, BACKWARD, ENCODE = "running blocks forward", "running blocks backward", "encoding block by block"
UNREACHED = "without effect on what the model predicts"
log = logging.getLogger(__name__)


def compress_at_price(
    source: Source,
    tokenizer: Any,
    windows: Int[Tensor, "windows length"],
    out: pathlib.Path,
    settings: ByPrice,
    track: Track = no_track,
) -> dict[str, Any]:
    """Write the compressed model to ``out``, of ``settings.bits`` stored bits per parameter, and return its metrics.

    Raises ValueError and OSError as ``compress.compress`` does, and ValueError if the model is larger even with every
    tile at the lowest rate, or gradients do not pass through a block.
    """
    bytes_for_tiles(source.model, settings, ())
    named = {"method": "nash_swarm"} | dataclasses.asdict(settings) | {"rates": list(settings.rates)}
    state_bytes = 4 * windows.numel() * structure_of(source.model).width
    total = int(settings.bits * parameters_of(source.model) / 8) + 2 * (len(structure_of(source.model).blocks) + 2) * (
        state_bytes
    )

    def left(work: pathlib.Path, about: Mapping[str, Any]) -> int:
        present = sum(path.stat().st_size for path in work.iterdir()) if work.exists() else 0
        return max(total - present, 0)

    def fill(work: pathlib.Path, about: dict[str, Any]) -> Layout:
        return _fill(Run(source, windows, settings, work), about, track)

    key = compress.run_key(source, windows, named)
    return compress.into_folder(out, key, left, fill, source, tokenizer, "nash_swarm, block by block")


def _fill(run: Run, about: dict[str, Any], track: Track) -> Layout:
    """Run all steps that are not done yet, stage by stage, and return what the files hold."""
    blocks, all_units = run.blocks, units(run.source.model)
    numbers = list(range(len(blocks)))
    stages: list[tuple[str, Callable[[Run, int], dict[str, Any]], list[int]]] = [
        (FORWARD, steps.forward, [OUTER, *numbers]),
        (BACKWARD, steps.backward, [len(blocks), *reversed(numbers), OUTER]),
        ("choosing rates", steps.choose_rates, [OUTER]),
        (ENCODE, steps.encode_unit, list(range(len(all_units)))),
    ]
    done = 0
    for description, step, order in stages:
        left = order[max(len(about["units"]) - done, 0) :]
        done += len(order)
        for number in track(left, description) if left else ():
            encoding = step is steps.encode_unit
            unit = all_units[number] if encoding else blocks[number] if number in numbers else all_units[-1]
            with compress.accounted(run.work, about, unit.modules) as facts:
                facts["step"] = description
                facts |= step(run, number)
            if encoding:
                steps.forget(run, unit)
    return _finished_layout(run)


def _finished_layout(run: Run) -> Layout:
    """Return what the files hold, and let the config say which matrices no gradient reached."""
    model, rates = run.source.model, run.read("rates")
    names = [name for unit in units(model) for group in unit.matrices for name in group]
    if unreached := {name: UNREACHED for name in names if name not in rates}:
        setattr(model.config, kept.UNCOMPRESSED, kept.describe_unreached(unreached))
        log.warning("%d matrices: %s, so kept at 16 bits: %s", len(unreached), UNREACHED, ", ".join(unreached))
    sizes = {name: tiles.matrix_bytes(model.get_submodule(name), int(part.sum())) for name, part in rates.items()}
    return tiled_layout(model, sizes)
