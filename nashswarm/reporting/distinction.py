"""Tell runs apart that share their labels and differ in their model or text, as those of a sweep over its settings."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from nashswarm.records.record import Record
from nashswarm.reporting.frame import flattened
from nashswarm.reporting.labels import CELL

GROUPS = ("model", "dataset")
DIGITS = 8  # of a sha256 in a label


def distinguish(records: Iterable[Record]) -> list[Record]:
    """Return the records, with settings in brackets behind the labels of models and datasets that differ in them.

    Runs that share all labels but the seed are rows of one table only if their models and texts are the same: two
    windows, two lists of excluded matrices, or two folders of one name are two rows.
    """
    labelled = list(records)
    relabelled: dict[int, Record] = {}
    cells: dict[tuple[str | None, ...], list[Record]] = {}
    for run in labelled:
        cells.setdefault(tuple(run.labels.get(label) for label in CELL), []).append(run)
    for runs in cells.values():
        for group in GROUPS:
            settings = [_settings(run.config.get(group)) for run in runs]
            keys = sorted({key for one in settings for key in one if len({other.get(key) for other in settings}) > 1})
            for run, own in zip(runs, settings, strict=True):
                if keys:
                    told = ",".join(f"{key}={own.get(key, 'absent')}" for key in keys)
                    before = relabelled.get(id(run), run)
                    labels = before.labels | {group: f"{before.labels[group]}[{told}]"}
                    relabelled[id(run)] = dataclasses.replace(before, labels=labels)
    return [relabelled.get(id(run), run) for run in labelled]


def _settings(group: Any) -> dict[str, str]:
    """Return the settings of a group as short text, by their dotted keys."""
    if not isinstance(group, Mapping):
        return {}
    return {
        key: re.sub(r"\b[0-9a-f]{64}\b", lambda sha: sha[0][:DIGITS], str(value)) for key, value in flattened(group)
    }
