"""Tensors on disk, kept under the fingerprint of all that produced them."""

import contextlib
import errno
import functools
import logging
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from nashswarm.records import files, record

log = logging.getLogger(__name__)


class Cache:
    """Tensors kept on disk under the fingerprint of what produced them; without a folder nothing is kept.  Of all
    workers on a folder one computes and the others wait for it; a computation may ask for other tensors, not for its
    own.  ``hits``: the kinds that were found."""

    def __init__(self, folder: pathlib.Path | None, key: Mapping[str, Any], hits: list[str] | None = None) -> None:
        self.folder, self.key = folder, dict(key)
        self.hits: list[str] = [] if hits is None else hits

    def with_key(self, key: Mapping[str, Any]) -> "Cache":
        """The same cache for what depends on ``key`` as well."""
        return Cache(self.folder, self.key | dict(key), self.hits)

    def __call__(
        self, kind: str, key: Mapping[str, Any], compute: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        if self.folder is None:
            return compute()
        path = self.folder / f"{kind}-{record.fingerprint(self.key | dict(key))}.safetensors"
        with contextlib.suppress(FileNotFoundError, safetensors.SafetensorError):
            return self._kept(kind, path)
        with files.claim(path):
            try:
                return self._kept(kind, path)  # another worker has made it meanwhile
            except FileNotFoundError:
                pass
            except safetensors.SafetensorError as error:
                log.warning("%s is damaged (%s) and is made anew", path, error)
            tensors = compute()
            files.write_by(path, functools.partial(_save, tensors))
        return tensors

    def _kept(self, kind: str, path: pathlib.Path) -> dict[str, Tensor]:
        tensors = safetensors.torch.load_file(path)
        self.hits.append(kind)
        return tensors


def _save(tensors: Mapping[str, Tensor], path: pathlib.Path) -> None:
    try:
        safetensors.torch.save_file({name: part.contiguous() for name, part in tensors.items()}, path)
    except safetensors.SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(errno.EIO, str(error)) from error
