"""How far the bit game ends from what is best: dual bounds, exact optima, the price of anarchy.

    python -m experiments.benchmarks.optima --players 121500

Writes a JSON file and a Markdown table.  The first part plays synthetic players in the number of GPT-2 124M, the others
the real damages of the default model on its calibration text.
"""

import argparse
import contextlib
import datetime
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from scipy import sparse

from experiments.config import compose
from nashswarm.experiment.compression import load
from nashswarm.experiment.plan import plan
from nashswarm.games import flock as swarm
from nashswarm.games import optima
from nashswarm.games.potential import Coupling, Game, best_response, shadow_price
from nashswarm.layers import Layer
from nashswarm.measures import timing
from nashswarm.methods.bit_allocation.blocks import PLAYED_WIDTHS, Blocks
from nashswarm.methods.bit_allocation.damages import block_damages
from nashswarm.methods.bit_allocation.game import solve
from nashswarm.progress import show_progress
from nashswarm.quant.grid import Scheme
from nashswarm.records.files import write_report
from nashswarm.records.provenance import provenance, told

SYNTHETIC_LAYERS = 50
DECADES = 5  # that the middle 99 % of the sensitivities span
EXACT_PLAYERS = 2000
GAP = 1e-6  # share of the damage at which the integer programme may stop
BITS = 3.0
NEIGHBOURS = 7
ALIGNS = (4.0, 64.0)  # bytes per unlike neighbour: what the method offers, and far more
STARTS = 100
SUBGAMES, SUBGAME_PLAYERS = 100, 7


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--players", type=int, default=121_500, help="of the synthetic game")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/benchmarks/optima"))
    options = parser.parse_args(arguments)
    started = datetime.datetime.now(datetime.UTC)
    rng = np.random.default_rng(options.seed)
    size = at_size(options.players, rng)
    blocks, budget = real_blocks(options.seed)
    content = {
        "at_size": size,
        "real": gaps(blocks, budget, rng),
        "anarchy": [anarchy(blocks, budget, align, rng) for align in ALIGNS],
        "provenance": provenance(started) | {"threads": torch.get_num_threads(), "seed": options.seed},
    }
    text = markdown(content)
    write_report(options.out, content, text)
    print(text)
    return 0


def at_size(players: int, rng: np.random.Generator) -> dict[str, float]:
    """Seconds, certificate and distance to the dual bound of a game with storage tags at ``BITS`` bits per weight."""
    blocks = synthetic(players, rng)
    budget = int(BITS * sum(layer.parameters for layer in blocks.layers) / 8)
    seconds, solution = timed(f"solving the game of {players:,} players", lambda: solve(blocks, budget))
    metrics, _ = solution.report(blocks)
    damage, cost = separable(blocks)
    spent = int(optima.total(cost, solution.profile))
    dual_seconds, (bound, price) = timed("dual bound", lambda: optima.dual_bound(damage, cost, spent))
    greedy_seconds, greedy = timed("greedy", lambda: optima.greedy(damage, cost, spent))
    return {
        "players": players,
        "seconds": seconds,
        "regret_max": metrics["regret_max"],
        "sweeps": metrics["sweeps"],
        "price": solution.price,
        "budget": budget,
        "packed_bytes": blocks.packed_bytes(solution.profile),
        "tile_bytes": spent,
        "damage": optima.total(damage, solution.profile),
        "dual_bound": bound,
        "dual_price": price,
        "dual_seconds": dual_seconds,
        "greedy_seconds": greedy_seconds,
        "gap_percent": percent(optima.total(damage, solution.profile), bound),
        "gap_without_tags_percent": percent(optima.total(damage, untagged(damage, cost, spent)), bound),
        "gap_greedy_percent": percent(optima.total(damage, greedy), bound),
    }


def synthetic(players: int, rng: np.random.Generator) -> Blocks:
    """Players with log-normal sensitivities s, half their variance shared by a layer, and damages s · 4^−b up to a
    quarter."""
    scheme = Scheme()
    counts = [len(part) for part in np.array_split(np.arange(players), SYNTHETIC_LAYERS)]
    layers = tuple(
        Layer(f"layer{index}", "synthetic", 0.5, (), (), torch.empty(16, count * scheme.group_size, device="meta"))
        for index, count in enumerate(counts)
    )
    spread = DECADES * np.log(10) / (2 * 2.576)  # 2.576: the quantile of a normal law with 0.5 % above it
    shared = np.repeat(rng.normal(size=SYNTHETIC_LAYERS), counts)
    log_sensitivity = spread * np.sqrt(0.5) * (shared + rng.normal(size=players))
    noise = rng.uniform(0.8, 1.25, (players, len(PLAYED_WIDTHS)))
    damage = np.exp(log_sensitivity)[:, None] * 4.0 ** -np.array(PLAYED_WIDTHS) * noise
    return Blocks(layers, scheme, PLAYED_WIDTHS, damage, log_sensitivity, np.zeros((players, 1)))


