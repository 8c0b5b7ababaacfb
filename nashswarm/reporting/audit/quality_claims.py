"""The claims on size and loss: C1, C2, C4, C10 and C12."""

import math

import numpy as np
import pandas as pd

from nashswarm.measures.prototype import UNTRAINED
from nashswarm.models.shapes import class_entropy
from nashswarm.quant.prototype import CLASS_BITS
from nashswarm.records import statistics
from nashswarm.records.record import Record
from nashswarm.reporting import typeset
from nashswarm.reporting.audit.claim import (
    ABLATION,
    AUDIT,
    FAMILY,
    LATER,
    SHAPES_ALONE,
    Claim,
    all_or_none,
    change,
    each,
    each_honest,
    each_size,
    elsewhere,
    interval,
    megabytes,
    percent,
)
from nashswarm.reporting.audit.evidence import Evidence, Place, Rows, having
from nashswarm.reporting.formats import fixed

mebibytes = fixed(1, 1 / 2**20)


def size(evidence: Evidence) -> Claim:
    """Decide C1, the compression of GPT-2, from its shapes."""
    family = [evidence.sizes[name] for name in FAMILY]
    first = family[0]
    counted = each_size(evidence, lambda sizes: percent(sizes.compression_counted))

    def saved(bits: float) -> str:
        return each_size(evidence, lambda sizes: percent(sizes.compression(bits)))

    stored, coded, free = map(saved, (CLASS_BITS, class_entropy(), 0))
    return Claim(
        "C1",
        "90.5–90.7 % compression of GPT-2 124M–1.5B; 13.8 MB, 18.4 MB at uniform 4 bits, of 475 MB",
        f"{counted} %; codes of the tied head alone, the only "
        f"`nn.Linear`: {mebibytes(first.code_bytes)} MiB, {mebibytes(first.uniform_bytes)} at 4 bits, of "
        f"{mebibytes(first.bytes_full)}",
        f"the whole file saves {stored} % ({coded} with classes at their entropy of {class_entropy():.3f} bits, "
        f"{free} with classes for nothing), exact from shapes",
        "the whole file saves 90.5 % at each size",
        all(sizes.compression(CLASS_BITS) >= 0.905 for sizes in family),
        SHAPES_ALONE,
    )


def beats(metrics: pd.Series, other: pd.Series) -> bool:
    """Return whether the KL interval lies wholly below the other's, in no larger file."""
    return bool(metrics["kl_high"] < other["kl_low"] and metrics["bytes_file"] <= other["bytes_file"])


def quality(evidence: Evidence) -> Claim:
    """Decide C2, the loss beside uniform 4-bit, by KL at no larger file."""

    def published(run: Record) -> str:
        adaptive, uniform = (run.series[f"loss_change_{scheme}"][0] for scheme in ("adaptive", "uniform4"))
        padding = percent(run.metrics["padding_share"])
        return f"{change(adaptive)} (uniform {change(uniform)}), {padding} % of it padding"

    def honest(rows: Rows) -> str:
        return ", ".join(
            f"`{method}` KL {typeset.text(rows[method], 'kl')} in {megabytes(rows[method]['bytes_file'])} MB"
            for method in ("as_published", "uniform4", "gptq", "nash_lattice")
            if method in rows
        )

    def quantizers(run: Record) -> str:
        adaptive, uniform = (interval(run, f"kl_{scheme}") for scheme in ("adaptive", "uniform4"))
        return f"KL of the two quantizers {adaptive} and {uniform}"

    tables = evidence.having("as_published", "uniform4")
    pairs = [(rows["as_published"], rows["uniform4"]) for rows in tables.values()]
    return Claim(
        "C2",
        'loss +0.12 % where uniform 4-bit has +23.56 % ("196×"), GPT-2 124M; medium −0.15 / +4.91; large +1.71 / '
        "+1.83; XL +0.41 / −0.66",
        each(evidence.trained, published),
        f"{each(evidence.trained, quantizers)}; in files, {each_honest(tables, honest)}",
        "KL of `as_published` lies wholly below that of group-wise `uniform4`, in no larger file",
        all_or_none(beats(adaptive, uniform) for adaptive, uniform in pairs),
        f"{AUDIT} and {ABLATION}",
        here=elsewhere(tables),
    )


