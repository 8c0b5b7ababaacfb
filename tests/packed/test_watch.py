"""What changes between two tokens of a text is seen by the second, as by the modules."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nashswarm import set_activations
from nashswarm.packed import native_forward
from nashswarm.packed.matrix import Counted
from nashswarm.packed.native_forward import by_modules, natively
from tests.packed.test_native_forward import TOLERANCE, random_tokens, tiny


def other_matrix(model: Any) -> None:
    first, second = model.model.layers
    first.mlp.up_proj.matrix, second.mlp.up_proj.matrix = second.mlp.up_proj.matrix, first.mlp.up_proj.matrix


def other_bytes(model: Any) -> None:
    first, second = (layer.mlp.gate_proj.matrix for layer in model.model.layers)
    first.content, first._tiles = second.content, None


def registered_bytes(model: Any) -> None:
    first, second = (layer.mlp.gate_proj.matrix for layer in model.model.layers)
    first.register_buffer("content", second.content)
    first._tiles = None


def other_module(model: Any) -> None:
    first, second = model.model.layers
    first.self_attn.o_proj = copy.deepcopy(second.self_attn.o_proj)


def other_norm(model: Any) -> None:
    model.model.norm.weight = nn.Parameter(2 * model.model.norm.weight)


def other_numbers(model: Any) -> None:
    model.model.norm.weight.data = 2 * model.model.norm.weight.data


def rounded(model: Any) -> None:
    set_activations(model, "int8")


def rounded_in_part(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.activations = "int8"


def hooked(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda module, given, made: 2 * made)


def hooked_before(model: Any) -> None:
    model.model.layers[1].mlp.register_forward_pre_hook(lambda module, given: tuple(2 * part for part in given))


CHANGES = (
    *(other_matrix, other_bytes, registered_bytes, other_module, other_norm, other_numbers),
    *(rounded, rounded_in_part, hooked, hooked_before),
)


@torch.no_grad()
def logits_of(model: Any, tokens: Tensor, change: Callable[[Any], None]) -> tuple[Tensor, Tensor]:
    """Return the logits of a text and of one more token, before which the model is changed."""
    before = model(tokens[:, :-2], use_cache=True)
    before = model(tokens[:, -2:-1], past_key_values=before.past_key_values)
    change(model)
    after = model(tokens[:, -1:], past_key_values=before.past_key_values)
    return before.logits[:, -1], after.logits[:, -1]


@pytest.mark.parametrize("change", CHANGES)
def test_step_after_a_change_is_that_of_the_changed_modules(change: Callable[[Any], None]) -> None:
    model, tokens = natively(tiny("llama")), random_tokens(1, 12)
    exact, same = by_modules(copy.deepcopy(model)), natively(copy.deepcopy(model))
    found, wanted = logits_of(model, tokens, change), logits_of(exact, tokens, change)
    unchanged = logits_of(same, tokens, lambda _: None)
    largest = float(wanted[1].abs().max())
    error = float((found[1] - wanted[1]).abs().max())
    moved = float((wanted[1] - unchanged[1]).abs().max())
    assert float((found[0] - wanted[0]).abs().max()) <= TOLERANCE * float(wanted[0].abs().max())
    assert moved > 100 * TOLERANCE * largest
    # rounded activations turn the last bits of sums into steps of their grid
    assert error <= (0.5 * moved if change is rounded else TOLERANCE * largest)


def test_hook_of_all_modules_between_two_tokens_is_called() -> None:
    model, tokens = natively(tiny("llama")), random_tokens(1, 12)
    called: list[nn.Module] = []
    handles: list[Any] = []

    def hook(module: nn.Module, *_: Any) -> None:
        called.append(module)

    def change(_: Any) -> None:
        handles.append(nn.modules.module.register_module_forward_hook(hook))

    logits_of(model, tokens, change)
    handles[0].remove()
    assert len(called) > 10


def test_description_is_kept_while_another_model_changes() -> None:
    model, other, tokens = natively(tiny("llama")), tiny("llama", seed=1), random_tokens(1, 12)
    with torch.no_grad():
        model(tokens)
        description = native_forward.describe(model)
        changes = Counted.changes
        other_matrix(other)
        assert Counted.changes > changes
        model(tokens)
    assert native_forward.describe(model) is description


def test_changes_of_a_packed_module_are_counted() -> None:
    linear = tiny("llama").model.layers[0].mlp.up_proj
    for change in (
        lambda: setattr(linear, "note", 1),
        lambda: delattr(linear, "note"),
        lambda: linear.to(torch.float32),
        lambda: linear.matrix.register_buffer("more", None),
        lambda: linear.matrix.add_module("child", None),
    ):
        before = Counted.changes
        change()
        assert Counted.changes > before
