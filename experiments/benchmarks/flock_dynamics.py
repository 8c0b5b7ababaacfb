"""The flock while its blocks reply to one another: what the figure and the animation of it are drawn from.

    python -m experiments.benchmarks.flock_dynamics

Plays the bit game of the embedded model where ``nash_lattice_best`` plays it, at the reference of its stance and with
the alignment given, from all blocks at the step of the price.  After every class of blocks that moved together their
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
from nashswarm.methods.nash_lattice.quantizer import QuantizedModel, by_block
from nashswarm.methods.nash_lattice.selection import HeldoutSelection
from nashswarm.methods.nash_lattice.settings import NashLattice
from nashswarm.methods.nash_lattice.solver import RateGameSolver
from nashswarm.methods.nash_lattice.step_choices import StepChoices
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
    config = compose("method=nash_lattice_best", f"method.swarm.align=[{options.align}]", "wandb=disabled")
    planned = plan(config)
    job = load(config, planned)
    assert isinstance(planned.method, NashLattice)
    context = job.session.context()
    selection = planned.method.selection(planned.method.solver(context, job.rng), context)
    content = dynamics(selection, options.align)
    content["provenance"] = provenance(started)
    files.write_whole(options.out, (json.dumps(content) + "\n").encode())


def dynamics(selection: HeldoutSelection, align: float) -> dict[str, Any]:
    """Return places, links and frames of the game at the reference rate."""
    solver, quantizer = selection.solver, selection.quantizer
    base_step = selection.reference_step()
    solved = selection.solve_at_reference(base_step)
    start = dataclasses.replace(solved, offsets=quantizer.neutral.offsets)
    model = quantizer.quantize_at(base_step, start, 0)
    costs = solver.offset_costs(model, start)
    game, profile, lowest = solver.offset_game(costs, base_step, start, align)
    unaligned = best_response(solver.offset_game(costs, base_step, start, 0.0)[0], profile).profile
    frames = [frame(solver, model, start, profile + lowest)]
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
                frames.append(frame(solver, model, start, profile + lowest))
    assert (profile == end).all(), "the blocks came to rest elsewhere than the solver says"
    assert solver.features is not None and solver.swarm is not None
    points = flock.standardise(solver.features)
    persuaded = np.flatnonzero(unaligned != end)
    watched = int(persuaded[0] if len(persuaded) else np.flatnonzero(end + lowest)[0])
    near = np.linalg.norm(points - points[watched], axis=1).argsort(kind="stable")
    places = TSNE(init="pca", random_state=0).fit_transform(points)
    links = solver.coupling.tocoo()
    return {
        "align": align,
        "names": [layer.name for layer in quantizer.layers],
        "blocks": quantizer.block_counts,
        "places": np.round(places, 2).tolist(),
        "links": [[int(one), int(other)] for one, other in zip(links.row, links.col, strict=True) if one < other],
        "watched": watched,
        "persuaded": len(persuaded),
        "neighbours": [int(other) for other in near if other != watched][: solver.swarm.neighbours],
        "frames": frames,
    }


def frame(
    solver: RateGameSolver, model: QuantizedModel, start: StepChoices, offsets: Int[np.ndarray, " blocks"]
) -> dict[str, Any]:
    """Return the offsets of all blocks and the bits per weight of the codes that answer them."""
    quantizer = solver.quantizer
    choices = dataclasses.replace(start, offsets=quantizer.split_by_layer(offsets))
    quantized = quantizer.quantize_at(model.base_step, choices, 0)
    bits: list[Float[np.ndarray, " blocks"]] = []
    for layer in quantizer.layers:
        rows = coded_bits(quantized.tensors[layer.name], quantized.tables)
        sizes = by_block(torch.full((len(layer.weight),), float(layer.weight.shape[1])))
        bits.append((by_block(rows) / sizes).numpy())
    return {"offsets": offsets.tolist(), "bits": np.round(np.concatenate(bits), 3).tolist()}


if __name__ == "__main__":
    main()
