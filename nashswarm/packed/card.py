"""Write the model card of a compressed model, from its record and what else is known about it."""

import pathlib
from collections.abc import Mapping
from typing import Any

from nashswarm.models.architecture import auto_class

WITHOUT_PLAYERS = (".AsPublished", ".NashArchive")  # methods that leave nothing to certify


def card(about: Mapping[str, Any]) -> str:
    """Return a model card for the hub, as Markdown.

    ``about``: the content of ``nashswarm.json``; folders compressed by layer say less.
    """
    record, source, facts = about["record"], about["config"]["model"], about.get("card", {})
    base = source.get("path")
    on_hub = base is not None and not pathlib.Path(base).exists()
    rows = _size_rows(record) | _quality_rows(record, facts) | _origin_rows(record)
    if "tensors" in facts:
        rows["kept at 16 or 32 bits"] = _kept(facts["tensors"])
    kind = auto_class(facts.get("architecture", "LlamaForCausalLM"))
    head = "\n".join(["---", "library_name: transformers", "tags: [nashswarm, quantized]"])
    head += f"\nbase_model: {base}\n---" if on_hub else "\n---"
    commands = "`nashswarm inspect` lists what is in it."
    target = about["config"].get("method", {}).get("_target_", "")
    if "by_layer" not in about and not target.endswith(WITHOUT_PLAYERS):
        commands = f"`nashswarm certify` computes the regret again from the bytes of this folder, {commands}"
    table = "\n".join(["| | |", "| :-- | --: |", *(f"| {name} | {value} |" for name, value in rows.items())])
    return f"""{head}

# {record["labels"]["model"]}, compressed by nashswarm

{table}

```python
import nashswarm  # makes the format known to transformers
from transformers import {kind}

model = {kind}.from_pretrained("this folder")
```

{commands}
"""


def _size_rows(record: Mapping[str, Any]) -> dict[str, str]:
    metrics = record["metrics"]
    rows = {
        "method": record["labels"]["method"],
        "stored bits per parameter, everything counted": f"{metrics['bits_per_weight_model']:.3f}",
        "bytes on disk": f"{metrics['bytes_file']:,} ({metrics['compression']:.1%} less than 32-bit floats)",
    }
    if "bytes_resident" in metrics:
        resident = f"{metrics['bytes_resident']:,.0f} (the full model: {metrics['bytes_resident_full']:,.0f})"
        rows["bytes in memory"] = resident
    if "regret_max" in metrics:
        rows["largest regret of a player, nats per token"] = f"{metrics['regret_max']:.1e}"
    return rows


def _quality_rows(record: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, str]:
    """Return what compressing cost: on the record's test text, or else on held-out calibration text."""
    metrics, text = record["metrics"], f"on {record['labels'].get('dataset', 'its text')}"
    if "kl" not in metrics:
        metrics = facts.get("heldout", {})
        text = "on held-out calibration text"
    rows = {}
    if "kl" in metrics:
        unit = "example" if "examples" in metrics else "token"
        rows[f"KL to the full model {text}, nats per {unit}"] = f"{metrics['kl']:.4f}"
    if "kl_median" in metrics:
        rows["its median and 99th percentile"] = f"{metrics['kl_median']:.4f}, {metrics['kl_p99']:.4f}"
    if "top1_agreement" in metrics:
        rows["same most likely prediction"] = f"{metrics['top1_agreement']:.1%}"
    if "nll_delta" in metrics:
        full = metrics["nll"] - metrics["nll_delta"]
        rows["negative log-likelihood, nats per token"] = f"{metrics['nll']:.4f} (the full model: {full:.4f})"
    if "distance" in metrics:
        rows[f"1 − cosine to the full model's outputs {text}"] = f"{metrics['distance']:.2e}"
    if number := metrics.get("tokens", metrics.get("texts")):
        rows["measured on"] = f"{number:,.0f} {'tokens' if 'tokens' in metrics else 'texts'}"
    return rows


def _origin_rows(record: Mapping[str, Any]) -> dict[str, str]:
    rows, origin = {}, record.get("provenance", {})
    dataset = record.get("config", {}).get("dataset", {})
    if "calibration_sha256" in dataset:
        source = dataset.get("source", record["labels"].get("dataset", "a text"))
        rows["calibrated on"] = f"{source}, sha256 {dataset['calibration_sha256']}"
    if types := origin.get("dequantized_from"):
        rows["weights of the full model"] = f"dequantized from {' and '.join(types)}"
    if version := origin.get("versions", {}).get("nashswarm"):
        rows["made by"] = f"nashswarm {version}"
    return rows


def _kept(tensors: list[dict[str, Any]]) -> str:
    """Return the kept tensors by reason with their share of all parameters, in one line."""
    total = sum(row["parameters"] for row in tensors)
    kept = [row for row in tensors if row["state"] == "kept"]
    return "; ".join(f"{row['reason']}: {row['parameters'] / total:.2%}" for row in kept) or "nothing"
