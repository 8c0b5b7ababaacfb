"""Caches that grow in place, against transformers' own that copy."""

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from nashswarm.packed.cache import BLOCK, GrowingLayer, GrowingWindowLayer, Shape, append, growing, reserve

SHAPE = Shape(1, 2, 4)


def test_growing_layer_holds_what_was_appended() -> None:
    layer, appended = GrowingLayer(), torch.randn(1, 2, 2 * BLOCK + 3, 4)
    first = 0
    for size in (5, 1, BLOCK - 6, 1, BLOCK + 2):
        keys, values = layer.update(appended[..., first : first + size, :], -appended[..., first : first + size, :])
        first += size
        assert torch.equal(keys, appended[..., :first, :]) and torch.equal(values, -keys)
        assert layer.get_seq_length() == first
    assert layer._room[0].shape[-2] == 3 * BLOCK


@settings(max_examples=60, deadline=None)
@given(
    window=some.sampled_from((0, 2, 5, 70)),
    actions=some.lists(
        some.tuples(
            some.sampled_from(("append", "crop", "reorder", "repeat", "reset", "record")), some.integers(1, 90)
        ),
        max_size=12,
    ),
)
def test_layer_does_what_that_of_transformers_does(window: int, actions: list[tuple[str, int]]) -> None:
    exact: Any = DynamicSlidingWindowLayer(window) if window else DynamicLayer()
    mine, batch = growing(exact), 2
    assert type(mine) is (GrowingWindowLayer if window else GrowingLayer)
    for action, number in actions:
        if action == "append":
            new = torch.randn(2, batch, 2, number, 4)
            assert all(map(torch.equal, mine.update(*new), exact.update(*new)))
        elif action == "crop" and exact.get_seq_length() > number and (not window or exact.record_past):
            for layer in (mine, exact):
                layer.crop(-number)
        elif action == "reorder":
            for layer in (mine, exact):
                layer.reorder_cache(torch.arange(batch).flip(0))
        elif action == "repeat" and batch < 8:
            batch *= 2 if exact.get_seq_length() else 1
            for layer in (mine, exact):
                layer.batch_repeat_interleave(2)
        elif action == "reset":
            for layer in (mine, exact):
                layer.reset()
        elif action == "record" and window:
            for layer in (mine, exact):
                layer.activate_past_recording()
        assert mine.get_seq_length() == exact.get_seq_length()
        assert mine.get_mask_sizes(3) == exact.get_mask_sizes(3)
        if exact.get_seq_length():
            assert torch.equal(mine.keys, exact.keys) and torch.equal(mine.values, exact.values)


def written(cache: DynamicCache, tokens: Tensor) -> None:
    """Append tokens as the library does, through the addresses."""
    addresses = reserve(cache, tokens.shape[2], SHAPE, [0, 0])
    assert isinstance(addresses, Tensor)
    for layer, (keys, values, capacity, shift) in zip(cache.layers, addresses[0].tolist(), strict=True):
        assert (keys, values) == tuple(room.data_ptr() for room in layer._room)
        assert capacity == layer._room[0].shape[2] and shift == layer.shift
        for room in layer._room:
            room[:, :, layer.length - shift :][:, :, : tokens.shape[2]] = tokens
    append(cache, tokens.shape[2])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_copy_lies_elsewhere(copied: Any) -> None:
    cache, tokens = DynamicCache(), torch.randn(1, 2, 6, 4)
    written(cache, tokens[:, :, :4])
    fork = copied(cache)
    written(cache, tokens[:, :, 4:5])
    written(fork, tokens[:, :, 5:])
    assert torch.equal(cache.layers[1].keys, tokens[:, :, :5])
    assert torch.equal(fork.layers[1].keys, tokens[:, :, [0, 1, 2, 3, 5]])


def test_freed_with_its_last_reference() -> None:
    import weakref

    cache = DynamicCache()
    written(cache, torch.randn(1, 2, 6, 4))
    room = weakref.ref(cache.layers[0]._room[0])
    del cache
    assert room() is None
