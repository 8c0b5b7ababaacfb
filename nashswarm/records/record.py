"""Records: one JSON file per finished run, the only source of numbers.

The file name is the record's fingerprint, a sha256 of everything that can change a number.  Records are written
atomically: a reader of the folder sees whole records or none.  The allocation is a second file beside the record, in
run-length text, and the record has its sha256.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from nashswarm.records.files import json_text, write_together

SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class Record:
    """The result of a finished run.

    ``labels``: the choices of the run (experiment, method, model, dataset, measure, seed).  ``config``: its identity,
    everything that can change a number.  ``metrics``: scalars, named as in the protocol.  ``series``: values per window
    (``nll`` and ``kl`` in nats per token, ``top1_agreement``, ``tokens``), values per sweep (``potential`` and
    ``regret`` in nats per token; ``_of_reference``: of the game that is solved once for all budgets), values per trial
    of the search for the budget (``price_of_trial`` in nats per token and byte, ``bytes_of_trial``) and values per
    layer (``layer_kl``).  ``layers``: one row per weight matrix.  ``allocation``: run-length text, one line per layer.
    ``provenance``: commit, versions, machine, start time; ``dequantized_from`` names the types of ggml whose grids the
    weights of the full model lie on, where it came from a quantized file.
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
    """Return sixteen hexadecimal digits that identify a config, whatever the order of its keys.

    >>> fingerprint({"a": 1, "b": 2.0}) == fingerprint({"b": 2.0, "a": 1})
    True
    """
    canonical = json.dumps(config, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def path_of(folder: pathlib.Path, config: Mapping[str, Any]) -> pathlib.Path:
    """Return the path of the record of ``config``."""
    return folder / f"{fingerprint(config)}.json"


def write(folder: pathlib.Path, record: Record) -> pathlib.Path:
    """Write the allocation, then the record with its sha256, and return the path of the record."""
    path = path_of(folder, record.config)
    fields = dataclasses.asdict(record)
    allocation = fields.pop("allocation").encode()
    fields["allocation_sha256"] = hashlib.sha256(allocation).hexdigest()
    content = json_text(fields, allow_nan=False) + "\n"
    write_together({path.with_suffix(".txt"): allocation, path: content.encode()})
    return path


def read(path: pathlib.Path) -> Record:
    """Load the record at ``path``, with the allocation beside it.

    Raises ValueError if it is not a whole record of this schema, or if the allocation is of another run.  Records of
    older code have no sha256 of their allocation, which is not checked then.
    """
    try:
        fields = json.loads(path.read_text())
        if known := fields["schema"] == SCHEMA:
            allocation = path.with_suffix(".txt").read_bytes()
            digest = fields.pop("allocation_sha256", None)
            record = Record(allocation=allocation.decode(), **fields)
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        raise ValueError(f"{path} is not a whole record ({error}); delete it and run again") from error
    if not known:
        raise ValueError(
            f"{path} has schema {fields['schema']}, this version reads schema {SCHEMA}: rerun it with rerun=true"
        )
    if digest not in (None, hashlib.sha256(allocation).hexdigest()):
        raise ValueError(f"{path} and the allocation beside it are of two runs: if none writes now, use rerun=true")
    return record


def read_all(folder: pathlib.Path) -> Iterator[Record]:
    """Load every record in ``folder`` and below, in the order of their paths."""
    for path in sorted(folder.rglob("[0-9a-f]*.json")):
        yield read(path)
