"""The texts of a run: what ``dataset=calibration_text`` reads, what the record says of it, and what is refused."""

import json
import pathlib

import pytest
import transformers
from omegaconf import OmegaConf
from tokenizers.processors import TemplateProcessing

from experiments.config import compose
from nashswarm.calibration import texts as calibration_texts
from nashswarm.calibration.texts import CalibrationText
from nashswarm.data import corpus, stdlib_docs, stdlib_source
from nashswarm.experiment import compression, texts
from nashswarm.experiment.plan import config_again, config_of, plan
from nashswarm.experiment.run import run
from nashswarm.measures.size import Size
from nashswarm.methods.gptq import Gptq
from nashswarm.models import sources

LABELS = {"experiment": "single", "model": "tiny", "method": "gptq", "dataset": "calibration_text", "measure": "size"}


@pytest.fixture(autouse=True)
def short_texts(monkeypatch: pytest.MonkeyPatch, text_file: pathlib.Path) -> None:
    """Instead of the embedded texts, which take seconds to read, and of the hub."""
    for module in (stdlib_docs, stdlib_source):
        monkeypatch.setattr(module, "text", lambda split: text_file.read_text() + split)
    monkeypatch.setenv(calibration_texts.HUB_VARIABLE, "/nowhere")


@pytest.fixture
def words(model_folder: pathlib.Path, tmp_path: pathlib.Path) -> list[str]:
    kept = [f"{name}={tmp_path / name}" for name in ("records", "cache")]
    sizes = ["dataset.calibration_windows=6", "dataset.holdout_windows=2", "dataset.sequence_length=32"]
    groups = ["model=local", f"model.path={model_folder}", "method=gptq", "measure=size", "dataset=calibration_text"]
    return [*groups, *kept, *sizes, "device=cpu", "wandb=disabled"]


@pytest.mark.slow
def test_run_on_auto_records_what_it_stood_for(words: list[str], tmp_path: pathlib.Path) -> None:
    found = run(compose(*words, f"save={tmp_path / 'saved'}"), LABELS).record
    assert found.config["dataset"]["source"] == calibration_texts.OFFLINE
    about = json.loads((tmp_path / "saved/nashswarm.json").read_text())
    assert about["config"]["dataset"]["source"] == calibration_texts.OFFLINE
    said = transformers.AutoConfig.from_pretrained(tmp_path / "saved").calibration
    assert said["sha256"] == found.config["dataset"]["calibration_sha256"] and said["positions"] == 6 * 32
    again = config_again(about, {})  # the text is found again, from the cache
    assert plan(again).identity["dataset"] == found.config["dataset"]


def test_run_on_a_file_that_moved_finds_it_by_its_content(
    words: list[str], text_file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    first, second = tmp_path / "mine.txt", tmp_path / "elsewhere" / "mine.txt"
    second.parent.mkdir()
    for path in (first, second):
        path.write_text(text_file.read_text())
    made = run(compose(*words, f"dataset.source={first}", f"save={tmp_path / 'saved'}"), LABELS)
    assert str(tmp_path) not in json.dumps(made.record.config)
    assert run(compose(*words, f"dataset.source={second}"), LABELS).status == "skipped"
    about = json.loads((tmp_path / "saved/nashswarm.json").read_text())
    first.unlink()
    moved = config_again(about, {"dataset": str(second)})
    assert moved.dataset.source == str(second)


def test_run_tests_on_the_dataset_that_is_named(words: list[str], text_file: pathlib.Path) -> None:
    other = "{_target_: nashswarm.data.corpus.HubText, path: " + str(text_file) + "}"
    planned = plan(compose(*words, "dataset.source=embedded", f"dataset.test={other}"))
    assert planned.texts["test"] == corpus.HubText(str(text_file)).text("test") != planned.texts["calibration"]
    assert str(text_file) not in json.dumps(planned.identity)


def test_resolved_unknown_source_is_refused_in_the_words_of_the_config(words: list[str]) -> None:
    with pytest.raises(
        ValueError, match=r"^dataset\.source=wikipedia is not a file, a folder or a source of text; choose"
    ):
        run(compose(*words, "dataset.source=wikipedia"), LABELS)


def test_resolved_leaves_other_datasets_alone() -> None:
    config = OmegaConf.create({"dataset": {"_target_": "nashswarm.data.corpus.StdlibDocs"}})
    assert texts.resolved(config) is config


def test_choose_takes_the_embedded_text_for_the_projects_own_models(model_folder: pathlib.Path) -> None:
    windows = {"calibration_windows": 3, "holdout_windows": 1}
    for model in (None, "family/default_xs"):
        assert texts.choose(None, model, **windows) == corpus.StdlibDocs(**windows)
    assert texts.choose(None, str(model_folder)) == CalibrationText(calibration_texts.OFFLINE)
    assert texts.choose(None, str(model_folder), own=False) == CalibrationText("embedded")
    assert texts.choose("code", None) == CalibrationText("code")


def test_windows_of_every_text_begin_with_bos_where_the_tokenizer_does(
    model_folder: pathlib.Path, text_file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    folder = tmp_path / "model"
    transformers.AutoModelForCausalLM.from_pretrained(model_folder).save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    bos = tokenizer.eos_token
    tokenizer.add_special_tokens({"bos_token": bos})
    template = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = template
    tokenizer.save_pretrained(folder)
    dataset = corpus.HubText(str(text_file), calibration_windows=4, holdout_windows=2, sequence_length=32)
    source = sources.ModelSource(str(folder))
    where = {"records": str(tmp_path / "records"), "cache": str(tmp_path / "cache")}
    config = config_of(source, Gptq(bits=4), dataset, Size(), seed=0, save=None, **where)
    loaded = compression.load(config, plan(config))
    for windows in (loaded.pool, loaded.test):
        assert set(windows[:, 0].tolist()) == {tokenizer.bos_token_id}
        assert tokenizer.bos_token_id not in windows[:, 1:]
