"""LLaMA checkpoints in many files: checked without reading a weight, then read tensor by tensor."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import safetensors
import torch
import transformers
from torch import Tensor

from nashswarm.models.sources import CONFIG, WEIGHTS

INDEX = f"{WEIGHTS}.index.json"
EMBEDDING, HEAD, NORM = "model.embed_tokens", "lm_head", "model.norm"


class Shards(Mapping[str, Tensor]):
    """Tensors of safetensors files by name; a file stays mapped as long as one of its tensors is in use."""

    def __init__(self, paths: Mapping[str, pathlib.Path]) -> None:
        self.paths = dict(paths)

    def __getitem__(self, name: str) -> Tensor:
        with safetensors.safe_open(self.paths[name], "pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint on the disk.  ``model``: the model without memory; ``shards``: its tensors, read when asked for."""

    folder: pathlib.Path
    config: Any
    model: Any
    shards: Shards

    def key(self) -> dict[str, Any]:
        """Return what changes when the checkpoint on the disk changes."""
        files = sorted(set(self.shards.paths.values()))
        sizes = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
        return {"config": hashlib.sha256((self.folder / CONFIG).read_bytes()).hexdigest(), "files": sizes}


def skeleton(config: Any) -> Any:
    """Return the model of a config, without memory.  Raises ValueError unless it is a LLaMA of plain floats."""
    if config.model_type != "llama":
        raise ValueError(
            f"compress by layer knows only LLaMA's architecture, and this is {config.model_type!r}: leave --by-layer "
            "out, which compresses the model as a whole in memory"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("the checkpoint is quantized already: start from the full model")
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def open_source(folder: pathlib.Path) -> Source:
    """Open the checkpoint in ``folder``: the header of every file is checked, and no weight is read.

    Raises ValueError, in one sentence, if the folder is not a complete LLaMA checkpoint.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: compress by layer reads from the disk, so fetch the checkpoint first")
    if not (folder / CONFIG).is_file():
        raise ValueError(f"the folder {folder} holds no {CONFIG}, so it is not a checkpoint in Hugging Face layout")
    config = transformers.AutoConfig.from_pretrained(folder)
    model = skeleton(config)
    if (folder / INDEX).is_file():
        try:
            index = json.loads((folder / INDEX).read_text())["weight_map"]
        except (ValueError, KeyError) as error:
            raise ValueError(f"{folder / INDEX} is damaged ({error!r}); fetch it again") from error
        files = {name: folder / file for name, file in index.items()}
    elif (folder / WEIGHTS).is_file():
        files = {}
    else:
        raise ValueError(f"the folder {folder} holds neither {WEIGHTS} nor {INDEX}; save the model as safetensors")
    paths = sorted(set(files.values())) or [folder / WEIGHTS]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise ValueError(f"{folder} lacks {', '.join(missing)}, which its index names; fetch the checkpoint again")
    shapes: dict[str, tuple[int, ...]] = {}
    path_of: dict[str, pathlib.Path] = {}
    for path in paths:
        try:
            with safetensors.safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  a safetensors file is no mapping
                    shapes[name], path_of[name] = tuple(file.get_slice(name).get_shape()), path
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is cut short or damaged ({error}); fetch it again") from error
    expected = {name: tuple(part.shape) for name, part in tensors_of(model).items()}
    if absent := [name for name in expected if name not in shapes]:
        raise ValueError(
            f"the checkpoint in {folder} lacks {len(absent)} of the model's tensors: {first_names(absent)}"
        )
    if mismatched := [name for name in expected if shapes[name] != expected[name]]:
        raise ValueError(f"{folder} holds tensors of other shapes than its {CONFIG} says: {first_names(mismatched)}")
    return Source(folder, config, model, Shards({name: path_of[name] for name in expected}))


def units(config: Any) -> list[tuple[str, ...]]:
    """Return the modules that are compressed and stored together, in order; a tied embedding is the head, the last."""
    blocks = [(f"model.layers.{number}",) for number in range(config.num_hidden_layers)]
    if config.tie_word_embeddings:
        return [*blocks, (NORM, EMBEDDING)]
    return [(EMBEDDING,), *blocks, (NORM, HEAD)]


def file_names(count: int) -> list[str]:
    """Return the names of ``count`` files of weights, as on the Hugging Face hub."""
    return [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]


def tensors_of(model: Any) -> dict[str, Tensor]:
    """Return the tensors that a checkpoint of the model holds: a tied head is the embedding."""
    tied = model.config.tie_word_embeddings
    return {name: part for name, part in model.state_dict().items() if not (tied and name == f"{HEAD}.weight")}


def first_names(names: Sequence[str], most: int = 8) -> str:
    """Return the first names and the number of the others."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
