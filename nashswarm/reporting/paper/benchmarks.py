"""LaTeX macros of the numbers in benchmark reports, one reader a kind of report."""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from nashswarm.reporting.formats import fixed, signed
from nashswarm.reporting.latex import macro_name, tex


def of_benchmarks(folder: pathlib.Path) -> dict[str, str]:
    """Return the macros of all reports in ``folder``; a report of an unknown kind has none.

    Raises ValueError if a benchmark was run from uncommitted or unknown code.
    """
    macros: dict[str, str] = {}
    for path in sorted(folder.glob("*.json")):
        report = json.loads(path.read_text())
        read = next((read for start, read in BENCHMARKS.items() if path.stem.startswith(start)), None)
        if read is None:
            continue
        if report.get("provenance", {}).get("dirty") is not False:
            raise ValueError(f"{path} comes from uncommitted or unknown code; commit and run its benchmark again")
        macros |= read(path.stem, report)
    return macros


def _flock(name: str, report: Mapping[str, Any]) -> dict[str, str]:
    macros = {}
    for row in report["rows"]:
        words = (name, str(row["role"]), str(row["windows"]), str(row["variant"]))
        for metric in ("difference_percent", "low_percent", "high_percent"):
            macros[macro_name(*words, metric)] = tex(signed(1)(row[metric]))
    return macros


def _code_game(name: str, report: Mapping[str, Any]) -> dict[str, str]:
    saved = {row["width"]: 1 - row["ratio"] for row in report["errors"]}
    layers = {macro_name(name, "layers"): str(row["layers"]) for row in report["errors"]}
    return layers | {macro_name(name, str(width), "saved"): fixed(1, 100)(share) for width, share in saved.items()}


def _optima(name: str, report: Mapping[str, Any]) -> dict[str, str]:
    size, real = report["at_size"], {(row["players"], row["way"]): row for row in report["real"]}
    players = max(count for count, _ in real)
    values = {
        "size_players": fixed(0)(size["players"]),
        "size_seconds": fixed(0)(size["seconds"]),
        "size_gap": fixed(3)(size["gap_percent"]),
        "players": fixed(0)(players),
        "gap": fixed(3)(real[players, "game with tags"]["gap_percent"]),
        "gap_alone": fixed(3)(real[players, "equilibrium, J = 0"]["gap_percent"]),
        "gap_uniform": fixed(0)(real[players, "uniform, rest by lot"]["gap_percent"]),
    }
    for row in report["anarchy"]:
        values[f"anarchy_{row['align']:g}"] = fixed(3)(row["anarchy"])
        values[f"starts_{row['align']:g}"] = fixed(0)(row["starts"])
        values[f"bytes_{row['align']:g}"] = fixed(0)(row["align"])
        values[f"small_{row['align']:g}"] = fixed(3)(row["small_anarchy_worst"])
        values[f"games_{row['align']:g}"] = fixed(0)(row["small_games"])
    return {macro_name(name, *key.split("_")): tex(value) for key, value in values.items()}


def _rotation(name: str, report: Mapping[str, Any]) -> dict[str, str]:
    """Return the largest change of KL by a rotation of the weights, in per cent, for each method."""
    rows = pd.DataFrame(report["rows"])
    changes = (rows["kl_turned"] / rows["kl_straight"] - 1).groupby(rows["method"])
    macros = {macro_name(name, str(method), "most"): fixed(1, 100)(part.abs().max()) for method, part in changes}
    return macros | {macro_name(name, "draws"): str(rows["signs"].nunique())}


def _encoder(name: str, report: Mapping[str, Any]) -> dict[str, str]:
    macros = {
        macro_name(name, "correlation", kind): fixed(2)(value) for kind, value in report["alone"]["correlation"].items()
    }
    for method, row in report["methods"].items():
        values = {"distance": row["distance"], "low": row["interval"][0], "high": row["interval"][1]}
        macros |= {macro_name(name, method, end): fixed(4)(value) for end, value in values.items()}
        macros[macro_name(name, method, "bits")] = fixed(2)(row["bits_per_weight"])
    return macros


def _reproduced(name: str, report: Mapping[str, Any]) -> dict[str, str]:
    runs = report["runs"]
    same = sum(not run["moved"] for run in runs)
    return {macro_name(name, "runs"): str(len(runs)), macro_name(name, "same"): str(same)}


def _sweeps(name: str, report: Mapping[str, Any]) -> dict[str, str]:
    """Return the speed-up by two processes, and the seconds that a sweep adds to a run, each of the worst round."""
    idle, (alone, together) = report["idle"], report["seconds"].values()
    times = min(np.divide(alone, together))
    added = max(max(np.subtract(idle[f"each, {mirror}"], idle["by hand"])) for mirror in ("disabled", "offline"))
    return {macro_name(name, "times"): fixed(1)(times), macro_name(name, "added"): fixed(1)(added)}


BENCHMARKS: Mapping[str, Callable[[str, Mapping[str, Any]], dict[str, str]]] = {
    "flock_": lambda name, report: {},  # a picture, no numbers
    "flock": _flock,
    "code_game": _code_game,
    "encoder_": _encoder,
    "optima": _optima,
    "reproduced": _reproduced,
    "rotation": _rotation,
    "sweeps": _sweeps,
}
