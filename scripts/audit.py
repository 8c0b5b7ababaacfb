"""The audit: what the earlier prototype claimed, its own protocol run again, and an honest measure beside it.

    python scripts/audit.py --paper paper/generated

Every number comes from a record (``experiment=audit``, ``experiment=ablation``) or is counted from shapes; every
verdict follows from them by the rule in its row.  Writes Markdown and LaTeX; with ``--paper`` the parts that the paper
includes go there, and runs from uncommitted or unknown code are refused.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from nashswarm.measures.prototype import UNTRAINED
from nashswarm.methods.nash_swarm.settings import NashSwarm
from nashswarm.models.shapes import SHAPES, ParameterCounts, class_entropy, count_from_config
from nashswarm.quant.prototype import CLASS_BITS
from nashswarm.records import files, record, statistics
from nashswarm.records.record import Record
from nashswarm.reporting import frame, typeset
from nashswarm.reporting.paper import commands, macro_name
from nashswarm.reporting.tables import equal_bytes
from nashswarm.reporting.typeset import CELL, REFERENCE

LATER = "not measured yet"
HOLDS, FAILS = "holds", "does not hold"
FAMILY = ("gpt2", "gpt2_medium", "gpt2_large", "gpt2_xl")
EXPERIMENTS = ("ablation", "audit", "speed")  # the first one that has a model and text tells of them
REMOVED = ("no_nash", "no_quantization", "no_swarm")  # methods without one component each
MIXTURES = ("quick_validation", "performance_analysis")
AS_CLAIMED = 1e8  # parameters of the smallest model that was claimed to be faster
AUDIT = "`python -m experiments.run experiment=audit model=gpt2 dataset=wikitext2_raw`"
ABLATION = "`python -m experiments.run experiment=ablation model=gpt2 dataset=wikitext2_raw`"
SHAPES_ALONE = "`python scripts/audit.py`"
MISSES = pathlib.Path("results/benchmarks/misses.json")
DENSE, TARGETS = 3.00, (28, 9.35, 2.34)  # ms, as published
HEADINGS = ("", "claim as published", "its protocol, run here", "honest measure", "holds if", "verdict", "on GPT-2")
SIZE_HEADINGS = (
    "model",
    "parameters",
    "MB, 32-bit",
    "quantized %",
    "counted: saved %",
    "file, classes free: saved %",
    "classes by entropy: saved %",
    "classes stored: saved %",
    "MB, classes stored",
    "MB of `nash_swarm`",
    "saved %",
)
SIZE_COLUMNS = f"@{{}}l{'r' * (len(SIZE_HEADINGS) - 1)}@{{}}"
percent = typeset.fixed(1, 100)
megabytes = typeset.fixed(2, 1e-6)
mebibytes = typeset.fixed(1, 1 / 2**20)


Place = tuple[str, str]  # a model and a text
Rows = Mapping[str, pd.Series]  # method → metrics


def change(value: float) -> str:
    """``value`` as a signed percentage."""
    return f"{100 * value:+z.2f} %".replace("-", "−")


def interval(run: Record, metric: str) -> str:
    """A metric of the record with its 95 % interval."""
    value, low, high = (typeset.fixed(4)(run.metrics[f"{metric}{end}"]) for end in ("", "_low", "_high"))
    return f"{value} [{low}, {high}]"


@dataclasses.dataclass(frozen=True)
class Evidence:
    """Records of the published protocol by model and text, honest runs by model, text and method, sizes by shape,
    the records of ``MIXTURES``, libraries beside ``nash_swarm`` at equal bytes, and what ``removals`` tells."""

    published: Mapping[Place, Record]
    honest: Mapping[Place, Rows]
    sizes: Mapping[str, ParameterCounts]
    mixtures: Mapping[str, Sequence[Record]] = dataclasses.field(default_factory=dict)
    peers: pd.DataFrame = dataclasses.field(default_factory=pd.DataFrame)
    misses: Sequence[Mapping[str, Any]] = ()  # rows of experiments/benchmarks/misses.py
    grown: Mapping[Place, Rows] = dataclasses.field(default_factory=dict)  # of models of one family
    removed: pd.DataFrame = dataclasses.field(default_factory=pd.DataFrame)

    @property
    def trained(self) -> dict[Place, Record]:
        """Without the models whose weights are random: their losses say nothing."""
        return {place: run for place, run in self.published.items() if not place[0].endswith("_random")}

    def having(self, *methods: str, metric: str = "kl") -> dict[Place, Rows]:
        """The honest runs that have these methods and this metric."""
        return having(self.honest, *methods, metric=metric)


@dataclasses.dataclass(frozen=True)
class Row:
    """One claim and what became of it; ``holds`` of None: nothing that could decide it was measured.  ``here``: it was
    decided on other models than those of the claim."""

    name: str
    claim: str
    published: str
    honest: str
    rule: str
    holds: bool | None
    command: str
    here: bool = False

    def cells(self) -> tuple[str, ...]:
        verdict = LATER if self.holds is None else (HOLDS if self.holds else FAILS) + (" here" if self.here else "")
        return self.name, self.claim, self.published, self.honest, self.rule, verdict, self.command


def gather(folder: pathlib.Path, misses: pathlib.Path = MISSES) -> Evidence:
    """The evidence of the records under ``folder``, and of ``misses`` where it is present.  Raises ValueError if the
    audit has no records."""
    runs = list(record.read_all(folder / "audit"))
    published = {}
    for run in runs:
        if run.labels["measure"] == "published":
            place = run.labels["model"], run.labels["dataset"]
            if place in published:
                raise ValueError(f"two records audit {place[0]} on {place[1]}; delete the stale one")
            published[place] = run
    if not published:
        raise ValueError("the audit has no records; run python -m experiments.run experiment=audit")
    measured = [run for run in runs if run.labels["measure"] != "published"]
    beside = [run for name in EXPERIMENTS if name != "audit" for run in record.read_all(folder / name)]
    honest = by_place([*beside, *measured])
    grown = by_place(list(record.read_all(folder / "scaling")))
    mixtures = {name: list(record.read_all(folder / name)) for name in MIXTURES}
    peers = equal_bytes(record.read_all(folder / "main"))
    if len(peers):
        peers = peers[peers["method"].str.startswith("peer_") & peers["kl_ratio"].notna()]
    counted = json.loads(misses.read_text())["rows"] if misses.exists() else ()
    exact = {name: count_from_config(config) for name, config in SHAPES.items()}
    return Evidence(published, honest, exact, mixtures, peers, counted, grown, removals(folder))


def removals(folder: pathlib.Path) -> pd.DataFrame:
    """One row for every run of ``REMOVED`` that is paired with ``nash_swarm`` of the same overrides, whatever the
    experiment: ``method``, ``experiment``, ``model``, and whether it ``costs``, its KL being higher where the test
    survives among all of its table."""
    rows = []
    for path in sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "audit"):
        runs = list(record.read_all(path))
        if not any(run.labels["method"].partition("[")[0] in REMOVED for run in runs):
            continue
        table = frame.tested(frame.average(frame.frame(runs)), runs)
        keys = [*CELL[:-1], "overrides"]
        table[["method", "overrides"]] = [list(label.partition("[")[::2]) for label in table["method"]]
        whole = table[table["method"] == REFERENCE].groupby(keys)["kl"].mean()
        own = table[table["method"].isin(REMOVED)]
        for _, row in own.dropna(subset="kl_p").iterrows() if "kl_p" in own else ():
            costs = row["kl_p"] <= typeset.LEVEL and row["kl"] > whole[tuple(row[keys])]
            rows.append({name: row[name] for name in ("method", "experiment", "model")} | {"costs": bool(costs)})
    return pd.DataFrame(rows)


def having(runs: Mapping[Place, Rows], *methods: str, metric: str = "kl") -> dict[Place, Rows]:
    """Those that have these methods and this metric."""
    return {
        place: rows
        for place, rows in runs.items()
        if all(method in rows and pd.notna(rows[method].get(metric)) for method in methods)
    }


def by_place(runs: Sequence[Record]) -> dict[Place, Rows]:
    """The rows of runs, means over seeds, by model and text and by method; of several experiments the first."""
    found: dict[Place, Rows] = {}
    if runs:
        table = frame.tested(frame.average(frame.frame(runs)), runs)
        for (_, model, dataset, _), rows in table.groupby(["experiment", "model", "dataset", "measure"]):
            found.setdefault((str(model), str(dataset)), {row["method"]: row for _, row in rows.iterrows()})
    return found


def each(runs: Mapping[Place, Record], write: Callable[[Record], str]) -> str:
    """What is to be said of every run, with its model and text."""
    return "; ".join(f"{model} on {dataset}: {write(run)}" for (model, dataset), run in sorted(runs.items()))


def each_honest(runs: Mapping[Place, Rows], write: Callable[[Rows], str]) -> str:
    """The same of honest runs."""
    return "; ".join(f"{model} on {dataset}: {write(rows)}" for (model, dataset), rows in sorted(runs.items()))


def each_of(found: Iterable[bool]) -> bool | None:
    """Whether all of them are true; None if there is none."""
    known = list(found)
    return all(known) if known else None


def elsewhere(runs: Mapping[Place, Any]) -> bool:
    """Whether none of the runs is of a model of the claims."""
    return not any(model.replace("-", "_") in FAMILY for model, _ in runs)


def family(evidence: Evidence, write: Callable[[ParameterCounts], str]) -> str:
    """What is to be said of GPT-2 in its four sizes."""
    return " / ".join(write(evidence.sizes[name]) for name in FAMILY)


def claims(evidence: Evidence) -> list[Row]:
    """All twelve, in their order."""
    makers = (size, quality, latency, small, routing, faster, components, equilibrium, cache, scale, novelty, helps)
    return [maker(evidence) for maker in makers]


def size(evidence: Evidence) -> Row:
    found = [evidence.sizes[name] for name in FAMILY]
    first = found[0]
    return Row(
        "C1",
        "90.5–90.7 % compression of GPT-2 124M–1.5B; 13.8 MB, 18.4 MB at uniform 4 bits, of 475 MB",
        f"{family(evidence, lambda own: percent(own.compression_counted))} %; codes of the tied head alone, the only "
        f"`nn.Linear`: {mebibytes(first.code_bytes)} MiB, {mebibytes(first.uniform_bytes)} at 4 bits, of "
        f"{mebibytes(first.bytes_full)}",
        f"the whole file saves {family(evidence, lambda own: percent(own.compression(CLASS_BITS)))} % "
        f"({family(evidence, lambda own: percent(own.compression(class_entropy())))} with classes at their entropy of "
        f"{class_entropy():.3f} bits, {family(evidence, lambda own: percent(own.compression(0)))} with classes for "
        "nothing), exact from shapes",
        "the whole file saves 90.5 % at each size",
        all(own.compression(CLASS_BITS) >= 0.905 for own in found),
        SHAPES_ALONE,
    )


def beats(own: pd.Series, other: pd.Series) -> bool:
    """Whether its KL lies wholly below the other's, in no larger file."""
    return bool(own["kl_high"] < other["kl_low"] and own["bytes_file"] <= other["bytes_file"])


