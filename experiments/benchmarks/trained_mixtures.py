"""What does compression cost mixtures of experts of transformers' own architectures, once they are trained?

    python -m experiments.benchmarks.trained_mixtures

A tiny Mixtral, Qwen3-MoE, DeepSeek-V3 and gpt-oss each learn the embedded text for about a minute on one thread, since
a divergence from random weights says little.  ``nashswarm.compress`` then packs each of them by ``nash_swarm``, and by
``gptq`` at the whole widths whose files come closest in bytes.  Every result is saved, opened again, and compared with
the full model on test text that neither trained nor calibrated it.  A last row calibrates on so little text that some
experts see no token of it.
"""

import argparse
import copy
import dataclasses
import datetime
import functools
import pathlib
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

import nashswarm
from nashswarm.calibration.expert_traffic import count_routed
from nashswarm.data import corpus, stdlib_docs
from nashswarm.models import evaluation, matrices
from nashswarm.models.split_experts import unfuse
from nashswarm.packed.account import TensorEntry
from nashswarm.records import files
from nashswarm.records.provenance import provenance
from nashswarm.records.statistics import interval
from scripts.train_default_model import train_tokenizer, unigram_nll

LENGTH = 128  # tokens of a window
BATCH = 16  # windows of a step
RATE, WARMUP = 3e-3, 20  # of Adam; steps until it is reached
BALANCE = 1e-3  # how far DeepSeek's balancing moves the bias of an expert in a step
SHAPE: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 32,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": LENGTH, "bos_token_id": 0,
    "eos_token_id": 0, "pad_token_id": 0, "router_aux_loss_coef": 0.01,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {  # architecture → what its experts and attention are like
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 16, "num_experts_per_tok": 4, "norm_topk_prob": True},
    "deepseek_v3": {
        "num_hidden_layers": 3, "first_k_dense_replace": 1, "intermediate_size": 128, "n_routed_experts": 16,
        "n_shared_experts": 1, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "num_key_value_heads": 4,
        "kv_lora_rank": 64, "q_lora_rank": 64, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 32,
        "head_dim": 16,
    },
    "gpt_oss": {
        "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
    },
}  # fmt: skip
BITS = (3.0, 4.0)
WIDTHS = (2, 3, 4, 8)  # of gptq, among which the closest files are chosen
SCARCE = (2, 32)  # windows and tokens of each, of the row that calibrates on almost nothing


@dataclasses.dataclass(frozen=True)
class Text:
    """Token windows for each purpose, and the tokenizer that made them."""

    tokenizer: Any
    train: Tensor
    calibration: Tensor
    test: Tensor


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, compress and measure every mixture, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(OWN), default=list(OWN))
    parser.add_argument("--steps", type=int, default=240, help="of training (240)")
    parser.add_argument("--vocabulary", type=int, default=1024, help="tokens of a tokenizer made for the text (1024)")
    parser.add_argument("--windows", type=int, default=64, help="of calibration text, a quarter held out (64)")
    parser.add_argument("--test-windows", type=int, default=64, help="evenly spread over the test text (64)")
    parser.add_argument("--bits", type=float, nargs="+", default=BITS, help="of nash_swarm, everything counted (3 4)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/benchmarks/trained_mixtures"))
    options = parser.parse_args(arguments)
    started = datetime.datetime.now(datetime.UTC)
    text = read_text(options.vocabulary, options.windows, options.test_windows)
    report: dict[str, Any] = {"models": {}, "rows": []}
    for kind in options.models:
        before = time.monotonic()
        model = train(kind, text, options.steps)
        report["models"][kind] = describe(model, text, options.steps) | {"seconds": time.monotonic() - before}
        report["rows"] += [{"model": kind, **row} for row in compress(model, text, options.bits)]
        files.write_report(options.out, report | {"provenance": provenance(started)}, table(report))
    print(table(report))


