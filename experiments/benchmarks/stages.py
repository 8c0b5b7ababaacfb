"""Seconds and peak memory of every stage of a compression, from loading to the certificate.

    python -m experiments.benchmarks.stages model=local model.path=<folder> dataset=local_text dataset.path=<folder>

The run is that of ``nashswarm compress``: load, calibrate, compress, store, write, and then ``certify``.  Stages of a
method are those of its progress; the same stage again, as in rounds of a game, adds to its row.  Work between stages
counts to the stage before.  Memory is the resident set: the peak of the stage, and what is left at its end.
Calibration is also compared with plain forward and backward passes over a window, of frozen weights and of all.
"""

import argparse
import contextlib
import dataclasses
import datetime
import logging
import pathlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from omegaconf import DictConfig
from torch.nn import functional

from experiments.config import compose
from nashswarm import memory
from nashswarm.calibration.session import CalibrationSession
from nashswarm.experiment import certify, compression, run
from nashswarm.experiment.plan import plan
from nashswarm.packed import model_folder
from nashswarm.progress import show_progress
from nashswarm.records import files
from nashswarm.records.provenance import provenance

PLAIN_WINDOWS = 3


@dataclasses.dataclass
class Stage:
    """What a stage took: seconds by the wall clock and of the processors, bytes resident at its peak and its end."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_bytes: int = 0
    end_bytes: int = 0


class Stages:
    """Stages by name, one of which is under way; the first is that of loading.  ``windows``: of calibration text."""

    def __init__(self) -> None:
        self.by_name: dict[str, Stage] = {}
        self.windows = 0
        self._start("load")

    def begin(self, name: str) -> None:
        """End the stage under way, and begin another."""
        stage = self.by_name.setdefault(self.current, Stage())
        stage.seconds += time.perf_counter() - self.started[0]
        stage.cpu_seconds += time.process_time() - self.started[1]
        stage.peak_bytes = max(stage.peak_bytes, memory.peak_bytes())
        stage.end_bytes = memory.resident_bytes()
        self._start(name)

    def _start(self, name: str) -> None:
        memory.reset_peak()
        self.current, self.started = name, (time.perf_counter(), time.process_time())

    def track(self, items: Sequence[Any], description: str) -> Iterator[Any]:
        """Begin a stage that iterates over items, and show its progress."""
        self.begin(description)
        yield from show_progress(items, description)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="overrides of the configuration, as for experiments.run")
    parser.add_argument("--no-certificate", action="store_true", help="end when the model is written")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/benchmarks/stages"))
    options = parser.parse_args(arguments)
    started = datetime.datetime.now(datetime.UTC)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as place:
        folders = [f"cache={place}/cache", f"records={place}/records", f"save={place}/model"]
        config = compose("wandb=disabled", "measure=size", *folders, *options.overrides)
        stages = measure(config, not options.no_certificate)
    windows = stages.windows
    times = {"windows": windows, "moments": stages.by_name["calibrating"].cpu_seconds / windows} | plain_passes(config)
    rows = [{"stage": name} | dataclasses.asdict(stage) for name, stage in stages.by_name.items()]
    content = {"stages": rows, "calibration": times, "threads": torch.get_num_threads()}
    text = as_table(rows) + "\n" + as_sentence(times)
    files.write_report(options.out, content | {"provenance": provenance(started)}, text)
    print(text)


def measure(config: DictConfig, certified: bool) -> Stages:
    """Compress stage by stage into the folder that ``config`` names, and certify what is in it."""
    stages = Stages()
    with named_stages(stages):
        run.run(config, {"model": config.model._target_, "method": config.method._target_, "dataset": "calibration"})
    if certified:
        stages.begin("certify")
        certify.certify(pathlib.Path(config.save))
    stages.begin("end")
    return stages


@contextlib.contextmanager
def named_stages(stages: Stages) -> Iterator[None]:
    """Let the functions of a run begin stages, during the context."""
    load, store, write = compression.load, CalibrationSession.store, model_folder.write

    def loaded(*arguments: Any) -> Any:
        result = load(*arguments)
        result.session.track, stages.windows = stages.track, len(result.session.calibration)
        stages.begin("prepare")
        return result

    def stored(*arguments: Any, **named: Any) -> Any:
        stages.begin("store")
        return store(*arguments, **named)

    def written(*arguments: Any) -> None:
        stages.begin("write")
        write(*arguments)

    with (
        mock.patch.object(compression, "load", loaded),
        mock.patch.object(CalibrationSession, "store", stored),
        mock.patch.object(model_folder, "write", written),
    ):
        yield


def plain_passes(config: DictConfig) -> dict[str, float]:
    """Return the processor seconds of a forward and backward pass over one window, the least of a few.

    ``frozen``: gradients of activations alone; ``trained``: of all weights too.
    """
    loaded = compression.load(config, plan(config))
    model, seconds = loaded.session.full, {}
    embedded = model.get_input_embeddings().register_forward_hook(lambda *call: call[-1].requires_grad_())
    for name, trained in (("frozen", False), ("trained", True)):
        model.requires_grad_(trained)
        took = []
        for window in loaded.session.calibration[:PLAIN_WINDOWS]:
            started = time.process_time()
            logits = model(input_ids=window[None]).logits[0, :-1]
            functional.cross_entropy(logits.float(), window[1:], reduction="sum").backward()
            took.append(time.process_time() - started)
            model.zero_grad()
        seconds[name] = min(took)
    embedded.remove()
    return seconds


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the stages as a Markdown table."""
    lines = ["| stage | seconds | processor seconds | peak GB | GB at its end |", "| :-- | --: | --: | --: | --: |"]
    for row in rows:
        cells = f"{row['seconds']:.1f} | {row['cpu_seconds']:.1f} | {row['peak_bytes'] / 1e9:.2f}"
        lines.append(f"| {row['stage']} | {cells} | {row['end_bytes'] / 1e9:.2f} |")
    total = [sum(row[name] for row in rows) for name in ("seconds", "cpu_seconds")]
    lines.append(f"| all | {total[0]:.1f} | {total[1]:.1f} | {max(row['peak_bytes'] for row in rows) / 1e9:.2f} | |")
    return "\n".join(lines) + "\n"


def as_sentence(times: dict[str, float]) -> str:
    """Return what calibration took, against plain passes."""
    return (
        f"Processor seconds of a window: {times['moments']:.2f} with moments ({times['windows']} windows); a plain "
        f"forward and backward pass takes {times['frozen']:.2f} with frozen weights, and {times['trained']:.2f} with "
        "gradients of all weights.\n"
    )


if __name__ == "__main__":
    main()
