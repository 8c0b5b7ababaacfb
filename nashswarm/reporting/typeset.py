"""How tables are written: in the terminal, in Markdown, CSV and LaTeX.

A number is formatted in one place (``FORMATS``), so the terminal, the README, the paper's table and the paper's prose
cannot disagree.
"""

import dataclasses
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

CELL = ["experiment", "model", "dataset", "measure", "method"]
LABELS = [*CELL, "seed"]
REFERENCE = "nash_swarm"  # the method that the others are tested against
TESTED = {"kl": "kl", "nll_delta": "nll"}  # metric → the per-window series in which it is paired
LEVEL = 0.05  # of all tests of a table together
MARK = "†"
UNCLEAN = "‡"
WORDS = [*LABELS, "layer", "contestant"]  # columns of text
ORIGIN: dict[str, Any] = {"fingerprint": " ".join, "commit": " ".join, "dirty": any}  # of runs → of their row
PAGE_WIDTH = 150  # characters
MISSING = "-"
OFFICIAL = {"accuracy": "accuracy", "f1": "F1", "matthews": "Matthews", "pearson": "Pearson", "spearman": "Spearman"}


def fixed(digits: int, scale: float = 1.0) -> Callable[[float], str]:
    """A formatter: ``digits`` decimals after multiplication by ``scale``, thousands apart."""
    return lambda value: format(value * scale, f"z,.{digits}f")


def signed(digits: int, scale: float = 1.0) -> Callable[[float], str]:
    """A formatter for differences: the sign is always shown."""
    return lambda value: format(scale * value, f"+z.{digits}f")


def scientific(value: float) -> str:
    """Two significant digits and a power of ten, for what spans many orders of magnitude; zero is ``0``."""
    return "0" if value == 0 else format(value, ".1e")


def signed_scientific(value: float) -> str:
    """Two significant digits and a power of ten, the sign always shown."""
    return "0" if value == 0 else format(value, "+.1e")


