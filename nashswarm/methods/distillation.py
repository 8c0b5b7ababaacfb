"""Recovery: a compressed model is trained to say what the full one says, within its format and its bytes.

What the format holds is trained and nothing else: norms, biases and other tensors beside the matrices, the floats among
the scales, and the codes (``quant.latent``).  The loss is KL(full ‖ compressed) on calibration text that is not held
out, in nats per token (of a model without a vocabulary 1 − cosine of its answers), plus what codes take in an
entropy-coded file at the price at which high-rate theory would buy the next bit: damage falls as 4^−b, so
``λ = 2 ln 2 · KL / weights``.  States along the way are packed to real bytes.  Where these exceed what they were by
more than a thousandth, the codes that grew longer and went least far go back until they do not.  Of all that were
packed the state of least KL on held-out text is kept; the untrained one is among them.
"""

import dataclasses
import logging
import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional

from nashswarm.calibration.session import CalibrationSession
from nashswarm.errors import Unsupported
from nashswarm.methods.method import Compressed
from nashswarm.models import evaluation, matrices
from nashswarm.packed import file_format
from nashswarm.packed.tiles import to_tiles
from nashswarm.quant.container import KINDS
from nashswarm.quant.entropy import CodeTables, coded_bits
from nashswarm.quant.grid import QuantizedTensor
from nashswarm.quant.lattice import LatticeTensor
from nashswarm.quant.prototype import ClassedTensor
from nashswarm.quant.trainable_codes import TrainableCodes, encode_tensors

