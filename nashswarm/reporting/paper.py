"""What the paper quotes: one LaTeX macro for every number of its prose, and tables that fit its columns.

A macro is named by where its number comes from: the experiment (left out for the ablation), what tells its rows apart,
the method, the metric.  Units are those of the tables: megabytes for bytes, per cent for shares, nats per token.
"""

import json
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from nashswarm.methods.nash_swarm import solver
from nashswarm.quant.grid import TILE_ROWS
from nashswarm.records.record import Record
from nashswarm.reporting import frame, tables, typeset
from nashswarm.reporting.typeset import CELL, Column, fixed, tex

MAIN = "ablation"  # the experiment whose macros name no experiment
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ROUTED = "moe_nash_swarm"  # whose records tell what the mixtures are
FORMATS: Mapping[str, Callable[[float], str]] = typeset.FORMATS | {
    "perplexity_full": typeset.FORMATS["perplexity"],
    "players": fixed(0),
    "damage_correlation": fixed(2),
    "correlation": fixed(2),
    "kl_times": fixed(1),
    "kl_times_low": fixed(1),
    "kl_times_high": fixed(1),
    **{f"{phase}_ratio{end}": fixed(2) for phase in ("decode", "decode_long", "prefill") for end in ("_low", "_high")},
}
COLUMNS = tuple(
    column
    for column in typeset.COLUMNS
    if column.metric
    not in {
        "bytes_file_before", "compression", "perplexity", "nll_delta_before", "quantize_seconds", "quantize_peak_bytes",
        "finetune_seconds", "finetune_chosen_step", "bytes_resident", "decode_ratio", "examples",
        *(f"{name}_full" for name in typeset.OFFICIAL),
    }
)  # fmt: skip
ROUTERS = tuple(
    column
    for column in tables.ROUTERS
    if column.metric
    not in {
        "load_cv", "dropped", "resident_hits", "resident_hits_without", "served_tokens_per_second",
        "served_tokens_per_second_without", "looks_ahead", "seeds",
    }
)  # fmt: skip
SIZE = {"bytes_file", "bits_per_weight_model"}
BUDGET = re.compile(r"(.+)\[bits=([\d.]+)\]")


def macro_name(*words: str) -> str:
    """A LaTeX command name: letters only, digits spelled.

    >>> macro_name("uniform4", "top1_agreement")
    'UniformFourTopOneAgreement'
    """
    spelled = re.sub(r"\d", lambda digit: f"_{DIGITS[int(digit[0])]}_", "_".join(words))
    return "".join(part.capitalize() for part in re.split(r"[^A-Za-z]+", spelled))


def commands(values: Mapping[str, str]) -> str:
    r"""``\newcommand`` lines, one a macro."""
    lines = [rf"\newcommand{{\{name}}}{{{value}}}" for name, value in values.items()]
    return "\n".join(["% Written by scripts/tables.py from the records; do not edit.", *lines, ""])


def numbers(table: pd.DataFrame, *words: str) -> dict[str, str]:
    """Every metric of every method, and what they were measured on, by macro; ``words`` begin each name, followed by
    the model, dataset, measure or circumstance where the rows differ in it.

    Raises ValueError if methods were measured on different windows.
    """
    told_apart = [label for label in (*CELL[1:-1], *tables.CIRCUMSTANCES) if label in table]
    varying = [label for label in told_apart if table[label].nunique(dropna=False) > 1]
    if varying:
        parts = table.groupby(varying[0], dropna=False, sort=False)
        named = [numbers(part, *words, "none" if pd.isna(value) else str(value)) for value, part in parts]
        return {name: value for part in named for name, value in part.items()}
    uneven = [name for name in ("tokens", "windows") if name in table and table[name].nunique() > 1]
    if uneven:
        raise ValueError(f"the methods were measured on different {', '.join(uneven)}; measure them on the same text")
    first = table.iloc[0]
    found = {macro_name(*words, label, "name"): tex(first[label]) for label in ("model", "dataset", "measure")}
    for name in ("tokens", "windows"):
        if name in table:
            found[macro_name(*words, name, "count")] = tex(typeset.text(first, name))
    sized = table.dropna(subset=sorted(SIZE)) if set(table) >= SIZE else table[:0]
    for _, row in sized[:1].iterrows():
        count = 8 * row["bytes_file"] / row["bits_per_weight_model"]
        found[macro_name(*words, "parameters", "millions")] = fixed(1, 1e-6)(count)
    if "seeds" in table:
        found[macro_name(*words, "seeds", "count")] = FORMATS["seeds"](table["seeds"].max())
    if set(table) >= {"perplexity", "nll_delta"}:
        table = table.assign(perplexity_full=table["perplexity"] * np.exp(-table["nll_delta"]))
    for _, row in table.iterrows():
        for metric, write in FORMATS.items():
            if metric in table and pd.notna(row[metric]):
                found[macro_name(*words, str(row["method"]), metric)] = tex(write(row[metric]))
    return found


