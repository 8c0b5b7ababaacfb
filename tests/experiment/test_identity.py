"""Names of classes in records and saved models outlive moves of code."""

import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from hydra.utils import get_class

import nashswarm  # noqa: F401  it makes the format known to transformers
from experiments.config import compose
from nashswarm.experiment.certify import certify
from nashswarm.experiment.identity import IMPORT_PATHS, RECORDED_NAMES, TARGET, to_importable, to_recorded
from nashswarm.experiment.plan import TEXT_KEYS, plan
from nashswarm.records.record import Record, fingerprint, read

ROOT = pathlib.Path(__file__).parents[2]
SAVED = ROOT / "tests/fixtures/saved_by_47b7d35"  # by the last commit before modules became packages
RECORDS = sorted((ROOT / "results/records").rglob("*.json"))


def targets(config: Any) -> Iterator[str]:
    if isinstance(config, dict):
        yield from (value for key, value in config.items() if key == TARGET)
    for part in config.values() if isinstance(config, dict) else config if isinstance(config, list) else ():
        yield from targets(part)


@pytest.fixture(scope="module")
def records() -> dict[pathlib.Path, Record]:
    return {path: read(path) for path in RECORDS}


def test_record_file_name_equals_fingerprint(records: dict[pathlib.Path, Record]) -> None:
    assert len(records) >= 276
    assert [path for path, record in records.items() if path.stem != record.fingerprint] == []


def test_recorded_targets_import_and_keep_their_names(records: dict[pathlib.Path, Record]) -> None:
    names = {name for record in records.values() for name in targets(record.config)}
    for name in names | set(IMPORT_PATHS):
        (path,) = targets(to_importable({TARGET: name}))
        assert isinstance(get_class(path), type), name
        assert to_recorded({TARGET: path}) == {TARGET: name}
    assert len(RECORDED_NAMES) == len(IMPORT_PATHS)


def test_identity_nested_config_renames_targets_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECORDED_NAMES, "new.A", "old.A")
    config = {TARGET: "new.A", "parts": [{TARGET: "new.A", "note": "new.A"}, "new.A"], "bits": 3}
    assert to_recorded(config) == {TARGET: "old.A", "parts": [{TARGET: "old.A", "note": "new.A"}, "new.A"], "bits": 3}
    assert config[TARGET] == "new.A"


def test_composed_configs_find_the_records_of_the_ablation(records: dict[pathlib.Path, Record]) -> None:
    """All but the text: the embedded one comes from the documentation of the Python that runs."""
    ablation = [record for record in records.values() if record.labels["experiment"] == "ablation"]
    assert len(ablation) >= 13
    for record in ablation:
        config = compose("experiment=ablation", f"method={record.labels['method']}", "device=cpu")
        identity = dict(plan(config).identity)
        texts = {key: record.config["dataset"][key] for key in TEXT_KEYS}
        identity |= {"dataset": identity["dataset"] | texts, "threads": record.config["threads"]}
        assert fingerprint(identity) == record.fingerprint, record.labels


@pytest.fixture
def saved(tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of the model that commit 47b7d35 saved, with a cache of its own."""
    folder = pathlib.Path(shutil.copytree(SAVED / "compressed", tmp_path / "compressed"))
    about = json.loads((folder / "nashswarm.json").read_text())
    about["config"]["cache"] = str(tmp_path / "cache")
    (folder / "nashswarm.json").write_text(json.dumps(about))
    return folder


def test_model_saved_before_the_packages_generates_the_same_tokens(saved: pathlib.Path) -> None:
    generated = json.loads((SAVED / "generated.json").read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    tokens = model.generate(torch.tensor(generated["prompt"]), max_new_tokens=24, do_sample=False)
    assert tokens.tolist() == generated["tokens"]


def test_model_saved_before_the_packages_certifies(saved: pathlib.Path) -> None:
    checked = certify(saved, str(SAVED / "full"), str(SAVED / "story.txt"))
    assert checked["agrees"] and checked["equilibrium"] and checked["enumerated"] == "codes and steps"
