"""Weights & Biases mirrors records; nothing here ever reads from it."""

import os
import pathlib

import matplotlib.figure

from nashswarm import figures
from nashswarm.record import Record

MODES = ("disabled", "offline", "online")
PROJECT = "nashswarm"
INIT_SECONDS = 30


def check(mode: str) -> None:
    """Raises ValueError, before any work, for an unknown mode and for online without a key."""
    if mode not in MODES:
        raise ValueError(f"unknown wandb={mode}: choose one of {', '.join(MODES)}")
    if mode == "online" and not os.environ.get("WANDB_API_KEY"):
        netrc = pathlib.Path.home() / ".netrc"
        if not (netrc.exists() and "wandb" in netrc.read_text()):
            raise ValueError("wandb=online needs a key: run `wandb login`, set WANDB_API_KEY, or use wandb=offline")


def mirror(record: Record, mode: str, folder: pathlib.Path) -> None:
    """Send a finished record: config, summary, the table of layers, and a figure."""
    if mode == "disabled":
        return
    import wandb

    session = wandb.init(
        project=PROJECT,
        group=labels["experiment"],
        name=f"{labels['method']} {labels['model']} {labels['dataset']} {labels['seed']}",
        config=record.config | {"labels": labels, "provenance": record.provenance},
        mode=mode,
        dir=folder,
        settings=wandb.Settings(init_timeout=INIT_SECONDS, silent=True),
    )
    session.summary.update(record.metrics)
    columns = sorted({key for row in record.layers for key in row})
    rows = [[row.get(column) for column in columns] for row in record.layers]
    session.log({"layers": wandb.Table(columns=columns, data=rows)})
    figure: matplotlib.figure.Figure = figures.layer_bits(record)
    session.log({"bits by layer": wandb.Image(figure)})
    session.finish(quiet=True)
