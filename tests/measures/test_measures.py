"""Every measure keeps its promises on the tiny model."""

import copy
import dataclasses
import functools
import importlib.metadata
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nashswarm.measures import timing
from nashswarm.measures.generation import Bleu, LmEval
from nashswarm.measures.layers import Layers
from nashswarm.measures.load import Load
from nashswarm.measures.measure import EvaluationTarget, Measure, Several, require
from nashswarm.measures.quality import Quality
from nashswarm.measures.size import Size, resident_bytes
from nashswarm.measures.speed import Speed
from nashswarm.methods.peers import onnxruntime
from nashswarm.models import evaluation
from nashswarm.models.matrices import find_layers
from nashswarm.packed import checkpoint
from nashswarm.packed.modules import PackedMatrix
from nashswarm.progress import no_track
from nashswarm.quant.grid import Scheme, quantize
from nashswarm.quant.pack import pack
from nashswarm.records import statistics


@pytest.fixture(scope="module")
def packed_model(tiny: Any) -> Any:
    """At 4 bits, in groups."""
    model = copy.deepcopy(tiny)
    layers = find_layers(model)
    checkpoint.adopt(model, layers, {layer.name: pack(quantize(layer.weight, 4, Scheme(64))) for layer in layers})
    return model


@pytest.fixture
def subject(tiny: Any, packed_model: Any, token_windows: Tensor, tokenizer: Any) -> EvaluationTarget:
    """The tiny model, its packed copy, that copy's weights as floats, and damages as if they were predicted."""
    own, floats = copy.deepcopy(packed_model), copy.deepcopy(packed_model)
    floats.dequantize()
    reference = functools.partial(evaluation.compute_reference, tiny, token_windows)
    layers, weights = find_layers(tiny), {layer.name: layer.weight for layer in find_layers(floats)}
    damage = {layer.name: float(number % 3) for number, layer in enumerate(layers)}
    return EvaluationTarget(
        tiny, floats, lambda: own, token_windows, lambda size: reference(size), no_track, tokenizer,
        layers, weights, damage,
    )  # fmt: skip


def test_every_measure_is_one() -> None:
    assert all(
        isinstance(measure, Measure) for measure in (Quality(), Size(), Speed(), Load(), Layers(), Bleu(), LmEval())
    )


@pytest.mark.parametrize("form", ["groups", "lattice"])
def test_size_runs_nothing_and_counts_what_is_loaded(
    form: str, tiny: Any, model: Any, packed: Callable[..., dict[str, np.ndarray]], token_windows: Tensor
) -> None:
    """By hand: a tied matrix once, the rest as floats; of a packed matrix its tiles and the order they are read in."""
    checkpoint.adopt(model, find_layers(model), packed(model, form))

    def never(batch_size: int) -> evaluation.Reference:
        raise AssertionError

    found, series = Size().measure(EvaluationTarget(tiny, None, lambda: model, token_windows, never, no_track))
    assert series == {} and set(found) == {"bytes_resident", "bytes_resident_full"}
    assert found["bytes_resident_full"] == 4 * sum(part.numel() for part in tiny.parameters())
    matrices = {module for module in model.modules() if isinstance(module, PackedMatrix)}
    others = 4 * sum(part.numel() for part in model.parameters())
    assert len(matrices) == 2 + 2 * 4
    assert found["bytes_resident"] == others + sum(matrix.tiles.nbytes for matrix in matrices)
    assert found["bytes_resident"] < found["bytes_resident_full"] / 2


def test_quality(subject: EvaluationTarget) -> None:
    found, series = Quality(batch_size=2).measure(subject)
    assert set(found) == {
        "nll", "tokens", "nll_delta", "nll_delta_low", "nll_delta_high", "kl", "kl_low", "kl_high", "top1_agreement",
    }  # fmt: skip
    assert set(series) == {"nll", "tokens", "nll_full", "kl", "top1_agreement"}
    assert all(len(values) == len(subject.windows) for values in series.values())
    assert found["tokens"] == subject.windows.numel() - len(subject.windows)
    assert 0 < found["kl_low"] <= found["kl"] <= found["kl_high"]
    assert found["nll_delta_low"] <= found["nll_delta"] <= found["nll_delta_high"]
    assert 0 < found["top1_agreement"] < 1
    own = evaluation.evaluate(subject.compressed, subject.windows, 2)
    assert found["nll"] == pytest.approx(evaluation.summarise(own)["nll"])


def test_quality_refuses_logits_that_are_not_finite(subject: EvaluationTarget) -> None:
    with torch.no_grad():
        subject.compressed.transformer.ln_f.weight.fill_(math.inf)
    with pytest.raises(ValueError, match=r"not finite on the test text; raise method\.bits"):
        Quality(batch_size=2).measure(subject)


