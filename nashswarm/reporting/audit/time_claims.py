"""The claims on time and memory of running models: C3, C5, C6 and C9."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nashswarm.records.record import Record
from nashswarm.reporting import typeset
from nashswarm.reporting.audit.claim import (
    ABLATION,
    AUDIT,
    LATER,
    Claim,
    all_or_none,
    change,
    each,
    each_honest,
    elsewhere,
    percent,
)
from nashswarm.reporting.audit.evidence import Evidence, Rows

AS_CLAIMED = 1e8  # parameters of the smallest model that was claimed to be faster
DENSE, TARGETS = 3.00, (28, 9.35, 2.34)  # ms, as published


def latency(evidence: Evidence) -> Claim:
    """Decide C3, the latency beside the full model, by the interval of decoding speed."""

    def published(run: Record) -> str:
        full, *others = (run.metrics[f"latency_ms_{name}"] for name in ("full", "adaptive", "uniform4", "full_again"))
        adaptive, uniform, again = (other / full for other in others)
        return f"{adaptive:.2f}× (uniform {uniform:.2f}×, the full model against itself {again:.2f}×)"

    def honest(rows: Rows) -> str:
        return ", ".join(
            f"`{method}` decodes {typeset.text(rows[method], 'decode_ratio')} times as fast as 32-bit floats"
            for method in methods
        )

    methods = ("as_published", "nash_lattice")
    tables = evidence.having(*methods, metric="decode_ratio")
    return Claim(
        "C3",
        "latency 0.93× of the baseline (0.85×, 1.01×)",
        each(evidence.published, published),
        each_honest(tables, honest),
        "the interval of the decoding speed of `as_published` lies wholly above 1",
        all_or_none(rows["as_published"]["decode_ratio_low"] > 1 for rows in tables.values()),
        f"{AUDIT} and {ABLATION}",
        here=elsewhere(tables),
    )


def routing(evidence: Evidence) -> Claim:
    """Decide C5, the time of routing, by that of a whole layer over the dense one."""

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
    return Claim(
        "C5",
        "MoE routing 3.00 → 1402 ms; targets 28, 9.35, 2.34 ms",
        each(evidence.published, published),
        f"the targets are {ratios} of the dense baseline; {honest or LATER}",
        "a layer with the fewest experts takes at most the last of these multiples of the dense layer's time",
        all_or_none(ratio <= TARGETS[-1] / DENSE for ratio in worst),
        f"{AUDIT} and `python -m experiments.run experiment=performance_analysis`",
    )


def faster(evidence: Evidence) -> Claim:
    """Decide C6, memory and speed on a CPU, by file size and decoding speed of ``nash_lattice``."""

    def honest(rows: Rows) -> str:
        metrics = rows["nash_lattice"]
        saved, times = percent(metrics["compression"]), typeset.text(metrics, "decode_ratio")
        quality = "random weights"
        if "baseline" in rows:
            before, after = (typeset.text(row, "perplexity") for row in (rows["baseline"], metrics))
            quality = f"perplexity {before} → {after}"
        return f"`nash_lattice` saves {saved} %, decodes {times} times as fast, {quality}"

    tables = evidence.having("nash_lattice", metric="decode_ratio")
    rows = [table["nash_lattice"] for table in tables.values()]
    large = [metrics for metrics in rows if 8 * metrics["bytes_file"] / metrics["bits_per_weight_model"] >= AS_CLAIMED]
    return Claim(
        "C6",
        "65 % less memory and 2.7× faster on CPU at 125M, 350M, 1.3B; perplexity 18.2 → 18.6; BLEU 42.5 → 41.8",
        "no code and no log: nothing to run",
        f"{each_honest(tables, honest) or LATER}",
        "the file of `nash_lattice` saves 65 % and its interval of decoding speed reaches 2.7, at the sizes of the "
        "claim where one was measured; random weights tell nothing of the rest",
        all_or_none(
            metrics["compression"] >= 0.65 and metrics["decode_ratio_high"] >= 2.7 for metrics in large or rows
        ),
        f"{ABLATION} and `python -m experiments.run experiment=speed`",
        here=elsewhere(tables),
    )


def cache(evidence: Evidence) -> Claim:
    """Decide C9, cache misses, by those that were counted for packed products."""

    def published(run: Record) -> str:
        full, adaptive, again = (run.metrics[f"process_growth_{name}"] for name in ("full", "adaptive", "full_again"))
        if not full:
            return "the process did not grow"
        return f"{change(adaptive / full - 1)}, the full model against itself {change(again / full - 1)}"

    def span(values: Sequence[float]) -> str:
        return f"{percent(min(values))}–{percent(max(values))}"

    def hits(rows: Iterable[Mapping[str, Any]]) -> str:
        return span([1 - row["first_misses"] / row["reads"] for row in rows])

    plain = [row for row in evidence.misses if row["form"] == "float32"]
    packed = [row for row in evidence.misses if row["form"] != "float32"]
    falls = {level: [row[f"{level}_fall"] for row in packed] for level in ("first", "last")}
    known = {level: [fall for fall in values if fall is not None] for level, values in falls.items()}
    counters = " and ".join(sorted({row["counter"] for row in packed}))
    parts = [f"misses of the {level} level fall by {span(values)} %" for level, values in known.items() if values]
    return Claim(
        "C9",
        "cache misses −67 %, hit rate 90–95 %",
        f"growth of the process, relabelled: {each(evidence.published, published)}",
        f"counted by {counters}, packed products at 2 to 4 bits on shapes of GPT-2 against 32-bit floats: "
        f"{' and '.join(parts)}; reads that hit the first: {hits(packed)} %, of floats {hits(plain)} %"
        if packed
        else f"hardware counters or cachegrind: {LATER}",
        "counted misses fall by 67 %",
        all_or_none(fall >= 0.67 for values in known.values() for fall in values),
        f"{AUDIT} and `python -m experiments.benchmarks.misses`" if packed else AUDIT,
        here=True,
    )