def of_records(records: Iterable[Record]) -> dict[str, str]:
    """The macros of all experiments, of what equal bytes, contestants and single layers say, and of the settings."""
    gathered = [one for one in records if one.labels["experiment"] != "audit"]
    found = {
        macro_name("significance", "level"): str(typeset.LEVEL),
        macro_name("tolerance", "of", "blocks"): tex(typeset.scientific(solver.REGRET)),
        macro_name("block", "rows"): str(TILE_ROWS),
    }
    for experiment in dict.fromkeys(sorted(one.labels["experiment"] for one in gathered)):
        words = () if experiment == MAIN else (experiment,)
        own = [one for one in gathered if one.labels["experiment"] == experiment]
        another = tables.unlike(own)
        found |= numbers(another[0] if another else frame.average(frame.frame(own)), *words)
        contestants = tables.speed(own)
        if len(contestants) and experiment != MAIN:
            method = contestants["method"] + " " + contestants["contestant"]
            found |= numbers(contestants.assign(method=method), experiment)
        for label, layers in tables.layers(own).groupby("method", sort=False):
            found[macro_name(*words, str(label), "correlation")] = FORMATS["correlation"](correlation(layers))
        found |= settings(own, *words) | mixtures(own, *words)
    equal = tables.equal_bytes(gathered)
    if "kl_ratio" in equal:
        times = {"kl_times": "", "kl_times_low": "_high", "kl_times_high": "_low"}
        equal = equal.assign(**{name: 1 / equal[f"kl_ratio{end}"] for name, end in times.items()})
        for experiment in dict.fromkeys(equal["experiment"]):
            found |= numbers(equal[equal["experiment"] == experiment], "equal", experiment)
    return found


def correlation(layers: pd.DataFrame) -> float:
    """Of the logarithms of the predicted and the measured damage of single matrices, rows of ``tables.layers``."""
    shown = layers[(layers["layer_damage"] > 0) & (layers["layer_kl"] > 0)]
    logs = np.log([shown["layer_damage"].to_numpy(float), shown["layer_kl"].to_numpy(float)])
    return float(np.corrcoef(logs)[0, 1])


def settings(records: Sequence[Record], *words: str) -> dict[str, str]:
    """What the whole method was told, as its record says: plain numbers of its config."""
    found: dict[str, str] = {}
    for record in records:
        if record.labels["method"] == typeset.REFERENCE:
            flat = frame.flattened({name: record.config.get(name, {}) for name in ("method", "dataset")})
            for key, value in flat:
                if isinstance(value, int | float) and not isinstance(value, bool):
                    found[macro_name(*words, "setting", *key.split(".")[1:])] = tex(f"{value:g}")
    return found


def mixtures(records: Iterable[Record], *words: str) -> dict[str, str]:
    """Experts, active parameters and tokens of training, both in millions, of every mixture that the game routes."""
    found: dict[str, str] = {}
    for record in records:
        if record.labels["method"] == ROUTED and "active_parameters" in record.metrics:
            model, training = record.config["model"], record.config["train_moe"]
            values = {
                "experts": str(model["experts"]),
                "active_millions": fixed(1, 1e-6)(record.metrics["active_parameters"]),
                "trained_millions": fixed(1, 1e-6)(training["steps"] * training["batch_size"] * model["context"]),
            }
            found |= {macro_name(*words, record.labels["model"], name): value for name, value in values.items()}
    return found


def of_benchmarks(folder: pathlib.Path) -> dict[str, str]:
    """The macros of the benchmarks in ``folder``: the roles of the flock, the code game, the encoder, what is best,
    what was made twice, rotations, sweeps.

    Raises ValueError if one was run from uncommitted code.
    """
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        read = next((read for start, read in BENCHMARKS.items() if path.stem.startswith(start)), None)
        if read is None:
            continue
        if content.get("provenance", {}).get("dirty") is not False:
            raise ValueError(f"{path} comes from uncommitted or unknown code; commit and run its benchmark again")
        found |= read(path.stem, content)
    return found


