"""A claim and its verdict, and the phrases that its sentences consist of."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from nashswarm.models.shapes import ParameterCounts
from nashswarm.records.record import Record
from nashswarm.reporting.audit.evidence import Evidence, Place, Rows
from nashswarm.reporting.formats import fixed

LATER = "not measured yet"
HOLDS, FAILS = "holds", "does not hold"
FAMILY = ("gpt2", "gpt2_medium", "gpt2_large", "gpt2_xl")  # the models of the claims
AUDIT = "`python -m experiments.run experiment=audit model=gpt2 dataset=wikitext2_raw`"
ABLATION = "`python -m experiments.run experiment=ablation model=gpt2 dataset=wikitext2_raw`"
SHAPES_ALONE = "`python scripts/audit.py`"
percent = fixed(1, 100)
megabytes = fixed(2, 1e-6)


@dataclasses.dataclass(frozen=True)
class Claim:
    """One claim and what became of it.

    ``holds`` is None if nothing that could decide the claim was measured.  ``here``: whether it was decided on other
    models than those of the claim.
    """

    name: str
    claim: str
    published: str
    honest: str
    rule: str
    holds: bool | None
    command: str
    here: bool = False

    def verdict(self) -> str:
        """Return the verdict in words."""
        return LATER if self.holds is None else (HOLDS if self.holds else FAILS) + (" here" if self.here else "")

    def cells(self) -> tuple[str, ...]:
        """Return the row of the table, in the order of ``document.HEADINGS``."""
        return self.name, self.claim, self.published, self.honest, self.rule, self.verdict(), self.command


def change(value: float) -> str:
    """Return ``value`` as a signed percentage."""
    return f"{100 * value:+z.2f} %".replace("-", "−")


def interval(run: Record, metric: str) -> str:
    """Return a metric of the record with its 95 % interval."""
    value, low, high = (fixed(4)(run.metrics[f"{metric}{end}"]) for end in ("", "_low", "_high"))
    return f"{value} [{low}, {high}]"


def each(runs: Mapping[Place, Record], write: Callable[[Record], str]) -> str:
    """Return what ``write`` says of every run, with its model and text."""
    return "; ".join(f"{model} on {dataset}: {write(run)}" for (model, dataset), run in sorted(runs.items()))


def each_honest(runs: Mapping[Place, Rows], write: Callable[[Rows], str]) -> str:
    """Return what ``write`` says of the honest runs of every model and text."""
    return "; ".join(f"{model} on {dataset}: {write(rows)}" for (model, dataset), rows in sorted(runs.items()))


def all_or_none(verdicts: Iterable[bool]) -> bool | None:
    """Return whether all verdicts are true, or None if there is none."""
    known = list(verdicts)
    return all(known) if known else None


def elsewhere(runs: Mapping[Place, Any]) -> bool:
    """Return whether none of the runs is of a model of the claims."""
    return not any(model.replace("-", "_") in FAMILY for model, _ in runs)


def each_size(evidence: Evidence, write: Callable[[ParameterCounts], str]) -> str:
    """Return what ``write`` says of GPT-2 in its four sizes."""
    return " / ".join(write(evidence.sizes[name]) for name in FAMILY)
