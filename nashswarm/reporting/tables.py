"""Tables beside the main one: methods at equal bytes, contestants of speed, layers, routers of experts, servers."""

import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from nashswarm.records import statistics
from nashswarm.records.record import Record
from nashswarm.reporting.balance import BALANCE, balance
from nashswarm.reporting.frame import by_cell, circumstances, mean_of_all, ordered, origin, paired
from nashswarm.reporting.labels import CELL, ORIGIN, REFERENCE
from nashswarm.reporting.typeset import Column

EQUAL_BYTES = (
    Column("MB", "bytes_file"),
    Column("KL (nats)", "kl"),
    Column("nash_lattice's KL at these bytes", "kl_at_bytes"),
    Column("nash_lattice's ÷ the method's", "kl_ratio"),
)
SPEED = (
    Column("MB in memory", "bytes_resident"),
    Column("decode ms", "decode_ms"),
    Column("× decode", "decode_ratio"),
    Column("× decode after the prompt", "decode_long_ratio"),
    Column("× prefill", "prefill_ratio"),
    Column("KL", "kl"),
)
LAYERS = (
    Column("weights", "parameters"),
    Column("bits/weight", "bits_per_weight"),
    Column("predicted damage (nats)", "layer_damage"),
    Column("KL alone (nats)", "layer_kl"),
    Column("ΔNLL alone (nats)", "layer_nll_delta"),
)
ROUTERS = (
    Column("NLL (nats)", "nll"),
    Column("± over seeds", "nll_spread"),
    Column("less top-k's NLL", "nll_to_top_k"),
    Column("its ± over seeds", "nll_to_top_k_spread"),
    Column("MaxVio", "max_violation"),
    Column("MaxVio, prices following", "max_violation_following"),
    Column("NLL then", "nll_following"),
    Column("Gini", "load_gini"),
    Column("CV", "load_cv"),
    Column("dead experts", "dead_experts"),
    Column("dropped %", "dropped"),
    Column("resident hits %", "resident_hits"),
    Column("without the term %", "resident_hits_without"),
    Column("tokens/s from the store", "served_tokens_per_second"),
    Column("without the term", "served_tokens_per_second_without"),
    Column("µs/token", "token_microseconds"),
    Column("router µs/token", "router_microseconds"),
    Column("looks ahead", "looks_ahead"),
    Column("seeds", "seeds"),
)
VALIDATION = (
    Column("MB as floats", "bytes_memory"),
    Column("MB of the file", "bytes_file"),
    Column("MB as it runs", "bytes_resident"),
    Column("loss (nats)", "nll"),
    Column("loss compressed", "nll_quantized"),
    Column("ms/batch", "latency_ms"),
    Column("compressed ms", "latency_ms_quantized"),
    Column("tokens/s", "tokens_per_second"),
    Column("compressed tokens/s", "tokens_per_second_quantized"),
    Column("seeds", "seeds"),
)
ROUTING = (
    Column("experts", "experts"),
    Column("top-k µs/token", "route_plain"),
    Column("flock", "route_flock"),
    Column("leaders", "route_leaders"),
    Column("first version", "route_first"),
    Column("scores %", "share_scores"),
    Column("choice, gates %", "share_choice"),
    Column("layer ÷ dense, one token", "layer_ratio_alone"),
    Column("all tokens", "layer_ratio_all"),
)
CIRCUMSTANCES = ("experts", "clients", "rate")  # a method has a row for each
SERVING = (
    Column("clients", "clients"),
    Column("requests", "requests"),
    Column("due per second", "rate"),
    *(
        Column(f"{heading}{whose}", f"latency_p{level}_ms{suffix}")
        for level, heading in ((50, "P50 ms"), (95, "P95"), (99, "P99"))
        for suffix, whose in (("_full", ", full"), ("", ""))
    ),
    Column("full P95 ÷ P95", "latency_p95_ratio"),
    Column("tokens/s, full", "tokens_per_second_full"),
    Column("tokens/s", "tokens_per_second"),
    Column("shed %", "shed_rate"),
    Column("errors %", "error_rate"),
    Column("memory moved %, full", "resident_spread_full"),
    Column("memory moved %", "resident_spread"),
)


