"""Compression by layer of tiny random models of many architectures, against the whole model run by transformers."""

import pathlib
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

import nashswarm as nashswarm  # registers the format
from nashswarm.methods.streaming import block, compress, forecast, moments, shards, skeleton
from nashswarm.methods.streaming.settings import ByLayer
from nashswarm.models import matrices
from nashswarm.models.split_experts import unfuse
from tests.models import architectures
from tests.models.tiny_configs import tiny_config, tiny_model

FEW = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}  # of a mixture
DENSE = [
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gemma3", "gemma4_text", "phi", "phi3",
    "gpt2", "gpt_neox", "gptj", "opt", "bloom", "falcon", "olmo2", "cohere2", "starcoder2", "glm4", "mamba2", "bamba",
]  # fmt: skip
MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text", "jetmoe", "inkling2_text"]
COMMON = {"llama", "mistral", "qwen3", "gemma2", "phi3", "gpt2", "opt", "mamba2", "mixtral", "qwen3_moe", "deepseek_v3"}
KINDS = [pytest.param(kind, marks=() if kind in COMMON else pytest.mark.slow) for kind in [*DENSE, *MIXTURES]]
REFUSED = {
    "zamba2": "they share weights",
    "gemma3n_text": "there are several lists of them",
    "glm_moe_dsa": "a block hands more than its outputs on",
    "falcon_h1": "their buffers cannot be computed one block at a time",
    "hrm_text": "do not simply run one after another",
    "xlnet": "hidden states have the shape",
}
SETTINGS = ByLayer(bits=3, group_size=16)


class NoTokenizer:
    """Stands for a tokenizer, which these tests do not need."""

    def save_pretrained(self, folder: pathlib.Path) -> None: ...


@pytest.fixture(scope="module")
def windows() -> Tensor:
    return torch.randint(5, 500, (2, 24), generator=torch.Generator().manual_seed(1))


def saved(kind: str, folder: pathlib.Path, **wanted: Any) -> Any:
    """Return a tiny model whose numbers 16 bits can hold, saved in ``folder`` as transformers saves it."""
    model = tiny_model(kind, **(FEW if kind in ("qwen2_moe", "qwen3_moe", "mixtral") else {}) | wanted)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
    model.config._experts_implementation = "eager"
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def inputs_of(model: Any, names: list[str], windows: Tensor) -> dict[str, Tensor]:
    """Return what each of the modules ``names`` reads while the model reads the windows, by hooks."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, arguments, inputs=seen[name]: inputs.append(arguments[0].flatten(0, -2))
        )
        for name in names
    ]
    for window in windows:
        model(input_ids=window.unsqueeze(0), use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(inputs) if inputs else torch.empty(0) for name, inputs in seen.items()}


@torch.no_grad()
def head_inputs(source: shards.Source, windows: Tensor, states: block.States) -> Tensor:
    surroundings = source.surroundings(windows.unique(), states.rows)
    return torch.cat([surroundings.head_inputs(*one) for one in zip(windows, states.hidden, strict=True)])


def close(one: Tensor, other: Tensor, tolerance: float = 1e-4) -> bool:
    return bool((one - other).norm() <= tolerance * other.norm())


@pytest.mark.parametrize("kind", [*DENSE, *MIXTURES])
@torch.no_grad()
def test_moments_without_compression_are_those_of_the_whole_model(
    kind: str, windows: Tensor, tmp_path: pathlib.Path
) -> None:
    """Every E[x xᵀ], and what the head reads after all blocks, where no block is compressed."""
    whole = saved(kind, tmp_path)
    unfuse(whole)
    source = shards.open_source(tmp_path)
    units = [unit for unit in skeleton.units(source.model) if unit.kind == skeleton.BLOCK]
    names = [name for unit in units for group in unit.matrices for name in group]
    head = skeleton.structure_of(source.model).head
    read = inputs_of(whole, [*names, head], windows)
    states = block.first_states(source, windows)
    surroundings = source.surroundings(windows.unique(), states.rows)
    hidden = states.hidden
    for number, unit in enumerate(units):
        part, prefix = source.block(unit.modules[0]), f"{unit.modules[0]}."
        calls = [surroundings.call(window, number) for window in windows]
        groups = [tuple(name.removeprefix(prefix) for name in group) for group in unit.matrices]
        with moments.counted_rows(part, [name for group in groups for name in group]) as rows:
            outputs = moments.block_outputs(part, calls, hidden)
        reached = [job for job in moments.jobs(groups, rows) if rows[job.matrices[0]]]
        for job, moment in moments.calibrate(part, calls, hidden, reached):
            for name in job.matrices:
                x = read[f"{prefix}{name}"]
                assert len(x) == rows[name] and close(moment, x.T @ x / len(x)), name
        hidden = outputs
    assert close(head_inputs(source, windows, block.States(hidden, states.rows)), read[head])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compressed_folder_computes_what_the_last_block_passed_on(
    kind: str, windows: Tensor, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder opens in transformers, and its weights as floats give the states that were passed on."""
    whole = saved(kind, tmp_path / "full")
    source = shards.open_source(tmp_path / "full")
    passed: list[block.States] = []
    compress_unit = block.compress_unit

    def remember(*arguments: Any) -> block.CompressedUnit:
        compressed = compress_unit(*arguments)
        passed.extend([compressed.outputs] if compressed.outputs else [])
        return compressed

    monkeypatch.setattr(compress, "compress_unit", remember)
    metrics = compress.compress(source, NoTokenizer(), windows, tmp_path / "out", SETTINGS)
    assert metrics["bytes_file"] == forecast.file_bytes_of(source.model, SETTINGS)
    assert not list(tmp_path.glob("*.unfinished"))
    kind_of_auto = transformers.AutoModelForCausalLM
    model, loading = kind_of_auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    plain, structure = model.dequantize().eval(), skeleton.structure_of(source.model)
    if structure.tied:  # blocks were calibrated with the full embedding, which is compressed last
        full = whole.get_input_embeddings().weight.detach().clone()
        plain.get_input_embeddings().weight = nn.Parameter(full)
    expected = inputs_of(plain, [structure.head], windows)[structure.head]
    assert close(head_inputs(source, windows, passed[-1]), expected, 1e-3)
    assert not close(inputs_of(whole, [structure.head], windows)[structure.head], expected, 1e-2)  # it was compressed


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "jetmoe"])
def test_routers_stay_at_16_bits_and_experts_are_compressed(kind: str) -> None:
    model = skeleton.skeleton(tiny_config(kind, **(FEW if kind != "jetmoe" else {})))
    compressed = {name for unit in skeleton.units(model) for group in unit.matrices for name in group}
    assert any(".experts." in name or "expert_matrix" in name for name in compressed)
    assert not any(matrices.is_router(name) or name.endswith(".gate") for name in compressed)
    left = [name for name, part in model.named_parameters() if part.ndim == 3]
    assert not left


