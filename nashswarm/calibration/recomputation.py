"""Decoder blocks that compute their activations again in the backward pass, in place of keeping them.

A window then takes the memory of one block, not of all (Chen et al. 2016, "Training deep nets with sublinear memory
cost").  The second forward pass of a block costs about as much time as pages for all activations would.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


@contextlib.contextmanager
def recomputed_blocks(model: nn.Module) -> Iterator[Callable[[], bool]]:
    """Let the blocks of a model keep no activations, during the context.

    Yields a function that tells whether a block is being computed again, for hooks that have seen its first pass.
    Blocks are what transformers recomputes in training; other modules stay as they are.
    """
    running = False

    @contextlib.contextmanager
    def second_pass() -> Iterator[None]:
        nonlocal running
        running = True
        try:
            yield
        finally:
            running = False

    def run(forward: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **options)
        return checkpoint(
            forward,
            *arguments,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (contextlib.nullcontext(), second_pass()),
            **options,
        )

    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    before = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        block.forward = functools.partial(run, block.forward)
    try:
        yield lambda: running
    finally:
        for block, own in zip(blocks, before, strict=True):
            if own is None:
                del block.forward
            else:
                block.forward = own