def quality(evidence: Evidence) -> Row:
    def published(run: Record) -> str:
        own, uniform = (run.series[f"loss_change_{scheme}"][0] for scheme in ("adaptive", "uniform4"))
        padding = percent(run.metrics["padding_share"])
        return f"{change(own)} (uniform {change(uniform)}), {padding} % of it padding"

    def honest(rows: Rows) -> str:
        return ", ".join(
            f"`{method}` KL {typeset.text(rows[method], 'kl')} in {megabytes(rows[method]['bytes_file'])} MB"
            for method in ("as_published", "uniform4", "gptq", "nash_swarm")
            if method in rows
        )

    def quantizers(run: Record) -> str:
        own, uniform = (interval(run, f"kl_{scheme}") for scheme in ("adaptive", "uniform4"))
        return f"KL of the two quantizers {own} and {uniform}"

    tables = evidence.having("as_published", "uniform4")
    pairs = [(rows["as_published"], rows["uniform4"]) for rows in tables.values()]
    return Row(
        "C2",
        'loss +0.12 % where uniform 4-bit has +23.56 % ("196×"), GPT-2 124M; medium −0.15 / +4.91; large +1.71 / '
        "+1.83; XL +0.41 / −0.66",
        each(evidence.trained, published),
        f"{each(evidence.trained, quantizers)}; in files, {each_honest(tables, honest)}",
        "KL of `as_published` lies wholly below that of group-wise `uniform4`, in no larger file",
        each_of(beats(own, other) for own, other in pairs),
        f"{AUDIT} and {ABLATION}",
        here=elsewhere(tables),
    )