def test_speed(subject: EvaluationTarget) -> None:
    measure = Speed(prompt_tokens=8, context_tokens=3, new_tokens=4, repeats=5, against=["bfloat16"], quality_windows=3)
    found, series = measure.measure(subject)
    ratios = {f"{phase}_ratio{end}" for phase in ("decode", "decode_long", "prefill") for end in ("", "_low", "_high")}
    suffixes = ("", "_float32", "_bfloat16")
    expected = {name.replace("ratio", f"ratio{suffix}") for name in ratios for suffix in suffixes}
    for suffix in (*suffixes, "_full"):
        expected |= {
            f"decode_ms{suffix}",
            f"decode_long_ms{suffix}",
            f"prefill_tokens_per_second{suffix}",
            f"bytes_resident{suffix}",
        }
    assert set(found) == expected | {"kl_int8", "kl_float32"}
    names = ("full", "int8", "float32", "bfloat16")
    assert {name: len(values) for name, values in series.items()} == {f"decode_ms_{name}": 5 for name in names}
    assert all(value > 0 for value in found.values())
    for suffix in suffixes:
        assert 0.05 < found[f"decode_ratio{suffix}"] < 20
        assert (
            found[f"decode_ratio{suffix}_low"] <= found[f"decode_ratio{suffix}"] <= found[f"decode_ratio{suffix}_high"]
        )
    assert min(series["decode_ms_int8"]) <= found["decode_ms"] <= max(series["decode_ms_int8"])
    assert found["bytes_resident"] == found["bytes_resident_float32"] == resident_bytes(subject.packed())
    assert found["bytes_resident_bfloat16"] == found["bytes_resident_full"] / 2


def test_speed_tells_what_rounded_activations_cost(subject: EvaluationTarget) -> None:
    found, _ = Speed(prompt_tokens=8, new_tokens=1, repeats=1, quality_windows=3).measure(subject)
    windows = subject.windows[:3]
    floats = evaluation.evaluate(subject.compressed, windows, 1, subject.reference(1))
    assert found["kl_float32"] == pytest.approx(evaluation.summarise(floats)["kl"], rel=1e-3)
    assert found["kl_int8"] != found["kl_float32"] and found["kl_int8"] == pytest.approx(found["kl_float32"], rel=0.2)


def test_an_unknown_contestant_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown measure\.against 'onxruntime': choose among bfloat16"):
        Speed(against=["bfloat16", "onxruntime"])


