"""The encoder of lattice paths: least cost of all sequences, and the library against the implementation in torch."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nashswarm.kernels import native, path_encoder
from nashswarm.kernels import path_encoder_reference as reference
from nashswarm.kernels.path_form import STEPS, Columns, Rows
from nashswarm.quant.path_entropy import first_tables

needs_library = pytest.mark.skipif(native.path() == native.SLOW, reason="the C++ library is not there")
BITS = torch.from_numpy(first_tables().bits()).float().view(2, 18, -1)


@dataclasses.dataclass
class Case:
    """What ``feedback`` takes but the targets."""

    rows: Rows
    columns: Columns
    factor: Tensor
    prices: Tensor
    price: float

    def answer(self, implementation, targets):
        return implementation.feedback(targets, self.rows, self.columns, self.factor, self.prices, self.price)


def drawn(out: int, columns: int, seed: int, price: float, largest_size: int) -> Case:
    random = torch.Generator().manual_seed(seed)

    def exponents(count: int, low: int, high: int) -> Tensor:
        return torch.randint(low, high, (count,), generator=random).to(torch.int8)

    factor = torch.triu(0.3 * torch.randn(columns, columns, generator=random))
    factor.diagonal().copy_(torch.rand(columns, generator=random) + 0.5)
    steps, sensitivities, across = (torch.rand(size, generator=random) + 0.5 for size in (out, out, columns))
    rows = Rows(steps, sensitivities, exponents(out, -4, 4), exponents(out, -6, largest_size))
    return Case(
        rows, Columns(across, exponents(columns, -4, 4), exponents(columns, -3, 4)), factor, BITS * price, price
    )


def least_cost(case: Case, targets: Tensor) -> float:
    """Return the least cost of a path in the first column, by walking all sequences of the numbers that are tried.

    Nothing here is shared with the encoder: states are tuples of the last five bits.
    """
    step = [float(one * case.columns.steps[0]) for one in case.rows.steps]
    weight = [float(a / case.factor[0, 0] ** 2) / 2 for a in case.rows.sensitivities]

    def cost_of(row: int, set_: int, number: int) -> float:
        value = (2 * number - (set_ and number > 0)) * step[row]
        scale = int(case.rows.scale[row]) + int(case.columns.scale[0])
        level = int(case.rows.size[row]) + int(case.columns.size[0]) - (scale // 2)
        shift = max((level - 5 + 1) // 2, 0)
        symbol = min(number >> shift, 48)
        bits = float(BITS[set_, max(level - 2 * shift, -12) + 12, symbol]) + (number > 0 and symbol == 0)
        return weight[row] * (abs(float(targets[0, row])) - value) ** 2 + case.price * bits

    def walk(row: int, bits: tuple[int, ...]) -> float:
        if row == targets.shape[1]:
            return 0.0
        set_ = bits[-3]  # the third last bit
        exact = (abs(float(targets[0, row])) / step[row] + set_) / 2
        options = []
        for odd in (0, 1):
            nearest = 2 * round((exact - odd) / 2) + odd
            bit = odd ^ bits[-5] ^ bits[-2]
            tried = {max(number, odd) for number in (nearest, nearest - 2, odd)}
            options.append(min(cost_of(row, set_, number) for number in tried) + walk(row + 1, (*bits[1:], bit)))
        return min(options)

    return walk(0, (0,) * 5)


def cost_of_codes(case: Case, targets: Tensor, codes: Tensor) -> float:
    """Return the cost of these codes in the first column, or infinity if they leave their path."""
    bits, total = [0] * 5, 0.0
    for row, code in enumerate(codes[0].tolist()):
        set_ = bits[-3]
        number = (abs(code) + set_) // 2
        if abs(code) != 2 * number - (set_ and number > 0):
            return float("inf")
        size = float(case.rows.steps[row] * case.columns.steps[0])
        scale = int(case.rows.scale[row]) + int(case.columns.scale[0])
        level = int(case.rows.size[row]) + int(case.columns.size[0]) - (scale // 2)
        shift = max((level - 5 + 1) // 2, 0)
        symbol = min(number >> shift, 48)
        length = float(BITS[set_, max(level - 2 * shift, -12) + 12, symbol]) + (number > 0 and symbol == 0)
        sensitivity = float(case.rows.sensitivities[row] / case.factor[0, 0] ** 2)
        total += sensitivity / 2 * (float(targets[0, row]) - code * size) ** 2 + case.price * length
        bits = [*bits[1:], (number & 1) ^ bits[-5] ^ bits[-2]]
    return total


@pytest.mark.parametrize("implementation", [path_encoder, reference])
@pytest.mark.parametrize(("price", "scale", "largest"), [(0.0, 3.0, 6), (0.05, 3.0, 6), (0.3, 1.0, 4), (0.1, 60.0, 16)])
def test_feedback_finds_the_least_cost_of_all_sequences(implementation, price, scale, largest):
    for seed in range(4):
        case, rows = drawn(10, 1, seed, price, largest), 10
        targets = scale * torch.randn(1, rows, generator=torch.Generator().manual_seed(50 + seed))
        codes, _ = case.answer(implementation, targets.clone())
        assert cost_of_codes(case, targets, codes) == pytest.approx(least_cost(case, targets), rel=1e-5)


@needs_library
@given(st.integers(0, 10**6), st.sampled_from([1, 15, STEPS, STEPS + 7]), st.sampled_from([0.3, 4.0, 80.0]))
@settings(max_examples=8, deadline=None)
def test_library_encodes_as_torch_does(seed, out, scale):
    case = drawn(out, 3, seed, 0.05, 14)
    targets = scale * torch.randn(3, out, generator=torch.Generator().manual_seed(seed))
    changed = [targets.clone(), targets.clone()]
    answers = [case.answer(part, one) for part, one in zip((path_encoder, reference), changed, strict=True)]
    for first, second in zip(*answers, strict=True):
        assert torch.equal(first, second)
    assert torch.equal(*changed)


@needs_library
def test_feedback_of_several_threads_is_the_same():
    case = drawn(20 * STEPS, 3, 1, 0.05, 8)
    targets = torch.randn(3, 20 * STEPS, generator=torch.Generator().manual_seed(1))
    answers = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        answers.append(case.answer(path_encoder, targets.clone()))
    torch.set_num_threads(1)
    assert all(torch.equal(first, second) for first, second in zip(*answers, strict=True))
