"""The native pass against the modules: logits, tokens, caches, and what it leaves to the modules."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as some
from torch import Tensor

from nashswarm import set_activations
from nashswarm.kernels import native
from nashswarm.models.matrices import find_layers
from nashswarm.packed import checkpoint
from nashswarm.packed.cache import GrowingLayer, GrowingWindowLayer
from nashswarm.packed.native_forward import by_modules, natively
from tests.conftest import packed_by

VOCABULARY, LONGEST = 96, 160
KINDS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "olmo", "olmo2", "gpt2")
TOLERANCE = 1e-5  # relative to the largest logit
SHARED = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}


def tiny(kind: str, seed: int = 0, **options: Any) -> Any:
    """A random trellis-coded model that rounds no activations.

    Weights shrink as width grows, so that attention scores stay as large as in a real model: those of hundreds would
    make the modules themselves move by more than the tolerance when a bias changes by its last bit.
    """
    torch.manual_seed(seed)
    width = options.get("n_embd" if kind == "gpt2" else "hidden_size", 32)
    spread = {"initializer_range": 0.2 * min(32 / width, 1) ** 0.5}
    if kind == "gpt2":
        sizes = spread | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": LONGEST}
        config: Any = transformers.GPT2Config(**SHARED | sizes | options)
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= spread | {"num_key_value_heads": 2, "max_position_embeddings": LONGEST}
        config = transformers.AutoConfig.for_model(kind, **SHARED | sizes | options)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    checkpoint.adopt(model, find_layers(model), packed_by(model, "trellis"), float_bits=32)
    set_activations(model, "float32")
    return model


def random_tokens(*shape: int) -> Tensor:
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def compared(model: Any, **inputs: Any) -> tuple[Any, Any]:
    """The outputs of the native pass and of the modules; inputs are copied, since both change caches."""
    outputs = []
    for prepare in (natively, by_modules):
        own = copy.deepcopy(inputs)
        outputs.append(prepare(model)(**own))
    natively(model)
    return outputs[0], outputs[1]


def nudged(model: Any) -> Callable[..., Any]:
    """Its forward pass by modules with the last bits of embeddings changed.

    Where a random model amplifies such a change beyond the tolerance, two ways of rounding cannot agree within it.
    """

    def change(_module: Any, _inputs: Any, embedded: Tensor) -> Tensor:
        signs = torch.randint(0, 2, embedded.shape, generator=torch.Generator().manual_seed(7))
        return embedded * (1 + (2 * signs - 1) * 2.0**-23)

    def forward(**inputs: Any) -> Any:
        handle = model.get_input_embeddings().register_forward_hook(change)
        try:
            return by_modules(model)(**inputs)
        finally:
            handle.remove()

    return forward


def assert_close(logits: Tensor, exact: Tensor) -> None:
    assert logits.shape == exact.shape
    assert float((logits - exact).abs().max()) <= TOLERANCE * float(exact.abs().max())


@pytest.fixture(autouse=True)
def no_fallback(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail where the modules computed what the native pass should have."""
    yield
    if request.cls is None:  # not in TestFallback
        assert not [record.message for record in caplog.records if "module by module" in record.message]


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    def force(name: str) -> None:
        monkeypatch.setenv(native.VARIABLE, name)
        native.path.cache_clear()

    yield force
    native.path.cache_clear()