def equal_bytes(records: Iterable[Record]) -> pd.DataFrame:
    """Compare the KL of each method with that of ``nash_lattice`` at the same file size.

    ``kl_at_bytes`` is the KL of ``nash_lattice`` at the method's bytes, interpolated window by window on the line of
    log KL over log bytes; ``kl_ratio`` is that KL over the method's, with its paired 95 % interval.

    The sizes of ``nash_lattice`` come from all experiments with the same model, calibration and test text whose runs
    have at least the method's windows; seeds are averaged first.  A method whose bytes lie outside these sizes has no
    ratio, and one that meets fewer than two sizes has no row.
    """
    runs = list(records)
    curve = [one for one in runs if re.fullmatch(rf"{REFERENCE}(\[bits=[^,]*\])?", one.labels["method"])]
    rows = []
    for labels, seeds in by_cell(runs).items():
        if labels[-1].startswith(REFERENCE) or any("kl" not in one.series for one in seeds):
            continue
        windows = len(seeds[0].series["kl"])
        steps: dict[str, list[Record]] = {}
        for one in curve:
            if circumstances(one) == circumstances(seeds[0]) and len(one.series.get("kl", [])) >= windows:
                config = json.dumps(one.config["method"], sort_keys=True)
                steps.setdefault(config, []).append(_first_windows(one, windows))
        if len(steps) < 2:
            continue
        pairs = [paired(seeds, step, "kl") for step in steps.values()]
        kl, size = pairs[0][0], float(np.mean([one.metrics["bytes_file"] for one in seeds]))
        sizes = [float(np.mean([one.metrics["bytes_file"] for one in step])) for step in steps.values()]
        row = dict(zip(CELL, labels, strict=True)) | {"bytes_file": size, "kl": kl.mean()}
        row |= origin([*seeds, *(one for step in steps.values() for one in step)])
        row["kl_low"], row["kl_high"] = statistics.interval(kl.tolist())
        if min(sizes) <= size <= max(sizes) and kl.mean() > 0:
            reference_kl = statistics.at_bytes(sizes, np.array([other for _, other in pairs]), size)
            row["kl_at_bytes"] = reference_kl.mean()
            ratio = statistics.ratio(reference_kl.tolist(), kl.tolist())
            row["kl_ratio"], row["kl_ratio_low"], row["kl_ratio_high"] = ratio
        rows.append(row)
    return ordered(pd.DataFrame(rows)) if rows else pd.DataFrame(columns=CELL)


def _first_windows(record: Record, windows: int) -> Record:
    """Return the record with ``kl`` and ``tokens`` of its first windows alone."""
    series = {name: values[:windows] for name, values in record.series.items() if name in ("kl", "tokens")}
    return dataclasses.replace(record, series=series)


def speed(records: Iterable[Record]) -> pd.DataFrame:
    """Return one row per method and contestant of the records with ``measure=speed``.

    Contestants are the full model, the packed one with either kind of activations, and the models of other libraries
    timed beside them.  Ratios are the full model's time over the contestant's.
    """
    rows = []
    for record in records:
        names = [name.removeprefix("decode_ms_") for name in record.series if name.startswith("decode_ms_")]
        for name in names if record.labels["measure"] == "speed" else ():
            suffix = "" if name == "int8" else f"_{name}"
            keys = {metric: f"{metric}{suffix}" for metric in ("bytes_resident", "decode_ms")} | {"kl": f"kl_{name}"}
            for phase in ("decode", "decode_long", "prefill"):
                keys |= {f"{phase}_ratio{end}": f"{phase}_ratio{suffix}{end}" for end in ("", "_low", "_high")}
            metrics = {metric: record.metrics.get(key, np.nan) for metric, key in keys.items()}
            labels = {label: record.labels[label] for label in CELL} | {"threads": record.config.get("threads")}
            rows.append(labels | {"contestant": name} | metrics | origin([record]))
    return pd.DataFrame(rows)


def layers(records: Iterable[Record]) -> pd.DataFrame:
    """Return one row per method and weight matrix of the records with ``measure=layers``, seeds averaged.

    ``layer_damage`` is the predicted and ``layer_kl`` the measured KL of compressing that matrix alone, nats per token.
    """
    rows = [
        {label: record.labels[label] for label in CELL}
        | {"layer": layer["name"], "parameters": layer["parameters"], "bits_per_weight": layer["bits_per_weight"]}
        | {"layer_damage": layer.get("damage")}
        | {name: values[place] for name, values in record.series.items() if name.startswith("layer_")}
        | origin([record])
        for record in records
        if "layer_kl" in record.series
        for place, layer in enumerate(record.layers)
    ]
    if not rows:
        return pd.DataFrame(columns=[*CELL, "layer"])
    table = pd.DataFrame(rows)
    aggregations = {name: ORIGIN.get(str(name), mean_of_all) for name in table if name not in (*CELL, "layer")}
    return ordered(table.groupby([*CELL, "layer"], sort=False).agg(aggregations).reset_index())


