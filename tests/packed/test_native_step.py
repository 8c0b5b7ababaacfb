"""A native step of several texts, which are, bit for bit, those of each alone."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from nashswarm import set_activations
from nashswarm.kernels import decoder, native
from nashswarm.packed.native_forward import by_modules, natively
from nashswarm.runtime.serving.steps import ModuleStepper
from tests.packed.test_native_forward import KINDS, TOLERANCE, random_tokens, tiny
from tests.packed.test_native_forward import path as path

SLIDING = {"mistral": {"sliding_window": 7}, "llama": {"hidden_size": 48, "num_key_value_heads": 1}}


def test_steps_of_many_texts_are_those_of_each_alone(path: Callable[[str], None]) -> None:
    models: dict[str, Any] = {}

    @settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        kind=some.sampled_from(KINDS),
        lengths=some.lists(some.integers(1, 70), min_size=1, max_size=9),
        steps=some.integers(1, 5),
        activations=some.sampled_from(("int8", "float32")),
        used=some.sampled_from([name for name in native.available() if name != native.SLOW]),
    )
    def check(kind: str, lengths: list[int], steps: int, activations: Any, used: str) -> None:
        path(used)
        model = models.setdefault(kind, natively(tiny(kind, **SLIDING.get(kind, {}))))
        set_activations(model, activations)
        stepper = ModuleStepper(model)
        assert stepper.batched
        prompts = [random_tokens(1, length)[0].tolist() for length in lengths]
        new = random_tokens(steps, len(lengths)).tolist()
        results = []
        for step in (stepper.step_alone, stepper.step_batched):
            caches = [stepper.start() for _ in prompts]
            for cache, prompt in zip(caches, prompts, strict=True):
                stepper.read(cache, prompt, False)
            with torch.no_grad():
                results.append(torch.stack([step(caches, tokens) for tokens in new]))
        assert torch.equal(*results)

    check()


def test_pieces_of_many_texts_in_one_go_are_those_of_each_alone(path: Callable[[str], None]) -> None:
    models: dict[str, Any] = {}

    @settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        kind=some.sampled_from(KINDS),
        sizes=some.lists(some.tuples(some.integers(1, 64), some.integers(1, 64)), min_size=1, max_size=9),
        activations=some.sampled_from(("int8", "float32")),
        used=some.sampled_from([name for name in native.available() if name != native.SLOW]),
    )
    def check(kind: str, sizes: list[tuple[int, int]], activations: Any, used: str) -> None:
        path(used)
        model = models.setdefault(kind, natively(tiny(kind, **SLIDING.get(kind, {}))))
        set_activations(model, activations)
        stepper = ModuleStepper(model)
        caches, alone = ([stepper.start() for _ in sizes] for _ in range(2))
        for part in zip(*sizes, strict=True):  # the second pieces follow the first
            texts = random_tokens(len(sizes), max(part)).tolist()
            pieces = [text[:size] for text, size in zip(texts, part, strict=True)]
            wanted = [stepper.read(cache, piece, False) for cache, piece in zip(alone, pieces, strict=True)]
            assert torch.equal(stepper.extend(caches, pieces), torch.cat(wanted))

    check()


def test_pieces_that_fail_leave_all_texts_as_they_were() -> None:
    stepper = ModuleStepper(natively(tiny("llama")))
    caches, alone = ([stepper.start() for _ in range(3)] for _ in range(2))
    pieces = random_tokens(3, 40).tolist()  # more than a pass takes
    with pytest.raises(IndexError, match="there is no token 100000"):
        stepper.extend(caches, [*pieces[:2], [100000]])
    assert [cache.get_seq_length() for cache in caches] == [0, 0, 0]
    wanted = [stepper.read(cache, piece, False) for cache, piece in zip(alone, pieces, strict=True)]
    assert torch.equal(stepper.extend(caches, pieces), torch.cat(wanted))


def test_more_texts_than_a_pass_takes_are_those_of_each_alone() -> None:
    stepper = ModuleStepper(natively(tiny("llama")))
    count = decoder.TOKENS + 5
    tokens = random_tokens(2, count).tolist()
    together, alone = ([stepper.start() for _ in range(count)] for _ in range(2))
    for row in tokens:
        assert torch.equal(stepper.step(together, row), stepper.step_alone(alone, row))


def test_caches_go_to_the_modules_and_back(caplog: pytest.LogCaptureFixture) -> None:
    model = natively(tiny("mistral", sliding_window=6))
    stepper, tokens = ModuleStepper(model), random_tokens(9, 3).tolist()
    exact = ModuleStepper(by_modules(copy.deepcopy(model)))
    caches, theirs = ([stepper.start() for _ in range(3)] for _ in range(2))
    hook = None
    for number, row in enumerate(tokens):
        if number % 3 == 1:
            hook = model.model.layers[0].register_forward_hook(lambda *_: None)
        elif hook is not None:
            hook.remove()
        found, wanted = stepper.step(caches, row), exact.step(theirs, row)
        assert float((found - wanted).abs().max()) <= TOLERANCE * float(wanted.abs().max())
    assert ["hooks" in record.message for record in caplog.records] == [True]
