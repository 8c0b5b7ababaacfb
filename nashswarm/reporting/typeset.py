"""How tables are written: in the terminal, in Markdown, CSV and LaTeX."""

import dataclasses
import sys
from collections import Counter
from collections.abc import Sequence

import pandas as pd
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nashswarm.reporting.formats import FORMATS, MARK, MISSING, OFFICIAL, UNCLEAN, fixed
from nashswarm.reporting.labels import CELL, REFERENCE, TESTED, WORDS, tested_against
from nashswarm.reporting.latex import tex, tex_heading

LEVEL = 0.05  # of all tests of a table together
PAGE_WIDTH = 150  # characters
FIRST = ("kl", "bytes_file", "nll_delta", "bytes_resident", "top1_agreement", "bits_per_weight_model")  # where few fit


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of a table: its heading, with the unit, and the metric in it."""

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
    """Return the formatted value of ``metric``, with its 95 % interval unless the interval is a point or absent."""
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
    """Return what the marks of a table mean and where its models and runs come from, one line each, or nothing."""
    notes = (_note_on_tests, _note_on_unclean_code, _note_on_models, _note_on_commits)
    return "\n".join(filter(None, (make(table) for make in notes)))


def _note_on_tests(table: pd.DataFrame) -> str:
    tests = sum(int(table[name].notna().sum()) for name in (f"{metric}_p" for metric in TESTED) if name in table)
    if not tests:
        return ""
    return (
        f"{MARK} differs from {tested_against(table['method'])} on the same windows: sign-flip test, "
        f"{LEVEL} for the {tests} tests of this table together (Holm)."
    )


def _note_on_unclean_code(table: pd.DataFrame) -> str:
    unclean = "dirty" in table and table["dirty"].any()
    return f"{UNCLEAN} of code that was not committed, or is unknown." if unclean else ""


def _note_on_models(table: pd.DataFrame) -> str:
    """Name the models whose weights lie on the grid of another quantization already."""
    if "dequantized_from" not in table:
        return ""
    pairs = table[["model", "dequantized_from"]].drop_duplicates().itertuples(index=False, name=None)
    return " ".join(f"The weights of {model} were dequantized from {types}." for model, types in pairs if types)


def _note_on_commits(table: pd.DataFrame) -> str:
    """Count each run once, in however many rows it is."""
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
    """Return a table as text: the labels that vary, the method, and the columns that are not wholly empty."""
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


def fitting(content: pd.DataFrame, columns: Sequence[Column], width: int) -> pd.DataFrame:
    """Return the columns of a table as text that fit ``width`` characters, at least one beside the words.

    Those of ``FIRST`` stay longest, then the earlier ones.
    """
    metrics = {column.heading: column.metric for column in columns}
    headings = list(map(str, content))
    words = [heading for heading in headings if heading in WORDS]

    def place(heading: str) -> int:
        return FIRST.index(metrics[heading]) if metrics.get(heading) in FIRST else len(FIRST)

    kept = list(words)
    for heading in sorted((heading for heading in headings if heading not in words), key=place):
        widths = [max(map(cell_len, [name, *content[name]])) for name in [*kept, heading]]
        if sum(widths) + 3 * len(widths) - 1 <= width or kept == words:  # two spaces and a rule between columns
            kept.append(heading)
    return content[[heading for heading in headings if heading in kept]]


def terminal(
    table: pd.DataFrame, title: str | None = None, columns: Sequence[Column] = COLUMNS, width: int = PAGE_WIDTH
) -> Table:
    """Return a table for a terminal of ``width`` characters; it says how many columns have no room there."""
    whole = cells(table, columns)
    content = fitting(whole, columns, width)
    missing = whole.shape[1] - content.shape[1]
    more = f"{missing} more column{'s' * (missing > 1)} in the files, or in a wider terminal." if missing else ""
    caption = "\n".join(filter(None, (note(table), more)))
    view = Table(title=title, caption=caption or None, header_style="bold", pad_edge=False)
    main = tested_against(table["method"]) if "method" in table else REFERENCE
    for heading in content:
        view.add_column(str(heading), justify="left" if heading in WORDS else "right", overflow="fold")
    for row in content.itertuples(index=False):
        view.add_row(*map(Text, row), style="bold" if {main, main + UNCLEAN} & set(row) else None)
    return view


def console() -> Console:
    """Return the console that tables are printed on: as wide as the terminal, or ``PAGE_WIDTH`` where there is none."""
    return Console() if sys.stdout.isatty() else Console(width=PAGE_WIDTH)


def markdown(table: pd.DataFrame, columns: Sequence[Column] = COLUMNS) -> str:
    """Return a table in Markdown, its note below it."""
    content = cells(table, columns)
    rules = [":--" if heading in WORDS else "--:" for heading in content]
    lines = markdown_lines(list(content.columns), content.to_numpy().tolist(), rules)
    explained = f"\n{note(table)}\n" if note(table) else ""
    return "".join(f"{line}\n" for line in lines) + explained


def markdown_lines(headings: Sequence[str], rows: Sequence[Sequence[str]], rules: Sequence[str]) -> list[str]:
    """Return the lines of a Markdown table; ``rules`` align its columns (``:--`` left, ``--:`` right)."""
    return [f"| {' | '.join(line)} |" for line in (headings, rules, *rows)]


def csv(table: pd.DataFrame, columns: Sequence[Column] = COLUMNS) -> str:
    """Return every column as CSV, shown or not, one line a row; a row of several runs has each commit once.

    Numbers have twelve digits, because processors differ in the last digit of an ``exp``.
    """
    unused = [name for name in ("dequantized_from",) if name in table and not table[name].any()]
    content = table.drop(columns=["identity", "fingerprint", *unused], errors="ignore")
    if "commit" in content:
        content = content.assign(commit=[" ".join(dict.fromkeys(commits.split())) for commits in content["commit"]])
    return content.to_csv(index=False, lineterminator="\n", float_format="%.12g")


def latex(table: pd.DataFrame, columns: Sequence[Column] = COLUMNS) -> str:
    """Return a table as a LaTeX ``tabular`` with booktabs rules; the paper writes the caption and the note in it."""
    content = cells(table, columns)
    alignment = "".join("l" if heading in WORDS else "r" for heading in content)
    style = content.style.hide(axis="index").format(tex).format_index(tex_heading, axis=1)
    return str(style.to_latex(hrules=True, column_format=f"@{{}}{alignment}@{{}}"))
