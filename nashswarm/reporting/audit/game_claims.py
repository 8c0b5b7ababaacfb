"""The claims on the game, its components and its novelty: C7, C8 and C11."""

import pandas as pd

from nashswarm.records.record import Record
from nashswarm.reporting import typeset
from nashswarm.reporting.audit.claim import ABLATION, AUDIT, FAMILY, LATER, Claim, each, each_honest, percent
from nashswarm.reporting.audit.evidence import REMOVED, Evidence, Rows
from nashswarm.reporting.formats import fixed


def components(evidence: Evidence) -> Claim:
    """Decide C7, that each component matters, by runs with and without the component."""
    removed = evidence.removed

    def count(costs: "pd.Series[bool]") -> str:
        return f"{costs.sum()} of {len(costs)}"

    def each_experiment(rows: pd.DataFrame) -> str:
        return ", ".join(f"{name} {count(runs['costs'])}" for name, runs in rows.groupby("experiment"))

    groups = {str(name): rows for name, rows in removed.groupby("method")} if len(removed) else {}
    counts = [f"`{name}` in {count(rows['costs'])} ({each_experiment(rows)})" for name, rows in groups.items()]
    return Claim(
        "C7",
        "each component matters",
        "no code: nothing to run",
        f"KL is higher, by runs with and without the component: {', '.join(counts) or LATER}",
        "KL without equilibrium, quantization or swarm is higher on the same windows (sign-flip test, Holm) in every "
        "experiment that has both",
        bool(removed["costs"].all()) if set(groups) == set(REMOVED) else None,
        f"{ABLATION}, and `experiment=main`, `experiment=glue`",
        here=not len(removed) or not removed["model"].str.replace("-", "_").isin(FAMILY).any(),
    )


def equilibrium(evidence: Evidence) -> Claim:
    """Decide C8, the equilibrium, by the regret that the published iteration leaves."""

    def published(run: Record) -> str:
        metrics = run.metrics
        return (
            f"{metrics['reply_iterations']:.0f} iterations whatever the payoffs, "
            f"{percent(metrics['best_reply_share'])} % of players at a best reply, "
            f"largest regret {metrics['reply_regret']:.1f} mean stakes"
        )

    def honest(rows: Rows) -> str:
        metrics = rows["nash_lattice"]
        sweeps, regret = typeset.text(metrics, "sweeps"), typeset.text(metrics, "regret_max")
        return f"`nash_lattice`, {sweeps} sweeps, largest regret {regret} nats per token"

    runs = evidence.published.values()
    solved = sorted({run.metrics["solved_sweeps"] for run in runs})
    left = max(run.metrics["solved_regret"] for run in runs)
    return Claim(
        "C8",
        "Nash equilibrium in about 10 iterations, convergence guaranteed",
        each(evidence.published, published),
        f"best replies solve the same small game in {', '.join(f'{count:.0f}' for count in solved)} sweep, regret "
        f"{left:.0f}; {each_honest(evidence.having('nash_lattice', metric='regret_max'), honest)}",
        "nobody regrets the profile where the published iteration stops",
        all(run.metrics["reply_regret"] == 0 for run in runs),
        AUDIT,
    )


def novelty(evidence: Evidence) -> Claim:
    """Decide C11, novelty and the state of the art, by the literature and by libraries at equal bytes."""
    peers, beside = evidence.peers, LATER
    if len(peers):
        libraries = sorted({name.partition("[")[0] for name in peers["method"]})
        low, high = (fixed(3)(limit) for limit in (peers["kl_ratio"].min(), peers["kl_ratio"].max()))
        beside = (
            f"at equal bytes {low} to {high} of the KL of {len(libraries)} libraries ({', '.join(libraries)}), which "
            "says nothing of trellis and vector codes (QuIP#, QTIP, AQLM): none was run"
        )
    return Claim(
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