@some.composite
def configurations(draw: Any) -> tuple[str, dict[str, Any]]:
    kind, key_heads, group = draw(some.sampled_from(KINDS)), draw(some.integers(1, 3)), draw(some.integers(1, 5))
    heads, size = key_heads * group, draw(some.sampled_from((2, 8, 12, 16, 20, 64, 80)))
    layers, tied = draw(some.integers(1, 3)), draw(some.booleans())
    if kind == "gpt2":  # of two columns a norm leaves the sign of their difference alone
        options = {
            "n_embd": heads * max(size, 8),
            "n_head": heads,
            "n_layer": layers,
            "n_inner": draw(some.integers(1, 90)),
        }
        options["activation_function"] = draw(some.sampled_from(("gelu_new", "gelu", "gelu_pytorch_tanh")))
        return kind, options | {"scale_attn_by_inverse_layer_idx": draw(some.booleans()), "tie_word_embeddings": tied}
    options = {"num_attention_heads": heads, "num_key_value_heads": key_heads, "head_dim": size}
    options |= {"hidden_size": heads * draw(some.integers(1, 20)), "intermediate_size": draw(some.integers(1, 90))}
    options |= {"num_hidden_layers": layers, "tie_word_embeddings": tied}
    if kind in ("gemma2", "olmo2"):  # norms of outputs amplify rounding where few columns may all be almost 0
        options["hidden_size"] = heads * draw(some.integers(-(-32 // heads), 40))
    if kind == "llama":
        options |= {"attention_bias": draw(some.booleans()), "mlp_bias": draw(some.booleans())}
        linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0}
        options["rope_parameters"] = draw(some.sampled_from((linear, linear | {"rope_type": "default"})))
    elif kind in ("mistral", "phi3"):
        options["sliding_window"] = draw(some.sampled_from((None, 2, 3, 7, 40)))
        if kind == "phi3" and size > 2 and draw(some.booleans()):
            options["rope_parameters"] = {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5}
    elif kind == "gemma2":
        options |= {"sliding_window": draw(some.sampled_from((2, 3, 7, 40))), "query_pre_attn_scalar": size}
        options |= {"attn_logit_softcapping": draw(some.sampled_from((None, 2.0, 50.0)))}
        options |= {"final_logit_softcapping": draw(some.sampled_from((None, 1.0, 30.0)))}
    elif kind == "olmo":
        options["clip_qkv"] = draw(some.sampled_from((None, 0.5, 8.0)))
    elif kind.startswith("qwen") and draw(some.booleans()):
        options |= {"use_sliding_window": True, "sliding_window": draw(some.integers(2, 30)), "max_window_layers": 1}
    return kind, options


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(drawn=configurations(), data=some.data())
def test_forward_of_any_configuration_equals_the_modules(
    drawn: tuple[str, dict[str, Any]], data: Any, path: Callable[[str], None]
) -> None:
    kind, options = drawn
    path(data.draw(some.sampled_from([name for name in native.available() if name != native.SLOW])))
    model = tiny(kind, data.draw(some.integers(0, 99)), **options)
    batch = data.draw(some.integers(1, 3))
    lengths = data.draw(some.lists(some.sampled_from((1, 2, 5, 17, 66)), min_size=1, max_size=3))
    assume(sum(lengths) <= LONGEST)
    tokens = random_tokens(batch, sum(lengths))
    padding = [data.draw(some.integers(0, lengths[0] - 1)) for _ in range(batch)]
    mask = (torch.arange(sum(lengths)) >= torch.tensor(padding)[:, None]).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    caches = [transformers.DynamicCache(config=model.config) for _ in range(3)]
    done = 0
    for length in lengths:
        span = slice(done, done + length)
        logits = []
        for prepare, cache in zip((natively, by_modules, nudged), caches, strict=True):
            with torch.no_grad():
                output = prepare(model)(
                    input_ids=tokens[:, span], attention_mask=mask[:, : done + length], past_key_values=cache,
                    position_ids=positions[:, span], use_cache=True,
                )  # fmt: skip
            logits.append(output.logits[mask[:, span] == 1])
        assume(float((logits[2] - logits[1]).abs().max()) <= TOLERANCE / 4 * float(logits[1].abs().max()))
        assert_close(*logits[:2])
        done += length
    assert caches[0].get_seq_length() == done
    real = mask[0] == 1
    for mine, theirs in zip(caches[0].layers, caches[1].layers, strict=True):
        held = mine.keys.shape[2]
        assert mine.keys.shape == theirs.keys.shape
        kept = real[done - held :]
        assert_close(mine.keys[0][:, kept], theirs.keys[0][:, kept])
        assert_close(mine.values[0][:, kept], theirs.values[0][:, kept])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activations", ["int8", "float32"])
def test_generate_gives_the_tokens_of_the_modules(kind: str, activations: Any) -> None:
    model = tiny(kind)
    set_activations(model, activations)
    tokens = random_tokens(2, 9)
    answers = []
    for prepare in (natively, by_modules):
        answers.append(prepare(model).generate(tokens, max_new_tokens=30, do_sample=False, pad_token_id=0))
    assert torch.equal(*answers)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "do_sample": False},
        {"do_sample": True, "top_k": 5},
        {"prompt_lookup_num_tokens": 3, "do_sample": False},
        {"num_return_sequences": 2, "do_sample": True},
    ],
)
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_generate_with_options_gives_the_tokens_of_the_modules(kind: str, options: dict[str, Any]) -> None:
    model = tiny(kind, **({"sliding_window": 100} if kind == "mistral" else {}))
    answers = []
    for prepare in (natively, by_modules):
        torch.manual_seed(3)
        answers.append(prepare(model).generate(random_tokens(1, 12), max_new_tokens=20, pad_token_id=0, **options))
    assert torch.equal(*answers)


