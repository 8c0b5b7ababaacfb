"""Finetune a compressed model by distillation from the full one, within its format and its bytes.

Only what the format stores is trained: norms, biases and other tensors beside the matrices, the scales, and the codes
(``quant.trainable_codes``).  The loss is KL(full ‖ compressed) in nats per token, on calibration text that is not held
out; for a model without a vocabulary it is 1 − cosine of the two models' answers.  Codes of an entropy-coded file also
pay for their length, at the price at which high-rate theory would buy the next bit: damage falls as 4^−b, so
``λ = 2 ln 2 · KL / weights``.

Some states along the way are packed to real bytes.  If these exceed the original size by more than a thousandth, the
codes that became longer and moved least are reset until the bytes fit.  The state of least KL on held-out text is
kept; the untrained one is among the candidates.
"""

import dataclasses
import logging
import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from nashswarm.calibration.session import CalibrationSession
from nashswarm.errors import Unsupported
from nashswarm.kernels.trellis import Trellis
from nashswarm.methods.method import Compressed
from nashswarm.methods.stored_state import StoredState, packed_bytes, with_stale_metrics
from nashswarm.models import evaluation, matrices
from nashswarm.packed import file_format
from nashswarm.quant.entropy import CodeTables
from nashswarm.quant.lattice_paths import PathTensor
from nashswarm.quant.prototype import ClassedTensor
from nashswarm.quant.trainable_codes import TrainableCodes, encode_tensors

TOLERANCE = 1e-3  # share by which the packed matrices may grow
TRIMS = 4  # attempts to fit the bytes
SLACK = 0.02  # share of the excess that is trimmed in addition

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Recovery:
    """Settings of the training: AdamW without weight decay, learning rates that fall linearly to zero.

    ``batch_size``: windows a step.  ``windows``: the most that are trained on, drawn at random from what there is.
    ``code_rate``: learning rate of latent codes, in steps of their grids.  ``scale_rate``: of the logarithms of scales.
    ``float_rate``: of the tensors beside the matrices.  A rate of 0 leaves its part as it is.  ``candidates``: how many
    states, evenly spaced, are packed and evaluated on held-out text.

    Raises ValueError for settings without a meaning.
    """

    steps: int = 64
    batch_size: int = 2
    windows: int = 512
    code_rate: float = 0.004
    scale_rate: float = 0.002
    float_rate: float = 0.001
    candidates: int = 2

    def __post_init__(self) -> None:
        if min(self.batch_size, self.windows) < 1 or not 1 <= self.candidates <= self.steps:
            raise ValueError(
                f"finetune.batch_size={self.batch_size} and finetune.windows={self.windows} must be at least 1, and "
                f"finetune.candidates={self.candidates} "
                f"between 1 and finetune.steps={self.steps}"
            )
        rates = (self.code_rate, self.scale_rate, self.float_rate)
        if min(rates) < 0 or not all(map(math.isfinite, rates)) or not any(rates):
            raise ValueError(
                f"finetune.code_rate, scale_rate and float_rate are {', '.join(map(str, rates))}: none may be "
                "negative, and one at least must be positive"
            )


@dataclasses.dataclass(frozen=True)
class Recovered:
    """The compressed model after training, with metrics and series of the training."""

    result: Compressed
    metrics: dict[str, float]
    series: dict[str, list[float]]


def recover(
    session: CalibrationSession,
    result: Compressed,
    windows: Int[Tensor, "windows length"],
    settings: Recovery,
    rng: np.random.Generator,
) -> Recovered:
    """Train what ``result`` stores on ``windows``.

    Afterwards ``session.candidate_model`` has the trained tensors beside the matrices.

    Raises Unsupported for a format that cannot be trained, and ValueError without a window to train on.
    """
    if not len(windows):
        raise ValueError("no calibration text is left to train on; lower dataset.holdout_windows or give more text")
    drawn = torch.from_numpy(rng.permutation(len(windows))[: settings.windows]).to(windows.device)
    return _Training(session, result, windows[drawn], settings).run(rng)