def latency(evidence: Evidence) -> Row:
    def published(run: Record) -> str:
        full, *others = (run.metrics[f"latency_ms_{name}"] for name in ("full", "adaptive", "uniform4", "full_again"))
        own, uniform, again = (other / full for other in others)
        return f"{own:.2f}× (uniform {uniform:.2f}×, the full model against itself {again:.2f}×)"

    def honest(rows: Rows) -> str:
        return ", ".join(
            f"`{method}` decodes {typeset.text(rows[method], 'decode_ratio')} times as fast as 32-bit floats"
            for method in methods
        )

    methods = ("as_published", "nash_swarm")
    tables = evidence.having(*methods, metric="decode_ratio")
    return Row(
        "C3",
        "latency 0.93× of the baseline (0.85×, 1.01×)",
        each(evidence.published, published),
        each_honest(tables, honest),
        "the interval of the decoding speed of `as_published` lies wholly above 1",
        each_of(rows["as_published"]["decode_ratio_low"] > 1 for rows in tables.values()),
        f"{AUDIT} and {ABLATION}",
        here=elsewhere(tables),
    )


def small(evidence: Evidence) -> Row:
    losses = [loss for run in evidence.published.values() for loss in run.series["loss_untrained"]]

    def memory(run: Record) -> str:
        full, own, again = (run.metrics[f"process_growth_{name}"] for name in ("full", "adaptive", "full_again"))
        return (
            f"the process grew by {megabytes(full)} MB with the full model, then {megabytes(own)} with the quantized "
            f"one, then {megabytes(again)} with the full one again"
        )

    seeds: dict[str, list[Record]] = {}
    for run in evidence.mixtures.get("quick_validation", ()):
        seeds.setdefault(f"`{run.labels['method']}` on {run.labels['dataset']}", []).append(run)
    changes = {
        name: np.concatenate([np.subtract(run.series["nll_quantized"], run.series["nll"]) for run in own])
        for name, own in seeds.items()
    }
    intervals = {name: statistics.interval(values.tolist()) for name, values in changes.items()}

    def trained(name: str) -> str:
        means = pd.DataFrame([run.metrics for run in seeds[name]]).mean()
        low, high = intervals[name]
        return (
            f"{name}, {len(seeds[name])} seeds: {megabytes(means['bytes_memory'])} → {megabytes(means['bytes_file'])} "
            f"MB, loss {means['nll']:.4f} → {means['nll_quantized']:.4f}, a change of {changes[name].mean():+.4f} "
            f"[{low:+.4f}, {high:+.4f}]"
        )

    return Row(
        "C4",
        "small transformer: 7.98 → 0.75 MB, loss 7.07 → 6.91, runtime memory −62.9 %",
        f"never trained: {min(losses):.2f}–{max(losses):.2f} by the luck of the seed, ln {UNTRAINED} = "
        f"{math.log(UNTRAINED):.2f}; {each(evidence.published, memory)}",
        f"both trained: {'; '.join(map(trained, seeds)) or LATER}",
        "the interval of the change in loss from the trained to the compressed model does not lie above zero",
        each_of(low <= 0 for low, _ in intervals.values()),
        f"{AUDIT} and `python -m experiments.run experiment=quick_validation`",
    )


