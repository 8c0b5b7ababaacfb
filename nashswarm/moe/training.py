"""Training a mixture of experts on text, once: what is trained lies in the cache under everything that made it, goes on
where it was interrupted, bit for bit, and serves every measure."""

import dataclasses
import io
import json
import logging
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from jaxtyping import Int
from torch import Tensor

from nashswarm.data import corpus
from nashswarm.models import sources
from nashswarm.moe import loss
from nashswarm.moe.model import MoeConfig, MoeForCausalLM, MoeSource
from nashswarm.moe.router import kinds
from nashswarm.moe.router.router import RouterSettings
from nashswarm.progress import Track
from nashswarm.records.files import claim, write_folder, write_whole
from nashswarm.records.record import fingerprint

HISTORY = "training.json"
AFTERWARDS = ("follow", "residency")  # settings of a router that training does not see
BETAS = (0.9, 0.95)
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Training:
    """AdamW, the rate rising over ``warmup`` steps and falling along a cosine to a tenth of ``learning_rate``.

    ``steps`` of ``batch_size`` windows each, drawn by lot, none twice before all were seen.  ``clip``: the largest norm
    of a gradient.  ``price_steps``: batches after training that move prices and nothing else, their bids averaged.
    ``save_every``: steps between two checkpoints.  ``any_version``: take a model of the same settings from the cache
    although another version of this program has trained it; the record tells which.
    """

    steps: int = 500
    batch_size: int = 16
    learning_rate: float = 0.003
    weight_decay: float = 0.1
    warmup: int = 50
    clip: float = 1.0
    price_steps: int = 50
    save_every: int = 100
    any_version: bool = False

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.save_every) < 1 or self.learning_rate <= 0 or self.clip <= 0:
            raise ValueError(
                "train_moe.steps, batch_size and save_every must be at least 1, train_moe.learning_rate and "
                "train_moe.clip positive"
            )


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained model, its tokenizer, by step what it was trained on, ``train_loss`` (L), ``train_nll`` and every term
    of L, and the digest of the program that trained it."""

    model: MoeForCausalLM
    tokenizer: Any
    series: dict[str, list[float]]
    code: str


def trained(
    source: MoeSource,
    router: RouterSettings,
    settings: Training,
    text: str,
    length: int | None,
    seed: int,
    device: str,
    cache: pathlib.Path,
    track: Track,
    code: str,
) -> Trained:
    """The model of ``source`` with ``router``, trained on ``text``: read from ``cache``, or made and put there.

    ``length``: tokens of a window, by default all that the model reads.  ``code``: a digest of the program, for another
    one would train another model.  Raises ValueError for a text that is too short or a loss that is not finite.
    """
    described = kinds.describe(router)
    made_of = {
        "model": dataclasses.asdict(source),
        "router": described,
        "training": dataclasses.asdict(settings),
        "training_sha256": corpus.sha256(text),
        "sequence_length": length,
        "seed": seed,
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "code": code,
    }
    key = trained_by(made_of)
    folder = cache / f"moe-{fingerprint(key)}"
    if settings.any_version and not folder.is_dir():
        folder = of_any_version(key, cache) or folder
    tokenizer = transformers.AutoTokenizer.from_pretrained(sources.EMBEDDED)
    checkpoint = folder.with_name(f"{folder.name}.checkpoint")
    with claim(folder):  # another measure of a sweep may ask for the same model
        if not folder.is_dir():
            taught = windows(source, text, length, "training").to(device)
            if len(taught) < settings.batch_size:
                few = f"the training text has {len(taught)} windows"
                raise ValueError(f"{few}; lower train_moe.batch_size or give more")
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = source.build(router, len(tokenizer), tokenizer.eos_token_id)
            model.to(torch.device(device))  # type: ignore[arg-type]
            series = train(model, taught, settings, router.loss, seed, checkpoint, track)

            def fill(partial: pathlib.Path) -> None:
                model.save_pretrained(partial)
                tokenizer.save_pretrained(partial)

            told = json.dumps({"made_of": made_of, "series": series}, allow_nan=False) + "\n"
            write_folder(folder, {HISTORY: told.encode()}, fill)
            checkpoint.unlink(missing_ok=True)
    history = json.loads((folder / HISTORY).read_text())
    config = MoeConfig.from_pretrained(folder)
    config.router = described  # as it is now: another ``follow`` is not another training
    found: Any = MoeForCausalLM.from_pretrained(folder, config=config)
    return Trained(found.eval().to(device), tokenizer, history["series"], history["made_of"]["code"])


def trained_by(made_of: Mapping[str, Any]) -> dict[str, Any]:
    """Of all that a model was made of what its training saw."""
    router = {name: value for name, value in made_of["router"].items() if name not in AFTERWARDS}
    training = {name: value for name, value in made_of["training"].items() if name != "any_version"}
    found: dict[str, Any] = json.loads(json.dumps({**made_of, "router": router, "training": training}))
    return found


def of_any_version(key: Mapping[str, Any], cache: pathlib.Path) -> pathlib.Path | None:
    """The folder of the model that was trained last with these settings, whatever the program."""
    for history in sorted(cache.glob(f"moe-*/{HISTORY}"), key=lambda path: path.stat().st_mtime, reverse=True):
        theirs = trained_by(json.loads(history.read_text())["made_of"])
        if {**theirs, "code": None} == {**key, "code": None}:
            log.info("%s was trained by another version of the program, and is taken as it is", history.parent.name)
            return history.parent
    return None


def windows(source: MoeSource, text: str, length: int | None, what: str) -> Int[Tensor, "windows length"]:
    """``text`` as windows of ``length`` tokens, by default all that the model reads.

    Raises ValueError for a length that it does not read, or a text that fills no window; ``what`` names the text.
    """
    wanted = source.context if length is None else length
    if not 2 <= wanted <= source.context:
        raise ValueError(f"dataset.sequence_length={wanted} is not between 2 and model.context={source.context}")
    return corpus.cut_windows(text, transformers.AutoTokenizer.from_pretrained(sources.EMBEDDED), wanted, what)


def train(
    model: MoeForCausalLM,
    windows: Int[Tensor, "windows length"],
    settings: Training,
    weights: loss.LossWeights,
    seed: int,
    checkpoint: pathlib.Path,
    track: Track,
    stop: Callable[[int], object] = lambda step: None,
) -> dict[str, list[float]]:
    """Train in place; the series of ``Trained``.  What ``checkpoint`` holds is gone on from.  ``stop``: called after
    every step, to end early by an exception."""
    decayed = [part for part in model.parameters() if part.ndim > 1]
    plain = [part for part in model.parameters() if part.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=BETAS, fused=True)
    series: dict[str, list[float]] = {name: [] for name in ("train_loss", "train_nll", *loss.TERMS)}
    done = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=windows.device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done, series = state["step"], state["series"]
        log.info("training goes on after step %d of %d", done, settings.steps)
    order = batches(len(windows), settings, seed)
    model.train()
    for step in track(range(done, settings.steps), "training"):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate(step, settings)
        for name, value in one_step(model, windows[order[step]], optimizer, settings.clip, weights).items():
            series[name].append(value)
        if not math.isfinite(series["train_loss"][-1]):
            raise ValueError(f"the loss of step {step + 1} is not finite; lower train_moe.learning_rate")
        if (step + 1) % settings.save_every == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            content = io.BytesIO()
            torch.save(state | {"series": series}, content)
            write_whole(checkpoint, content.getvalue())
            log.info("step %d of %d: training NLL %.3f", step + 1, settings.steps, series["train_nll"][-1])
        stop(step + 1)
    model.train(False)
    if any(router.settles for router in model.routers()):
        for number in track(range(settings.price_steps), "settling prices"):
            with torch.no_grad():
                model.settle(model(input_ids=windows[order[number % len(order)]]).routings or (), 1 / (number + 1))
    return series


def one_step(
    model: MoeForCausalLM,
    batch: Int[Tensor, "batch length"],
    optimizer: torch.optim.Optimizer,
    clip: float,
    weights: loss.LossWeights,
) -> dict[str, float]:
    """One step of training, prices moved after it; the loss and its parts."""
    answer = model(input_ids=batch, labels=batch)
    assert answer.loss is not None and answer.routings is not None
    parts = loss.terms(answer.routings, batch.shape[1], weights.congestion)
    found = loss.total(answer.loss, parts, weights)
    optimizer.zero_grad(set_to_none=True)
    found.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    model.settle(answer.routings)
    values: Mapping[str, Tensor] = {"train_loss": found, "train_nll": answer.loss, **parts}
    return {name: value.item() for name, value in values.items()}


def batches(windows: int, settings: Training, seed: int) -> list[Int[Tensor, " batch"]]:
    """The windows of every step: one order by lot after the other."""
    rng = np.random.default_rng((seed, 0))
    needed = settings.steps * settings.batch_size
    drawn: Sequence[Any] = [rng.permutation(windows) for _ in range(-(-needed // windows))]
    order = torch.from_numpy(np.concatenate(drawn)[:needed])
    return list(order.split(settings.batch_size))


def rate(step: int, settings: Training) -> float:
    """The share of the learning rate at a step.

    >>> [round(rate(step, Training(steps=100, warmup=10)), 3) for step in (0, 9, 10, 99)]
    [0.1, 1.0, 1.0, 0.1]
    """
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    gone = (step - settings.warmup) / max(settings.steps - settings.warmup, 1)
    return 0.1 + 0.9 * (1 + math.cos(math.pi * gone)) / 2
