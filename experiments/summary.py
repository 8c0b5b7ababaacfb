"""The end of a sweep: what finished, was skipped, left out or failed, as a table; the exit status says if
anything failed."""

import pathlib
import sys
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from nashswarm.records import record
from nashswarm.reporting import frame, typeset


class Summary(Callback):
    """Hydra callback that reads the jobs' ``outcome.json`` and their records."""

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        outcomes = frame.read_outcomes(pathlib.Path(config.hydra.sweep.dir))
        records = [record.read(pathlib.Path(outcome["record"])) for outcome in outcomes if outcome["record"]]
        typeset.console().print(frame.summary(outcomes, records))
        if any(outcome["status"] == "failed" for outcome in outcomes):
            sys.exit(1)
