"""The flock while its blocks reply to one another: what the figure and the animation of it are drawn from.

    python -m experiments.benchmarks.flock_dynamics

Plays the bit game of the embedded model where ``nash_swarm`` plays it, at the reference of its stance and with the
alignment given, from all blocks at the step of the price.  After every class of blocks that moved together their
offsets are kept, and the bits per weight that their codes then take.  Places are an embedding of the features in two
dimensions (t-SNE, van der Maaten & Hinton 2008): distances in it mean little, links are the flock's own.
"""

import argparse
import dataclasses
import datetime
import json
import pathlib
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.manifold import TSNE

from experiments.config import compose
from nashswarm.experiment.compression import load
from nashswarm.experiment.plan import plan
from nashswarm.games import flock
from nashswarm.games.potential import best_response, independent_classes
from nashswarm.methods.nash_swarm.quantizer import Played, Stance, by_block
from nashswarm.methods.nash_swarm.solver import REFERENCE, NashSwarm, _Table
from nashswarm.quant.entropy import coded_bits
from nashswarm.records import files
from nashswarm.records.provenance import provenance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/benchmarks/flock_dynamics.json"))
    parser.add_argument("--align", type=float, default=0.25, help="bytes per quarter octave between neighbours")
    options = parser.parse_args()
    started = datetime.datetime.now(datetime.UTC)
    torch.set_num_threads(1)
    config = compose("method=nash_swarm", f"method.swarm.align=[{options.align}]", "wandb=disabled")
    planned = plan(config)
    job = load(config, planned)
    assert isinstance(planned.method, NashSwarm)
    content = danced(_Table(planned.method, job.session.context(), job.rng), options.align)
    content["provenance"] = provenance(started)
    files.write_whole(options.out, (json.dumps(content) + "\n").encode())


def danced(table: _Table, align: float) -> dict[str, Any]:
    """Places, links and frames of the game that ``table`` plays at its reference."""
    unit = table.unit_of_rounding(int(max(REFERENCE * table.slope.at_high_rate, 2.0 * table.smallest_bytes())))
    solved = table.solve(unit)
    start = dataclasses.replace(solved, offsets=table.plain.offsets)
    played = table.play(unit, start, 0)
    costs = table.actions(played, start)
    game, profile, least = table.game(costs, played, start, align)
    alone = best_response(table.game(costs, played, start, 0.0)[0], profile).profile
    frames = [frame(table, played, start, profile + least)]
    classes = independent_classes(game.couplings, len(profile))
    end = best_response(game, profile, classes).profile
    moved = True
    while moved:
        moved = False
        for members in classes:
            regret = game.regret(profile)[members]
            movers = members[regret > 0]
            if len(movers):
                moved = True
                profile[movers] = game.costs(profile)[movers].argmin(1)
                frames.append(frame(table, played, start, profile + least))
    assert (profile == end).all(), "the blocks came to rest elsewhere than the solver says"
    assert table.features is not None and table.rules.swarm is not None
    points = flock.standardise(table.features)
    persuaded = np.flatnonzero(alone != end)
    watched = int(persuaded[0] if len(persuaded) else np.flatnonzero(end + least)[0])
    near = np.linalg.norm(points - points[watched], axis=1).argsort(kind="stable")
    places = TSNE(init="pca", random_state=0).fit_transform(points)
    links = table.flock.tocoo()
    return {
        "align": align,
        "names": [layer.name for layer in table.layers],
        "blocks": table.counts,
        "places": np.round(places, 2).tolist(),
        "links": [[int(one), int(other)] for one, other in zip(links.row, links.col, strict=True) if one < other],
        "watched": watched,
        "persuaded": len(persuaded),
        "neighbours": [int(other) for other in near if other != watched][: table.rules.swarm.neighbours],
        "frames": frames,
    }


def frame(table: _Table, played: Played, start: Stance, offsets: Int[np.ndarray, " blocks"]) -> dict[str, Any]:
    """The offsets of all blocks and the bits per weight of the codes that answer them."""
    answered = table.play(played.unit, dataclasses.replace(start, offsets=table.by_layer(offsets)), 0)
    bits: list[Float[np.ndarray, " blocks"]] = []
    for layer in table.layers:
        rows = coded_bits(answered.tensors[layer.name], answered.tables)
        sizes = by_block(torch.full((len(layer.weight),), float(layer.weight.shape[1])))
        bits.append((by_block(rows) / sizes).numpy())
    return {"offsets": offsets.tolist(), "bits": np.round(np.concatenate(bits), 3).tolist()}


if __name__ == "__main__":
    main()
