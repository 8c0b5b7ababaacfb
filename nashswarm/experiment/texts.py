"""Choose and read the texts of a run, and name them in its identity."""

import pathlib
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nashswarm.calibration import texts
from nashswarm.calibration.texts import CalibrationText
from nashswarm.data import corpus
from nashswarm.data.corpus import CALIBRATION_WINDOWS
from nashswarm.experiment.identity import TARGET
from nashswarm.models import sources
from nashswarm.models.sources import LONGEST_WINDOW
from nashswarm.packed import model_folder

CALIBRATION_TEXT = f"{CalibrationText.__module__}.{CalibrationText.__qualname__}"
COMMAND, CONFIG = "--calibration ", "dataset.source="  # how the doors call the source


def choose(
    named: str | None, model: str | None, own: bool = True, **windows: Any
) -> corpus.StdlibDocs | CalibrationText:
    """Return the text that ``--calibration`` names; None stands for the best one for ``model``, a path.

    The model that comes along (None) and its family are calibrated on the embedded text, as they were trained.
    ``own``: whether the model can sample text.  Raises ValueError for a name that is no source, file or folder.
    """
    if named is None and (model is None or sources.is_own(model)):
        return corpus.StdlibDocs(**windows)
    asked = texts.AUTO if named is None else named
    source = texts.resolve(texts.checked(asked, COMMAND), own)
    texts.announce(source, asked, "--calibration FILE")
    return CalibrationText(source, **windows)


def resolved(config: DictConfig) -> DictConfig:
    """Return ``config`` with what ``dataset.source=auto`` stands for today, so that the text is found again later."""
    if config.dataset.get(TARGET) != CALIBRATION_TEXT:
        return config
    asked = config.dataset.get("source", texts.AUTO)
    source = texts.resolve(texts.checked(asked, CONFIG))
    if source != asked:
        texts.announce(source, asked, f"{CONFIG}FILE")
    return DictConfig(OmegaConf.merge(config, {"dataset": {"source": source}}))


def read(dataset: Any, source: Any, cache: str) -> dict[str, str]:
    """Return the texts that calibrate and test; text of the model's own is sampled, or read from the ``cache``."""
    if isinstance(dataset, CalibrationText):
        own = texts.cached_own(source, pathlib.Path(cache))
        windows = (dataset.calibration_windows or 0) + (dataset.holdout_windows or 0)
        most = texts.bytes_for(max(windows, CALIBRATION_WINDOWS), dataset.sequence_length or LONGEST_WINDOW)
        return {"calibration": texts.read(dataset.source, own, most), "test": dataset.text("test")}
    return {purpose: dataset.text(purpose) for purpose in ("calibration", "test")}


def identify(dataset: Mapping[str, Any], read_texts: Mapping[str, str]) -> dict[str, Any]:
    """Return the part of a run's identity that its texts are; paths count by their content."""
    named = {key: value for key, value in dataset.items() if key not in ("path", "name")}
    if "source" in named:
        named["source"] = texts.named(named["source"])
    if isinstance(named.get("test"), Mapping):
        named["test"] = {key: value for key, value in named["test"].items() if key not in ("path", "name")}
    return named | {f"{purpose}_sha256": corpus.sha256(text) for purpose, text in read_texts.items()}


def refuse_training_text(source: sources.Source, text: str) -> None:
    """Raise ValueError if the model was trained on the text that is to test it, as where both are one file."""
    path = getattr(source, "path", None)
    if path is not None and model_folder.training_text(pathlib.Path(path)) == corpus.sha256(text):
        raise ValueError(
            f"the model in {path} was trained on this very test text: choose another dataset, or train and test with a "
            "folder of train, validation and test files"
        )
