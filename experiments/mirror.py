"""Weights & Biases mirrors records; nothing here ever reads from it."""

import dataclasses
import json
import os
import pathlib

import pandas as pd

from nashswarm import figures, page, report, typeset
from nashswarm.record import Record

MODES = ("disabled", "offline", "online")
PROJECT = "nashswarm"
INIT_SECONDS = 30
TRAINED = ("train_loss", "train_nll", "balance", "cache", "swarm", "nash")  # series by step of training


def check(mode: str) -> None:
    """Raises ValueError, before any work, for an unknown mode and for online without a key."""
    if mode not in MODES:
        raise ValueError(f"unknown wandb={mode}: choose one of {', '.join(MODES)}")
    if mode == "online" and not os.environ.get("WANDB_API_KEY"):
        netrc = pathlib.Path.home() / ".netrc"
        if not (netrc.exists() and "wandb" in netrc.read_text()):
            raise ValueError("wandb=online needs a key: run `wandb login`, set WANDB_API_KEY, or use wandb=offline")


def mirror(record: Record, mode: str, folder: pathlib.Path) -> None:
    """Send a finished record: config, summary, the table of layers, a figure, and an artifact of its files."""
    if mode == "disabled":
        return
    import matplotlib.pyplot  # noqa: F401  wandb.Image looks for it
    import wandb

    labels = record.labels
    session = wandb.init(
        project=PROJECT,
        group=labels["experiment"],
        name=f"{labels['method']} {labels['model']} {labels['dataset']} {labels['seed']}",
        config=record.config | {"labels": labels, "provenance": record.provenance},
        mode="online" if mode == "online" else "offline",
        dir=folder,
        settings=wandb.Settings(init_timeout=INIT_SECONDS, silent=True),
    )
    session.summary.update(record.metrics)
    curves = {name: record.series[name] for name in TRAINED if name in record.series}
    for values in zip(*curves.values(), strict=True):
        session.log(dict(zip(curves, values, strict=True)))
    if record.layers:
        session.log({"layers": wandb.Table(dataframe=pd.DataFrame(record.layers))})
        session.log({"bits by layer": wandb.Image(figures.layer_bits(record))})
    artifact = wandb.Artifact(f"record-{record.fingerprint}", type="record", metadata=dict(labels))
    for name, content in contents(record).items():
        with artifact.new_file(name) as file:
            file.write(content)
    session.log_artifact(artifact)
    session.finish()


def contents(record: Record) -> dict[str, str]:
    """The files of a run's artifact: its numbers, its allocation, its row of the table, its page."""
    fields = dataclasses.asdict(record)
    allocation = fields.pop("allocation")
    return {
        "record.json": json.dumps(fields, indent=1, ensure_ascii=False) + "\n",
        "allocation.txt": allocation,
        "table.md": typeset.markdown(report.points(report.frame([record]))),
        "page.html": page.page([record]),
    }