def test_cache_goes_to_the_modules_and_back() -> None:
    model, tokens = tiny("mistral", sliding_window=6), random_tokens(1, 40)
    mine, theirs = (transformers.DynamicCache(config=model.config) for _ in range(2))
    for number, first in enumerate(range(0, 40, 5)):
        with torch.no_grad():
            span = tokens[:, first : first + 5]
            exact = by_modules(model)(span, past_key_values=theirs).logits
            natively(model) if number % 3 else by_modules(model)
            assert_close(model(span, past_key_values=mine).logits, exact)
    assert mine.get_seq_length() == 40
    assert {type(layer) for layer in mine.layers} == {GrowingWindowLayer}


def test_cropped_cache_continues_without_the_tokens() -> None:
    model, tokens = natively(tiny("llama")), random_tokens(1, 20)
    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
        cache.crop(-8)
        assert {type(layer) for layer in cache.layers} == {GrowingLayer}
        logits = model(tokens[:, 12:], past_key_values=cache).logits
        assert_close(logits, model(tokens).logits[:, 12:])


def test_copied_cache_is_another() -> None:
    model, tokens = natively(tiny("llama")), random_tokens(1, 20)
    with torch.no_grad():
        cache = model(tokens[:, :10], use_cache=True).past_key_values
        fork = copy.deepcopy(cache)
        model(random_tokens(1, 3), past_key_values=fork)
        logits = model(tokens[:, 10:], past_key_values=cache).logits
        assert fork.get_seq_length() == 13
        assert_close(logits, model(tokens).logits[:, 10:])


def test_cache_with_a_window_holds_no_more_than_it_needs() -> None:
    model = natively(tiny("mistral", sliding_window=8, max_position_embeddings=4000))
    with torch.no_grad():
        output = model(random_tokens(1, 8), use_cache=True)
        for _ in range(400):
            output = model(random_tokens(1, 1), past_key_values=output.past_key_values)
    layers = output.past_key_values.layers
    assert {layer.length for layer in layers} == {408}
    assert max(keys.shape[2] for layer in layers for keys in layer._room) < 100


@pytest.mark.parametrize("threads", [2, 3])
def test_several_threads_give_the_same_logits(threads: int) -> None:
    model = natively(tiny("qwen3", hidden_size=256, intermediate_size=400, num_hidden_layers=4, head_dim=64))
    tokens = random_tokens(2, 33)
    with torch.no_grad():
        alone = model(tokens).logits
        torch.set_num_threads(threads)
        try:
            together = model(tokens).logits
        finally:
            torch.set_num_threads(1)
    assert torch.equal(alone, together)


def test_logits_to_keep_are_the_last() -> None:
    model, tokens = natively(tiny("qwen2")), random_tokens(3, 70)
    with torch.no_grad():
        every = model(tokens).logits
        assert torch.equal(model(tokens, logits_to_keep=2).logits, every[:, -2:])


def test_change_of_the_model_is_noticed() -> None:
    model, tokens = natively(tiny("llama")), random_tokens(1, 9)
    with torch.no_grad():
        before = model(tokens).logits
        model.model.norm.weight.mul_(2.0)
        assert_close(model(tokens).logits, 2 * before)
        model.model.norm.weight.data = model.model.norm.weight / 2
        assert_close(model(tokens).logits, before)
        model.model.layers[0], model.model.layers[1] = model.model.layers[1], model.model.layers[0]
        for number, layer in enumerate(model.model.layers):
            layer.self_attn.layer_idx = number
        assert_close(*(output.logits for output in compared(model, input_ids=tokens)))


def test_copy_and_pickle_are_models_of_their_own() -> None:
    model, tokens = natively(tiny("llama")), random_tokens(1, 9)
    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        logits = model(tokens).logits
        model.model.norm.weight.zero_()
        for twin in twins:
            assert type(twin) is type(model)
            assert_close(twin(tokens).logits, logits)


def test_class_keeps_its_name_and_signature_and_dequantizes_to_the_plain_one() -> None:
    model = natively(tiny("llama"))
    plain = transformers.LlamaForCausalLM
    assert isinstance(model, plain)
    assert (type(model).__name__, type(model).__module__) == (plain.__name__, plain.__module__)
    assert model.can_generate()
    with torch.no_grad():
        logits = model(random_tokens(1, 9)).logits
        model.dequantize()
        assert type(model) is plain
        assert_close(model(random_tokens(1, 9)).logits, logits)


def test_token_that_does_not_exist_is_named() -> None:
    with torch.no_grad(), pytest.raises(IndexError, match=f"no token 96: the model has {VOCABULARY}"):
        natively(tiny("llama"))(torch.tensor([[3, 96]]))