def read_text(vocabulary: int, windows: int, test_windows: int) -> Text:
    """Cut the embedded text into windows by a tokenizer that is trained on its first part."""
    tokenizer = train_tokenizer(stdlib_docs.text("train"), vocabulary, LENGTH)
    cut = {split: corpus.cut_windows(stdlib_docs.text(split), tokenizer, LENGTH, split) for split in stdlib_docs.SPLITS}
    return Text(tokenizer, cut["train"], spread(cut["calibration"], windows), spread(cut["test"], test_windows))


def spread(windows: Tensor, count: int) -> Tensor:
    """Return ``count`` windows that are evenly spread over all."""
    return windows[torch.linspace(0, len(windows) - 1, min(count, len(windows))).long()]


def train(kind: str, text: Text, steps: int) -> Any:
    """Train a mixture of this architecture from a fixed seed, its experts balanced as the architecture does it."""
    cls = transformers.CONFIG_MAPPING[kind]
    config = cls(**SHAPE | {"vocab_size": len(text.tokenizer)} | OWN[kind])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = transformers.AutoModelForCausalLM.from_config(config)
    biased = [module for module in model.modules() if hasattr(module, "e_score_correction_bias")]
    for module in biased:
        module.register_forward_hook(rebalance)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, 1 - 0.9 * step / max(steps, 1))
    )
    generator = torch.Generator().manual_seed(0)
    model.train()
    for step in range(steps):
        batch = text.train[torch.randint(len(text.train), (BATCH,), generator=generator)]
        loss = model(input_ids=batch, labels=batch, **{} if biased else {"output_router_logits": True}).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"{kind}: step {step}, loss {float(loss.detach()):.3f}", flush=True)
    return model.eval()


