"""Labels: what identifies a run and a row of a table, and the order in which methods appear everywhere."""

import re
from collections.abc import Iterable
from typing import Any

CELL = ["experiment", "model", "dataset", "measure", "method"]
LABELS = [*CELL, "seed"]
REFERENCE = "nash_lattice"  # the method whose curve the others are compared with at equal bytes
TESTED_AGAINST = ("nash_swarm", REFERENCE)  # the first of them that a table has
ABLATIONS = ("no_", "lattice_no_", "fixed_no_")  # beginnings of the names of methods that leave one part out
KINDS: tuple[str | tuple[str, ...], ...] = (
    "baseline",
    "uniform",
    "rtn",
    "gptq",
    "as_published",
    ABLATIONS,
    "",
    REFERENCE,
)
TESTED = {"kl": "kl", "nll_delta": "nll"}  # metric → the per-window series in which it is paired
WORDS = [*LABELS, "layer", "contestant"]  # columns of text
ORIGIN: dict[str, Any] = {  # of runs → of their row
    "fingerprint": " ".join,
    "commit": " ".join,
    "dirty": any,
    "dequantized_from": max,  # the same for all runs of one model
}


def tested_against(methods: Iterable[str]) -> str:
    """Return the method that the other methods of a table are tested against.

    >>> tested_against(["gptq", "nash_lattice[bits=2]"]), tested_against(["nash_lattice", "nash_swarm"])
    ('nash_lattice', 'nash_swarm')
    """
    names = {method.partition("[")[0] for method in methods}
    return next((method for method in TESTED_AGAINST if method in names), REFERENCE)


def family_of(method: str) -> str:
    """Return the method without its size, if the size is its only override, and without the file type of llama.cpp.

    >>> family_of("gptq[bits=3]"), family_of("nash_lattice[bits=3.0,code_game=pass]")
    ('gptq', 'nash_lattice[bits=3.0,code_game=pass]')
    >>> family_of("peer_llama_cpp[imatrix=True,type=Q2_K]"), family_of("peer_llama_cpp[type=Q2_K]")
    ('peer_llama_cpp[imatrix=True]', 'peer_llama_cpp')
    """
    return re.sub(r"\[bits=[^],]*\]$|\[type=[^],]*\]$|,type=[^],]*(?=\]$)", "", method)


def rank(method: str) -> tuple[int, int, str]:
    """Return the sort key of a method in tables and figures; unknown methods precede ``nash_lattice``, which is last.

    >>> sorted(["nash_lattice", "fixed_no_nash", "uniform4", "hqq", "uniform8", "baseline"], key=rank)
    ['baseline', 'uniform8', 'uniform4', 'fixed_no_nash', 'hqq', 'nash_lattice']
    """
    if uniform := re.fullmatch(r"uniform(\d+)", method):
        return 1, -int(uniform[1]), method
    kind = next((place for place, start in enumerate(KINDS) if start and method.startswith(start)), KINDS.index(""))
    return kind, 0, padded(method)


def padded(label: str) -> str:
    """Return a sort key of a label that orders the numbers in it by size.

    >>> sorted(["windows=16", "windows=4", "bits=2.3"], key=padded)
    ['bits=2.3', 'windows=4', 'windows=16']
    """
    return re.sub(r"\d+(\.\d+)?", lambda number: f"{float(number[0]):09.3f}", label)