def routing(evidence: Evidence) -> Row:
    def published(run: Record) -> str:
        loops, plain = (run.metrics[f"router_microseconds_{name}"] for name in ("loops", "top_k"))
        return f"loops take {loops:.1f} µs per token, plain top-k {plain:.2f}: {loops / plain:.0f} times"

    ratios = ", ".join(f"{target / DENSE:.1f}×" for target in TARGETS)
    runs = evidence.mixtures.get("performance_analysis", ())
    counts = sorted(
        {int(name.rpartition("_")[2]) for run in runs for name in run.metrics if name.startswith("route_plain")}
    )

    def layers(run: Record, count: int) -> str:
        alone, batch = (
            run.metrics[f"layer_ratio_batch_{size}_{count}"] for size in (1, run.config["measure"]["tokens"])
        )
        router = run.metrics[f"route_flock_{count}"] / run.metrics[f"route_plain_{count}"]
        return f"with {count} experts {alone:.1f}× at batch 1 and {batch:.1f}×, the router {router:.2f}× plain top-k"

    honest = "; ".join(
        f"without loops the layer takes, for {run.config['measure']['tokens']} tokens, "
        + ", ".join(layers(run, count) for count in counts)
        for run in runs
    )
    worst = [run.metrics[f"layer_ratio_batch_{run.config['measure']['tokens']}_{counts[0]}"] for run in runs]
    return Row(
        "C5",
        "MoE routing 3.00 → 1402 ms; targets 28, 9.35, 2.34 ms",
        each(evidence.published, published),
        f"the targets are {ratios} of the dense baseline; {honest or LATER}",
        "a layer with the fewest experts takes at most the last of these multiples of the dense layer's time",
        each_of(ratio <= TARGETS[-1] / DENSE for ratio in worst),
        f"{AUDIT} and `python -m experiments.run experiment=performance_analysis`",
    )