FORMATS: dict[str, Callable[[float], str]] = {
    "bits_per_weight_model": fixed(2),
    "bits_per_weight": fixed(2),
    "nominal_bits": fixed(2),
    "bytes_file": fixed(2, 1e-6),
    "compression": fixed(1, 100.0),
    "perplexity": fixed(2),
    "perplexity_low": fixed(2),
    "perplexity_high": fixed(2),
    "nll": fixed(4),
    "nll_spread": fixed(4),
    "nll_delta": signed(4),
    "nll_delta_low": signed(4),
    "nll_delta_high": signed(4),
    "kl": fixed(4),
    "kl_low": fixed(4),
    "kl_high": fixed(4),
    "kl_before": fixed(4),
    "kl_before_low": fixed(4),
    "kl_before_high": fixed(4),
    "nll_delta_before": signed(4),
    "nll_delta_before_low": signed(4),
    "nll_delta_before_high": signed(4),
    "kl_p": scientific,
    "nll_delta_p": scientific,
    "kl_spread": fixed(4),
    "nll_delta_spread": fixed(4),
    "kl_at_bytes": fixed(4),
    "kl_ratio": fixed(3),
    "kl_ratio_low": fixed(3),
    "kl_ratio_high": fixed(3),
    "layer_kl": scientific,
    "layer_kl_low": scientific,
    "layer_kl_high": scientific,
    "layer_nll_delta": signed_scientific,
    "top1_agreement": fixed(1, 100.0),
    **{f"{name}{suffix}": fixed(1, 100.0) for name in OFFICIAL for suffix in ("", "_full")},
    **{f"{name}_delta": signed(1, 100.0) for name in OFFICIAL},
    "examples": fixed(0),
    "tokens": fixed(0),
    "windows": fixed(0),
    "parameters": fixed(0),
    "damage": fixed(4),
    "damage_pearson": fixed(3),
    "damage_spearman": fixed(3),
    "layer_damage": scientific,
    "bleu": fixed(1),
    "bleu_low": fixed(1),
    "bleu_high": fixed(1),
    "bleu_text": fixed(1),
    "bleu_text_low": fixed(1),
    "bleu_text_high": fixed(1),
    "bleu_text_full": fixed(1),
    "regret_max": scientific,
    "regret_mean": scientific,
    "potential_start": fixed(4),
    "potential_end": fixed(4),
    "price": scientific,
    "sweeps": fixed(0),
    "flock_moves": fixed(0),
    "quantize_seconds": fixed(1),
    "bytes_file_before": fixed(2, 1e-6),
    "finetune_seconds": fixed(1),
    "finetune_steps": fixed(0),
    "finetune_chosen_step": fixed(0),
    "seconds": fixed(1),
    "peak_bytes": fixed(0, 1e-6),
    "quantize_peak_bytes": fixed(0, 1e-6),
    "bytes_resident": fixed(2, 1e-6),
    "decode_ms": fixed(2),
    "decode_ratio": fixed(2),
    "decode_long_ratio": fixed(2),
    "prefill_ratio": fixed(2),
    "prefill_tokens_per_second": fixed(0),
    "seeds": fixed(0),
    "threads": fixed(0),
    "nll_to_top_k": signed(4),
    "nll_to_top_k_spread": fixed(4),
    "served_tokens_per_second": fixed(0),
    "served_tokens_per_second_without": fixed(0),
    "max_violation": fixed(3),
    "max_violation_following": fixed(3),
    "nll_following": fixed(4),
    "load_gini": fixed(3),
    "load_cv": fixed(3),
    "dead_experts": fixed(1),
    "dropped": fixed(1, 100.0),
    "resident_hits": fixed(1, 100.0),
    "resident_hits_without": fixed(1, 100.0),
    "token_microseconds": fixed(1),
    "router_microseconds": fixed(2),
    "looks_ahead": fixed(0),
    "bytes_memory": fixed(2, 1e-6),
    "nll_quantized": fixed(4),
    **{f"latency_ms{suffix}": fixed(2) for suffix in ("", "_quantized")},
    **{f"tokens_per_second{suffix}": fixed(0) for suffix in ("", "_quantized")},
    **{f"latency_p{level}_ms{suffix}": fixed(0) for level in (50, 95, 99) for suffix in ("", "_full")},
    "latency_p95_ratio": fixed(2),
    "tokens_per_second_full": fixed(0),
    "clients": fixed(0),
    "requests": fixed(0),
    "rate": fixed(1),
    **{name: fixed(1, 100.0) for name in ("shed_rate", "error_rate", "resident_spread", "resident_spread_full")},
    "experts": fixed(0),
    **{f"route_{version}": fixed(2) for version in ("plain", "flock", "leaders", "first")},
    **{f"share_{part}": fixed(0, 100.0) for part in ("scores", "choice")},
    "layer_ratio_alone": fixed(2),
    "layer_ratio_all": fixed(2),
}


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of the main table: its heading, with the unit, and the metric under it."""

    heading: str
    metric: str


COLUMNS = (
    Column("bits/param", "bits_per_weight_model"),
    Column("MB before", "bytes_file_before"),
    Column("MB", "bytes_file"),
    Column("saved %", "compression"),
    Column("perplexity", "perplexity"),
    Column("ΔNLL before (nats)", "nll_delta_before"),
    Column("ΔNLL (nats)", "nll_delta"),
    Column("KL before (nats)", "kl_before"),
    Column("KL (nats)", "kl"),
    Column("KL ± over seeds", "kl_spread"),
    Column("top-1 %", "top1_agreement"),
    *(
        column
        for name, heading in OFFICIAL.items()
        for column in (Column(f"{heading} %", name), Column(f"Δ{heading} (points)", f"{name}_delta"))
    ),
    Column("Pearson", "damage_pearson"),
    Column("Spearman", "damage_spearman"),
    Column("examples", "examples"),
    Column("max regret", "regret_max"),
    Column("flock moves", "flock_moves"),
    Column("quantize s", "quantize_seconds"),
    Column("quantize MB", "quantize_peak_bytes"),
    Column("fine-tune s", "finetune_seconds"),
    Column("after step", "finetune_chosen_step"),
    Column("MB in memory", "bytes_resident"),
    Column("× decode", "decode_ratio"),
    Column("BLEU to full", "bleu"),
    Column("BLEU to text", "bleu_text"),
)


def text(row: pd.Series, metric: str) -> str:
    """The formatted value of ``metric``, with its 95 % interval where the row has one that is not a point."""
    value = row.get(metric)
    if value is None or pd.isna(value):
        return MISSING
    write = FORMATS.get(metric, fixed(4))
    written = write(value) + (MARK if row.get(f"{metric}_p", 1.0) <= LEVEL else "")
    low, high = row.get(f"{metric}_low"), row.get(f"{metric}_high")
    if low is None or high is None or pd.isna(low) or pd.isna(high) or low == high or metric == "perplexity":
        return written
    return f"{written} [{write(low)}, {write(high)}]"


def note(table: pd.DataFrame) -> str:
    """What the marks of a table mean, and which commits its runs are of, a line each; empty where there is neither."""
    return "\n".join(filter(None, (_of_tests(table), _of_dirt(table), _of_commits(table))))


def _of_tests(table: pd.DataFrame) -> str:
    tests = sum(int(table[name].notna().sum()) for name in (f"{metric}_p" for metric in TESTED) if name in table)
    if not tests:
        return ""
    return (
        f"{MARK} differs from {REFERENCE} on the same windows: sign-flip test, "
        f"{LEVEL} for the {tests} tests of this table together (Holm)."
    )


def _of_dirt(table: pd.DataFrame) -> str:
    return (
        f"{UNCLEAN} of code that was not committed, or is unknown." if "dirty" in table and table["dirty"].any() else ""
    )


def _of_commits(table: pd.DataFrame) -> str:
    """Each run counts once, in however many rows it is."""
    if "commit" not in table:
        return ""
    rows = zip(table["fingerprint"], table["commit"], strict=True)
    runs = {run for names, commits in rows for run in zip(names.split(), commits.split(), strict=True)}
    counts = sorted(Counter(commit[:7] for _, commit in runs).items())
    if len(counts) < 2:
        return "".join(f"Runs of commit {commit}." for commit, _ in counts)
    *others, last = (f"{commit} ({count})" for commit, count in counts)
    return f"Runs of commits {', '.join(others)} and {last}."


def cells(table: pd.DataFrame, columns: Sequence[Column] = COLUMNS) -> pd.DataFrame:
    """A table as text: the labels that vary, the method, and the columns that are not wholly empty."""
    varying = [label for label in CELL if label == "method" or table[label].nunique() > 1]
    varying += [label for label in ("layer", "contestant") if label in table]
    shown = [column for column in columns if column.metric in table and table[column.metric].notna().any()]
    if "threads" in table and table["threads"].nunique() > 1:
        shown.insert(0, Column("threads", "threads"))
    if "seeds" in table and (table["seeds"] > 1).any():
        shown.append(Column("seeds", "seeds"))
    content = {label: table[label].astype(str) for label in varying}
    if "dirty" in table:
        content["method"] = content["method"] + table["dirty"].map({True: UNCLEAN, False: ""})
    for column in shown:
        content[column.heading] = pd.Series([text(row, column.metric) for _, row in table.iterrows()], dtype=str)
    return pd.DataFrame(content)


def terminal(table: pd.DataFrame, title: str | None = None, columns: Sequence[Column] = COLUMNS) -> Table:
    """A table for the terminal."""
    content = cells(table, columns)
    view = Table(title=title, caption=note(table) or None, header_style="bold", pad_edge=False)
    for heading in content:
        view.add_column(str(heading), justify="left" if heading in WORDS else "right", overflow="fold")
    for row in content.itertuples(index=False):
        view.add_row(*map(Text, row), style="bold" if {REFERENCE, REFERENCE + UNCLEAN} & set(row) else None)
    return view


def console() -> Console:
    """Where tables are printed: the terminal as it is, a wide page where there is none."""
    return Console() if sys.stdout.isatty() else Console(width=PAGE_WIDTH)


def markdown(table: pd.DataFrame, columns: Sequence[Column] = COLUMNS) -> str:
    """A table in Markdown, its note below it."""
    content = cells(table, columns)
    rule = [":--" if heading in WORDS else "--:" for heading in content]
    rows = [list(content.columns), rule, *content.to_numpy().tolist()]
    explained = f"\n{note(table)}\n" if note(table) else ""
    return "".join(f"| {' | '.join(row)} |\n" for row in rows) + explained


def table_of(headings: Sequence[str], rows: Sequence[Sequence[str]], rules: Sequence[str]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(line)} |" for line in (headings, rules, *rows)]


def csv(table: pd.DataFrame, columns: Sequence[Column] = COLUMNS) -> str:
    """Every column, shown or not, to twelve digits (processors differ in the last of an ``exp``), one line per row; of
    several runs each commit once."""
    told = table.drop(columns=["identity", "fingerprint"], errors="ignore")
    if "commit" in told:
        told = told.assign(commit=[" ".join(dict.fromkeys(commits.split())) for commits in told["commit"]])
    return told.to_csv(index=False, lineterminator="\n", float_format="%.12g")


def latex(table: pd.DataFrame, columns: Sequence[Column] = COLUMNS) -> str:
    """A table as a LaTeX ``tabular`` with booktabs rules; the caption, and the note in it, belong to the paper."""
    content = cells(table, columns)
    alignment = "".join("l" if heading in WORDS else "r" for heading in content)
    style = content.style.hide(axis="index").format(tex).format_index(tex_heading, axis=1)
    return str(style.to_latex(hrules=True, column_format=f"@{{}}{alignment}@{{}}"))


ESCAPES = str.maketrans(
    {
        **{character: f"\\{character}" for character in "_%&#${}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "Δ": r"$\Delta$",
        "÷": r"$\div$",
        "−": "$-$",
        "±": r"$\pm$",
        MARK: r"$^\dagger$",
        UNCLEAN: r"$^\ddagger$",
    }
)


def tex(content: object) -> str:
    r"""``content`` in LaTeX: special characters escaped, minus signs and powers of ten set, intervals below.

    >>> print(tex("no_nash"), tex("2.1e-06"), tex("-0.5"))
    no\_nash $2.1{\cdot}10^{-6}$ $-$0.5
    """
    plain = str(content)
    if plain == MISSING:
        return "--"
    if power := re.fullmatch(r"(-?[\d.]+)e([+-]\d+)", plain):
        return rf"${power[1]}{{\cdot}}10^{{{int(power[2])}}}$"
    escaped = re.sub(r"(?<![\w-])-(?=\d)", "$-$", plain.translate(ESCAPES))
    below = r"\\begin{tabular}[t]{@{}r@{}}\1\\\\[-2pt]{\\tiny\2}\\end{tabular}"
    return re.sub(r"^(.*) (\[.*\])$", below, escaped)


def tex_heading(content: object) -> str:
    """``content`` in LaTeX, one word below the other."""
    words = tex(content).split()
    stacked = r"\\".join(words)
    return stacked if len(words) == 1 else rf"\begin{{tabular}}[b]{{@{{}}r@{{}}}}{stacked}\end{{tabular}}"
