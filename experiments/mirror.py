"""Weights & Biases and a local viewer mirror records; nothing here ever reads from them.

``python -m experiments.mirror results/records/main --viewer trackio`` mirrors records that exist.
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
TRAINED = ("train_loss", "train_nll", "balance", "cache", "swarm", "nash")  # series by step of training


def check(wandb: str, viewer: str) -> None:
    """Raises ValueError, before any work, for an unknown choice, online without a key and a viewer that is absent."""
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
    """Send the record at ``path`` to W&B, which writes to ``folder``, and to the viewer.

    Nothing that goes wrong there is an error of the run: a warning says how to mirror later.  Whether all went well.
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
        found = f"{option}={mode} failed ({type(error).__name__}: {error})"
        again = f"python -m experiments.mirror {path} --{option} {mode}"
        log.warning("%s; the record is kept, to mirror it later: %s", found, again)
        return False
    return True


def name_of(record: Record) -> str:
    """What the mirrors call a run."""
    return " ".join(record.labels[key] for key in ("method", "model", "dataset", "seed"))


def settings_of(record: Record) -> dict[str, object]:
    """What the mirrors file a run under."""
    return record.config | {"labels": record.labels, "provenance": record.provenance}


def steps_of(record: Record) -> list[dict[str, float]]:
    """The series by step of training, a row for each step."""
    curves = {name: record.series[name] for name in TRAINED if name in record.series}
    return [dict(zip(curves, values, strict=True)) for values in zip(*curves.values(), strict=True)]


def to_wandb(record: Record, mode: str, folder: pathlib.Path) -> None:
    """Config, summary, the table of layers, a figure, and an artifact of the record's files."""
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
    """Config, series and, as the last step, metrics: into the database of ``TRACKIO_DIR``, once for each record.

    Not by ``trackio.init``, which asks the hub for the user's name and sends the run away if the environment says so.
    """
    os.environ.setdefault("TRACKIO_DIR", TRACKIO_DIR)  # read when trackio is imported
    from trackio.sqlite_storage import SQLiteStorage

    run = f"{name_of(record)} {record.fingerprint}"
    SQLiteStorage.delete_run(PROJECT, run, run_id=record.fingerprint)  # an earlier measurement
    about = {"_Group": record.labels["experiment"], "_Created": record.provenance["started"]}
    SQLiteStorage.bulk_log(
        PROJECT, run, [*steps_of(record), record.metrics], config=settings_of(record) | about, run_id=record.fingerprint
    )


def contents(record: Record) -> dict[str, str]:
    """The files of a run's artifact: its numbers, its allocation, its row of the table, its page."""
    fields = dataclasses.asdict(record)
    allocation = fields.pop("allocation")
    return {
        "record.json": json.dumps(fields, indent=1, ensure_ascii=False) + "\n",
        "allocation.txt": allocation,
        "table.md": typeset.markdown(frame.points(frame.frame([record]))),
        "page.html": page.page([record]),
    }


def main() -> None:
    """Mirror records that exist; the exit status says if any was refused."""
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
    found: list[pathlib.Path] = []
    for given in options.records:
        here = sorted(given.rglob("[0-9a-f]*.json")) if given.is_dir() else [given]
        if not here or not given.exists():
            sys.exit(f"{given} is no record and no folder of records; see results/records")
        found += here
    folder = pathlib.Path("results/logs/mirror")
    folder.mkdir(parents=True, exist_ok=True)
    sent = [mirror(path, options.wandb, options.viewer, folder) for path in found]
    print(f"{sum(sent)} of {len(found)} records mirrored")
    sys.exit(0 if all(sent) else 1)


if __name__ == "__main__":
    main()
