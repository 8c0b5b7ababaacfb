"""Moments of modules that calibration text did not reach: experts without tokens, and other names of a used matrix."""

import dataclasses
from collections.abc import Iterable, Mapping
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
    names = siblings(name, positions)
    if not names:
        raise ValueError(f"no expert of {mixture_of(name)} was ever used: give more calibration text")
    mean: Moments | None = None
    for other in names:
        mean = added_sibling(mean, table[other], positions[other], len(names))
    assert mean is not None
    return mean


def siblings(name: str, used: Iterable[str]) -> list[str]:
    """Return which of the ``used`` matrices are the same one as ``name`` in other experts of its layer."""
    role = name.rpartition(".")[2]
    return [other for other in used if other.startswith(f"{mixture_of(name)}.") and other.endswith(f".{role}")]


def mixture_of(name: str) -> str:
    """Return the module that holds the expert that holds the matrix ``name``."""
    return name.rpartition(".")[0].rpartition(".")[0]


def added_sibling(mean: Moments | None, moments: Moments, positions: int, count: int) -> Moments:
    """Return the mean with one of ``count`` siblings added, which was seen at so many positions."""
    fields = {}
    for field in dataclasses.fields(Moments):
        scale = 1 / positions if field.name in ("inputs", "coupled_inputs") else 1
        before = torch.zeros(()) if mean is None else getattr(mean, field.name)
        fields[field.name] = before + scale * getattr(moments, field.name) / count
    return Moments(**fields)
