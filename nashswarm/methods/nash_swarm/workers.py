"""Compute several layers at a time, with one thread each."""

import concurrent.futures
import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from nashswarm.layers import Layer
from nashswarm.memory import pages_of_their_own, trim_heap
from nashswarm.progress import Track

Result = TypeVar("Result")


def one_thread_each(function: Callable[..., Result], *arguments: Sequence[Any]) -> Iterator[Result]:
    """Yield the function's results, in order; as many are computed at a time as torch has threads, with one each."""
    with _computed(function, *arguments) as futures:
        for _ in range(len(futures)):
            yield _result(futures.pop(0))  # which is not held any longer


def of_layers(
    function: Callable[..., Result], layers: Sequence[Layer], *arguments: Sequence[Any], track: Track, description: str
) -> list[Result]:
    """Return the function's result for each layer, and show how many have ended.

    The largest layer often comes first and ends last.  So the one that ends as the n-th counts as the n-th smallest.
    """
    with _computed(function, layers, *arguments) as futures:
        ended = concurrent.futures.as_completed(futures)
        for _, future in zip(
            track(sorted(layers, key=lambda layer: layer.parameters), description), ended, strict=True
        ):
            _result(future)
        return [future.result() for future in futures]


@contextlib.contextmanager
def _computed(
    function: Callable[..., Result], *arguments: Iterable[Any]
) -> Iterator[list[concurrent.futures.Future[Result]]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    try:
        with pages_of_their_own():
            yield [pool.submit(function, *each) for each in zip(*arguments, strict=True)]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # an interrupt does not wait for the layers in work
        torch.set_num_threads(threads)


def _result(future: concurrent.futures.Future[Result]) -> Result:
    result = future.result()
    trim_heap()  # each thread has a heap of its own, which keeps what is freed
    return result