def test_a_contestant_that_is_not_installed_is_not_timed(
    subject: EvaluationTarget, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    absent = dataclasses.replace(onnxruntime.LIBRARY, needs=("no-such-package",))
    monkeypatch.setattr(onnxruntime, "LIBRARY", absent)
    found, _ = Speed(prompt_tokens=4, new_tokens=1, repeats=1, against=["onnxruntime"], quality_windows=1).measure(
        subject
    )
    assert "decode_ms" in found and "decode_ms_onnxruntime" not in found
    assert "not timed: measure.against=onnxruntime needs no-such-package" in caplog.text


def test_load(subject: EvaluationTarget) -> None:
    pytest.importorskip("fastapi", reason="not installed")
    found, series = Load(requests=6, concurrency=2, prompt_tokens=8, new_tokens=3).measure(subject)
    names = ("latency_p50_ms", "latency_p95_ms", "latency_p99_ms", "tokens_per_second", "shed_rate", "error_rate")
    every = {f"{name}{end}" for name in (*names, "resident_spread") for end in ("", "_full")}
    assert set(found) == every | {"latency_p95_ratio"}
    for end in ("", "_full"):
        held = series[f"resident_mb{end}"]
        assert min(held) > 100 and found[f"resident_spread{end}"] == pytest.approx(1 - min(held) / max(held))
        assert (
            len(series[f"latency_ms{end}"]) == 6 and found[f"error_rate{end}"] == 0 < found[f"tokens_per_second{end}"]
        )
        assert 0 < found[f"latency_p50_ms{end}"] <= found[f"latency_p95_ms{end}"] <= found[f"latency_p99_ms{end}"]
    assert found["latency_p95_ratio"] == found["latency_p95_ms_full"] / found["latency_p95_ms"]


def test_load_counts_requests_that_fail(subject: EvaluationTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fastapi", reason="not installed")

    def broken(**_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(subject.packed(), "forward", broken)
    found, _ = Load(requests=4, concurrency=2, prompt_tokens=8, new_tokens=2).measure(subject)
    assert found["error_rate"] == 1 and found["tokens_per_second"] == 0 == found["error_rate_full"]


@pytest.mark.parametrize(
    "measure",
    [Speed(prompt_tokens=20, new_tokens=5), Speed(new_tokens=13), Load(prompt_tokens=20, new_tokens=5), Load()],
)
def test_prompts_longer_than_the_window_are_refused(subject: EvaluationTarget, measure: Speed | Load) -> None:
    with pytest.raises(ValueError, match=r"measure\.prompt_tokens.* exceed the window of 24"):
        measure.measure(subject)


def test_decoding_is_greedy_and_counts_the_tokens(subject: EvaluationTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cached path reads the tokens that generating without a cache would."""
    read: list[Tensor] = []
    forward = subject.compressed.forward
    monkeypatch.setattr(subject.compressed, "forward", lambda **kw: (read.append(kw["input_ids"]), forward(**kw))[1])
    prompt = subject.windows[:1, :8]
    prefill, decode = timing.generation(subject.compressed, prompt, 5)
    assert prefill > 0 and decode > 0
    tokens = prompt
    with torch.no_grad():
        for _ in range(5):
            tokens = torch.cat([tokens, forward(input_ids=tokens).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(torch.cat(read, 1), tokens)


def test_several_measures_are_taken_one_after_the_other(subject: EvaluationTarget) -> None:
    parts = [Size(), Quality(batch_size=2)]
    found, series = Several(parts).measure(subject)
    alone = [part.measure(subject) for part in parts]
    assert found == alone[0][0] | alone[1][0] and series == alone[1][1]


def test_each_layer_is_measured_alone(subject: EvaluationTarget, tiny: Any) -> None:
    """By hand: a fresh copy of the full model per matrix, one window at a time."""
    found, series = Layers(windows=3).measure(subject)
    windows, full = subject.windows[:3], evaluation.compute_reference(tiny, subject.windows[:3], 1)
    floats = dict(subject.compressed.named_parameters())
    for place, layer in enumerate(subject.layers):
        alone = copy.deepcopy(tiny)
        with torch.no_grad():
            name = f"{layer.name}.weight"
            dict(alone.named_parameters())[name].copy_(floats[name])
        expected = evaluation.summarise(evaluation.evaluate(alone, windows, 1, full))
        assert series["layer_kl"][place] == pytest.approx(expected["kl"], rel=1e-3)
        assert series["layer_nll_delta"][place] == pytest.approx(expected["nll_delta"], abs=1e-6)
        assert series["layer_kl_low"][place] <= series["layer_kl"][place] <= series["layer_kl_high"][place]
    assert set(series) == {"layer_kl", "layer_kl_low", "layer_kl_high", "layer_nll_delta"}
    assert all(len(values) == len(subject.layers) for values in series.values())
    assert found["layer_kl_sum"] == pytest.approx(sum(series["layer_kl"]))
    whole = evaluation.summarise(evaluation.evaluate(subject.compressed, windows, 3, full))
    assert found["kl_together"] == pytest.approx(whole["kl"], rel=1e-3)
    predicted = [subject.damage[layer.name] for layer in subject.layers]
    assert (found["damage_pearson"], found["damage_spearman"]) == statistics.correlations(predicted, series["layer_kl"])
    assert found["damage_pearson"] == pytest.approx(np.corrcoef(predicted, series["layer_kl"])[0, 1])


def test_the_forward_passes_are_as_many_as_it_says(subject: EvaluationTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = 0
    forward = type(subject.full).forward

    def counted(*given: Any, **named: Any) -> Any:
        nonlocal passes
        passes += 1
        return forward(*given, **named)

    monkeypatch.setattr(type(subject.full), "forward", counted)
    found, _ = Layers(windows=5).measure(subject)
    assert found["forward_passes"] == passes == len(subject.layers) + 2


def test_a_method_that_predicts_nothing_has_no_correlation(subject: EvaluationTarget) -> None:
    found, _ = Layers(windows=2).measure(dataclasses.replace(subject, damage={}))
    assert set(found) == {"layer_kl_sum", "kl_together", "forward_passes"}


@pytest.mark.parametrize("measure", [Layers(windows=6), Bleu(windows=6), Bleu(windows=0)])
def test_more_windows_than_there_are_are_refused(subject: EvaluationTarget, measure: Layers | Bleu) -> None:
    with pytest.raises(
        ValueError, match=rf"measure\.windows={measure.windows} must be between 1 and the 5 test windows"
    ):
        measure.measure(subject)


def test_continuations_are_those_of_generate(tiny: Any, token_windows: Tensor) -> None:
    found = evaluation.continue_greedily(tiny, token_windows[:, :8], 6, batch_size=2)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(found, tiny.generate(token_windows[:, :8], **options)[:, 8:])


def test_bleu_is_sacrebleus(subject: EvaluationTarget) -> None:
    sacrebleu = pytest.importorskip("sacrebleu", reason="the extra eval is not installed")
    found, series = Bleu(prompt_tokens=8, new_tokens=16, windows=5).measure(subject)
    names = ("bleu", "bleu_text", "bleu_text_full")
    assert set(found) == {f"{name}{end}" for name in (*names, "bleu_text_delta") for end in ("", "_low", "_high")}
    assert set(series) == set(names) and all(len(series[name]) == 5 for name in names)
    prompts = subject.windows[:, :8]
    own, full = (evaluation.continue_greedily(model, prompts, 16, 5) for model in (subject.packed(), subject.full))
    texts = [
        subject.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        for tokens in (own, full, subject.windows[:, 8:])
    ]
    for name, one, other in (("bleu", 0, 1), ("bleu_text", 0, 2), ("bleu_text_full", 1, 2)):
        assert found[name] == pytest.approx(sacrebleu.corpus_bleu(texts[one], [texts[other]]).score)
        alone = [sacrebleu.corpus_bleu([a], [[b]]).score for a, b in zip(texts[one], texts[other], strict=True)]
        assert series[name] == pytest.approx(alone)
        assert found[f"{name}_low"] <= found[name] <= found[f"{name}_high"]
    assert found["bleu_text_delta"] == pytest.approx(found["bleu_text"] - found["bleu_text_full"])


def test_a_model_writes_like_itself(subject: EvaluationTarget) -> None:
    pytest.importorskip("sacrebleu", reason="the extra eval is not installed")
    same = dataclasses.replace(subject, compressed=subject.full)
    found, _ = Bleu(prompt_tokens=4, new_tokens=20, windows=4, packed=False).measure(same)
    assert found["bleu"] == pytest.approx(100)
    assert found["bleu_text"] == found["bleu_text_full"] and found["bleu_text_delta"] == 0
    with pytest.raises(ValueError, match=r"measure\.new_tokens exceed the window of 24"):
        Bleu(prompt_tokens=20, new_tokens=5, windows=4).measure(same)


TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
"""
QUESTIONS = [("the quiet", [" starling", " price of"], 0), ("every old", [" and or", " flock"], 1)] * 4


@pytest.fixture
def task_folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """Two tasks of eight questions with two choices each; the second measures no accuracy."""
    path = tmp_path / "questions.json"
    rows = [{"text": text, "choices": choices, "label": label} for text, choices, label in QUESTIONS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    for name, metric in (("small_questions", "acc"), ("no_questions", "acc_norm")):
        (tmp_path / f"tasks/{name}.yaml").write_text(TASK.format(name=name, path=path, metric=metric))
    return tmp_path / "tasks"


def test_the_harness_asks_both_models(subject: EvaluationTarget, task_folder: pathlib.Path) -> None:
    """By hand: the choice whose tokens are likelier after the text."""
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    found, series = LmEval(["small_questions"], str(task_folder)).measure(subject)
    name = "accuracy_small_questions"
    for suffix, model in (("", subject.compressed), ("_full", subject.full)):
        right = []
        for text, choices, label in QUESTIONS:
            scores = []
            for choice in choices:
                start = len(subject.tokenizer(text)["input_ids"])
                tokens = torch.tensor(subject.tokenizer(text + choice)["input_ids"])
                with torch.no_grad():
                    log_p = model(input_ids=tokens[None]).logits[0].log_softmax(-1)
                scores.append(sum(log_p[place - 1, tokens[place]].item() for place in range(start, len(tokens))))
            right.append(float(int(np.argmax(scores)) == label))
        assert series[name + suffix] == right
        assert found[name + suffix] == np.mean(right)
        assert found[f"{name}{suffix}_stderr"] == pytest.approx(np.std(right, ddof=1) / math.sqrt(8))
    assert found[f"{name}_delta"] == found[name] - found[f"{name}_full"]
    assert found[f"{name}_delta_low"] <= found[f"{name}_delta"] <= found[f"{name}_delta_high"]


def test_the_harness_asks_no_more_than_the_limit(subject: EvaluationTarget, task_folder: pathlib.Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    _, series = LmEval(["small_questions"], str(task_folder), limit=3).measure(subject)
    assert all(len(values) == 3 for values in series.values())


@pytest.mark.parametrize(
    ("task", "message"), [("riddles", "there is no riddles"), ("no_questions", "no_questions measure no accuracy")]
)
def test_a_task_that_cannot_be_scored_is_named(
    task: str, message: str, subject: EvaluationTarget, task_folder: pathlib.Path
) -> None:
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    with pytest.raises(ValueError, match=message):
        LmEval([task], str(task_folder)).measure(subject)


def test_a_missing_package_is_named_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    for measure, package in ((Bleu(), "sacrebleu"), (LmEval(), "lm-eval")):
        with pytest.raises(ValueError, match=rf"needs {package}: pip install 'nashswarm\[eval\]'"):
            require(Several([Quality(), measure]))
    require(Several([Quality(), Size()]))