def test_position_that_does_not_exist_is_named() -> None:
    with torch.no_grad(), pytest.raises(IndexError, match=f"no position {LONGEST}: the model has {LONGEST}"):
        natively(tiny("gpt2"))(random_tokens(1, LONGEST + 1))


class TestFallback:
    """What only the modules know: they compute it, and one warning says why."""

    @pytest.mark.parametrize(
        ("inputs", "reason"),
        [
            ({"output_attentions": True}, "output_attentions is given"),
            ({"output_hidden_states": True}, "output_hidden_states is given"),
            ({"labels": random_tokens(2, 9)}, "labels is given"),
            ({"logits_to_keep": torch.tensor([1, 3])}, "chosen positions"),
            ({"attention_mask": torch.ones(2, 9).index_fill(1, torch.tensor([3]), 0)}, "more than padding on the left"),
            ({"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])}, "do not count the tokens"),
            ({"past_key_values": "static"}, "in a StaticCache"),
        ],
    )
    def test_unknown_input_goes_to_the_modules(
        self, inputs: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        model = tiny("llama", attn_implementation="eager")
        if "past_key_values" in inputs:
            inputs = {"past_key_values": transformers.StaticCache(config=model.config, max_cache_len=20)}
        tokens = random_tokens(1 if "position_ids" in inputs else 2, 9)
        for _ in range(2):
            mine, theirs = compared(model, input_ids=tokens, **inputs)
            assert torch.equal(mine.logits, theirs.logits)
        assert [reason in record.message for record in caplog.records] == [True]

    def test_gradients_go_to_the_modules(self, caplog: pytest.LogCaptureFixture) -> None:
        model = natively(tiny("llama"))
        model.model.norm.weight.requires_grad_()
        model(random_tokens(1, 9)).logits.sum().backward()
        assert model.model.norm.weight.grad is not None
        assert ["torch.no_grad()" in record.message for record in caplog.records] == [True]

    def test_hooks_are_called(self, caplog: pytest.LogCaptureFixture) -> None:
        model, called = natively(tiny("gpt2")), []
        with torch.no_grad():
            model(random_tokens(1, 9))
            hook = model.transformer.h[1].mlp.c_fc.register_forward_hook(lambda *_: called.append(1))
            model(random_tokens(1, 9))
            hook.remove()
            model(random_tokens(1, 9))
        assert called == [1]
        assert ["hooks" in record.message for record in caplog.records] == [True]

    def test_other_precision_is_named(self, caplog: pytest.LogCaptureFixture) -> None:
        model = natively(tiny("llama"))
        with torch.no_grad():
            model(random_tokens(1, 9))
            assert model.bfloat16()(random_tokens(1, 9)).logits.dtype == torch.bfloat16
        assert ["dtype=torch.float32" in record.message for record in caplog.records] == [True]

    def test_other_architecture_is_named(
        self, random_model: Callable[[str], Any], caplog: pytest.LogCaptureFixture
    ) -> None:
        model = random_model("gpt_neox")
        checkpoint.adopt(model, find_layers(model), packed_by(model, "trellis"))
        with torch.no_grad():
            model(random_tokens(1, 9))
        assert ["GPTNeoXForCausalLM has no native pass" in record.message for record in caplog.records] == [True]

    def test_matrix_in_another_form_is_named(self, caplog: pytest.LogCaptureFixture) -> None:
        config = transformers.AutoConfig.for_model("llama", **SHARED, hidden_size=32, intermediate_size=48)
        config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads = 1, 4, 2
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        layers = [layer for layer in find_layers(model) if "down" not in layer.name]
        stored = packed_by(model, "trellis")
        checkpoint.adopt(model, layers, {layer.name: stored[layer.name] for layer in layers})
        with torch.no_grad():
            model(random_tokens(1, 9))
        assert [
            "down_proj is a Linear that is not in trellis tiles" in record.message for record in caplog.records
        ] == [True]

    def test_model_without_trellis_keeps_its_class(
        self, random_model: Callable[[str], Any], caplog: pytest.LogCaptureFixture
    ) -> None:
        model = random_model("gpt2")
        checkpoint.adopt(model, find_layers(model), packed_by(model, "groups"))
        assert type(model) is transformers.GPT2LMHeadModel

    def test_training_goes_to_the_modules(self, caplog: pytest.LogCaptureFixture) -> None:
        model = natively(tiny("gpt2")).train()
        with torch.no_grad():
            assert not torch.equal(model(random_tokens(1, 9)).logits, model(random_tokens(1, 9)).logits)
        assert not caplog.records
