"""What is known of a model that is to be compressed: calibration statistics, and how far weights move it on held-out
text.  An ``CalibrationContext`` answers from it, and methods see nothing else."""

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from nashswarm.calibration.cache import Cache
from nashswarm.calibration.context import CalibrationContext
from nashswarm.calibration.moments import calibrate, summed_nll
from nashswarm.calibration.prefix_replay import PrefixReplay
from nashswarm.layers import Layer, Moments
from nashswarm.memory import trim_heap
from nashswarm.models import evaluation, matrices
from nashswarm.packed import file_format
from nashswarm.progress import Track, show_progress

HELDOUT_LOGITS = 1 << 26  # in a batch of held-out windows: what their divergence may take in memory
Compute = Callable[[], dict[str, Tensor]]
Truth = evaluation.Reference | Float[Tensor, "some width"]  # what a full model says about text


class CalibrationSession:
    """A model, its layers, and the windows that calibrate it and those held out; ``seed`` is that of labels drawn from
    the model."""

    def __init__(
        self,
        model: Any,
        layers: tuple[Layer, ...],
        calibration: Integer[Tensor, "windows length"],
        holdout: Integer[Tensor, "holdout length"],
        seed: int,
        cache: Cache,
        track: Track = show_progress,
    ) -> None:
        self.full, self.layers, self.calibration, self.holdout = model, layers, calibration, holdout
        self.seed, self.cache, self.track = seed, cache, track
        self.probes: dict[int, _Probe] = {}
        self.parameters = sum(parameter.numel() for parameter in model.parameters())

    @functools.cached_property
    def candidate_model(self) -> Any:
        """A copy of the model to try weights on, made when first asked for: calibration needs the room."""
        return copy.deepcopy(self.full)

    def context(self) -> CalibrationContext:
        """All that the method may know."""
        others = matrices.uncompressed_tensors(self.full, self.layers)
        likely = {layer.name: np.zeros(layer.parameters // 3, np.uint8) for layer in self.layers}
        likely[file_format.TABLES] = np.zeros(1000, np.uint8)
        fixed = sum(len(content) for content in file_format.checkpoint_files(self.full, likely, others, 16).values())
        fixed -= sum(len(content) for content in likely.values())
        return CalibrationContext(
            layers=self.layers,
            fixed_bytes=fixed + 3 * len(self.layers),  # of the header: longer numbers, if layers take more
            parameters=self.parameters,
            moments=self.moments,
            heldout_kl=self.heldout_kl,
            cached=self.cache,
            track=self.track,
            inputs_after=self.inputs_after,
            calibration=(self.full, self.calibration),
        )

    def moments(self) -> dict[str, Moments]:
        """Calibration statistics of every module of the layers."""
        names = [module for layer in self.layers for module in layer.modules]
        parts = [field.name for field in dataclasses.fields(Moments)]
        score = summed_nll if self.causal else evaluation.projection

        def compute() -> dict[str, Tensor]:
            generator = torch.Generator().manual_seed(self.seed)
            found = calibrate(self.full, names, self.calibration, generator, track=self.track, score=score)
            trim_heap()
            return {f"{name}/{part}": getattr(moments, part) for name, moments in found.items() for part in parts}

        tensors = self.cache("moments", {}, compute)
        return {name: Moments(*(tensors[f"{name}/{part}"] for part in parts)) for name in names}

    @torch.no_grad()
    def inputs_after(self, weights: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        """E[x xᵀ] of these modules over the calibration windows, with these layer weights and the others in full."""
        sums: dict[str, Tensor] = {}

        def see(name: str, module: Any, arguments: tuple[Any, ...]) -> None:
            x = arguments[0].detach().float().flatten(0, -2)
            sums[name] = sums.get(name, 0) + (x.T @ x).double().cpu()

        hooks = [
            self.candidate_model.get_submodule(name).register_forward_pre_hook(functools.partial(see, name))
            for name in names
        ]
        matrices.set_weights(self.candidate_model, weights)
        positions = 0
        for window in self.calibration:
            tokens = evaluation.without_padding(self.full, window)
            self.candidate_model(input_ids=tokens[None])
            positions += len(tokens)
        matrices.set_weights(
            self.candidate_model, {layer.name: layer.weight for layer in self.layers if layer.name in weights}
        )
        for hook in hooks:
            hook.remove()
        return {name: (total / positions).float() for name, total in sums.items()}

    @property
    def causal(self) -> bool:
        """Whether it predicts tokens, so that the divergence of its predictions can be measured."""
        return self.full.get_output_embeddings() is not None

    @functools.cached_property
    def reference(self) -> evaluation.Reference:
        return evaluation.compute_reference(self.full, self.holdout, self.batch)

    @functools.cached_property
    def embeddings(self) -> Float[Tensor, "holdout width"]:
        """What a full model without a vocabulary makes of the held-out windows."""
        return evaluation.embed_all(self.full, self.holdout, self.batch)

    @functools.cached_property
    def mean_length(self) -> int:
        """Tokens of a held-out window, its padding aside."""
        return max(
            sum(len(evaluation.without_padding(self.full, window)) for window in self.holdout) // len(self.holdout), 1
        )

    @property
    def batch(self) -> int:
        """Windows in a batch of held-out text: 8, or fewer of a long window and a large vocabulary."""
        rows = len(self.full.get_output_embeddings().weight) if self.causal else 1
        return min(max(HELDOUT_LOGITS // (rows * self.holdout.shape[1]), 1), 8)

    def heldout_kl(self, weights: Mapping[str, Tensor], tokens: int | None) -> float:
        """KL in nats per token on held-out calibration text of the model with these layer weights; of a model without
        a vocabulary 1 − cosine of its answers."""
        if tokens is None:
            self.probes.clear()  # they hold all that a full model says about their text
            return self.moved(weights, self.holdout, self.reference if self.causal else self.embeddings)
        if tokens not in self.probes:
            self.probes[tokens] = self.probe(self.holdout[: -(-tokens // self.mean_length)])
        probe = self.probes[tokens]
        with probe.replay.skip_prefix(weights):
            return self.moved(weights, probe.windows, probe.truth)

    def probe(self, windows: Integer[Tensor, "some length"]) -> "_Probe":
        """What one layer after the other is tried on."""
        run = functools.partial(
            evaluation.evaluate if self.causal else evaluation.embed_all, self.candidate_model, windows, self.batch
        )
        truth = self.reference.with_cached_logits(len(windows)) if self.causal else self.embeddings[: len(windows)]
        return _Probe(windows, truth, PrefixReplay(self.candidate_model, run))

    def moved(self, weights: Mapping[str, Tensor], windows: Integer[Tensor, "some length"], truth: Truth) -> float:
        """How far the model's answers are from the ``truth`` with these layer weights."""
        matrices.set_weights(self.candidate_model, weights)
        if isinstance(truth, evaluation.Reference):
            found = evaluation.summarise(evaluation.evaluate(self.candidate_model, windows, self.batch, truth))["kl"]
        else:
            found = evaluation.embedding_distance(
                truth, evaluation.embed_all(self.candidate_model, windows, self.batch)
            )
        matrices.set_weights(
            self.candidate_model, {layer.name: layer.weight for layer in self.layers if layer.name in weights}
        )
        trim_heap()
        return found


@dataclasses.dataclass(frozen=True)
class _Probe:
    """Some held-out windows, what the full model says about them, and the answers of its blocks."""

    windows: Integer[Tensor, "some length"]
    truth: Truth
    replay: PrefixReplay
