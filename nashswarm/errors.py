"""Errors that callers tell apart.  Each message is one sentence that names the offending setting and the remedy."""

import importlib.metadata
from collections.abc import Sequence


class Unsupported(ValueError):
    """A combination of settings that a method does not offer, such as a number of bits or an absent package.

    A sweep leaves such a job out and does not count it as failed.
    """


class MissingPackage(Unsupported):
    """An optional package that is not installed."""


def require(setting: str, packages: Sequence[str], extra: str = "peers") -> None:
    """Check that all ``packages`` are installed.

    Raises MissingPackage, whose message names ``setting``, the absent packages and the ``extra`` that installs them.
    """
    missing = []
    for package in packages:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    if missing:
        raise MissingPackage(f"{setting} needs {', '.join(missing)}: pip install 'nashswarm[{extra}]'")
