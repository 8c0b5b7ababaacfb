"""Copies of records in Weights & Biases and in a local viewer.  Nothing is ever read back from them.

``python -m experiments.mirror results/records/main --viewer trackio`` copies records that exist.
"""

import argparse
import dataclasses
import importlib.util
import json
import logging
import os
import pathlib
import sys
from collections.abc import Callable

import pandas as pd

from nashswarm.records.record import Record, read
from nashswarm.reporting import frame, page, typeset
from nashswarm.reporting.figures.games import layer_bits

log = logging.getLogger(__name__)
MODES = ("disabled", "offline", "online")
VIEWERS = ("disabled", "trackio")
PROJECT = "nashswarm"
TRACKIO_DIR = "results/trackio"
INIT_SECONDS = 30
TRAINED = (
    "train_loss",
    "train_nll",
    "balance",
    "cache",
    "swarm",
    "nash",
)  # names of series that have one value for each step of training


def check(wandb: str, viewer: str) -> None:
    """Check both settings before any work.

    Raises ValueError for an unknown choice, for ``online`` without a key and for a viewer that is not installed.
    """
    for name, choice, choices in (("wandb", wandb, MODES), ("viewer", viewer, VIEWERS)):
        if choice not in choices:
            raise ValueError(f"unknown {name}={choice}: choose one of {', '.join(choices)}")
    if wandb == "online" and not os.environ.get("WANDB_API_KEY"):
        netrc = pathlib.Path.home() / ".netrc"
        if not (netrc.exists() and "wandb" in netrc.read_text()):
            raise ValueError("wandb=online needs a key: run `wandb login`, set WANDB_API_KEY, or use wandb=offline")
    if viewer == "trackio" and importlib.util.find_spec("trackio") is None:
        raise ValueError("viewer=trackio needs trackio: pip install -e '.[ui]', or leave it out")


def mirror(path: pathlib.Path, wandb: str, viewer: str, folder: pathlib.Path) -> bool:
    """Send the record at ``path`` to W&B, whose files go to ``folder``, and to the viewer; return whether both took it.

    A mirror that fails does not fail the run: a warning says how to mirror the record later.
    """
    sent = True
    for option, mode, send in (("wandb", wandb, to_wandb), ("viewer", viewer, to_trackio)):
        if mode != "disabled":
            sent &= _tried(path, option, mode, folder, send)
    return sent


def _tried(
    path: pathlib.Path, option: str, mode: str, folder: pathlib.Path, send: Callable[[Record, str, pathlib.Path], None]
) -> bool:
    try:
        send(read(path), mode, folder)
    except Exception as error:
        failure = f"{option}={mode} failed ({type(error).__name__}: {error})"
        again = f"python -m experiments.mirror {path} --{option} {mode}"
        log.warning("%s; the record is kept, to mirror it later: %s", failure, again)
        return False
    return True


def name_of(record: Record) -> str:
    """Return the name of a run in the mirrors: method, model, dataset and seed."""
    return " ".join(record.labels[key] for key in ("method", "model", "dataset", "seed"))


def settings_of(record: Record) -> dict[str, object]:
    """Return the config of a run in the mirrors, with labels and provenance."""
    return record.config | {"labels": record.labels, "provenance": record.provenance}


def steps_of(record: Record) -> list[dict[str, float]]:
    """Return the series of a training, one dict for each step."""
    curves = {name: record.series[name] for name in TRAINED if name in record.series}
    return [dict(zip(curves, values, strict=True)) for values in zip(*curves.values(), strict=True)]


def to_wandb(record: Record, mode: str, folder: pathlib.Path) -> None:
    """Send config, metrics, training curves, the table of layers, a figure and the record's files to W&B."""
    import matplotlib.pyplot  # noqa: F401  wandb.Image looks for it
    import wandb

    with wandb.init(
        project=PROJECT,
        group=record.labels["experiment"],
        name=name_of(record),
        config=settings_of(record),
        mode="online" if mode == "online" else "offline",
        dir=folder,
        settings=wandb.Settings(init_timeout=INIT_SECONDS, silent=True),
    ) as session:
        session.summary.update(record.metrics)
        for values in steps_of(record):
            session.log(values)
        if record.layers:
            session.log({"layers": wandb.Table(dataframe=pd.DataFrame(record.layers))})
            session.log({"bits by layer": wandb.Image(layer_bits(record))})
        artifact = wandb.Artifact(f"record-{record.fingerprint}", type="record", metadata=dict(record.labels))
        for name, content in contents(record).items():
            with artifact.new_file(name) as file:
                file.write(content)
        session.log_artifact(artifact)


def to_trackio(record: Record, mode: str, folder: pathlib.Path) -> None:
    """Write config, series and, as the last step, metrics into trackio's database, once for each record.

    The database lies in ``TRACKIO_DIR``.  This does not call ``trackio.init``, which asks the hub for the user's name
    and uploads the run if the environment says so.
    """
    os.environ.setdefault("TRACKIO_DIR", TRACKIO_DIR)  # read when trackio is imported
    from trackio.sqlite_storage import SQLiteStorage

    run = f"{name_of(record)} {record.fingerprint}"
    SQLiteStorage.delete_run(PROJECT, run, run_id=record.fingerprint)  # an earlier measurement of the same run
    about = {"_Group": record.labels["experiment"], "_Created": record.provenance["started"]}
    SQLiteStorage.bulk_log(
        PROJECT, run, [*steps_of(record), record.metrics], config=settings_of(record) | about, run_id=record.fingerprint
    )


def contents(record: Record) -> dict[str, str]:
    """Return the files of a run's artifact by name: numbers, allocation, row of the table, page."""
    fields = dataclasses.asdict(record)
    allocation = fields.pop("allocation")
    return {
        "record.json": json.dumps(fields, indent=1, ensure_ascii=False) + "\n",
        "allocation.txt": allocation,
        "table.md": typeset.markdown(frame.points(frame.frame([record]))),
        "page.html": page.page([record]),
    }


def main() -> None:
    """Mirror records that exist; exit with status 1 if a mirror refused one."""
    parser = argparse.ArgumentParser(prog="python -m experiments.mirror", description="Mirror records that exist.")
    parser.add_argument("records", type=pathlib.Path, nargs="+", help="records, or folders of them")
    parser.add_argument("--wandb", choices=MODES, default="disabled")
    parser.add_argument("--viewer", choices=VIEWERS, default="disabled")
    options = parser.parse_args()
    if options.wandb == options.viewer == "disabled":
        parser.error("give --wandb offline, --wandb online or --viewer trackio")
    try:
        check(options.wandb, options.viewer)
    except ValueError as error:
        sys.exit(str(error))
    paths: list[pathlib.Path] = []
    for path in options.records:
        records = sorted(path.rglob("[0-9a-f]*.json")) if path.is_dir() else [path]
        if not records or not path.exists():
            sys.exit(f"{path} is no record and no folder of records; see results/records")
        paths += records
    folder = pathlib.Path("results/logs/mirror")
    folder.mkdir(parents=True, exist_ok=True)
    sent = [mirror(path, options.wandb, options.viewer, folder) for path in paths]
    print(f"{sum(sent)} of {len(paths)} records mirrored")
    sys.exit(0 if all(sent) else 1)


if __name__ == "__main__":
    main()
