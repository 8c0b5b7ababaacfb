"""Turning the heads of a GPT-2 changes its weights and not its function."""

from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.benchmarks.rotation import rotation, turned


@pytest.mark.parametrize("width", [1, 2, 16, 64])
def test_rotation_of_any_width_is_orthogonal_and_flat(width: int) -> None:
    turn = rotation(width, torch.Generator().manual_seed(width))
    assert torch.allclose(turn @ turn.T, torch.eye(width), atol=1e-6)
    assert torch.allclose(turn.abs(), torch.full((width, width), width**-0.5))


def test_turned_with_biases_is_the_same_function(model: Any, token_windows: Tensor) -> None:
    """With biases that are not zero."""
    with torch.no_grad():
        for name, part in model.named_parameters():
            if name.endswith("bias"):
                part.normal_()
        other = turned(model, 0)
        assert not torch.equal(other.transformer.h[0].attn.c_proj.weight, model.transformer.h[0].attn.c_proj.weight)
        assert torch.allclose(other(token_windows).logits, model(token_windows).logits, atol=1e-4)
        assert not torch.equal(
            turned(model, 1).transformer.h[0].attn.c_proj.weight, other.transformer.h[0].attn.c_proj.weight
        )


def test_turned_of_another_architecture_is_refused(random_model: Any) -> None:
    with pytest.raises(ValueError, match="only a GPT-2 with heads"):
        turned(random_model("llama"), 0)
