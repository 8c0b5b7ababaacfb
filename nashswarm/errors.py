"""Errors that callers tell apart.  Each message is one sentence that names the offending setting and the remedy."""

import contextlib
import importlib.metadata
import re
from collections.abc import Iterator, Mapping, Sequence


class Unsupported(ValueError):
    """A combination of settings that a method does not offer, such as a number of bits or an absent package.

    A sweep leaves such a job out and does not count it as failed.
    """


class MissingPackage(Unsupported):
    """An optional package that is not installed."""


@contextlib.contextmanager
def in_words_of(options: Mapping[str, str]) -> Iterator[None]:
    """Let the messages of ValueErrors name a door's own options in place of the configuration's keys.

    ``options``: key → option.  Checks lie deep in the library, where nobody knows whether a value came from the command
    line, from Python or from a configuration, so they name the key.
    """
    try:
        yield
    except ValueError as error:
        if len(error.args) == 1:
            error.args = (renamed(str(error), options),)
        raise


def renamed(message: str, options: Mapping[str, str]) -> str:
    """Return ``message`` with options in place of keys.

    >>> renamed("method.bits=0 is too small; raise method.bits", {"method.bits": "--bits"})
    '--bits 0 is too small; raise --bits'
    >>> renamed("method.bits=0 is too small; raise method.bits", {"method.bits": "bits="})
    'bits=0 is too small; raise bits='
    """
    for key, option in options.items():
        valued = option if option.endswith("=") else f"{option} "
        message = re.sub(rf"(?<![\w./]){re.escape(key)}=(?=\S)", valued, message)
        if "." in key:  # any other is a word as well
            message = re.sub(rf"(?<![\w./]){re.escape(key)}(?![\w/])", option, message)
    return message


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
