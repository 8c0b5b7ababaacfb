import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from nashswarm.layers import Layer
from nashswarm.methods.nash_swarm.workers import of_layers, one_thread_each
from nashswarm.progress import no_track


def layer(name: str, size: int) -> Layer:
    return Layer(name, name, 0.0, (name,), ("Linear",), torch.zeros(1, size))


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("two_threads")
def test_small_layers_that_end_while_the_first_is_computed_count_as_progress() -> None:
    layers = [layer("embedding", 100), *(layer(f"small.{number}", 10) for number in range(4))]
    counted: list[int] = []
    all_small_ones = threading.Event()

    def track(items: Sequence[Any], description: str) -> Iterator[Any]:
        for item in items:
            yield item
            counted.append(item.parameters)
            if len(counted) == 4:
                all_small_ones.set()

    def work(layer: Layer, number: int) -> tuple[str, int, int]:
        assert layer.parameters < 100 or all_small_ones.wait(30)
        return layer.name, number, torch.get_num_threads()

    results = of_layers(work, layers, range(5), track=track, description="working")
    assert counted == [10, 10, 10, 10, 100]
    assert results == [("embedding", 0, 1), *((f"small.{number}", number + 1, 1) for number in range(4))]
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_an_error_of_one_layer_is_raised_and_threads_come_back() -> None:
    def fail(number: int) -> int:
        if number == 2:
            raise ValueError("layer 2")
        return number

    results = one_thread_each(fail, range(4))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="layer 2"):
        next(results)
    assert torch.get_num_threads() == 2

    def refuse(layer: Layer) -> None:
        raise ValueError(layer.name)

    with pytest.raises(ValueError, match="embedding"):
        of_layers(refuse, [layer("embedding", 1)], track=no_track, description="working")
    assert torch.get_num_threads() == 2
