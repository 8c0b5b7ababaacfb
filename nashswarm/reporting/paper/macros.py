"""LaTeX macros of the numbers in records, named by where a number comes from.

A name consists of the experiment (left out for the ablation), the labels that tell its rows apart, the method and the
metric.  Units are those of the tables: megabytes, per cent, nats per token.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from nashswarm.methods.nash_lattice import solver
from nashswarm.quant.grid import TILE_ROWS
from nashswarm.records.record import Record
from nashswarm.reporting import formats, frame, tables, typeset
from nashswarm.reporting.formats import fixed
from nashswarm.reporting.labels import CELL, REFERENCE
from nashswarm.reporting.latex import macro_name, tex

MAIN = "ablation"  # the experiment that macro names leave out
ROUTED = "moe_nash_swarm"  # the method whose records describe the mixtures
FORMATS: Mapping[str, Callable[[float], str]] = formats.FORMATS | {
    "perplexity_full": formats.FORMATS["perplexity"],
    "players": fixed(0),
    "damage_correlation": fixed(2),
    "correlation": fixed(2),
    "kl_times": fixed(1),
    "kl_times_low": fixed(1),
    "kl_times_high": fixed(1),
    **{f"{phase}_ratio{end}": fixed(2) for phase in ("decode", "decode_long", "prefill") for end in ("_low", "_high")},
}
SIZE = {"bytes_file", "bits_per_weight_model"}


def numbers(table: pd.DataFrame, *words: str) -> dict[str, str]:
    """Return a macro for every metric of every method in ``table``, and for the model, text and measure.

    ``words`` begin each name, followed by the model, dataset, measure or circumstance where the rows differ in it.

    Raises ValueError if methods were measured on different windows.
    """
    varying = [
        label
        for label in (*CELL[1:-1], *tables.CIRCUMSTANCES)
        if label in table and table[label].nunique(dropna=False) > 1
    ]
    if varying:
        groups = table.groupby(varying[0], dropna=False, sort=False)
        parts = [numbers(rows, *words, "none" if pd.isna(value) else str(value)) for value, rows in groups]
        return {name: value for part in parts for name, value in part.items()}
    uneven = [name for name in ("tokens", "windows") if name in table and table[name].nunique() > 1]
    if uneven:
        raise ValueError(f"the methods were measured on different {', '.join(uneven)}; measure them on the same text")
    first = table.iloc[0]
    macros = {macro_name(*words, label, "name"): tex(first[label]) for label in ("model", "dataset", "measure")}
    for name in ("tokens", "windows"):
        if name in table:
            macros[macro_name(*words, name, "count")] = tex(typeset.text(first, name))
    sized = table.dropna(subset=sorted(SIZE)) if set(table) >= SIZE else table[:0]
    for _, row in sized[:1].iterrows():
        parameters = 8 * row["bytes_file"] / row["bits_per_weight_model"]
        macros[macro_name(*words, "parameters", "millions")] = fixed(1, 1e-6)(parameters)
    if "seeds" in table:
        macros[macro_name(*words, "seeds", "count")] = FORMATS["seeds"](table["seeds"].max())
    if set(table) >= {"perplexity", "nll_delta"}:
        table = table.assign(perplexity_full=table["perplexity"] * np.exp(-table["nll_delta"]))
    for _, row in table.iterrows():
        for metric, write in FORMATS.items():
            if metric in table and pd.notna(row[metric]):
                macros[macro_name(*words, str(row["method"]), metric)] = tex(write(row[metric]))
    return macros


def of_records(records: Iterable[Record]) -> dict[str, str]:
    """Return the macros of all experiments, of equal bytes, contestants and single layers, and of the settings."""
    runs = [one for one in records if one.labels["experiment"] != "audit"]
    macros = {
        macro_name("significance", "level"): str(typeset.LEVEL),
        macro_name("tolerance", "of", "blocks"): tex(formats.scientific(solver.REGRET)),
        macro_name("block", "rows"): str(TILE_ROWS),
    }
    for experiment in dict.fromkeys(sorted(one.labels["experiment"] for one in runs)):
        words = () if experiment == MAIN else (experiment,)
        here = [one for one in runs if one.labels["experiment"] == experiment]
        special = tables.special_table(here)
        macros |= numbers(special[0] if special else frame.average(frame.frame(here)), *words)
        contestants = tables.speed(here)
        if len(contestants) and experiment != MAIN:
            method = contestants["method"] + " " + contestants["contestant"]
            macros |= numbers(contestants.assign(method=method), experiment)
        for label, layers in tables.layers(here).groupby("method", sort=False):
            macros[macro_name(*words, str(label), "correlation")] = FORMATS["correlation"](correlation(layers))
        macros |= settings(here, *words) | mixtures(here, *words)
    equal = tables.equal_bytes(runs)
    if "kl_ratio" in equal:
        times = {"kl_times": "", "kl_times_low": "_high", "kl_times_high": "_low"}
        equal = equal.assign(**{name: 1 / equal[f"kl_ratio{end}"] for name, end in times.items()})
        for experiment in dict.fromkeys(equal["experiment"]):
            macros |= numbers(equal[equal["experiment"] == experiment], "equal", experiment)
    return macros


def correlation(layers: pd.DataFrame) -> float:
    """Return the correlation of the logarithms of predicted and measured damage, rows of ``tables.layers``."""
    shown = layers[(layers["layer_damage"] > 0) & (layers["layer_kl"] > 0)]
    logs = np.log([shown["layer_damage"].to_numpy(float), shown["layer_kl"].to_numpy(float)])
    return float(np.corrcoef(logs)[0, 1])


def settings(records: Sequence[Record], *words: str) -> dict[str, str]:
    """Return a macro for every number in the config of ``nash_lattice`` and its dataset."""
    macros: dict[str, str] = {}
    for record in records:
        if record.labels["method"] == REFERENCE:
            config = frame.flattened({name: record.config.get(name, {}) for name in ("method", "dataset")})
            for key, value in config:
                if isinstance(value, int | float) and not isinstance(value, bool):
                    macros[macro_name(*words, "setting", *key.split(".")[1:])] = tex(f"{value:g}")
    return macros


def mixtures(records: Iterable[Record], *words: str) -> dict[str, str]:
    """Return macros of every mixture that the game routes.

    They hold its experts, its active parameters in millions, and the tokens it was trained on in millions.
    """
    macros: dict[str, str] = {}
    for record in records:
        if record.labels["method"] == ROUTED and "active_parameters" in record.metrics:
            model, training = record.config["model"], record.config["train_moe"]
            values = {
                "experts": str(model["experts"]),
                "active_millions": fixed(1, 1e-6)(record.metrics["active_parameters"]),
                "trained_millions": fixed(1, 1e-6)(training["steps"] * training["batch_size"] * model["context"]),
            }
            macros |= {macro_name(*words, record.labels["model"], name): value for name, value in values.items()}
    return macros
