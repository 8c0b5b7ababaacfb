"""A plugin of pytest: the kernels of the library that the environment variable SANITIZED names."""

import os
import pathlib


def pytest_configure() -> None:
    from nashswarm.kernels import native  # not before the plugin that checks shapes

    native.LIBRARY = pathlib.Path(os.environ["SANITIZED"])
    found = native.library()
    assert not isinstance(found, str), found
