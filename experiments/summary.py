"""The table at the end of a sweep: which jobs finished, were skipped, were left out or failed."""

import pathlib
import sys
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from nashswarm.records import record
from nashswarm.reporting import frame, typeset


class Summary(Callback):
    """Hydra callback that reads each job's ``outcome.json`` and record.  It exits with status 1 if a job failed."""

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        outcomes = frame.read_outcomes(pathlib.Path(config.hydra.sweep.dir))
        records = [record.read(pathlib.Path(outcome["record"])) for outcome in outcomes if outcome["record"]]
        console = typeset.console()
        console.print(frame.summary(outcomes, records, console.width))
        if any(outcome["status"] == "failed" for outcome in outcomes):
            sys.exit(1)
