"""The end of a sweep: what finished, was skipped and failed, as a table; the exit status says whether anything
failed."""

import json
import pathlib
import sys
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console

from nashswarm import record, report


class Summary(Callback):
    """Hydra callback that reads the jobs' ``outcome.json`` and their records."""

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        folder = pathlib.Path(config.hydra.sweep.dir)
        outcomes = [json.loads(path.read_text()) for path in sorted(folder.glob("*/outcome.json"))]
        records = [record.read(pathlib.Path(outcome["record"])) for outcome in outcomes if outcome["record"]]
        Console().print(report.summary(outcomes, records))
        if any(outcome["status"] == "failed" for outcome in outcomes):
            sys.exit(1)