def faster(evidence: Evidence) -> Row:
    def honest(rows: Rows) -> str:
        own = rows["nash_swarm"]
        quality = "random weights"
        if "baseline" in rows:
            quality = f"perplexity {typeset.text(rows['baseline'], 'perplexity')} → {typeset.text(own, 'perplexity')}"
        return (
            f"`nash_swarm` saves {percent(own['compression'])} %, decodes {typeset.text(own, 'decode_ratio')} times as "
            f"fast, {quality}"
        )

    tables = evidence.having("nash_swarm", metric="decode_ratio")
    rows = [table["nash_swarm"] for table in tables.values()]
    large = [own for own in rows if 8 * own["bytes_file"] / own["bits_per_weight_model"] >= AS_CLAIMED]
    return Row(
        "C6",
        "65 % less memory and 2.7× faster on CPU at 125M, 350M, 1.3B; perplexity 18.2 → 18.6; BLEU 42.5 → 41.8",
        "no code and no log: nothing to run",
        f"{each_honest(tables, honest) or LATER}",
        "the file of `nash_swarm` saves 65 % and its interval of decoding speed reaches 2.7, at the sizes of the claim "
        "where one was measured; random weights tell nothing of the rest",
        each_of(own["compression"] >= 0.65 and own["decode_ratio_high"] >= 2.7 for own in large or rows),
        f"{ABLATION} and `python -m experiments.run experiment=speed`",
        here=elsewhere(tables),
    )


def components(evidence: Evidence) -> Row:
    found = evidence.removed

    def count(costs: "pd.Series[bool]") -> str:
        return f"{costs.sum()} of {len(costs)}"

    def each_experiment(rows: pd.DataFrame) -> str:
        return ", ".join(f"{name} {count(own['costs'])}" for name, own in rows.groupby("experiment"))

    groups = {str(name): rows for name, rows in found.groupby("method")} if len(found) else {}
    told = [f"`{name}` in {count(rows['costs'])} ({each_experiment(rows)})" for name, rows in groups.items()]
    return Row(
        "C7",
        "each component matters",
        "no code: nothing to run",
        f"KL is higher, by runs with and without the component: {', '.join(told) or LATER}",
        "KL without equilibrium, quantization or swarm is higher on the same windows (sign-flip test, Holm) in every "
        "experiment that has both",
        bool(found["costs"].all()) if set(groups) == set(REMOVED) else None,
        f"{ABLATION}, and `experiment=main`, `experiment=glue`",
        here=not len(found) or not found["model"].str.replace("-", "_").isin(FAMILY).any(),
    )


