"""Train the embedded default: a small GPT-2 on the prose that ships with CPython, or one size of its family.

    python scripts/train_default_model.py --out nashswarm/default_model
    python scripts/train_default_model.py --size xs --steps 1000 --out results/family/default_xs

Reads the text from the running interpreter, trains its own byte-level BPE and the model, and writes a folder in
Hugging Face layout (fp16 weights, tokenizer, model card).  An interrupted run leaves the last written checkpoint.
Two runs never write one folder at a time: the later one waits.
"""

import argparse
import hashlib
import json
import math
import os
import pathlib
import platform
import time
from collections.abc import Sequence

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from nashswarm.data import stdlib_docs
from nashswarm.records import files

END = "<|endoftext|>"
FAMILY = {  # of ``experiment=scaling``; l is as large as the embedded default
    "xs": {"layers": 2, "width": 64, "heads": 2},
    "s": {"layers": 2, "width": 128, "heads": 4},
    "m": {"layers": 4, "width": 192, "heads": 4},
    "l": {"layers": 4, "width": 256, "heads": 4},
}


def train_tokenizer(text: str, vocabulary: int, sequence_length: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of ``vocabulary`` entries on ``text``."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END, model_max_length=sequence_length)


def tokens_of(tokenizer: PreTrainedTokenizerFast, split: str) -> torch.Tensor:
    """Return the token ids of one split of the embedded text."""
    return torch.tensor(tokenizer(stdlib_docs.text(split), verbose=False)["input_ids"])


@torch.no_grad()
def mean_nll(model: GPT2LMHeadModel, tokens: torch.Tensor, sequence_length: int) -> float:
    """Compute nats per token over consecutive windows, the tail dropped."""
    model.eval()
    windows = tokens[: len(tokens) // sequence_length * sequence_length].view(-1, sequence_length)
    total = sum(model(batch, labels=batch).loss.item() * len(batch) for batch in windows.split(16))
    model.train()
    return total / len(windows)


def unigram_nll(train: torch.Tensor, test: torch.Tensor, vocabulary: int) -> float:
    """Compute nats per token on ``test`` of the smoothed token frequencies of ``train``."""
    counts = torch.bincount(train, minlength=vocabulary).double() + 1
    return -(counts / counts.sum()).log()[test].mean().item()


def write(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, out: pathlib.Path, card: dict[str, object]
) -> None:
    """Save fp16 weights, tokenizer and model card into ``out``."""
    half = GPT2LMHeadModel(model.config)
    half.load_state_dict(model.state_dict())
    half.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(card, indent=1) + "\n")
    rows = "\n".join(f"| {key} | {value} |" for key, value in card.items() if not isinstance(value, list))
    (out / "README.md").write_text(
        "---\nlicense: mit\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n"
        "# The default model of nashswarm\n\n"
        "A GPT-2-architecture language model for tests, examples and the quick start: small enough to ship with the "
        "package, trained long enough to lose something when it is compressed. It knows the prose of Python's "
        "documentation and nothing else; do not use it for anything but compression research. Written by "
        "`scripts/train_default_model.py`.\n\n"
        f"| | |\n|---|---|\n{rows}\n"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write the checkpoint to")
    parser.add_argument("--size", choices=FAMILY, help="of the family, instead of layers, width and heads")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=16, help="windows per step")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="train nothing if --out holds a finished model")
    parser.add_argument("--evaluate", action="store_true", help="train nothing: evaluate the checkpoint in --out again")
    options = parser.parse_args(arguments)
    vars(options).update(FAMILY.get(options.size, {}))
    with files.claim(options.out):
        if options.keep and finished(options.out):
            print(f"{options.out} is trained; it stays")
            return
        if not options.evaluate:
            train_model(options)
        evaluate(options.out)


def finished(folder: pathlib.Path) -> bool:
    """Return whether ``folder`` holds a model that was trained to its end, which is when it is tested."""
    card = folder / "training.json"
    return card.exists() and "test_nll" in json.loads(card.read_text())


def train_model(options: argparse.Namespace) -> None:
    """Train the model that the options describe, and write its folder every 250 steps and at the end."""
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    length = options.sequence_length
    tokenizer = train_tokenizer(stdlib_docs.text("train"), options.vocabulary, length)
    train, calibration = tokens_of(tokenizer, "train"), tokens_of(tokenizer, "calibration")
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=length,
        n_embd=options.width,
        n_layer=options.layers,
        n_head=options.heads,
        resid_pdrop=options.dropout,
        embd_pdrop=options.dropout,
        attn_pdrop=options.dropout,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = GPT2LMHeadModel(config)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=options.learning_rate,
        betas=(0.9, 0.95),
    )
    warmup = min(200, options.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / (warmup + 1), 0.5 + 0.5 * math.cos(math.pi * max(0, step - warmup) / (options.steps - warmup))
        ),
    )
    card: dict[str, object] = {
        "architecture": f"GPT-2, {options.layers} blocks, width {options.width}, {options.heads} heads, tied head",
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(tokenizer),
        "sequence_length": length,
        "data": f"topics, docstrings and comment blocks of CPython {platform.python_version()}",
        "train_sha256": hashlib.sha256(stdlib_docs.text("train").encode()).hexdigest(),
        "train_tokens": len(train),
        "seed": options.seed,
        "batch_tokens": options.batch * length,
        "learning_rate": options.learning_rate,
        "dropout": options.dropout,
        "hardware": f"{torch.get_num_threads()} CPU threads, {platform.machine()}, torch {torch.__version__}",
    }
    curve: list[dict[str, float]] = []
    started, running = time.monotonic(), 0.0
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=options.steps, loss="")
        for step in range(1, options.steps + 1):
            starts = rng.integers(0, len(train) - length, options.batch)
            batch = torch.stack([train[start : start + length] for start in starts])
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            running = loss.item() if step == 1 else 0.98 * running + 0.02 * loss.item()
            progress.update(task, advance=1, loss=f"loss {running:.3f}")
            if step % 250 == 0 or step == options.steps:
                curve.append(
                    {
                        "step": step,
                        "train_nll": round(running, 4),
                        "calibration_nll": round(mean_nll(model, calibration, length), 4),
                    }
                )
                progress.console.print(curve[-1], round(time.monotonic() - started), "s")
                card |= {"steps": step, "minutes": round((time.monotonic() - started) / 60, 1), "curve": curve}
                write(model, tokenizer, options.out, card)


def evaluate(folder: pathlib.Path) -> None:
    """Update the test numbers of a checkpoint's card with the text of this interpreter."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
    card = json.loads((folder / "training.json").read_text())
    train, test = tokens_of(tokenizer, "train"), tokens_of(tokenizer, "test")
    nll = mean_nll(model, test, card["sequence_length"])
    card |= {
        "train_nll": card["curve"][-1]["train_nll"],
        "test_sha256": hashlib.sha256(stdlib_docs.text("test").encode()).hexdigest(),
        "test_tokens": len(test),
        "test_nll": round(nll, 4),
        "test_perplexity": round(math.exp(nll), 2),
        "unigram_perplexity": round(math.exp(unigram_nll(train, test, len(tokenizer))), 2),
    }
    write(model, tokenizer, folder, card)
    print(json.dumps({key: value for key, value in card.items() if key != "curve"}, indent=1))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
