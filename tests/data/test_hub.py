"""Whether the hub can be reached: asked once, and answered in time."""

import socket
import time
from collections.abc import Iterator

import huggingface_hub.constants
import pytest

from nashswarm.data import hub


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub.use_cache_if_unreachable.cache_clear()
    yield
    hub.use_cache_if_unreachable.cache_clear()


def test_hub_that_refuses_is_unreachable_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        assert not hub.use_cache_if_unreachable()
    assert huggingface_hub.constants.HF_HUB_OFFLINE


def test_hub_that_never_answers_costs_the_timeout_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a resolver nor a server that hangs may hold up a run."""

    def hang(*_: object, **__: object) -> None:
        time.sleep(1)
        raise TimeoutError

    monkeypatch.setattr(hub.urllib.request, "urlopen", hang)
    monkeypatch.setattr(hub, "TIMEOUT", 0.2)
    started = time.monotonic()
    assert not hub.use_cache_if_unreachable() and not hub.use_cache_if_unreachable()
    assert time.monotonic() - started < 0.9 and huggingface_hub.constants.HF_HUB_OFFLINE


def test_hub_with_an_error_status_is_reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise hub.urllib.error.HTTPError("https://hub", 403, "forbidden", None, None)  # type: ignore[arg-type]

    monkeypatch.setattr(hub.urllib.request, "urlopen", forbidden)
    assert hub.use_cache_if_unreachable() and not huggingface_hub.constants.HF_HUB_OFFLINE