def equilibrium(evidence: Evidence) -> Row:
    def published(run: Record) -> str:
        found = run.metrics
        return (
            f"{found['reply_iterations']:.0f} iterations whatever the payoffs, {percent(found['best_reply_share'])} % "
            f"of players at a best reply, largest regret {found['reply_regret']:.1f} mean stakes"
        )

    def honest(rows: Rows) -> str:
        own = rows["nash_swarm"]
        sweeps, regret = typeset.text(own, "sweeps"), typeset.text(own, "regret_max")
        return f"`nash_swarm`, {sweeps} sweeps, largest regret {regret} nats per token"

    runs = evidence.published.values()
    solved = sorted({run.metrics["solved_sweeps"] for run in runs})
    left = max(run.metrics["solved_regret"] for run in runs)
    return Row(
        "C8",
        "Nash equilibrium in about 10 iterations, convergence guaranteed",
        each(evidence.published, published),
        f"best replies solve the same small game in {', '.join(f'{count:.0f}' for count in solved)} sweep, regret "
        f"{left:.0f}; {each_honest(evidence.having('nash_swarm', metric='regret_max'), honest)}",
        "nobody regrets the profile where the published iteration stops",
        all(run.metrics["reply_regret"] == 0 for run in runs),
        AUDIT,
    )


def cache(evidence: Evidence) -> Row:
    def published(run: Record) -> str:
        full, own, again = (run.metrics[f"process_growth_{name}"] for name in ("full", "adaptive", "full_again"))
        if not full:
            return "the process did not grow"
        return f"{change(own / full - 1)}, the full model against itself {change(again / full - 1)}"

    def span(values: Sequence[float]) -> str:
        return f"{percent(min(values))}–{percent(max(values))}"

    def hits(rows: Iterable[Mapping[str, Any]]) -> str:
        return span([1 - row["first_misses"] / row["reads"] for row in rows])

    plain = [row for row in evidence.misses if row["form"] == "float32"]
    packed = [row for row in evidence.misses if row["form"] != "float32"]
    falls = {level: [row[f"{level}_fall"] for row in packed] for level in ("first", "last")}
    known = {level: [fall for fall in found if fall is not None] for level, found in falls.items()}
    counters = " and ".join(sorted({row["counter"] for row in packed}))
    parts = [f"misses of the {level} level fall by {span(found)} %" for level, found in known.items() if found]
    return Row(
        "C9",
        "cache misses −67 %, hit rate 90–95 %",
        f"growth of the process, relabelled: {each(evidence.published, published)}",
        f"counted by {counters}, packed products at 2 to 4 bits on shapes of GPT-2 against 32-bit floats: "
        f"{' and '.join(parts)}; reads that hit the first: {hits(packed)} %, of floats {hits(plain)} %"
        if packed
        else f"hardware counters or cachegrind: {LATER}",
        "counted misses fall by 67 %",
        each_of(fall >= 0.67 for found in known.values() for fall in found),
        f"{AUDIT} and `python -m experiments.benchmarks.misses`" if packed else AUDIT,
        here=True,
    )


def scale(evidence: Evidence) -> Row:
    counted = [own.compression_counted for own in evidence.sizes.values()]
    real = [evidence.sizes[name].compression(CLASS_BITS) for name in FAMILY]
    others = [own.compression(CLASS_BITS) for name, own in evidence.sizes.items() if name not in FAMILY]
    return Row(
        "C10",
        "adaptive quantization is scale-invariant",
        f"{percent(min(counted))}–{percent(max(counted))} % at all {len(counted)} shapes below: three bits of 32 by "
        "the constant split, counted over quantized weights alone",
        f"the whole file saves {' / '.join(map(percent, real))} % of GPT-2 in its four sizes, "
        f"{percent(min(others))}–{percent(max(others))} % of the other shapes, exact",
        "the savings of the four files differ by less than a point",
        max(real) - min(real) < 0.01,
        SHAPES_ALONE,
    )


