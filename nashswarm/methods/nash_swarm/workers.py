"""Compute several layers at a time, with one thread each."""

import concurrent.futures
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from nashswarm.memory import pages_of_their_own, trim_heap

Result = TypeVar("Result")


def one_thread_each(function: Callable[..., Result], *arguments: Sequence[Any]) -> Iterator[Result]:
    """Yield the function's results, in order; as many are computed at a time as torch has threads, with one each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    try:
        with pages_of_their_own():
            for result in pool.map(function, *arguments):
                trim_heap()  # each thread has a heap of its own, which keeps what is freed
                yield result
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # an interrupt does not wait for the layers in work
        torch.set_num_threads(threads)
