"""Moments of modules that calibration text did not reach: experts without tokens, and other names of a used matrix."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from nashswarm.calibration.moments_table import MomentsTable
from nashswarm.layers import Moments


def no_moments(module: Any) -> Moments:
    """Return moments by which an error in a module costs nothing."""
    rows, columns = (module.nf, module.nx) if isinstance(module, Conv1D) else module.weight.shape
    inputs = torch.zeros(rows) if isinstance(module, nn.Embedding) else torch.zeros(columns, columns)
    outputs = torch.zeros(columns if isinstance(module, nn.Embedding) else rows)
    return Moments(inputs, outputs, outputs, inputs)


def mean_of_siblings(name: str, table: MomentsTable, positions: Mapping[str, int]) -> Moments:
    """Return moments for an expert that no token was routed to: the mean of the used experts of its layer.

    They count as seen at one position, so that errors in the expert cost little but not nothing.
    """
    stem, _, role = name.rpartition(".")
    layer = stem.rpartition(".")[0]
    names = [other for other in positions if other.startswith(f"{layer}.") and other.endswith(f".{role}")]
    if not names:
        raise ValueError(f"no expert of {layer} was ever used: give more calibration text")
    mean = [torch.zeros(())] * len(dataclasses.fields(Moments))
    for other in names:
        moments, share = table[other], 1 / positions[other]
        for number, field in enumerate(dataclasses.fields(Moments)):
            scale = share if field.name in ("inputs", "coupled_inputs") else 1
            mean[number] = mean[number] + scale * getattr(moments, field.name) / len(names)
    return Moments(*mean)
