"""What is around the blocks takes memory only for the tokens that occur, and only as long as it is used."""

import gc
import pathlib
import sys
import weakref

import pytest
import torch
from torch import Tensor

from nashswarm import memory
from nashswarm.methods.streaming import gradients, shards, surroundings
from nashswarm.methods.streaming.surroundings import Surroundings
from tests.methods.streaming.test_by_layer_architectures import saved

ROWS, COLUMNS = 1 << 15, 1 << 11  # of a table of 256 MiB


@pytest.fixture
def source(tmp_path: pathlib.Path) -> shards.Source:
    saved("llama", tmp_path)
    return shards.open_source(tmp_path)


def opened(source: shards.Source, windows: Tensor) -> Surroundings:
    ids = windows.unique()
    return source.surroundings(ids, source.mapped("model.embed_tokens.weight")[ids].float())


def test_surroundings_are_freed_with_their_last_use(source: shards.Source) -> None:
    """Not by Python's search for cycles, before which the embeddings of many blocks would add up."""
    windows = torch.arange(5, 53).view(2, 24)
    gc.disable()
    try:
        around = opened(source, windows)
        model, calls = weakref.ref(around.model), [around.call(window, 1) for window in windows]
        around.head_inputs(windows[0], calls[0].hidden[0])
        del around
        assert model() is None
        around = opened(source, windows)
        model = weakref.ref(around.model)
        weight = source.mapped("lm_head.weight").float()
        states = torch.stack([call.hidden[0] for call in calls])
        gradients.head_backward(around, "lm_head", weight, windows, states, seed=0)
        del around
        assert model() is None
    finally:
        gc.enable()


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages and their advice are the Linux kernel's")
def test_unwritten_table_takes_memory_for_written_rows_alone() -> None:
    before = memory.resident_bytes()
    table = surroundings._unwritten(torch.Size((ROWS, COLUMNS)))
    table[torch.arange(0, ROWS, ROWS // 64)] = torch.ones(64, COLUMNS)
    assert float(table[0].sum()) == COLUMNS and float(table[1].abs().sum()) == 0
    assert memory.resident_bytes() - before < 4 << 20
