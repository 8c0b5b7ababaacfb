"""Does incoherence help?  Values and outputs of every attention head are turned by a random Hadamard matrix.

    python -m experiments.benchmarks.rotation --model <folder of a GPT-2> dataset=wikitext2 dataset.test_windows=60

With Q = H · diag(±1) / √d inside each head, W_v → Q W_v and W_o → W_o Qᵀ leave the function as it is and fuse into the
weights, so that the turned model has the same architecture and no side information (QuaRot, Ashkboos et al. 2024; the
residual stream of a model with LayerNorm cannot be turned so, for LayerNorm subtracts a mean).  Both models are
compressed by the same methods at the same size; the table pairs the KL of their windows.
"""

import argparse
import datetime
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from jaxtyping import Float
from scipy.linalg import hadamard
from torch import Tensor

from experiments.config import compose
from nashswarm.experiment.run import run
from nashswarm.records import files
from nashswarm.records.provenance import provenance
from nashswarm.records.statistics import interval

METHODS = ("nash_lattice method.bits=3.0", "nash_lattice method.bits=2.0", "gptq method.bits=3", "gptq method.bits=2")
TURNS = 3  # draws of the signs


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="overrides of the configuration, as for experiments.run")
    parser.add_argument("--model", required=True, help="folder or hub name")
    parser.add_argument("--records", default="results/benchmarks/records")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/benchmarks/rotation"))
    options = parser.parse_args(arguments)
    started = datetime.datetime.now(datetime.UTC)
    plain = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for method in METHODS:
            straight_run = measured(method, options.model, "straight", options)
            for seed in range(TURNS):
                folder = pathlib.Path(scratch) / str(seed)
                if not folder.exists():
                    turned(plain, seed).save_pretrained(folder)
                    tokenizer.save_pretrained(folder)
                turned_run = measured(method, str(folder), f"turned {seed}", options)
                low, high = interval(
                    [
                        turned_kl - straight_kl
                        for turned_kl, straight_kl in zip(turned_run["kl"], straight_run["kl"], strict=True)
                    ]
                )
                rows.append(
                    {"method": method.replace(" method.", "[") + "]", "signs": seed, "bits": turned_run["bits"]}
                    | {"kl_straight": float(np.mean(straight_run["kl"])), "kl_turned": float(np.mean(turned_run["kl"]))}
                    | {"difference_low": low, "difference_high": high}
                )
    content = {"rows": rows, "provenance": provenance(started)}
    files.write_report(options.out, content, table(rows))
    print(table(rows))


def turned(plain: Any, seed: int) -> Any:
    """A copy of a GPT-2 of the same function, the values of its heads in other coordinates.

    Raises ValueError for another architecture or heads whose width is no power of 2.
    """
    model = transformers.AutoModelForCausalLM.from_config(plain.config)
    model.load_state_dict(plain.state_dict())
    width = plain.config.hidden_size // plain.config.num_attention_heads
    if plain.config.model_type != "gpt2" or width & (width - 1):
        raise ValueError("only a GPT-2 with heads of 2, 4, 8, ... columns can be turned")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in model.transformer.h:
            values = block.attn.c_attn.weight[:, 2 * plain.config.hidden_size :]  # Conv1D: (in, out)
            bias = block.attn.c_attn.bias[2 * plain.config.hidden_size :]
            for start in range(0, plain.config.hidden_size, width):
                head = slice(start, start + width)
                turn = rotation(width, generator)
                values[:, head] = values[:, head] @ turn.T
                bias[head] = turn @ bias[head]
                block.attn.c_proj.weight[head] = turn @ block.attn.c_proj.weight[head]
    return model.eval()


def rotation(width: int, generator: torch.Generator) -> Float[Tensor, "width width"]:
    """An orthogonal matrix whose entries are all ±1/√width."""
    signs = torch.randint(0, 2, (width,), generator=generator) * 2 - 1
    return torch.from_numpy(hadamard(width)).float() * signs / width**0.5


def measured(method: str, model: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the KL of each window and the bits per parameter of one run; a run with a record is not repeated."""
    words = [f"method={method.split()[0]}", *method.split()[1:], "model=local", f"model.path={model}"]
    config = compose(*words, "wandb=disabled", f"records={options.records}", *options.overrides)
    labels = {"model": name, "method": method, "dataset": "any", "measure": "quality", "experiment": "rotation"}
    record = run(config, labels).record
    return {"kl": record.series["kl"], "bits": record.metrics["bits_per_weight_model"]}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    head = "| method | signs | bits/param | KL as it is | KL turned | turned minus as it is |"
    lines = [head, "| :-- | --: | --: | --: | --: | --: |"]
    for row in rows:
        lines.append(
            f"| {row['method']} | {row['signs']} | {row['bits']:.3f} | {row['kl_straight']:.4g} "
            f"| {row['kl_turned']:.4g} | [{row['difference_low']:+.3g}, {row['difference_high']:+.3g}] |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
