"""Errors that callers tell apart: each message is one sentence with its remedy."""

import importlib.metadata
from collections.abc import Sequence


class Unsupported(ValueError):
    """A method that has nothing to offer here: not at these bits, or not without a package that is absent.  In a sweep
    it is left out, which is no failure."""


class MissingPackage(Unsupported):
    """An optional package is absent."""


def require(setting: str, packages: Sequence[str], extra: str = "peers") -> None:
    """Raises MissingPackage, which names the packages that ``setting`` needs and that are absent."""
    missing = []
    for package in packages:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    if missing:
        raise MissingPackage(f"{setting} needs {', '.join(missing)}: pip install 'nashswarm[{extra}]'")