def routers(records: Iterable[Record]) -> pd.DataFrame:
    """Return one row per trained mixture of experts: means over seeds, and its NLL against ``moe_top_k``.

    ``nll_to_top_k`` pairs the windows of the seeds that both have, with a 95 % interval; ``_spread`` is the standard
    deviation over seeds.
    """
    cells = by_cell(one for one in records if "train_loss" in one.series and "token_microseconds" in one.metrics)
    rows = []
    for labels, runs in cells.items():
        names = dict.fromkeys(name for one in runs for name in one.metrics)
        row: dict[str, Any] = dict(zip(CELL, labels, strict=True)) | {"seeds": len(runs)} | origin(runs)
        row |= {name: float(np.mean([one.metrics.get(name, np.nan) for one in runs])) for name in names}
        if len(runs) > 1:
            row["nll_spread"] = float(np.std([one.metrics["nll"] for one in runs], ddof=1))
        baseline = cells.get((*labels[:-1], "moe_top_k"), [])
        seeds = {one.labels["seed"] for one in runs} & {one.labels["seed"] for one in baseline}
        if seeds and labels[-1] != "moe_top_k":
            pairs = [[one for one in group if one.labels["seed"] in seeds] for group in (runs, baseline)]
            nll, baseline_nll = paired(pairs[0], pairs[1], "nll")
            row["nll_to_top_k"] = float((nll - baseline_nll).mean())
            interval = statistics.interval((nll - baseline_nll).tolist())
            row["nll_to_top_k_low"], row["nll_to_top_k_high"] = interval
            if len(seeds) > 1:
                means = [{one.labels["seed"]: one.metrics["nll"] for one in group} for group in pairs]
                differences = [means[0][seed] - means[1][seed] for seed in sorted(seeds)]
                row["nll_to_top_k_spread"] = float(np.std(differences, ddof=1))
        rows.append(row)
    return ordered(pd.DataFrame(rows)) if rows else pd.DataFrame()


def validation(records: Iterable[Record]) -> pd.DataFrame:
    """Return the earlier prototype's table: trained models before and after compression, means over seeds."""
    cells = by_cell(one for one in records if "latency_ms_quantized" in one.metrics)
    rows = []
    for labels, runs in cells.items():
        means = pd.DataFrame([one.metrics for one in runs])[[column.metric for column in VALIDATION[:-1]]].mean()
        rows.append(dict(zip(CELL, labels, strict=True)) | {"seeds": len(runs)} | means.to_dict() | origin(runs))
    return ordered(pd.DataFrame(rows)) if rows else pd.DataFrame()


def routing(records: Iterable[Record]) -> pd.DataFrame:
    """Return one row per number of experts: the time of routing a token, and of a whole layer over the dense layer's.

    Times are in microseconds for each version of the router; ``share_`` columns are the parts of the flock's router.
    """
    rows = []
    for one in records:
        start = "route_plain_"
        for count in (int(name.removeprefix(start)) for name in one.metrics if name.startswith(start)):
            batches = {"alone": 1, "all": one.config["measure"]["tokens"]}
            metrics = {
                f"layer_ratio_{name}": one.metrics[f"layer_ratio_batch_{size}_{count}"]
                for name, size in batches.items()
            }
            names = [column.metric for column in ROUTING if column.metric.startswith(("route_", "share_"))]
            metrics |= {name: one.metrics[f"{name}_{count}"] for name in names}
            rows.append({label: one.labels[label] for label in CELL} | {"experts": count} | metrics | origin([one]))
    return pd.DataFrame(rows)


def serving(records: Iterable[Record]) -> pd.DataFrame:
    """Return one row per load on a server, and what its clients saw of the compressed and of the full model.

    ``rate``: requests due per second, missing where each client asks once it is answered.
    """
    rows = []
    for one in records:
        if "latency_p95_ratio" in one.metrics:
            measure = one.config["measure"]
            load = {"clients": measure["concurrency"], "requests": measure["requests"], "rate": measure["rate"]}
            rows.append({label: one.labels[label] for label in CELL} | load | one.metrics | origin([one]))
    table = pd.DataFrame(rows)
    return table.sort_values(["rate", "clients"], na_position="first", kind="stable") if rows else table


def special_table(records: Sequence[Record]) -> tuple[pd.DataFrame, Sequence[Column]] | None:
    """Return table and columns of an experiment that measures something else than the quality of compressed models.

    The result is None for an experiment that measures quality, whose table is ``frame.average`` with ``COLUMNS``.
    """
    makers = (
        (routers, ROUTERS), (balance, BALANCE), (validation, VALIDATION), (routing, ROUTING), (serving, SERVING),
    )  # fmt: skip
    candidates = ((make(records), columns) for make, columns in makers)
    return next(((table, columns) for table, columns in candidates if len(table)), None)