@torch.no_grad()
def rebalance(router: Any, arguments: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Raise the bias of experts that few tokens chose, and lower that of others, as DeepSeek-V3 was trained."""
    if router.training:
        load = torch.bincount(output[2].flatten(), minlength=len(router.e_score_correction_bias)).float()
        router.e_score_correction_bias += BALANCE * (load.mean() - load).sign()


def describe(model: Any, text: Text, steps: int) -> dict[str, Any]:
    """Count parameters and experts, and compare the model with the frequencies of tokens."""
    tables = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    nll = evaluation.evaluate(model, text.test, BATCH)["nll"]
    targets = text.test[:, 1:].flatten()
    return {
        "parameters": model.num_parameters(),
        "besides_embeddings": model.num_parameters() - sum(table.numel() for table in tables),
        "steps": steps,
        "nll": float(np.mean(nll)),
        "nll_of_frequencies": unigram_nll(text.train.flatten(), targets, len(text.tokenizer)),
    }


def compress(model: Any, text: Text, bits: Sequence[float]) -> list[dict[str, Any]]:
    """Compress the model by each method, and measure what its files hold."""
    reference = evaluation.compute_reference(model, text.test, BATCH)
    measured = functools.partial(measure, model, text, reference)
    ours = [measured("nash_swarm", width, text.calibration) for width in bits]
    theirs = [measured("gptq", width, text.calibration) for width in WIDTHS]
    rows = []
    for row in ours:
        closest = min(theirs, key=lambda other: abs(other["bytes_file"] - row["bytes_file"]))
        rows += [row] if closest in rows else [row, closest]
    windows, length = SCARCE
    return [*rows, measured("nash_swarm", min(bits), text.calibration[:windows, :length])]


def measure(
    model: Any, text: Text, reference: evaluation.Reference, method: str, bits: float, windows: Tensor
) -> dict[str, Any]:
    """Compress the model, open its files again, and compare it with the full one on the test windows."""
    small, made = nashswarm.compress(model, text.tokenizer, method, windows, bits)
    with tempfile.TemporaryDirectory() as folder:
        small.save_pretrained(folder)
        opened = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        positions = evaluation.evaluate_positions(opened, text.test, BATCH, reference)
        opened.dequantize()
    by_window = evaluation.window_means(positions)
    print(f"{method} {bits:g}: {made.bytes_file:,} bytes, KL {np.mean(by_window['kl']):.4f}", flush=True)
    return {
        "method": method,
        "bits": bits,
        "calibration_windows": len(windows),
        "bytes_file": made.bytes_file,
        "bits_per_weight_model": made.bits_per_weight_model,
        "damage": made.metrics.get("damage"),
        "kl": float(np.mean(by_window["kl"])),
        "kl_interval": interval(by_window["kl"]),
        **evaluation.distribution(positions["kl"], text.test, None),
        "top1_agreement": float(np.mean(by_window["top1_agreement"])),
        "nll_delta": float(np.subtract(by_window["nll"], by_window["nll_full"]).mean()),
        **unseen(model, windows, method, bits),
        "experts_erased": len({name.rpartition(".expert_")[0] for name in erased(opened)}),
        **kept(made.tensors),
        "seconds": made.seconds,
        "kl_windows": by_window["kl"],
    }


def unseen(model: Any, windows: Tensor, method: str, bits: float) -> dict[str, int]:
    """Count experts, and those to which no token of the windows is routed that ``nashswarm.compress`` draws."""
    split = copy.deepcopy(model)
    unfuse(split)
    names = [name for layer in matrices.find_layers(split) for name in layer.modules]
    most = corpus.most_windows(nashswarm.api.method_of(method, bits))
    drawn, _ = corpus.draw_windows(windows, None, None, np.random.default_rng(0), most)
    tokens, _ = count_routed(split, names, drawn)
    experts: dict[str, int] = {}
    for name, count in tokens.items():
        expert = name.rpartition(".")[0]
        experts[expert] = max(experts.get(expert, 0), count)
    return {"experts": len(experts), "experts_unseen": sum(not count for count in experts.values())}


def erased(model: Any) -> list[str]:
    """Return the matrices of experts that have no weight but 0: the game gave them no bits."""
    named = ((name, weight) for name, weight in model.named_parameters() if ".expert_" in name and weight.ndim == 2)
    return [name for name, weight in named if not weight.any()]


def kept(tensors: Sequence[TensorEntry]) -> dict[str, Any]:
    """Count the tensors of routers and the bits of their parameters in the file, and what no method saw."""
    routers = [entry for entry in tensors if entry.reason == "router" and entry.parameters]
    return {
        "routers": len(routers),
        "router_bits": sorted({8 * entry.nbytes / entry.parameters for entry in routers}),
        "unknown_layout": [entry.name for entry in tensors if entry.reason == "unknown layout"],
    }


def table(report: Mapping[str, Any]) -> str:
    """Return what was trained, and what compression cost it, as two tables in Markdown."""
    lines = [
        "| mixture | parameters | besides embeddings | steps | seconds | NLL | NLL of token frequencies |",
        "| :-- | --: | --: | --: | --: | --: | --: |",
    ]
    for kind, model in report["models"].items():
        lines.append(
            f"| {kind} | {model['parameters']:,} | {model['besides_embeddings']:,} | {model['steps']} | "
            f"{model['seconds']:.0f} | {model['nll']:.3f} | {model['nll_of_frequencies']:.3f} |"
        )
    lines += [
        "",
        "| mixture | method | windows | bytes | bits/param | predicted | KL (nats/token) | 99th percentile | top-1 | "
        "ΔNLL | experts without tokens | with a matrix of zeros | routers |",
        "| :-- | :-- | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: | :-- |",
    ]
    for row in report["rows"]:
        low, high = row["kl_interval"]
        routers = f"{row['routers']} at {', '.join(f'{bits:g}' for bits in row['router_bits'])} bits"
        lines.append(
            f"| {row['model']} | {row['method']} {row['bits']:g} | {row['calibration_windows']} | "
            f"{row['bytes_file']:,} | {row['bits_per_weight_model']:.3f} | {row['damage']:.4f} | "
            f"{row['kl']:.4f} [{low:.4f}, {high:.4f}] | "
            f"{row['kl_p99']:.3f} | {row['top1_agreement']:.1%} | {row['nll_delta']:+.4f} | "
            f"{row['experts_unseen']} of {row['experts']} | {row['experts_erased']} | {routers} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