STALE = ("regret", "potential", "damage")  # how metrics begin that tell of the codes before they were trained
TOLERANCE = 1e-3  # how much more than before the packed matrices may take
TRIMS = 4  # attempts to fit the bytes
SLACK = 0.02  # of the excess, taken away on top of it

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Recovery:
    """How a compressed model is trained: AdamW without decay of weights, rates that fall linearly to zero.

    ``batch_size``: windows a step.  ``windows``: how many are trained on, drawn by lot where there are more.
    ``code_rate``: of latent codes, in steps of their grids; ``scale_rate``: of the logarithms of scales;
    ``float_rate``: of what stands beside the matrices.  A rate of 0 leaves that part as it is.  ``candidates``: how
    many states, evenly spaced, are packed and judged on held-out text.
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
    """The compressed model after training, and how that went."""

    result: Compressed
    metrics: dict[str, float]
    series: dict[str, list[float]]


@dataclasses.dataclass(frozen=True)
class State:
    """A model as it would be stored: packed matrices, their tensors and, rounded, what stands beside them."""

    packed: dict[str, UInt8[np.ndarray, " _"]]
    tensors: dict[str, LatticeTensor | QuantizedTensor]
    floats: list[Tensor]

    def weights(self) -> dict[str, Tensor]:
        return {name: tensor.dequantize() for name, tensor in self.tensors.items()}


def recover(
    session: CalibrationSession,
    result: Compressed,
    windows: Int[Tensor, "windows length"],
    settings: Recovery,
    rng: np.random.Generator,
) -> Recovered:
    """Train what ``result`` stores on ``windows``; ``evidence.trial`` has the floats beside the matrices afterwards.

    Raises Unsupported for a format that cannot be trained, ValueError without a window to train on.
    """
    if not len(windows):
        raise ValueError("no calibration text is left to train on; lower dataset.holdout_windows or give more text")
    drawn = torch.from_numpy(rng.permutation(len(windows))[: settings.windows]).to(windows.device)
    return _Training(session, result, windows[drawn], settings).run(rng)


class _Training:
    """One training under way."""

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
        self.latents: dict[str, TrainableCodes] = {}
        for layer in session.layers:
            content = result.packed[layer.name]
            tensor = file_format.decode(layer.name, content, tables)
            if isinstance(tensor, ClassedTensor):
                raise Unsupported(f"task=finetune cannot train the format in which {layer.name} is stored")
            coded = content[:4].tobytes() in KINDS.values()
            self.latents[layer.name] = TrainableCodes(tensor, layer.weight, windows.device, coded, tables)
        taken = {id(self.candidate_model.get_submodule(layer.name).weight) for layer in session.layers}
        self.floats = [
            part for part in self.candidate_model.parameters() if id(part) not in taken and part.is_floating_point()
        ]
        self.limit = int((1 + TOLERANCE) * _size(result.packed))
        self.teacher: Any = (
            evaluation.compute_reference(session.full, windows, session.batch)
            if session.causal
            else evaluation.embed_all(session.full, windows, session.batch)
        )

    def run(self, rng: np.random.Generator) -> Recovered:
        settings = self.settings
        best = self.state(0.0, self.result.packed)
        least = before = self.judge(best)
        chosen = 0
        series: dict[str, list[float]] = {"finetune_loss": [], "finetune_kl_heldout": [before]}
        coded = sum(latent.codes.numel() for latent in self.latents.values() if latent.coded)
        price = 2 * math.log(2) * before / coded if coded else 0.0
        groups = [
            ([latent.codes for latent in self.latents.values()], settings.code_rate),
            ([latent.scale for latent in self.latents.values()], settings.scale_rate),
            (self.floats, settings.float_rate),
        ]
        trained = [{"params": list(parts), "lr": rate} for parts, rate in groups if parts and rate]
        optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / settings.steps)
        judged = {round(settings.steps * (number + 1) / settings.candidates) for number in range(settings.candidates)}
        for step in self.session.track(range(1, settings.steps + 1), "recovering"):
            series["finetune_loss"].append(self.step(self.batch(rng), price))
            optimizer.step()
            decay.step()
            for latent in self.latents.values():
                latent.clamp_codes()
            if step in judged and (state := self.fitted()) is not None:
                kl = self.judge(state)
                series["finetune_kl_heldout"].append(kl)
                log.debug("step %d: held-out KL %.5f, %d bytes", step, kl, _size(state.packed))
                if kl < least:
                    best, least, chosen = state, kl, step
        self.candidate_model.zero_grad(set_to_none=True)
        self.place(best.floats)
        found = {
            "finetune_steps": settings.steps,
            "finetune_chosen_step": chosen,
            "finetune_windows": len(self.windows),
            "finetune_kl_heldout": least,
            "finetune_kl_heldout_before": before,
        }
        return Recovered(self.report(best, chosen > 0), found, series)

    def batch(self, rng: np.random.Generator) -> Int[Tensor, " batch"]:
        """Windows drawn by lot, none twice in a batch."""
        size = min(self.settings.batch_size, len(self.windows))
        return torch.from_numpy(rng.choice(len(self.windows), size, replace=False)).to(self.windows.device)

    def step(self, batch: Int[Tensor, " batch"], price: float) -> float:
        """Gradients of the loss on a batch, in every parameter; the loss."""
        matrices.set_weights(self.candidate_model, {name: latent.weight() for name, latent in self.latents.items()})
        self.candidate_model.zero_grad(set_to_none=True)
        loss = self.loss(batch)
        loss.backward()
        for name, latent in self.latents.items():
            latent.backpropagate(matrices.weight_gradient(self.candidate_model, name), price)
        return loss.item()

    def loss(self, batch: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
        if not self.session.causal:
            apart: Tensor = (evaluation.embed(self.candidate_model, self.windows[batch]) - self.teacher[batch]).square()
            return apart.sum(1).mean() / 2
        with torch.no_grad():
            wanted = self.teacher.head(self.teacher.states[batch])[:, :-1].float().log_softmax(-1)
        own = self.candidate_model(input_ids=self.windows[batch]).logits[:, :-1].float().log_softmax(-1)
        return functional.kl_div(own, wanted, reduction="none", log_target=True).sum(-1).mean()

    def state(self, least: float, packed: Any = None) -> State:
        """What would be stored now, but for codes that grew longer without going further than ``least`` steps."""
        tensors = {name: latent.quantized(least) for name, latent in self.latents.items()}
        coded = {name: latent.coded for name, latent in self.latents.items()}
        stored = encode_tensors(tensors, coded, file_format.TABLES) if packed is None else dict(packed)
        floats = [part.detach().clone() for part in self.floats]
        if self.result.float_bits == 16:
            floats = [part.half().to(part.dtype) for part in floats]
        return State(stored, tensors, floats)

    def fitted(self) -> State | None:
        """What would be stored now, in the bytes of the start but for ``TOLERANCE``; None if it is not finite or does
        not fit."""
        finite = [*self.floats, *(part for latent in self.latents.values() for part in (latent.codes, latent.scale))]
        if not all(part.isfinite().all() for part in finite):
            return None
        state = self.state(0.0)
        excess = 8.0 * (_size(state.packed) - self.limit)
        log.debug("%d bytes of at most %d", _size(state.packed), self.limit)
        if excess <= 0:
            return state
        moves = [latent.lengthened_codes() for latent in self.latents.values() if latent.coded]
        if not moves:
            return None
        way, grown = (torch.cat(parts) for parts in zip(*moves, strict=True))
        order = way.argsort(stable=True)
        saved = grown[order].double().cumsum(0)
        wanted = 0.0
        for _ in range(TRIMS):
            wanted += (1 + SLACK) * excess
            place = int(torch.searchsorted(saved, wanted))
            state = self.state(float(way[order[place]]) if place < len(order) else math.inf)
            excess = 8.0 * (_size(state.packed) - self.limit)
            if excess <= 0:
                return state
        return None

    def judge(self, state: State) -> float:
        """KL in nats per token on held-out text."""
        now = [part.detach().clone() for part in self.floats]
        self.place(state.floats)
        found = self.session.heldout_kl(state.weights(), None)
        self.place(now)
        return found if math.isfinite(found) else math.inf

    @torch.no_grad()
    def place(self, floats: list[Tensor]) -> None:
        for part, value in zip(self.floats, floats, strict=True):
            part.copy_(value)

    def report(self, best: State, trained: bool) -> Compressed:
        """The compressed model; what was certified of it before, under names that say so."""
        own = self.result
        found = {f"{name}_before" if name.startswith(STALE) else name: value for name, value in own.metrics.items()}
        if not trained:
            return dataclasses.replace(own, metrics=found)
        bits: dict[str, float] = {}
        if file_format.TABLES in best.packed:
            tables = CodeTables.unpack(best.packed[file_format.TABLES])
            lattices = {name: part for name, part in best.tensors.items() if isinstance(part, LatticeTensor)}
            bits = {name: float(coded_bits(tensor, tables).sum()) for name, tensor in lattices.items()}
            resident = sum(to_tiles(tensor).nbytes for tensor in lattices.values())
            found["bits_per_weight_resident"] = 8 * resident / sum(part.codes.numel() for part in lattices.values())
        return dataclasses.replace(
            own,
            packed=best.packed,
            weights=best.weights(),
            allocation=_reworded(
                own.allocation, {name: bits[name] / best.tensors[name].codes.numel() for name in bits}
            ),
            code_bits=int(sum(bits.values())) if bits else own.code_bits,
            damage={},
            metrics=found,
            game={},
        )


def _size(packed: Any) -> int:
    return sum(len(content) for content in packed.values())


def _reworded(allocation: str, bits: dict[str, float]) -> str:
    """The lines of lattices with the bits per weight that their codes take now."""
    lines = [line.split(" ", 2) for line in allocation.splitlines()]
    found = [[line[0], f"{bits[line[0]]:.3f}", *line[2:]] if line[0] in bits else line for line in lines]
    return "".join(" ".join(line) + "\n" for line in found)
