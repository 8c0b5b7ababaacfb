"""A step of several texts equals the steps of each alone, on every architecture, or they are computed alone."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from nashswarm.models.matrices import find_layers
from nashswarm.packed import checkpoint
from nashswarm.runtime.serving.steps import ModuleStepper

SMALL = {
    "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "initializer_range": 0.2,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {},
    "opt": {},
    "gpt_neox": {},
    "qwen3": {},
    "phi3": {},
    "mistral": {"sliding_window": 8},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 16},  # soft caps, so attention is eager
}
ALONE = ("falcon", "bloom", "mamba")  # attention of its own, positions by other means, no attention


def build(kind: str, random_model: Callable[[str], Any]) -> Any:
    if kind in ("gpt2", "llama", "opt", "gpt_neox"):
        return random_model(kind)
    config = transformers.AutoConfig.for_model(kind)
    wanted = {name: value for name, value in (SMALL | KINDS.get(kind, {})).items() if hasattr(config, name)}
    if kind == "falcon":
        del wanted["head_dim"]  # a property there
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **wanted)).eval()


def texts(lengths: Sequence[int]) -> list[list[int]]:
    random = torch.Generator().manual_seed(1)
    return [torch.randint(1, 512, (length,), generator=random).tolist() for length in lengths]


def steps_of(stepper: ModuleStepper, prompts: Sequence[Sequence[int]], new: Tensor, together: bool) -> Tensor:
    """The logits after each of the new tokens (steps, texts, vocabulary)."""
    caches = [stepper.start() for _ in prompts]
    for cache, prompt in zip(caches, prompts, strict=True):
        stepper.read(cache, prompt, False)
    take = stepper.step if together else stepper.step_alone
    return torch.stack([take(caches, tokens) for tokens in new.tolist()])


@pytest.mark.parametrize("kind", KINDS)
def test_batched_steps_equal_full_forward_without_cache(kind: str, random_model: Callable[[str], Any]) -> None:
    model = build(kind, random_model)
    stepper, before = ModuleStepper(model), model.config._attn_implementation
    assert stepper.batched
    prompts, new = texts([2, 5, 17, 30]), torch.tensor(texts([4] * 12))
    together = steps_of(stepper, prompts, new, True)
    for row, prompt in enumerate(prompts):
        with torch.no_grad():
            whole = model(input_ids=torch.tensor([[*prompt, *new[:, row].tolist()]])).logits[0, len(prompt) :]
        torch.testing.assert_close(together[:, row], whole, rtol=1e-4, atol=1e-4)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("form", ["tiles", "trellis"])
@pytest.mark.parametrize("activations", ["int8", "float32"])
def test_batched_steps_on_packed_weights_are_those_of_texts_alone(
    form: str, activations: Any, model: Any, packed: Callable[..., Any]
) -> None:
    import nashswarm

    checkpoint.adopt(model, find_layers(model), packed(model, form))
    nashswarm.set_activations(model, activations)
    stepper = ModuleStepper(model)
    assert stepper.batched
    prompts, new = texts([1, 9, 20]), torch.tensor(texts([3] * 8))
    alone, together = (steps_of(stepper, prompts, new, side) for side in (False, True))
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ALONE)
def test_other_architectures_step_one_at_a_time(
    kind: str, random_model: Callable[[str], Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = build(kind, random_model)
    stepper = ModuleStepper(model)
    assert not stepper.batched and "do not batch texts: steps compute one at a time" in caplog.text
    prompts, new = texts([3, 6]), torch.tensor(texts([2] * 3))
    together = steps_of(stepper, prompts, new, True)
    for row, prompt in enumerate(prompts):
        with torch.no_grad():
            whole = model(input_ids=torch.tensor([[*prompt, *new[:, row].tolist()]])).logits[0, len(prompt) :]
        torch.testing.assert_close(together[:, row], whole, rtol=1e-3, atol=1e-3)


def test_read_in_pieces_gives_logits_of_every_position(tiny: Any) -> None:
    stepper, (text,) = ModuleStepper(tiny), texts([20])
    cache = stepper.start()
    pieces = [stepper.read(cache, text[first : first + 7], True) for first in range(0, 20, 7)]
    with torch.no_grad():
        whole = tiny(input_ids=torch.tensor([text])).logits[0]
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-4, atol=1e-4)
    assert stepper.read(stepper.start(), text, False).shape == (1, 512)