@torch.no_grad()
def test_unreached_experts_get_the_moments_of_all_tokens_of_their_layer(
    windows: Tensor, tmp_path: pathlib.Path
) -> None:
    saved("mixtral", tmp_path)
    source = shards.open_source(tmp_path)
    part: Any = source.block("model.layers.0")
    chosen = torch.tensor([0, 1]).expand(windows.shape[1], 2)  # the first two experts read every token
    part.mlp.gate.forward = lambda states: (None, torch.full(chosen.shape, 0.5), chosen)
    states = block.first_states(source, windows)
    surroundings = source.surroundings(windows.unique(), states.rows)
    calls = [surroundings.call(window, 0) for window in windows]
    groups = [(f"mlp.experts.{number}.expert_{leaf}",) for number in range(4) for leaf in ("up", "down")]
    with moments.counted_rows(part, [name for group in groups for name in group]) as rows:
        moments.block_outputs(part, calls, states.hidden)
    assert list(rows.values()) == 4 * [windows.numel()] + 4 * [0]
    listed = moments.jobs(groups, rows)
    assert len(listed) == 6 and listed[4].matrices == ("mlp.experts.2.expert_up", "mlp.experts.3.expert_up")
    assert listed[-1].matrices == ("mlp.experts.2.expert_down", "mlp.experts.3.expert_down")
    found = [moment for _, moment in moments.calibrate(part, calls, states.hidden, listed)]
    for own, pooled in ((found[0:4:2], found[4]), (found[1:4:2], found[5])):
        assert close(sum(own) / 2, pooled)
    alone = moments.jobs(groups, dict.fromkeys(rows, 0))
    assert all(
        moment.equal(torch.eye(len(moment))) for _, moment in moments.calibrate(part, calls, states.hidden, alone)
    )


@torch.no_grad()
def test_passes_change_nothing_and_hold_no_more_numbers_than_the_block(windows: Tensor, tmp_path: pathlib.Path) -> None:
    saved("mixtral", tmp_path, intermediate_size=512)
    source = shards.open_source(tmp_path)
    part = source.block("model.layers.1")
    states = block.first_states(source, windows)
    surroundings = source.surroundings(windows.unique(), states.rows)
    calls = [surroundings.call(window, 1) for window in windows]
    unit = next(unit for unit in skeleton.units(source.model) if unit.modules == ("model.layers.1",))
    groups = [tuple(name.removeprefix("model.layers.1.") for name in group) for group in unit.matrices]
    listed = moments.jobs(groups, {name: 1 for group in groups for name in group})
    together = moments.calibrate(part, calls, states.hidden, listed)
    parts = moments.passes(part, listed)
    apart = [one for jobs in parts for one in moments.calibrate(part, calls, states.hidden, jobs)]
    assert len(parts) > 1 and [job for job, _ in apart] == listed
    assert all(one.equal(other) for (_, one), (_, other) in zip(together, apart, strict=True))
    weights = sum(parameter.numel() for parameter in part.parameters())
    assert all(sum(len(m) ** 2 for _, m in moments.calibrate(part, calls, states.hidden, p)) <= weights for p in parts)


@pytest.mark.parametrize("kind", REFUSED)
def test_unfit_architecture_is_refused_in_one_sentence(kind: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[kind]) as refused:
        skeleton.skeleton(tiny_config(kind))
    assert "leave --by-layer out" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", ["t5", "vit"])
def test_no_decoder_is_refused_in_one_sentence(kind: str) -> None:
    with pytest.raises(ValueError, match=f"knows decoders, and this is a .* of '{kind}'"):
        skeleton.skeleton(tiny_config(kind))


@pytest.mark.slow
@pytest.mark.parametrize("kind", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
def test_every_decoder_of_transformers_is_known_or_refused(kind: str) -> None:
    """No architecture fails in another way than by one sentence."""
    if kind in architectures.CANNOT_RUN:
        pytest.skip(architectures.CANNOT_RUN[kind])
    try:
        model = skeleton.skeleton(tiny_config(kind))
    except ValueError as error:
        assert "leave --by-layer out" in str(error)
    else:
        assert forecast.file_bytes_of(model, ByLayer(bits=4, group_size=8)) > 0