def small(evidence: Evidence) -> Claim:
    """Decide C4, the small transformer, by the change of loss of trained models."""
    losses = [loss for run in evidence.published.values() for loss in run.series["loss_untrained"]]

    def memory(run: Record) -> str:
        full, adaptive, again = (run.metrics[f"process_growth_{name}"] for name in ("full", "adaptive", "full_again"))
        return (
            f"the process grew by {megabytes(full)} MB with the full model, then {megabytes(adaptive)} with the "
            f"quantized one, then {megabytes(again)} with the full one again"
        )

    seeds: dict[str, list[Record]] = {}
    for run in evidence.mixtures.get("quick_validation", ()):
        seeds.setdefault(f"`{run.labels['method']}` on {run.labels['dataset']}", []).append(run)
    changes = {
        name: np.concatenate([np.subtract(run.series["nll_quantized"], run.series["nll"]) for run in runs])
        for name, runs in seeds.items()
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

    return Claim(
        "C4",
        "small transformer: 7.98 → 0.75 MB, loss 7.07 → 6.91, runtime memory −62.9 %",
        f"never trained: {min(losses):.2f}–{max(losses):.2f} by the luck of the seed, ln {UNTRAINED} = "
        f"{math.log(UNTRAINED):.2f}; {each(evidence.published, memory)}",
        f"both trained: {'; '.join(map(trained, seeds)) or LATER}",
        "the interval of the change in loss from the trained to the compressed model does not lie above zero",
        all_or_none(low <= 0 for low, _ in intervals.values()),
        f"{AUDIT} and `python -m experiments.run experiment=quick_validation`",
    )


def scale(evidence: Evidence) -> Claim:
    """Decide C10, invariance to scale, by the saving of the whole file at every shape."""
    counted = [sizes.compression_counted for sizes in evidence.sizes.values()]
    real = [evidence.sizes[name].compression(CLASS_BITS) for name in FAMILY]
    others = [sizes.compression(CLASS_BITS) for name, sizes in evidence.sizes.items() if name not in FAMILY]
    return Claim(
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


def helps(evidence: Evidence) -> Claim:
    """Decide C12, that small models gain most, by whether any model gains beyond uniform 4-bit."""

    def published(run: Record) -> str:
        adaptive, uniform = run.series["loss_change_adaptive"], run.series["loss_change_uniform4"]
        ahead = sum(loss < other for loss, other in zip(adaptive, uniform, strict=True))
        return (
            f"{change(min(adaptive))} to {change(max(adaptive))} over {len(adaptive)} sets of paragraphs (uniform "
            f"{change(min(uniform))} to {change(max(uniform))}), ahead of uniform in {ahead}"
        )

    def parameters(rows: Rows) -> float:
        metrics = rows["uniform4"]
        return float(8 * metrics["bytes_file"] / metrics["bits_per_weight_model"])

    def beside(place: Place, rows: Rows) -> str:
        adaptive, uniform = (typeset.text(rows[method], "kl") for method in ("as_published", "uniform4"))
        return f"{place[0]} ({fixed(2, 1e-6)(parameters(rows))}M): {adaptive} (`uniform4` {uniform})"

    tables = evidence.having("as_published", "uniform4")
    family = sorted(having(evidence.family, "as_published", "uniform4").items(), key=lambda item: parameters(item[1]))
    helped = [beats(rows["as_published"], rows["uniform4"]) for rows in (*tables.values(), *dict(family).values())]
    count = f"in files `as_published` helps {sum(helped)} of {len(helped)} models beyond `uniform4`"
    sizes = f"{len(family)} sizes of one family (`scaling`), KL: {'; '.join(beside(*one) for one in family) or LATER}"
    return Claim(
        "C12",
        "accuracy is model-specific, adaptive quantization helps small models most",
        each(evidence.trained, published),
        f"{count if helped else LATER}; {sizes}",
        "it helps, as C2 has it, and the gain falls with size: decided where it helps none",
        False if helped and not any(helped) else None,
        f"{AUDIT}, {ABLATION} and `python -m experiments.run experiment=scaling`",
        here=elsewhere(tables),
    )
