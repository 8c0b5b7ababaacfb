"""The only entry point: ``python -m experiments.run method=nash_lattice model=default``; ``--help`` says more."""

import json
import logging
import os
import pathlib
import sys
import traceback
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from experiments import mirror
from nashswarm.errors import Unsupported
from nashswarm.experiment.run import run
from nashswarm.records import files

log = logging.getLogger(__name__)


def labels_of(config: DictConfig) -> dict[str, str]:
    """Name the run by Hydra's choices, with the overrides of the method and the calibration size in brackets.

    A choice that stands for many is named by what it was given: a folder or a model of the hub by the last part of its
    path, a task of GLUE by its name.  The experiment is the name of the job, which two experiments may share: their
    records stand in one table.
    """
    choices = HydraConfig.get().runtime.choices
    overrides = [
        text.removeprefix("method.") for text in HydraConfig.get().overrides.task if text.startswith("method.")
    ]
    labels = {name: str(choices[name]) for name in ("model", "method", "dataset", "measure")}
    if overrides:
        labels["method"] += f"[{','.join(sorted(overrides))}]"
    sizes = [text for text in HydraConfig.get().overrides.task if text.startswith("dataset.calibration_windows=")]
    for group, choice in (("model", "local"), ("model", "hub"), ("dataset", "local_text")):
        if labels[group] == choice and config[group].path is not None:
            labels[group] = pathlib.Path(config[group].path).name
    if labels["dataset"] == "glue":
        labels["dataset"] = config.dataset.task
    if sizes:
        labels["dataset"] += f"[{sizes[-1].removeprefix('dataset.')}]"
    return labels | {"experiment": HydraConfig.get().job.name}


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(config: DictConfig) -> None:
    """Run one job and write its ``outcome.json``.

    A failed job of a sweep does not stop the others: the summary sets the exit status.  A method that does not support
    the requested size is left out, which is no failure.
    """
    hydra_config = HydraConfig.get()
    folder = pathlib.Path(hydra_config.runtime.output_dir)
    outcome: dict[str, Any] = {
        "status": "failed",
        "labels": {},
        "record": None,
        "message": "stopped before its end",
        "log": str(folder / f"{hydra_config.job.name}.log"),
    }
    outcome["overrides"] = list(hydra_config.overrides.task)
    try:
        if missing := sorted(OmegaConf.missing_keys(config)):
            raise ValueError(f"{' and '.join(missing)} must be given, for example {missing[0]}=...")
        outcome["labels"] = labels_of(config)
        mirror.check(config.wandb, config.viewer)
        ended = run(config, outcome["labels"], many=hydra_config.mode == RunMode.MULTIRUN)
        outcome |= {
            "status": ended.status,
            "record": str(ended.path.resolve()),
            "labels": ended.record.labels,
            "message": "",
        }
        if ended.status == "finished":
            mirror.mirror(ended.path, config.wandb, config.viewer, folder)
        log.info("%s: %s", ended.status, ended.path)
    except Exception as error:
        sentence = str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"
        many = hydra_config.mode == RunMode.MULTIRUN
        left_out = many and isinstance(error, Unsupported)
        outcome |= {"status": "left out" if left_out else "failed", "message": sentence}
        logging.getLogger("nashswarm.traceback").error(traceback.format_exc())
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        log.log(logging.WARNING if left_out else logging.ERROR, "%s", sentence)
        if not many:
            sys.exit(1)
    finally:
        try:
            files.write_whole(folder / "outcome.json", (json.dumps(outcome, indent=1) + "\n").encode())
        except OSError as error:  # such as a full disk: without an outcome the sweep counts the job as failed
            log.error("%s", error)


if __name__ == "__main__":
    main()
