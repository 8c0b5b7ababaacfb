"""A model with its calibration text: statistics of its layers, and the effect of candidate weights on held-out text."""

import contextlib
import copy
import dataclasses
import functools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from nashswarm.calibration import expert_traffic
from nashswarm.calibration.cache import Cache
from nashswarm.calibration.context import CalibrationContext, Quantize
from nashswarm.calibration.expert_traffic import Prices
from nashswarm.calibration.moments import Expected, calibrate
from nashswarm.calibration.moments_table import MomentsTable
from nashswarm.calibration.prefix_replay import PrefixReplay
from nashswarm.calibration.reach import keep_unreached, score_of
from nashswarm.layers import Layer
from nashswarm.memory import trim_heap
from nashswarm.models import evaluation, kept, matrices
from nashswarm.packed import file_format
from nashswarm.progress import Track, show_progress

ReferenceOutputs = evaluation.Reference | Float[Tensor, "some width"]  # of the full-precision model on some text


class CalibrationSession:
    """A model, its layers, its calibration windows and its held-out windows.

    Methods see a session only through its ``context()``.  ``seed`` is that of the labels sampled from the model.
    ``layers``: those that calibration reaches.  ``unreached``: why the others stay at 16 bits, by name.
    """

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
        self.full, self.calibration, self.holdout = model, calibration, holdout
        self.layers, self.unreached = keep_unreached(model, layers, calibration)
        trim_heap()  # the activations of the window that was tried
        if self.unreached:
            setattr(model.config, kept.UNCOMPRESSED, kept.describe_unreached(self.unreached))
        self.seed, self.cache, self.track = seed, cache, track
        self.subsets: dict[int, _HeldoutSubset] = {}
        self.parameters = sum(parameter.numel() for parameter in model.parameters())

    @functools.cached_property
    def candidate_model(self) -> Any:
        """A copy of the model for trying weights.  It is made on first use, because calibration needs the memory."""
        return copy.deepcopy(self.full)

    @contextlib.contextmanager
    def _candidate(self, weights: Mapping[str, Tensor]) -> Iterator[Any]:
        """Provide the candidate model with these layer weights, and restore full precision afterwards."""
        matrices.set_weights(self.candidate_model, weights)
        try:
            yield self.candidate_model
        finally:
            full = {layer.name: layer.weight for layer in self.layers if layer.name in weights}
            matrices.set_weights(self.candidate_model, full)

    @contextlib.contextmanager
    def _replaced(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Give the full model itself these layer weights, during the context.

        Its own ones wait in a file: calibration needs the memory that another model would take.
        """
        layers = [layer for layer in self.layers if layer.name in weights]
        with tempfile.TemporaryFile(dir=self.cache.folder) as file:
            for layer in layers:
                layer.weight.numpy().tofile(file)
            try:
                matrices.set_weights(self.full, weights)
                yield
            finally:
                file.seek(0)
                for layer in layers:  # whose weights may be those of the model
                    own = torch.from_numpy(np.fromfile(file, np.float32, layer.parameters))
                    layer.weight.copy_(own.view_as(layer.weight))
                    matrices.set_weights(self.full, {layer.name: layer.weight})

    def context(self) -> CalibrationContext:
        """Return what a compression method may know of the model."""
        others = matrices.uncompressed_tensors(self.full, self.layers)
        placeholders = {layer.name: np.zeros(layer.parameters // 3, np.uint8) for layer in self.layers}
        placeholders[file_format.TABLES] = np.zeros(1000, np.uint8)
        files = file_format.checkpoint_files(self.full, placeholders, others, 16)
        fixed = sum(map(len, files.values())) - sum(map(len, placeholders.values()))
        return CalibrationContext(
            layers=self.layers,
            fixed_bytes=fixed + 3 * len(self.layers),  # the header grows by some digits if layers are larger
            parameters=self.parameters,
            moments=self.moments,
            heldout_kl=self.heldout_kl,
            cached=self.cache,
            track=self.track,
            zipf_moments=self.zipf_moments,
            moments_after=self.moments_after,
            inputs_after=self.inputs_after,
            calibration=(self.full, self.calibration),
            experts=expert_traffic.routed_experts(
                self.full,
                lambda: self.candidate_model,
                [module for layer in self.layers for module in layer.modules],
                self.calibration,
                lambda: self._calibrate(self.calibration, "zipf"),
                self.heldout_kl,
            ),
        )

    def store(
        self,
        packed: Mapping[str, Any],
        weights: Mapping[str, Tensor],
        float_bits: int,
        file_bytes: int | None = None,
        prices: Prices | None = None,
    ) -> tuple[dict[str, bytes], dict[str, float]]:
        """Put compressed layers on the candidate model: the files of its checkpoint, and their sizes.

        Every road that compresses a model in memory ends here: the API, the command line and the experiments.
        ``packed``: bytes by layer, ``weights``: what they stand for.  Everything else in the model is rounded to
        ``float_bits``, as it is stored.  ``file_bytes``: the size of another library's own file, which counts instead
        of the checkpoint's.  ``prices``: of experts, where they changed.
        """
        model = self.candidate_model
        expert_traffic.set_prices(model, prices or {})
        others = matrices.uncompressed_tensors(model, self.layers)
        matrices.set_weights(model, weights)
        matrices.round_to_stored(others, float_bits)
        files = file_format.checkpoint_files(model, packed, others, float_bits)
        return files, file_format.sizes_of(
            file_bytes=sum(len(content) for content in files.values()) if file_bytes is None else file_bytes,
            packed_bytes=sum(len(content) for content in packed.values()),
            packed_weights=sum(layer.parameters for layer in self.layers),
            parameters=self.parameters,
        )

    def moments(self) -> MomentsTable:
        """Return the calibration statistics of all modules of the layers, computed or read from the cache."""
        tensors = self.cache("moments", {}, lambda: self._calibrate(self.calibration, "even").tensors())
        return MomentsTable.from_tensors(tensors)

    def zipf_moments(self, share: int = 1) -> MomentsTable:
        """Return the statistics with tokens expected by Zipf's law, of one in ``share`` windows, or from the cache."""
        windows = self.calibration[: max(len(self.calibration) // share, 1)]
        tensors = self.cache(
            "moments_zipf", {"windows": len(windows)}, lambda: self._calibrate(windows, "zipf").tensors()
        )
        return MomentsTable.from_tensors(tensors)

    def moments_after(self, quantize: Quantize, key: Mapping[str, Any]) -> MomentsTable:
        """Return ``zipf_moments()`` with gradients of a model that is quantized already, or from the cache.

        ``quantize`` makes its weights from those statistics; ``key``: the settings that they depend on.  A gradient
        that vanishes in the full model, as that of a saturated attention head does, need not vanish there.  The inputs
        stay those of the full model: with those of the quantized one, errors that it makes already would look like
        part of the text.
        """
        before = self.zipf_moments()

        def gradients() -> dict[str, Tensor]:
            weights = quantize(before)
            with self._replaced(weights):
                del weights
                return self._calibrate(self.calibration, "zipf", before).gradients()

        return before.with_gradients(self.cache("gradients_after", key, gradients))

    def _calibrate(
        self, windows: Integer[Tensor, "windows length"], expected: Expected, known: MomentsTable | None = None
    ) -> MomentsTable:
        """Compute the statistics of all modules of the layers, with the weights that the model has now.

        ``known``: statistics whose inputs stay.
        """
        names = [module for layer in self.layers for module in layer.modules]
        generator = torch.Generator().manual_seed(self.seed)
        moments = calibrate(
            self.full, names, windows, generator, track=self.track, score=score_of(self.full), expected=expected,
            rounded=expected == "zipf", known=known,
        )  # fmt: skip
        trim_heap()
        return moments

    @torch.no_grad()
    def inputs_after(self, weights: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        """Compute E[x xᵀ] of modules over the calibration windows, in the model with these layer weights.

        All other layers are in full precision.
        """
        sums: dict[str, Tensor] = {}

        def add_inputs(name: str, module: Any, arguments: tuple[Any, ...]) -> None:
            x = arguments[0].detach().float().flatten(0, -2)
            sums[name] = sums.get(name, 0) + (x.T @ x).double().cpu()

        hooks = [
            self.candidate_model.get_submodule(name).register_forward_pre_hook(functools.partial(add_inputs, name))
            for name in names
        ]
        positions = 0
        with self._candidate(weights) as model:
            for window in self.calibration:
                tokens = evaluation.without_padding(self.full, window)
                model(input_ids=tokens[None])
                positions += len(tokens)
        for hook in hooks:
            hook.remove()
        return {name: (total / positions).float() for name, total in sums.items()}

    @property
    def causal(self) -> bool:
        """Whether the model predicts tokens, so that the divergence of its predictions can be measured."""
        return self.full.get_output_embeddings() is not None

    @functools.cached_property
    def reference(self) -> evaluation.Reference:
        """Predictions of the full-precision model on the held-out windows."""
        return evaluation.compute_reference(self.full, self.holdout, evaluation.BATCH)

    @functools.cached_property
    def embeddings(self) -> Float[Tensor, "holdout width"]:
        """Embeddings of the held-out windows by a full-precision model without an output vocabulary."""
        return evaluation.embed_all(self.full, self.holdout)

    @functools.cached_property
    def mean_length(self) -> int:
        """Mean number of tokens in a held-out window, without padding."""
        lengths = [len(evaluation.without_padding(self.full, window)) for window in self.holdout]
        return max(sum(lengths) // len(lengths), 1)

    def heldout_kl(self, weights: Mapping[str, Tensor], tokens: int | None) -> float:
        """Compute how far these layer weights move the model on held-out calibration text.

        The result is a KL divergence in nats per token, or 1 − cosine similarity of the embeddings for a model without
        an output vocabulary.  ``tokens`` is the size of the text, and None stands for all of it.
        """
        if tokens is None:
            self.subsets.clear()  # frees the recorded outputs
            return self.divergence(weights, self.holdout, self.reference if self.causal else self.embeddings)
        if tokens not in self.subsets:
            self.subsets[tokens] = self._subset(self.holdout[: -(-tokens // self.mean_length)])
        subset = self.subsets[tokens]
        with subset.replay.skip_prefix(weights):
            return self.divergence(weights, subset.windows, subset.reference)

    def _subset(self, windows: Integer[Tensor, "some length"]) -> "_HeldoutSubset":
        run = functools.partial(
            evaluation.evaluate if self.causal else evaluation.embed_all, self.candidate_model, windows
        )
        reference = self.reference.with_cached_logits(len(windows)) if self.causal else self.embeddings[: len(windows)]
        return _HeldoutSubset(windows, reference, PrefixReplay(self.candidate_model, run))

    def divergence(
        self, weights: Mapping[str, Tensor], windows: Integer[Tensor, "some length"], reference: ReferenceOutputs
    ) -> float:
        """Compute the divergence of the model with these layer weights from its ``reference`` outputs."""
        with self._candidate(weights) as model:
            if isinstance(reference, evaluation.Reference):
                metrics = evaluation.summarise(evaluation.evaluate(model, windows, full=reference))
                divergence = metrics["kl"]
            else:
                divergence = evaluation.embedding_distance(reference, evaluation.embed_all(model, windows))
        trim_heap()
        return divergence


@dataclasses.dataclass(frozen=True)
class _HeldoutSubset:
    """Some held-out windows, the outputs of the full-precision model on them, and those of its blocks."""

    windows: Integer[Tensor, "some length"]
    reference: ReferenceOutputs
    replay: PrefixReplay