def novelty(evidence: Evidence) -> Row:
    peers, beside = evidence.peers, LATER
    if len(peers):
        libraries = sorted({name.partition("[")[0] for name in peers["method"]})
        low, high = (typeset.fixed(3)(limit) for limit in (peers["kl_ratio"].min(), peers["kl_ratio"].max()))
        beside = (
            f"at equal bytes {low} to {high} of the KL of {len(libraries)} libraries ({', '.join(libraries)}), which "
            "says nothing of trellis and vector codes (QuIP#, QTIP, AQLM): none was run"
        )
    return Row(
        "C11",
        "the first combination of game theory and swarm behaviour for models; state of the art",
        "no comparison: nothing to run",
        "games for bits and layers exist: bargaining in video coding (2006), Nash equilibrium in rate control (2022), "
        "interaction games of layers (IMPQ/CoopQ 2025), pruning as a game (2025), routing as a congestion game (2026); "
        f"feature-space flocks that couple bit-widths were not found; {beside}",
        "nothing of the kind is published before, and no method of the field does better at equal bytes",
        False if len(peers) else None,
        "`python -m experiments.run experiment=main model=gpt2 dataset=wikitext2_raw`",
        here=True,
    )


def helps(evidence: Evidence) -> Row:
    def published(run: Record) -> str:
        own, uniform = run.series["loss_change_adaptive"], run.series["loss_change_uniform4"]
        ahead = sum(mine < other for mine, other in zip(own, uniform, strict=True))
        return (
            f"{change(min(own))} to {change(max(own))} over {len(own)} sets of paragraphs (uniform "
            f"{change(min(uniform))} to {change(max(uniform))}), ahead of uniform in {ahead}"
        )

    def parameters(rows: Rows) -> float:
        own = rows["uniform4"]
        return float(8 * own["bytes_file"] / own["bits_per_weight_model"])

    def beside(place: Place, rows: Rows) -> str:
        own, other = (typeset.text(rows[method], "kl") for method in ("as_published", "uniform4"))
        return f"{place[0]} ({typeset.fixed(2, 1e-6)(parameters(rows))}M): {own} (`uniform4` {other})"

    tables = evidence.having("as_published", "uniform4")
    grown = sorted(having(evidence.grown, "as_published", "uniform4").items(), key=lambda found: parameters(found[1]))
    helped = [beats(rows["as_published"], rows["uniform4"]) for rows in (*tables.values(), *dict(grown).values())]
    found = f"in files `as_published` helps {sum(helped)} of {len(helped)} models beyond `uniform4`"
    sizes = f"{len(grown)} sizes of one family (`scaling`), KL: {'; '.join(beside(*one) for one in grown) or LATER}"
    return Row(
        "C12",
        "accuracy is model-specific, adaptive quantization helps small models most",
        each(evidence.trained, published),
        f"{found if helped else LATER}; {sizes}",
        "it helps, as C2 has it, and the gain falls with size: decided where it helps none",
        False if helped and not any(helped) else None,
        f"{AUDIT}, {ABLATION} and `python -m experiments.run experiment=scaling`",
        here=elsewhere(tables),
    )


def size_rows(found: Mapping[str, ParameterCounts]) -> list[tuple[str, ...]]:
    """The published scheme and the budget of ``nash_swarm`` at every shape."""
    bits = NashSwarm().bits
    count = typeset.fixed(0)
    return [
        (
            f"`{name}`",
            count(own.parameters),
            megabytes(own.bytes_full),
            percent(own.share),
            percent(own.compression_counted),
            *(percent(own.compression(class_bits)) for class_bits in (0, class_entropy(), CLASS_BITS)),
            megabytes(own.bytes_prototype(CLASS_BITS)),
            megabytes(own.bytes_at(bits)),
            percent(1 - own.bytes_at(bits) / own.bytes_full),
        )
        for name, own in found.items()
    ]


