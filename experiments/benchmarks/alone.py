"""Does any matrix or attention head cost more than its damage predicts?  Each is compressed alone, and measured.

    python -m experiments.benchmarks.alone model=smollm2_135m dataset=wikitext2

A query head is its rows of ``q_proj`` and its columns of ``o_proj``, a key head its rows of ``k_proj`` and ``v_proj``.
Everything else stays in full precision.  The weights are those of the method, at ``--bits``; the KL is measured on
windows of the calibration text that are held out.  What counts is a part that costs much although its predicted share
was small: a game that trusts the prediction would spare bits there.
"""

import argparse
import datetime
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from experiments.config import compose
from nashswarm import layers
from nashswarm.calibration.session import CalibrationSession
from nashswarm.experiment import compression
from nashswarm.experiment.plan import plan
from nashswarm.layers import Layer, Moments
from nashswarm.methods.nash_swarm.settings import NashSwarm
from nashswarm.records import files, statistics
from nashswarm.records.provenance import provenance

PREDICTED_SMALL = 0.01  # share of the whole damage below which a part counts as spared

Place = tuple[slice, slice]  # rows and columns
Part = tuple[str, str, list[tuple[Layer, Place]]]  # its kind, its name, and where it lies


def main(arguments: Sequence[str] | None = None) -> None:
    """Compress the model, put back everything but one part, measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="overrides of the configuration, as for experiments.run")
    parser.add_argument("--bits", type=float, default=3.0, help="per parameter, everything counted")
    parser.add_argument("--tokens", type=int, default=2048, help="of held-out text")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/benchmarks/alone"))
    options = parser.parse_args(arguments)
    started = datetime.datetime.now(datetime.UTC)
    config = compose("wandb=disabled", *options.overrides)
    loaded = compression.load(config, plan(config))
    session, method = loaded.session, NashSwarm(bits=options.bits)
    moments = method.game(session.context(), np.random.default_rng(loaded.seed)).moments
    weights = method.compress(session.context(), np.random.default_rng(loaded.seed)).weights
    together = session.heldout_kl(weights, options.tokens)
    rows = []
    for kind, name, places in session.track(parts_of(session), "one part after the other"):
        part = {layer.name: with_part(layer, weights, place) for layer, place in places}
        predicted = [damage(layer, moments, part[layer.name], method.floor) for layer, _ in places]
        measured = session.heldout_kl(part, options.tokens)
        rows.append({"kind": kind, "part": name, "predicted": sum(predicted), "measured": measured})
    content = {"bits": options.bits, "tokens": options.tokens, "together": together, "parts": rows}
    text = table(content)
    files.write_report(options.out, content | {"provenance": provenance(started)}, text)
    print(text)


def parts_of(session: CalibrationSession) -> list[Part]:
    """Return every matrix, and every attention head of a model with separate matrices of queries, keys and values."""
    everything = slice(None)
    parts: list[Part] = [(layer.role, layer.name, [(layer, (everything, everything))]) for layer in session.layers]
    attention: dict[str, dict[str, Layer]] = {}
    for layer in session.layers:
        if layer.role in ("q_proj", "k_proj", "v_proj", "o_proj"):
            attention.setdefault(layer.name.rpartition(".")[0], {})[layer.role] = layer
    for name, by_role in attention.items():
        if len(by_role) < 4:
            continue
        width = session.full.get_submodule(name).head_dim
        for kind, first, second in (("query head", "q_proj", "o_proj"), ("key head", "k_proj", "v_proj")):
            for start in range(0, len(by_role[first].weight), width):
                head = slice(start, start + width)
                other = (everything, head) if second == "o_proj" else (head, everything)
                places = [(by_role[first], (head, everything)), (by_role[second], other)]
                parts.append((kind, f"{name} {start // width}", places))
    return parts


def with_part(layer: Layer, weights: Mapping[str, Tensor], place: Place) -> Tensor:
    """Return the full weights of a layer, compressed in one place."""
    weight = layer.weight.clone()
    weight[place] = weights[layer.name][place]
    return weight


def damage(layer: Layer, moments: Mapping[str, Moments], weight: Tensor, floor: float) -> float:
    """Return the damage that the method predicts for these weights of a layer, in nats per token."""
    return float(layers.curvature(layer, moments, floor).damage_by_row(weight - layer.weight).sum())


def table(content: Mapping[str, Any]) -> str:
    """Return what was measured as a table in Markdown, one row a kind of part."""
    parts = pd.DataFrame(content["parts"])
    matrix = ~parts["kind"].str.endswith("head")
    whole = parts.loc[matrix, "predicted"].sum()
    small = parts[parts["predicted"] < PREDICTED_SMALL * whole]
    lines = [
        "| part | number | predicted (nats) | measured (nats) | correlation of logs | largest measured ÷ predicted | "
        "largest share of the whole KL | the same, of parts predicted below 1 % |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for kind, group in parts.groupby("kind", sort=False):
        measured = group["measured"].clip(lower=1e-12)
        correlation = statistics.correlations(np.log(group["predicted"]), np.log(measured))[0] if len(group) > 1 else 1
        spared = small.loc[small["kind"] == kind, "measured"].max() / content["together"]
        lines.append(
            f"| {kind} | {len(group)} | {group['predicted'].sum():.4f} | {group['measured'].sum():.4f} | "
            f"{correlation:.2f} | {(group['measured'] / group['predicted']).max():.2f} | "
            f"{group['measured'].max() / content['together']:.3f} | {'none' if np.isnan(spared) else f'{spared:.3f}'} |"
        )
    worst = max(content["parts"], key=lambda part: part["measured"] / part["predicted"])
    lines += [
        "",
        f"Everything at once: {content['together']:.4f} nats per token; the matrices alone add up to "
        f"{parts.loc[matrix, 'measured'].sum():.4f}, predicted {whole:.4f}.  The largest ratio is that of "
        f"{worst['kind']} {worst['part']}: {worst['measured']:.5f} against {worst['predicted']:.5f}.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
