"""A cache that several processes share."""

import multiprocessing
import pathlib
import time
from typing import Any

import pytest
import torch

from nashswarm.calibration.cache import Cache


def read_cache(folder: pathlib.Path, ready: Any, results: Any) -> None:
    """Read from the cache; put the tensor and the hits into ``results``."""

    def compute() -> dict[str, torch.Tensor]:
        with (folder.parent / "computed").open("a") as file:
            file.write("once\n")
        time.sleep(0.5)
        return {"x": torch.arange(3.0)}

    ready.wait()
    cache = Cache(folder, {"seed": 0})
    results.put((cache("moments", {}, compute)["x"].tolist(), cache.hits))


def test_cache_with_two_processes_computes_once(tmp_path: pathlib.Path) -> None:
    context = multiprocessing.get_context("fork")  # safe, because neither process uses torch's threads
    ready, results = context.Barrier(2), context.Queue()
    workers = [context.Process(target=read_cache, args=(tmp_path / "cache", ready, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    outcomes = sorted(results.get(timeout=300) for _ in workers)
    for worker in workers:
        worker.join()
    assert outcomes == [([0.0, 1.0, 2.0], []), ([0.0, 1.0, 2.0], ["moments"])]
    assert (tmp_path / "computed").read_text() == "once\n"
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".safetensors"]


def test_cache_removes_partial_file_of_killed_process(tmp_path: pathlib.Path) -> None:
    one, other = Cache(tmp_path, {"seed": 0}), Cache(tmp_path, {"seed": 1})
    one("moments", {}, lambda: {"x": torch.zeros(2)})
    [path] = tmp_path.iterdir()
    path.unlink()
    path.with_name(f".{path.name}.0123.partial").write_bytes(b"half")
    other("moments", {}, lambda: {"x": torch.ones(2)})
    assert len(list(tmp_path.glob(".*.partial"))) == 1  # it belongs to another key
    one("moments", {}, lambda: {"x": torch.zeros(2)})
    assert len(list(tmp_path.iterdir())) == 2 and not list(tmp_path.glob(".*"))


def test_cache_computation_may_use_cache(tmp_path: pathlib.Path) -> None:
    cache = Cache(tmp_path, {})
    inner = cache.with_key({"part": 1})
    tensors = cache("outer", {}, lambda: {"x": 1 + inner("inner", {}, lambda: {"x": torch.ones(1)})["x"]})
    assert tensors["x"] == 2 and len(list(tmp_path.iterdir())) == 2


def test_cache_that_cannot_be_claimed_raises_before_computing(tmp_path: pathlib.Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(OSError, match=r"cannot claim .*moments-\w+\.safetensors: "):
        Cache(tmp_path / "cache", {})("moments", {}, lambda: pytest.fail("it computed"))