def markdown(evidence: Evidence) -> str:
    """Both tables, and what they mean."""
    rows = [row.cells() for row in claims(evidence)]
    lines = typeset.table_of(HEADINGS, rows, [":--"] * len(HEADINGS))
    lines += [
        "",
        f"Sizes, exact from shapes alone, weights untouched; `nash_swarm` at {NashSwarm().bits} stored bits per "
        "parameter, its budget:",
        "",
        *typeset.table_of(SIZE_HEADINGS, size_rows(evidence.sizes), [":--"] + ["--:"] * (len(SIZE_HEADINGS) - 1)),
    ]
    return "\n".join(lines) + "\n"


TEX = typeset.ESCAPES | str.maketrans(
    {"×": r"$\times$", "−": "$-$", "→": r"$\to$", "–": "--", "µ": r"\textmu{}", "≥": r"$\geq$"}
)


def latex(evidence: Evidence) -> str:
    """Both tables as LaTeX ``tabular`` with booktabs rules; the captions belong to the paper."""
    claimed = [row.cells()[:-1] for row in claims(evidence)]
    return (
        tabular("@{}lp{.17\\linewidth}p{.25\\linewidth}p{.27\\linewidth}p{.12\\linewidth}l@{}", HEADINGS[:-1], claimed)
        + "\n"
        + tabular(SIZE_COLUMNS, SIZE_HEADINGS, size_rows(evidence.sizes))
    )


def included(evidence: Evidence) -> dict[str, str]:
    """What the paper includes, by file: every claim in full, the verdicts alone, sizes, and how many claims hold."""
    rows = [row.cells() for row in claims(evidence)]
    short = [(name, claim, verdict) for name, claim, *_, verdict, _ in rows]
    counts = {
        macro_name("audit", "claims"): len(rows),
        macro_name("audit", "holds"): sum(verdict.startswith(HOLDS) for *_, verdict in short),
        macro_name("audit", "fails"): sum(verdict.startswith(FAILS) for *_, verdict in short),
        macro_name("audit", "open"): sum(verdict == LATER for *_, verdict in short),
    }
    return {
        "audit_claims": "".join(
            rf"\claim{''.join(f'{{{escaped(cell)}}}' for cell in row[:-1])}" + "\n" for row in rows
        ),
        "audit_verdicts": tabular(r"@{}lp{.66\linewidth}l@{}", ("", HEADINGS[1], HEADINGS[5]), short),
        "audit_sizes": tabular(SIZE_COLUMNS, SIZE_HEADINGS, size_rows(evidence.sizes), stacked),
        "audit_numbers": commands({name: str(count) for name, count in counts.items()}),
    }


def escaped(cell: str) -> str:
    return cell.replace("`", "").translate(TEX)


def stacked(heading: str) -> str:
    return typeset.tex_heading(heading.replace("`", ""))


def tabular(
    columns: str,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    heading: Callable[[str], str] = escaped,
) -> str:
    head = " & ".join(map(heading, headings)) + r" \\"
    body = [" & ".join(map(escaped, row)) + r" \\" for row in rows]
    parts = [
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        head,
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=pathlib.Path, default=pathlib.Path("results/records"))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/tables"))
    parser.add_argument("--misses", type=pathlib.Path, default=MISSES, help="what experiments.benchmarks.misses wrote")
    parser.add_argument("--paper", type=pathlib.Path, help="also write the paper's tables here")
    options = parser.parse_args(arguments)
    try:
        evidence = gather(options.records, options.misses)
        if options.paper:
            frame.refuse_dirty(frame.frame(record.read_all(options.records)))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    for row in claims(evidence):
        typeset.console().print(" ".join(row.cells()[i] for i in (0, 1)), f"[bold]{row.cells()[5]}[/bold]", sep=": ")
    files.write_whole(options.out / "audit.md", markdown(evidence).encode())
    files.write_whole(options.out / "audit.tex", latex(evidence).encode())
    for name, content in included(evidence).items() if options.paper else ():
        files.write_whole(options.paper / f"{name}.tex", content.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