def _flock(name: str, content: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for row in content["rows"]:
        words = (name, str(row["role"]), str(row["windows"]), str(row["variant"]))
        for metric in ("difference_percent", "low_percent", "high_percent"):
            found[macro_name(*words, metric)] = tex(typeset.signed(1)(row[metric]))
    return found


def _code_game(name: str, content: Mapping[str, Any]) -> dict[str, str]:
    saved = {row["width"]: 1 - row["ratio"] for row in content["errors"]}
    layers = {macro_name(name, "layers"): str(row["layers"]) for row in content["errors"]}
    return layers | {macro_name(name, str(width), "saved"): fixed(1, 100)(part) for width, part in saved.items()}


def _optima(name: str, content: Mapping[str, Any]) -> dict[str, str]:
    size, real = content["at_size"], {(row["players"], row["way"]): row for row in content["real"]}
    players = max(count for count, _ in real)
    found = {
        "size_players": fixed(0)(size["players"]),
        "size_seconds": fixed(0)(size["seconds"]),
        "size_gap": fixed(3)(size["gap_percent"]),
        "players": fixed(0)(players),
        "gap": fixed(3)(real[players, "game with tags"]["gap_percent"]),
        "gap_alone": fixed(3)(real[players, "equilibrium, J = 0"]["gap_percent"]),
        "gap_uniform": fixed(0)(real[players, "uniform, rest by lot"]["gap_percent"]),
    }
    for row in content["anarchy"]:
        found[f"anarchy_{row['align']:g}"] = fixed(3)(row["anarchy"])
        found[f"starts_{row['align']:g}"] = fixed(0)(row["starts"])
        found[f"bytes_{row['align']:g}"] = fixed(0)(row["align"])
        found[f"small_{row['align']:g}"] = fixed(3)(row["small_anarchy_worst"])
        found[f"games_{row['align']:g}"] = fixed(0)(row["small_games"])
    return {macro_name(name, *key.split("_")): tex(value) for key, value in found.items()}


def _rotation(name: str, content: Mapping[str, Any]) -> dict[str, str]:
    rows = pd.DataFrame(content["rows"])
    changed = (rows["kl_turned"] / rows["kl_straight"] - 1).groupby(rows["method"])
    found = {macro_name(name, str(label), "most"): fixed(1, 100)(part.abs().max()) for label, part in changed}
    return found | {macro_name(name, "draws"): str(rows["signs"].nunique())}


def _encoder(name: str, content: Mapping[str, Any]) -> dict[str, str]:
    found = {
        macro_name(name, "correlation", how): fixed(2)(value) for how, value in content["alone"]["correlation"].items()
    }
    for method, own in content["methods"].items():
        values = {"distance": own["distance"], "low": own["interval"][0], "high": own["interval"][1]}
        found |= {macro_name(name, method, end): fixed(4)(value) for end, value in values.items()}
        found[macro_name(name, method, "bits")] = fixed(2)(own["bits_per_weight"])
    return found


def _reproduced(name: str, content: Mapping[str, Any]) -> dict[str, str]:
    runs = content["runs"]
    same = sum(not run["moved"] for run in runs)
    return {macro_name(name, "runs"): str(len(runs)), macro_name(name, "same"): str(same)}


def _sweeps(name: str, content: Mapping[str, Any]) -> dict[str, str]:
    """How many times faster two processes are, and what is added to a run, mirrored or not; the worst round."""
    idle, (alone, together) = content["idle"], content["seconds"].values()
    times = min(np.divide(alone, together))
    added = max(max(np.subtract(idle[f"each, {mirror}"], idle["by hand"])) for mirror in ("disabled", "offline"))
    return {macro_name(name, "times"): fixed(1)(times), macro_name(name, "added"): fixed(1)(added)}


BENCHMARKS: Mapping[str, Callable[[str, Mapping[str, Any]], dict[str, str]]] = {
    "flock_": lambda name, content: {},  # a picture, no numbers
    "flock": _flock,
    "code_game": _code_game,
    "encoder_": _encoder,
    "optima": _optima,
    "reproduced": _reproduced,
    "rotation": _rotation,
    "sweeps": _sweeps,
}


def budgets(means: pd.DataFrame, bits: Sequence[str]) -> str:
    """A LaTeX ``tabular``: one row a method, and for each of its ``bits`` what is stored and its KL to three digits.

    Rows of other methods than ``<method>[bits=<bits>]`` are left out.
    """
    named = means["method"].str.extract(BUDGET)
    columns = (Column("bits/param", "bits_per_weight_model"), Column("KL", "kl"))
    lines = [
        rf"\begin{{tabular}}{{@{{}}l{'rr' * len(bits)}@{{}}}}",
        r"\toprule",
        " & ".join(["", *(rf"\multicolumn{{2}}{{c}}{{told {budget} bits}}" for budget in bits)]) + r" \\",
        " ".join(rf"\cmidrule(lr){{{2 * place + 2}-{2 * place + 3}}}" for place in range(len(bits))),
        " & ".join(["method", *(column.heading for _ in bits for column in columns)]) + r" \\",
        r"\midrule",
    ]
    for method in dict.fromkeys(named[0].dropna()):
        cells = [tex(method)]
        for budget in bits:
            rows = means[(named[0] == method) & (named[1] == budget)]
            for column in columns:
                cells.append(tex(_significant(rows.iloc[0], column.metric) if len(rows) else typeset.MISSING))
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _significant(row: pd.Series, metric: str) -> str:
    """Two decimals of bits, three digits of anything else, and the mark of a difference."""
    value = row[metric]
    if pd.isna(value):
        return typeset.MISSING
    mark = typeset.MARK if row.get(f"{metric}_p", 1.0) <= typeset.LEVEL else ""
    return (format(value, ".2f") if metric.startswith("bits") else format(value, "#.3g").rstrip(".")) + mark
