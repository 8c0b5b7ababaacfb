"""The command that serves, its processes, and what becomes of them."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi", reason="not installed")
uvicorn = pytest.importorskip("uvicorn", reason="not installed")
httpx = pytest.importorskip("httpx", reason="not installed")

import nashswarm  # noqa: E402
from nashswarm.cli import main  # noqa: E402
from nashswarm.runtime.serving import host  # noqa: E402


def ask(client: Any) -> Any:
    return client.post("/v1/completions", json={"prompt": [1, 2, 3], "max_tokens": 4, "temperature": 0})


@pytest.fixture
def served(model: Any, tokenizer: Any, tmp_path: pathlib.Path) -> Iterator[tuple[Any, int]]:
    """A client of the command itself, and the number of its process."""
    packed, _ = nashswarm.compress(model, tokenizer, "uniform", torch.arange(64).view(2, 32))
    for part in (packed, tokenizer):
        part.save_pretrained(tmp_path / "small")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = "import sys; from nashswarm.cli import main; sys.exit(main())"
    words = [sys.executable, "-c", command, "serve", str(tmp_path / "small"), "--port", str(port)]
    words += ["--memory-mb", "100000", "--cors-origins", "http://localhost:3000"]
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[3])}
    with (
        subprocess.Popen(words, env=environment) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False) as client,
    ):
        try:
            yield client, process.pid
        finally:
            process.terminate()
            assert process.wait(60) == 0


def workers(parent: int) -> list[int]:
    processes = []
    for status in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = status.read_text().rsplit(")", 1)[1].split()
            if int(fields[1]) == parent and b"spawn_main" in (status.parent / "cmdline").read_bytes():
                processes.append(int(status.parent.name))
    return processes


def ask_until_up(client: Any) -> Any:
    """Of a server that may be starting: whom the listening socket holds is answered in time."""
    for _ in range(240):
        with contextlib.suppress(httpx.HTTPError):
            return ask(client)
        time.sleep(0.5)
    raise AssertionError("the server never came up")


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="processes cannot be stopped here")
def test_supervisor_worker_death_ends_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker is stopped while a health check waits for it, and then killed."""
    monkeypatch.setattr("uvicorn.supervisors.multiprocess.SIGNALS", {})  # those of the tests stay
    supervisor = host.Supervisor(uvicorn.Config("nowhere:app"), [])
    supervisor.init_processes()
    (process,) = supervisor.processes
    os.kill(process.pid, signal.SIGSTOP)
    threading.Timer(0.5, os.kill, (process.pid, signal.SIGKILL)).start()
    started = time.monotonic()
    assert not process.is_alive(timeout=60) and 0.4 < time.monotonic() - started < 30
    process.join()


@pytest.mark.parametrize("text", ["localhost:3000", "http://localhost:3000/", "http://", "", "null"])
def test_serve_command_origin_that_no_browser_sends_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["serve", "folder", "--cors-origins", "http://localhost:3000", text])
    assert stopped.value.code == 2 and f"--cors-origins: '{text}' is no origin: write scheme" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are looked up in /proc")
def test_serve_command_restarts_killed_worker(served: tuple[Any, int]) -> None:
    client, parent = served
    before = ask_until_up(client)
    assert before.status_code == 200
    page = {"Origin": "http://localhost:3000"}
    assert client.get("/health", headers=page).headers["access-control-allow-origin"] == page["Origin"]
    (killed,) = workers(parent)
    os.kill(killed, signal.SIGKILL)
    after = ask_until_up(client)
    assert after.status_code == 200 and after.json()["choices"] == before.json()["choices"]
    assert killed not in workers(parent) and len(workers(parent)) == 1
