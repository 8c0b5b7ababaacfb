"""Records: one JSON file per finished run, the only source of numbers.

A record is named by its fingerprint, the sha256 of everything that can move a number, and is written atomically:
whoever reads the folder sees whole records or none.  The allocation stands beside it as run-length text, its sha256 in
the record.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from nashswarm.records.files import write_together

SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class Record:
    """What a finished run leaves behind.

    ``labels``: the choices that made it (experiment, method, model, dataset, seed).  ``config``: its identity, all that
    can move a number.  ``metrics``: scalars, named as the protocol names them.  ``series``: per-window values (``nll``
    and ``kl`` in nats per token, ``top1_agreement``, ``tokens``), per-sweep values (``potential``, ``regret``, in nats
    per token; ``_of_reference``: of the game that is solved once for all budgets), values of each trial of the search
    for the budget (``price_of_trial``, nats per token and byte; ``bytes_of_trial``) and per-layer values
    (``layer_kl``).  ``layers``: one row per weight matrix.  ``allocation``: run-length text, one line per layer.
    ``provenance``: commit, versions, machine, start time.
    """

    labels: dict[str, str]
    config: dict[str, Any]
    metrics: dict[str, float]
    series: dict[str, list[float]]
    layers: list[dict[str, Any]]
    allocation: str
    provenance: dict[str, Any]
    schema: int = SCHEMA

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.config)


def fingerprint(config: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits that name a configuration; the order of its keys does not matter.

    >>> fingerprint({"a": 1, "b": 2.0}) == fingerprint({"b": 2.0, "a": 1})
    True
    """
    canonical = json.dumps(config, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def path_of(folder: pathlib.Path, config: Mapping[str, Any]) -> pathlib.Path:
    """Where the record of ``config`` lives."""
    return folder / f"{fingerprint(config)}.json"


def write(folder: pathlib.Path, record: Record) -> pathlib.Path:
    """Write the record, its allocation first, whose sha256 it tells; the path of the record comes back."""
    path = path_of(folder, record.config)
    fields = dataclasses.asdict(record)
    allocation = fields.pop("allocation").encode()
    fields["allocation_sha256"] = hashlib.sha256(allocation).hexdigest()
    content = json.dumps(fields, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_together({path.with_suffix(".txt"): allocation, path: content.encode()})
    return path


def read(path: pathlib.Path) -> Record:
    """The record at ``path``.

    Raises ValueError if it is not a whole record of this schema, or if the allocation beside it is not its own; records
    of older code do not tell which is.
    """
    try:
        fields = json.loads(path.read_text())
        if known := fields["schema"] == SCHEMA:
            allocation = path.with_suffix(".txt").read_bytes()
            told = fields.pop("allocation_sha256", None)
            found = Record(allocation=allocation.decode(), **fields)
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        raise ValueError(f"{path} is not a whole record ({error}); delete it and run again") from error
    if not known:
        raise ValueError(
            f"{path} has schema {fields['schema']}, this version reads schema {SCHEMA}: rerun it with rerun=true"
        )
    if told not in (None, hashlib.sha256(allocation).hexdigest()):
        raise ValueError(f"{path} and the allocation beside it are of two runs: if none writes now, use rerun=true")
    return found


def read_all(folder: pathlib.Path) -> Iterator[Record]:
    """Every record in ``folder`` and below, in the order of their paths."""
    for path in sorted(folder.rglob("[0-9a-f]*.json")):
        yield read(path)
