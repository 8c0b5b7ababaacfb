"""Memory of models, the longest text within a limit, and pinned weights."""

import pathlib
import resource
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from nashswarm import inference, memory
from nashswarm.cli import main
from nashswarm.measures.size import resident_bytes
from nashswarm.models.matrices import find_layers
from nashswarm.packed import checkpoint
from nashswarm.runtime import memory_limit, profile
from nashswarm.runtime.serving.engine import Limits

Packed = Callable[..., dict[str, np.ndarray]]
BASE, TOKEN = 1_000_000, 500  # bytes of a process that is made up


@pytest.fixture(params=["tiles", "trellis"])
def small(request: pytest.FixtureRequest, model: Any, packed: Packed) -> Any:
    """The tiny model on packed matrices."""
    checkpoint.adopt(model, find_layers(model), packed(model, request.param))
    return model


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths that were tried on the process that is made up."""
    lengths: list[int] = []

    def peak(model: Any, tokens: int) -> int:
        lengths.append(tokens)
        return BASE + TOKEN * tokens + tokens * tokens

    monkeypatch.setattr(memory_limit, "peak_bytes", peak)
    return lengths


def test_weight_tensors_count_each_once(small: Any, tiny: Any) -> None:
    packed, others = (sum(part.nbytes for part in group) for group in memory_limit.weight_tensors(small))
    assert packed + others == resident_bytes(small) and 0 < others < packed
    none, every = (sum(part.nbytes for part in group) for group in memory_limit.weight_tensors(tiny))
    assert none == 0 and every == resident_bytes(tiny)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_token_bytes_are_keys_and_values_of_layers(kind: str, random_model: Callable[[str], Any]) -> None:
    heads = {"gpt2": 4, "llama": 2}[kind]
    assert memory_limit.token_bytes(random_model(kind)) == 2 * 2 * heads * 16 * 4


@pytest.mark.parametrize("fits", [1024, 1023, 700, 64, 3, 2])
def test_longest_text_fits_and_uses_limit(fits: int, tried: list[int]) -> None:
    limit = BASE + TOKEN * fits + fits * fits
    tokens, held = memory_limit.longest_text(None, limit, 1024)
    assert held == BASE + TOKEN * tokens + tokens * tokens <= limit
    assert 0.7 * fits <= tokens <= fits and len(tried) <= memory_limit.TRIES + 11


def test_longest_text_limit_below_process_refused(tried: list[int]) -> None:
    with pytest.raises(ValueError, match="holds 1 MB with a text of two tokens, more than the limit of 0 MB"):
        memory_limit.longest_text(None, BASE // 4, 1024)
    assert tried == [2]


def test_longest_text_doubles_until_over_limit(tried: list[int]) -> None:
    memory_limit.longest_text(None, BASE + TOKEN * 100, 1024)
    assert tried[:7] == [2, 4, 8, 16, 32, 64, 128] and max(tried) == 128


def test_peak_bytes_grow_with_text() -> None:
    config = transformers.GPT2Config(vocab_size=64, n_positions=2048, n_embd=256, n_layer=2, n_head=4)
    wide = transformers.GPT2LMHeadModel(config).eval()
    try:
        least, most = memory_limit.peak_bytes(wide, 2), memory_limit.peak_bytes(wide, 2048)
    except ValueError as refused:
        pytest.skip(str(refused))
    size = memory_limit.token_bytes(wide)
    assert size is not None and most - least > 2048 * size > 2**23 - 1


def test_pin_weights_seen_by_system(small: Any) -> None:
    try:
        size = memory_limit.pin(small)
    except ValueError as refused:
        pytest.skip(str(refused))
    assert size == resident_bytes(small) <= memory.usage_by_kind()["pinned"]


def test_pin_refused_by_system_named(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: int, size: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(memory, "pin", refuse)
    with pytest.raises(ValueError, match=r"cannot be pinned \(Cannot allocate memory\): raise .*ulimit -l"):
        memory_limit.pin(small)


def test_pin_unmapped_memory_fails() -> None:
    with pytest.raises(OSError, match=r"."):
        memory.pin(resource.getpagesize(), 10**15)


def test_token_bytes_without_cache_is_none() -> None:
    class Plain(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> object:
            return object()

    assert memory_limit.token_bytes(Plain()) is None


def test_profile_command_prints_memory(
    small: Any, tokenizer: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], tried: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(profile, "read_bandwidth", lambda size: 1e10)  # reads for seconds
    small.save_pretrained(tmp_path)
    words = ["profile", str(tmp_path), "--steps", "1", "--largest-batch", "1", "--threads", "1"]
    assert main([*words, "--memory-mb", "1.01"]) == 0
    shown = capsys.readouterr().out
    packed, _ = (sum(part.nbytes for part in group) for group in memory_limit.weight_tensors(small))
    assert f"{packed:,} bytes of packed matrices" in shown and "bytes of cache for each token" in shown
    assert "within 1.01 MB: texts of 19 tokens, 1 MB at the peak" in shown
    assert main([*words, "--memory-mb", "0.5"]) == 2
    assert "more than the limit" in capsys.readouterr().err


@pytest.fixture
def folder(small: Any, tokenizer: Any, tmp_path: pathlib.Path) -> pathlib.Path:
    small.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_server_with_limit_answers_texts_that_fit(
    folder: pathlib.Path, tried: list[int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fastapi", reason="not installed")
    httpx = pytest.importorskip("httpx", reason="not installed")
    from nashswarm.runtime.serving import host

    pinned: list[int] = []
    monkeypatch.setattr(memory, "pin", lambda address, size: pinned.append(size))
    limit = 1e-6 * (BASE + 12 * TOKEN + 200)  # between the needs of 12 and of 13
    app = inference._build_app(folder, "small", 1, Limits(), limit, True)
    log = capsys.readouterr().err
    assert f"{sum(pinned):,} bytes of weights are pinned" in log and "texts of up to 12 tokens are answered" in log
    with host.serve_in_thread(app) as url:
        for tokens, status in ((9, 200), (10, 400)):
            body = {"prompt": [1, 2, 3], "max_tokens": tokens}
            assert httpx.post(f"{url}/v1/completions", json=body).status_code == status


def test_server_with_low_limit_does_not_start(
    folder: pathlib.Path, tried: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("fastapi", reason="not installed")
    from uvicorn.config import STARTUP_FAILURE

    with pytest.raises(SystemExit) as stopped:
        inference._build_app(folder, "small", 1, Limits(), 0.5, False)
    assert stopped.value.code == STARTUP_FAILURE and "more than the limit of 0 MB" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["-1", "0", "inf", "nan", "much"])
def test_memory_option_invalid_number_refused(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "folder", f"--memory-mb={size}"])
    assert f"--memory-mb: '{size}' is no number of megabytes above 0" in capsys.readouterr().err
