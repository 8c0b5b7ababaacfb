"""Checkpoints in many files: checked without reading a weight, then read tensor by tensor."""

import collections
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import safetensors
import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor, nn

from nashswarm.methods.streaming import conversion, surroundings
from nashswarm.methods.streaming.skeleton import skeleton as skeleton
from nashswarm.methods.streaming.skeleton import structure_of, with_fused_experts
from nashswarm.methods.streaming.skeleton import tensors_of as tensors_of
from nashswarm.methods.streaming.surroundings import Surroundings
from nashswarm.models.sources import CONFIG, WEIGHTS

INDEX = f"{WEIGHTS}.index.json"


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
    """A checkpoint on the disk.

    ``model``: the model without memory, every expert a module of its own; ``fused``: the same with the modules of
    transformers, which the checkpoint is loaded into.  ``shards``: the tensors, read when asked for.  ``keys``: the
    names in the checkpoint by the parameter of ``fused`` that is made of them.
    """

    folder: pathlib.Path
    config: Any
    model: Any
    fused: Any
    shards: Shards
    keys: Mapping[str, Sequence[str]]

    def key(self) -> dict[str, Any]:
        """Return what changes when the checkpoint on the disk changes."""
        files = sorted(set(self.shards.paths.values()))
        sizes = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
        return {"config": hashlib.sha256((self.folder / CONFIG).read_bytes()).hexdigest(), "files": sizes}

    def mapped(self, name: str) -> Tensor:
        """Return the parameter ``name`` in the precision of the checkpoint, mapped from its file and not copied."""
        keys = self.keys[name]
        if len(keys) != 1:
            raise ValueError(f"the checkpoint in {self.folder} holds {name} in {len(keys)} pieces: save it in one")
        return self.shards[keys[0]]

    def surroundings(self, ids: Int[Tensor, " tokens"], rows: Float[Tensor, "tokens width"]) -> Surroundings:
        """Return what is around the decoder blocks; ``rows``: of the embedding, for the tokens ``ids`` to be read."""
        return surroundings.load(self.fused, self.shards, self.keys, structure_of(self.model), ids, rows)

    def block(self, name: str) -> nn.Module:
        """Return the module ``name`` with its weights in 32-bit floats, every expert a module of its own."""
        return conversion.loaded_block(self.fused, name, self.shards, self.keys)


def open_source(folder: pathlib.Path) -> Source:
    """Open the checkpoint in ``folder``: the header of every file is checked, and no weight is read.

    Raises ValueError, in one sentence, if the folder is not a complete checkpoint of a decoder.
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
    empty: dict[str, Tensor] = {}
    path_of: dict[str, pathlib.Path] = {}
    for path in paths:
        try:
            with safetensors.safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  a safetensors file is no mapping
                    empty[name] = torch.empty(tuple(file.get_slice(name).get_shape()), device="meta")
                    path_of[name] = path
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is cut short or damaged ({error}); fetch it again") from error
    fused = with_fused_experts(config)
    keys = _checked_keys(folder, fused, empty)
    used = {key for names in keys.values() for key in names}
    return Source(folder, config, model, fused, Shards({key: path_of[key] for key in path_of if key in used}), keys)


def _checked_keys(folder: pathlib.Path, fused: Any, empty: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return the names in the checkpoint by the parameter that is made of them.

    ``empty``: the tensors of the checkpoint without values, which are loaded as a trial.  Raises ValueError for
    missing tensors and wrong shapes.
    """
    expected = tensors_of(fused)
    keys: dict[str, list[str]] = collections.defaultdict(list)
    for key, name in conversion.targets(fused, empty).items():
        if name in expected:
            keys[name].append(key)
    used = {key: empty[key] for names in keys.values() for key in names}
    info = conversion.load(with_fused_experts(fused.config), used, "meta")
    mismatched = {name for name, *_ in info.mismatched_keys}
    absent = [name for name in expected if name in info.missing_keys and name not in mismatched]
    if absent:
        raise ValueError(
            f"the checkpoint in {folder} lacks {len(absent)} of the model's tensors: {first_names(absent)}"
        )
    if wrong := [name for name in expected if name in mismatched]:
        raise ValueError(f"{folder} holds tensors of other shapes than its {CONFIG} says: {first_names(wrong)}")
    return dict(keys)


def file_names(count: int) -> list[str]:
    """Return the names of ``count`` files of weights, as on the Hugging Face hub."""
    return [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]


def first_names(names: Sequence[str], most: int = 8) -> str:
    """Return the first names and the number of the others."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