def real_blocks(seed: int) -> tuple[Blocks, int]:
    """The players of the default model, surveyed as its method surveys them, and the byte budget of its layers."""
    config = compose("method=fixed_width", f"seed={seed}", "wandb=disabled", "device=cpu")
    context = load(config, plan(config)).session.context()
    blocks = block_damages(context, context.moments(), PLAYED_WIDTHS, Scheme(search=True), code_game=True)
    return blocks, int(BITS * context.parameters / 8) - context.fixed_bytes


def gaps(blocks: Blocks, budget: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Damage and gap to the dual bound of every way to hand out the same tile bytes: all players, and a sample."""
    damage, cost = separable(blocks)
    seconds, solution = timed("game with tags", lambda: solve(blocks, budget))
    spent = int(optima.total(cost, solution.profile))
    everybody = ("game with tags", seconds, solution.profile)
    sample = np.sort(rng.choice(len(damage), min(EXACT_PLAYERS, len(damage)), replace=False))
    share = int(spent * len(sample) / len(damage))
    return [
        *compared(damage, cost, spent, rng, [everybody]),
        *compared(damage[sample], cost[sample], share, rng, []),
    ]


def compared(
    damage: np.ndarray,
    cost: np.ndarray,
    budget: int,
    rng: np.random.Generator,
    known: Sequence[tuple[str, float, np.ndarray]],
) -> list[dict[str, Any]]:
    """One row per way: players, seconds, bytes, damage in nats per token, and percent above the dual bound."""
    seconds, (bound, _) = timed("dual bound", lambda: optima.dual_bound(damage, cost, budget))
    ways: dict[str, Callable[[], np.ndarray]] = {
        "uniform, rest by lot": lambda: uniform(cost, budget, rng),
        "greedy": lambda: optima.greedy(damage, cost, budget),
        "equilibrium, J = 0": lambda: untagged(damage, cost, budget),
        "dynamic programme": lambda: optima.dynamic_programme(damage, cost, budget),
        f"integer programme, gap {GAP:g}": lambda: optima.integer_programme(damage, cost, budget, GAP),
    }
    rows = [*known, *((name, *timed(name, way)) for name, way in ways.items())]
    common = {"players": len(damage), "budget": budget}
    return [
        *(
            common
            | {
                "way": name,
                "seconds": took,
                "bytes": int(optima.total(cost, profile)),
                "damage": optima.total(damage, profile),
                "gap_percent": percent(optima.total(damage, profile), bound),
            }
            for name, took, profile in rows
        ),
        common | {"way": "dual bound", "seconds": seconds, "bytes": budget, "damage": bound, "gap_percent": 0.0},
    ]


def separable(blocks: Blocks) -> tuple[np.ndarray, np.ndarray]:
    """Damage and tile bytes of every action of every player; tags and headers left out."""
    tile = np.array([blocks.scheme.tile_bytes(width) for width in blocks.widths])
    return blocks.damage.astype(float), np.tile(tile, (len(blocks.damage), 1))


def untagged(damage: np.ndarray, cost: np.ndarray, budget: int) -> np.ndarray:
    """The equilibrium without any coupling at the price that meets the budget."""
    start = np.full(len(damage), damage.shape[1] // 2)
    return shadow_price(
        lambda price: best_response(Game(damage + price * cost), start).profile,
        lambda profile: optima.total(cost, profile),
        budget,
        float(damage.mean() / cost.mean()),
    )[1]


def uniform(cost: np.ndarray, budget: int, rng: np.random.Generator) -> np.ndarray:
    """The widest uniform width that fits, and the next one for as many players, by lot, as the budget allows."""
    players, actions = cost.shape
    base = int((cost.sum(0) <= budget).sum()) - 1
    if base + 1 == actions:
        return np.full(players, base)
    step = int(cost[0, base + 1] - cost[0, base])
    profile = np.full(players, base)
    profile[rng.permutation(players)[: (budget - int(cost[:, base].sum())) // step]] += 1
    return profile


def anarchy(blocks: Blocks, budget: int, align: float, rng: np.random.Generator) -> dict[str, Any]:
    """The price of anarchy of the real game with tags and flock: over random starts, and exactly in small parts of it.

    Every coupling cost is at least 0, so that no potential is below the sum of what everybody pays alone at best; the
    worst potential in units of that sum bounds the price of anarchy over the starts from above.
    """
    flock = swarm.flock(blocks.features, NEIGHBOURS, "features", rng)
    solution = solve(blocks, budget, flock=flock, align=align)
    seconds, anarchy = timed("", lambda: optima.price_of_anarchy(solution.game, STARTS, rng, show_progress))
    profiles = np.array([end.profile for end in anarchy.equilibria])
    best = profiles[int(anarchy.potentials.argmin())]
    exact = [
        optima.exact_price_of_anarchy(part(solution.game, members_around(flock, int(player))))
        for player in show_progress(rng.choice(len(best), SUBGAMES, replace=False).tolist(), "small games")
    ]
    return {
        "players": len(best),
        "starts": STARTS,
        "align": align,
        "price": solution.price,
        "seconds": seconds,
        "worst": float(anarchy.potentials.max()),
        "mean": float(anarchy.potentials.mean()),
        "least": anarchy.least,
        "from_the_middle_width": solution.equilibrium.potentials[-1],
        "anarchy": anarchy.price,
        "anarchy_at_most": float(anarchy.potentials.max()) / float(solution.game.own_cost.min(1).sum()),
        "distinct": len(np.unique(profiles, axis=0)),
        "players_unlike_the_best_percent": 100 * float((profiles != best).mean() * STARTS / (STARTS - 1)),
        "regret_max": max(end.regrets[-1] for end in anarchy.equilibria),
        "sweeps_most": max(end.sweeps for end in anarchy.equilibria),
        "bytes_least_and_most": [f(blocks.packed_bytes(profile) for profile in profiles) for f in (min, max)],
        "small_games": SUBGAMES,
        "small_game_players": SUBGAME_PLAYERS,
        "small_anarchy_median": float(np.median(exact)),
        "small_anarchy_worst": max(exact),
        "small_above_one_percent": 100 * float((np.array(exact) > 1 + 1e-9).mean()),
    }


def members_around(flock: sparse.csr_array, player: int) -> np.ndarray:
    """The player and those whom it minds most."""
    minded = flock[[player]].toarray()[0]
    return np.append(player, np.argsort(-minded, kind="stable")[: SUBGAME_PLAYERS - 1])


def part(game: Game, members: np.ndarray) -> Game:
    """The game among ``members`` alone."""
    couplings = (Coupling(one.weights[members][:, members], one.disagreement) for one in game.couplings)
    return Game(game.own_cost[members], tuple(couplings))


def timed(what: str, work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and value of ``work``, with a spinner on a terminal."""
    console = Console(stderr=True)
    with console.status(what) if what and console.is_terminal else contextlib.nullcontext():
        value, seconds = timing.timed(work)
    return seconds, value


def percent(value: float, bound: float) -> float:
    return 100 * (value / bound - 1)


def markdown(content: dict[str, Any]) -> str:
    """Three tables."""
    size, anarchy, origin = content["at_size"], content["anarchy"], content["provenance"]
    lines = [
        "# The bit game against what is best",
        "",
        f"{told(origin)}, {origin['machine']}, "
        f"{origin['threads']} thread(s); `python -m experiments.benchmarks.optima --seed {origin['seed']}`.",
        "",
        f"## {size['players']:,} players",
        "",
        "**The damages of this part are synthetic**: log-normal sensitivities s whose middle 99 % span "
        f"{DECADES} decades, half their variance shared by a layer, damages s · 4^−b up to a quarter, "
        f"{SYNTHETIC_LAYERS} layers, {BITS} bits per weight, storage tags as the coupling. "
        "Gaps are to the Lagrangian dual bound at the same tile bytes.",
        "",
        "| seconds | sweeps | regret_max | gap % | gap without tags % | gap of greedy % | s of dual | s of greedy |",
        "| --: | --: | --: | --: | --: | --: | --: | --: |",
        f"| {size['seconds']:.1f} | {size['sweeps']} | {size['regret_max']:.1e} | {size['gap_percent']:.4f} | "
        f"{size['gap_without_tags_percent']:.1e} | {size['gap_greedy_percent']:.1e} | {size['dual_seconds']:.2f} | "
        f"{size['greedy_seconds']:.2f} |",
        "",
        "## The default model's real damages, J = 0",
        "",
        "Everybody hands out the same tile bytes; damage in nats per token.",
        "",
        "| players | way | seconds | bytes | damage | above the dual bound % |",
        "| --: | :-- | --: | --: | --: | --: |",
        *(
            f"| {row['players']:,} | {row['way']} | {row['seconds']:.2f} | {row['bytes']:,} | {row['damage']:.6f} | "
            f"{row['gap_percent']:.5f} |"
            for row in content["real"]
        ),
        "",
        "## Price of anarchy of the real game with tags and flock",
        "",
        f"{anarchy[0]['players']:,} players at one price, {STARTS} random starts; and exactly, by enumeration, in "
        f"{SUBGAMES} games of a block and the {SUBGAME_PLAYERS - 1} that it minds most. `align` is what an unlike "
        f"neighbour costs, in bytes; the method offers {ALIGNS[0]:g}.",
        "",
        "| align | distinct equilibria | worst / least found | worst / lower bound | regret_max | unlike the best % | "
        "small: worst | small: above 1, % | seconds |",
        "| --: | --: | --: | --: | --: | --: | --: | --: | --: |",
        *(
            f"| {row['align']:g} | {row['distinct']} | {row['anarchy']:.5f} | {row['anarchy_at_most']:.5f} | "
            f"{row['regret_max']:.1e} | {row['players_unlike_the_best_percent']:.2f} | "
            f"{row['small_anarchy_worst']:.5f} | {row['small_above_one_percent']:.0f} | {row['seconds']:.1f} |"
            for row in anarchy
        ),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
