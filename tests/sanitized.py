"""A pytest plugin that tests the kernels of another library, named by the environment variable SANITIZED."""

import os
import pathlib


def pytest_configure() -> None:
    from nashswarm.kernels import native  # after the plugin that checks shapes is loaded

    native.LIBRARY = pathlib.Path(os.environ["SANITIZED"])
    loaded = native.library()
    assert not isinstance(loaded, str), loaded
