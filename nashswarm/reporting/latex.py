"""LaTeX: escaped text, stacked headings, ``tabular`` environments, and macros that hold numbers."""

import re
from collections.abc import Iterable, Mapping, Sequence

from nashswarm.reporting.formats import MARK, MISSING, UNCLEAN

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
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
    r"""Return ``content`` in LaTeX.

    Special characters are escaped, minus signs and powers of ten become formulas, and an interval goes below its value.

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
    """Return ``content`` in LaTeX, one word below the other."""
    words = tex(content).split()
    stacked = r"\\".join(words)
    return stacked if len(words) == 1 else rf"\begin{{tabular}}[b]{{@{{}}r@{{}}}}{stacked}\end{{tabular}}"


def table_row(cells: Iterable[str]) -> str:
    """Return one row of a ``tabular`` from cells that are LaTeX already."""
    return " & ".join(cells) + r" \\"


def tabular(alignment: str, head: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a ``tabular`` with booktabs rules, from lines of its head and cells of its rows, all LaTeX already."""
    lines = [rf"\begin{{tabular}}{{{alignment}}}", r"\toprule", *head, r"\midrule", *map(table_row, rows)]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def macro_name(*words: str) -> str:
    """Return a LaTeX command name, which may have letters only; digits are spelled.

    >>> macro_name("uniform4", "top1_agreement")
    'UniformFourTopOneAgreement'
    """
    spelled = re.sub(r"\d", lambda digit: f"_{DIGITS[int(digit[0])]}_", "_".join(words))
    return "".join(part.capitalize() for part in re.split(r"[^A-Za-z]+", spelled))


def commands(values: Mapping[str, str]) -> str:
    r"""Return one ``\newcommand`` line for each macro."""
    lines = [rf"\newcommand{{\{name}}}{{{value}}}" for name, value in values.items()]
    return "\n".join(["% Written by scripts/tables.py from the records; do not edit.", *lines, ""])