class _Training:
    """One training in progress: the trainable codes of every layer, and the parameters beside them."""

    def __init__(
        self,
        session: CalibrationSession,
        result: Compressed,
        windows: Int[Tensor, "windows length"],
        settings: Recovery,
    ) -> None:
        self.session, self.result, self.windows, self.settings = session, result, windows, settings
        self.candidate_model = session.candidate_model
        packed_tables = result.packed.get(file_format.TABLES)
        tables = None if packed_tables is None else CodeTables.unpack(packed_tables)
        self.codes: dict[str, TrainableCodes] = {}
        for layer in session.layers:
            content = result.packed[layer.name]
            tensor = file_format.decode(layer.name, content, tables)
            if isinstance(tensor, ClassedTensor | PathTensor | Trellis):
                raise Unsupported(
                    f"task=finetune cannot train the format in which {layer.name} is stored: choose a method that "
                    "stores a lattice or groups, such as method=nash_lattice or method=gptq"
                )
            coded = file_format.is_entropy_coded(content)
            self.codes[layer.name] = TrainableCodes(tensor, layer.weight, windows.device, coded, tables)
        matrix_ids = {id(self.candidate_model.get_submodule(layer.name).weight) for layer in session.layers}
        self.floats = [
            parameter
            for parameter in self.candidate_model.parameters()
            if id(parameter) not in matrix_ids and parameter.is_floating_point()
        ]
        self.byte_limit = int((1 + TOLERANCE) * packed_bytes(result.packed))
        self.teacher: Any = (
            evaluation.compute_reference(session.full, windows, evaluation.BATCH)
            if session.causal
            else evaluation.embed_all(session.full, windows, evaluation.BATCH)
        )

    def run(self, rng: np.random.Generator) -> Recovered:
        """Train, and return the candidate of least held-out KL."""
        settings = self.settings
        best = self.state(0.0, self.result.packed)
        best_kl = kl_before = self.heldout_kl(best)
        best_step = 0
        series: dict[str, list[float]] = {"finetune_loss": [], "finetune_kl_heldout": [kl_before]}
        coded_weights = sum(codes.codes.numel() for codes in self.codes.values() if codes.coded)
        price = 2 * math.log(2) * kl_before / coded_weights if coded_weights else 0.0
        groups = [
            ([codes.codes for codes in self.codes.values()], settings.code_rate),
            ([codes.scale for codes in self.codes.values()], settings.scale_rate),
            (self.floats, settings.float_rate),
        ]
        trained = [{"params": list(parameters), "lr": rate} for parameters, rate in groups if parameters and rate]
        optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / settings.steps)
        candidate_steps = {
            round(settings.steps * (number + 1) / settings.candidates) for number in range(settings.candidates)
        }
        for step in self.session.track(range(1, settings.steps + 1), "recovering"):
            series["finetune_loss"].append(self.backward(self.draw_batch(rng), price))
            optimizer.step()
            decay.step()
            for codes in self.codes.values():
                codes.clamp_codes()
            if step in candidate_steps and (state := self.state_within_limit()) is not None:
                kl = self.heldout_kl(state)
                series["finetune_kl_heldout"].append(kl)
                log.debug("step %d: held-out KL %.5f, %d bytes", step, kl, state.size)
                if kl < best_kl:
                    best, best_kl, best_step = state, kl, step
        self.candidate_model.zero_grad(set_to_none=True)
        self.set_floats(best.floats)
        metrics = {
            "finetune_steps": settings.steps,
            "finetune_chosen_step": best_step,
            "finetune_windows": len(self.windows),
            "finetune_kl_heldout": best_kl,
            "finetune_kl_heldout_before": kl_before,
        }
        result = with_stale_metrics(self.result)
        return Recovered(best.as_result(result) if best_step else result, metrics, series)

    def draw_batch(self, rng: np.random.Generator) -> Int[Tensor, " batch"]:
        """Return the numbers of random windows, none twice."""
        size = min(self.settings.batch_size, len(self.windows))
        return torch.from_numpy(rng.choice(len(self.windows), size, replace=False)).to(self.windows.device)

    def backward(self, batch: Int[Tensor, " batch"], price: float) -> float:
        """Compute the gradient of every parameter on a batch; return the loss."""
        weights = {name: codes.weight() for name, codes in self.codes.items()}
        matrices.set_weights(self.candidate_model, weights)
        self.candidate_model.zero_grad(set_to_none=True)
        loss = self.loss(batch)
        loss.backward()
        for name, codes in self.codes.items():
            codes.backpropagate(matrices.weight_gradient(self.candidate_model, name), price)
        return loss.item()

    def loss(self, batch: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
        """Return the KL in nats per token on a batch, or 1 − cosine of the answers without a vocabulary."""
        if not self.session.causal:
            answers = evaluation.embed(self.candidate_model, self.windows[batch])
            squared_distance: Tensor = (answers - self.teacher[batch]).square().sum(1)
            return squared_distance.mean() / 2
        with torch.no_grad():
            target = self.teacher.head(self.teacher.states[batch])[:, :-1].float().log_softmax(-1)
        logits = self.candidate_model(input_ids=self.windows[batch]).logits[:, :-1]
        divergence = functional.kl_div(logits.float().log_softmax(-1), target, reduction="none", log_target=True)
        return divergence.sum(-1).mean()

    def state(self, min_move: float, packed: Any = None) -> StoredState:
        """Return what would be stored now; codes that grew longer by a move of at most ``min_move`` steps are reset."""
        tensors = {name: codes.quantized(min_move) for name, codes in self.codes.items()}
        coded = {name: codes.coded for name, codes in self.codes.items()}
        content = encode_tensors(tensors, coded, file_format.TABLES) if packed is None else dict(packed)
        floats = [parameter.detach().clone() for parameter in self.floats]
        if self.result.float_bits == 16:
            floats = [values.half().to(values.dtype) for values in floats]
        return StoredState(content, tensors, floats)

    def state_within_limit(self) -> StoredState | None:
        """Return what would be stored now, trimmed to the byte limit; None if it is not finite or does not fit."""
        parameters = [part for codes in self.codes.values() for part in (codes.codes, codes.scale)]
        if not all(part.isfinite().all() for part in [*self.floats, *parameters]):
            return None
        state = self.state(0.0)
        excess_bits = 8.0 * (state.size - self.byte_limit)
        log.debug("%d bytes of at most %d", state.size, self.byte_limit)
        if excess_bits <= 0:
            return state
        lengthened = [codes.lengthened_codes() for codes in self.codes.values() if codes.coded]
        if not lengthened:
            return None
        moves, growth = (torch.cat(parts) for parts in zip(*lengthened, strict=True))
        order = moves.argsort(stable=True)
        saved_bits = growth[order].double().cumsum(0)
        bits_to_save = 0.0
        for _ in range(TRIMS):
            bits_to_save += (1 + SLACK) * excess_bits
            place = int(torch.searchsorted(saved_bits, bits_to_save))
            state = self.state(float(moves[order[place]]) if place < len(order) else math.inf)
            excess_bits = 8.0 * (state.size - self.byte_limit)
            if excess_bits <= 0:
                return state
        return None

    def heldout_kl(self, state: StoredState) -> float:
        """Return the KL of ``state`` in nats per token on held-out text, infinite if it is not a number."""
        current = [parameter.detach().clone() for parameter in self.floats]
        self.set_floats(state.floats)
        kl = self.session.heldout_kl(state.weights(), None)
        self.set_floats(current)
        return kl if math.isfinite(kl) else math.inf

    @torch.no_grad()
    def set_floats(self, floats: list[Tensor]) -> None:
        """Write values into the parameters beside the matrices."""
        for parameter, values in zip(self.floats, floats, strict=True):
            parameter.copy_(values)
