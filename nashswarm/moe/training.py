"""Train a mixture of experts on text, and cache it.

The cache key is everything that the training depends on, so that all measures share one trained model.  An interrupted
training continues from its last checkpoint to the same bits.
"""

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
AFTERWARDS = ("follow", "residency")  # settings of a router that training does not use
BETAS = (0.9, 0.95)
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Training:
    """AdamW with a linear warm-up over ``warmup`` steps and a cosine decay to a tenth of ``learning_rate``.

    ``steps``: of ``batch_size`` random windows each; no window comes twice before all have come once.  ``clip``:
    largest norm of the gradient.  ``price_steps``: batches after training that move prices alone, towards the mean of
    their bids.  ``save_every``: steps between two checkpoints.  ``any_version``: accept a cached model of the same
    settings that another version of this program trained; the record says which.
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
    """A trained model with its tokenizer.

    ``series``: by step, ``train_loss`` (L), ``train_nll`` (nats per token) and every other term of L.  ``code``: digest
    of the program that trained it.
    """

    model: MoeForCausalLM
    tokenizer: Any
    series: dict[str, list[float]]
    code: str


def load_or_train(
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
    """Return the model of ``source`` with ``router``, trained on ``text`` or taken from ``cache``.

    ``length``: tokens per window; None: the model's context.  ``code``: digest of the program, as another program may
    train another model.  Raises ValueError for a text that is too short or a loss that is not finite.
    """
    description = kinds.describe(router)
    made_of = {
        "model": dataclasses.asdict(source),
        "router": description,
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
    key = training_key(made_of)
    folder = cache / f"moe-{fingerprint(key)}"
    if settings.any_version and not folder.is_dir():
        folder = of_any_version(key, cache) or folder
    tokenizer = transformers.AutoTokenizer.from_pretrained(sources.EMBEDDED)
    checkpoint = folder.with_name(f"{folder.name}.checkpoint")
    with claim(folder):  # another measure of a sweep may ask for the same model
        if not folder.is_dir():
            training_windows = cut_windows(source, text, length, "training").to(device)
            if len(training_windows) < settings.batch_size:
                few = f"the training text has {len(training_windows)} windows"
                raise ValueError(f"{few}; lower train_moe.batch_size or give more")
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = source.build(router, len(tokenizer), tokenizer.eos_token_id)
            model.to(torch.device(device))  # type: ignore[arg-type]
            series = train(model, training_windows, settings, router.loss, seed, checkpoint, track)

            def fill(partial: pathlib.Path) -> None:
                model.save_pretrained(partial)
                tokenizer.save_pretrained(partial)

            history = json.dumps({"made_of": made_of, "series": series}, allow_nan=False) + "\n"
            write_folder(folder, {HISTORY: history.encode()}, fill)
            checkpoint.unlink(missing_ok=True)
    about = json.loads((folder / HISTORY).read_text())
    config = MoeConfig.from_pretrained(folder)
    config.router = description  # as it is now: settings that training does not use may differ
    saved: Any = MoeForCausalLM.from_pretrained(folder, config=config)
    return Trained(saved.eval().to(device), tokenizer, about["series"], about["made_of"]["code"])


def training_key(made_of: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of ``made_of`` that the training depends on, as plain JSON values."""
    router = {name: value for name, value in made_of["router"].items() if name not in AFTERWARDS}
    training = {name: value for name, value in made_of["training"].items() if name != "any_version"}
    key: dict[str, Any] = json.loads(json.dumps({**made_of, "router": router, "training": training}))
    return key


def of_any_version(key: Mapping[str, Any], cache: pathlib.Path) -> pathlib.Path | None:
    """Return the folder of the newest cached model with this key, whatever program trained it; None if there is
    none."""
    for history in sorted(cache.glob(f"moe-*/{HISTORY}"), key=lambda path: path.stat().st_mtime, reverse=True):
        cached_key = training_key(json.loads(history.read_text())["made_of"])
        if {**cached_key, "code": None} == {**key, "code": None}:
            log.info("using %s, which another version of this program trained", history.parent.name)
            return history.parent
    return None


def cut_windows(source: MoeSource, text: str, length: int | None, what: str) -> Int[Tensor, "windows length"]:
    """Cut ``text`` into windows of ``length`` tokens; None: the model's context.

    Raises ValueError for a length outside the context, or a text that fills no window; ``what`` names the text.
    """
    size = source.context if length is None else length
    if not 2 <= size <= source.context:
        raise ValueError(f"dataset.sequence_length={size} is not between 2 and model.context={source.context}")
    return corpus.cut_windows(text, transformers.AutoTokenizer.from_pretrained(sources.EMBEDDED), size, what)


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
    """Train the model in place and return the series of ``Trained``.

    Training continues from ``checkpoint`` if the file exists.  ``stop``: called after every step; it may end training
    by an exception.  Raises ValueError if the loss is not finite.
    """
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
        log.info("training continues after step %d of %d", done, settings.steps)
    order = draw_batches(len(windows), settings, seed)
    model.train()
    for step in track(range(done, settings.steps), "training"):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * schedule(step, settings)
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
    """Take one step of training, move the prices, and return the loss and its parts by name, in nats per token."""
    output = model(input_ids=batch, labels=batch)
    assert output.loss is not None and output.routings is not None
    parts = loss.terms(output.routings, batch.shape[1], weights.congestion)
    total = loss.total(output.loss, parts, weights)
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    model.settle(output.routings)
    values: Mapping[str, Tensor] = {"train_loss": total, "train_nll": output.loss, **parts}
    return {name: value.item() for name, value in values.items()}


def draw_batches(windows: int, settings: Training, seed: int) -> list[Int[Tensor, " batch"]]:
    """Return the numbers of the windows of every step: random permutations of all windows, one after the other."""
    rng = np.random.default_rng((seed, 0))
    needed = settings.steps * settings.batch_size
    drawn: Sequence[Any] = [rng.permutation(windows) for _ in range(-(-needed // windows))]
    order = torch.from_numpy(np.concatenate(drawn)[:needed])
    return list(order.split(settings.batch_size))


def schedule(step: int, settings: Training) -> float:
    """Return the learning rate of a step as a fraction of the largest one.

    >>> [round(schedule(step, Training(steps=100, warmup=10)), 3) for step in (0, 9, 10, 99)]
    [0.1, 1.0, 1.0, 0.1]
    """
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(settings.steps - settings.warmup, 1)
    return 0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2
