"""A cache of tensors on disk, keyed by the fingerprint of what produced them."""

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
    """A cache of tensors, as one safetensors file for each kind and key.

    If several processes ask for the same tensors, one computes them and the others wait.  A computation may ask the
    cache for other tensors, but not for its own.  Without a ``folder`` nothing is stored.  ``hits`` lists the kinds
    that were read from disk.
    """

    def __init__(self, folder: pathlib.Path | None, key: Mapping[str, Any], hits: list[str] | None = None) -> None:
        self.folder, self.key = folder, dict(key)
        self.hits: list[str] = [] if hits is None else hits

    def with_key(self, key: Mapping[str, Any]) -> "Cache":
        """Return this cache for tensors that depend on ``key`` as well."""
        return Cache(self.folder, self.key | dict(key), self.hits)

    def __call__(
        self, kind: str, key: Mapping[str, Any], compute: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Return the tensors of ``kind`` and ``key``, read from disk or computed by ``compute``."""
        if self.folder is None:
            return compute()
        path = self.folder / f"{kind}-{record.fingerprint(self.key | dict(key))}.safetensors"
        with contextlib.suppress(FileNotFoundError, safetensors.SafetensorError):
            return self._read(kind, path)
        with files.claim(path):
            try:
                return self._read(kind, path)  # another process may have written it meanwhile
            except FileNotFoundError:
                pass
            except safetensors.SafetensorError as error:
                log.warning("%s is damaged (%s) and is computed again", path, error)
            tensors = compute()
            files.write_by(path, functools.partial(_save, tensors))
        return tensors

    def _read(self, kind: str, path: pathlib.Path) -> dict[str, Tensor]:
        tensors = safetensors.torch.load_file(path)
        self.hits.append(kind)
        return tensors


def _save(tensors: Mapping[str, Tensor], path: pathlib.Path) -> None:
    try:
        safetensors.torch.save_file({name: part.contiguous() for name, part in tensors.items()}, path)
    except safetensors.SafetensorError as error:  # safetensors reports a full disk this way
        raise OSError(errno.EIO, str(error)) from error
