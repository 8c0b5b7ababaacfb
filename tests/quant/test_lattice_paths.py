"""Lattice paths: codes against a state machine in plain Python, bytes and back, damaged bytes, and what paths gain."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nashswarm.kernels import trellis
from nashswarm.kernels.path_form import STEPS
from nashswarm.quant.container import KINDS
from nashswarm.quant.curvature import Curvature, factor_curvature
from nashswarm.quant.entropy import ESCAPE, CodeTables, coded_bits, count_symbols, encode_lattice, fit_tables
from nashswarm.quant.lattice import Lattice, LatticeTensor, bit_price, make_lattice
from nashswarm.quant.lattice_codes import RateTerm, lattice_descent, lattice_error_feedback
from nashswarm.quant.lattice_paths import GAIN, PathTensor, path_error_feedback
from nashswarm.quant.path_entropy import decode_paths, encode_paths, first_tables, with_fitted_sizes
from nashswarm.quant.prototype import KIND as PROTOTYPE
from tests.quant.cases import weights
from tests.quant.laplace import LAPLACE

few_examples = settings(max_examples=25, deadline=None)


def walk(numbers: list[int]) -> tuple[list[int], list[int]]:
    """Return sets and magnitudes of a column whose magnitudes have these numbers, by a state machine in plain Python.

    The state is the list of its last five bits, the newest last.
    """
    sets, magnitudes, bits = [], [], [0] * 5
    for row, number in enumerate(numbers):
        if row % STEPS == 0:
            bits = [0] * 5
        sets.append(bits[-3])
        magnitudes.append(2 * number - 1 if bits[-3] and number else 2 * number)
        bits = [*bits[1:], (number + bits[-5] + bits[-2]) % 2]
    return sets, magnitudes


@st.composite
def path_tensors(draw: st.DrawFn) -> tuple[PathTensor, np.ndarray, np.ndarray]:
    """Any shape; numbers small, of many sizes, or zero; sizes fitted to them or random.  Also their sets, numbers."""
    rows, columns = draw(st.sampled_from([1, 7, STEPS, STEPS + 1, 2 * STEPS + 9])), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    largest = draw(st.sampled_from([0, 2, 60, 5000, 2**30 - 1]))
    numbers = np.minimum(2 ** (rng.random((rows, columns)) * np.log2(largest + 1)) - 1, largest).astype(np.int64)
    walked = [walk(column.tolist()) for column in numbers.T]
    sets, magnitudes = (np.array(part).T for part in zip(*walked, strict=True))
    codes = torch.from_numpy((magnitudes * rng.choice([-1, 1], numbers.shape)).astype(np.int32))
    sides = [torch.from_numpy(rng.integers(-128, 128, size).astype(np.int8)) for size in (rows, columns) * 2]
    tensor = PathTensor(codes, Lattice(float(np.float32(rng.random() + 0.1)), *sides))
    return (with_fitted_sizes(tensor)[0] if draw(st.booleans()) else tensor), sets, numbers


@given(path_tensors())
@few_examples
def test_numbers_are_those_of_a_state_machine_in_plain_python(drawn: tuple[PathTensor, np.ndarray, np.ndarray]) -> None:
    tensor, sets, numbers = drawn
    found = tensor.numbers()
    assert (found[0] == sets).all() and (found[1] == numbers).all()


@given(path_tensors(), st.booleans())
@few_examples
def test_decode_paths_inverts_encode_paths(drawn: tuple[PathTensor, np.ndarray, np.ndarray], fitted: bool) -> None:
    tensor, _, numbers = drawn
    refitted, counts = with_fitted_sizes(tensor)
    tables = fit_tables(counts.symbols) if fitted else first_tables()
    if fitted:
        tensor = refitted
    packed = encode_paths(tensor, tables)
    decoded = decode_paths(packed, CodeTables.unpack(tables.pack()))
    assert isinstance(decoded, PathTensor) and decoded.codes.dtype == torch.int32
    assert torch.equal(decoded.codes, tensor.codes) and torch.equal(decoded.dequantize(), tensor.dequantize())
    for name in ("row_scale", "column_scale", "row_size", "column_size"):
        assert torch.equal(getattr(decoded.lattice, name), getattr(tensor.lattice, name)), name
    assert np.array_equal(encode_paths(decoded, tables), packed)
    if fitted and numbers.max() < ESCAPE:
        sides = 4 * 60 + sum(tensor.codes.shape)  # what exponents may take, and tables of them
        assert len(packed) <= counts.bits(tables) / 8 + 2 * sides + 40


def example() -> tuple[PathTensor, CodeTables]:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(300, 9, generator=generator)
    curvature = factor_curvature(Curvature(torch.ones(300), torch.eye(9), None))
    lattice = make_lattice(weight, 0.3, curvature.rows, curvature.columns)
    lattice = dataclasses.replace(lattice, base=lattice.base / 2)
    tensor, counts = with_fitted_sizes(path_error_feedback(weight, curvature, lattice, first_tables(), 1e-3))
    return tensor, fit_tables(counts.symbols)


def test_every_flipped_byte_and_every_cut_is_refused() -> None:
    tensor, tables = example()
    packed = encode_paths(tensor, tables)
    for place in range(len(packed)):
        damaged = packed.copy()
        damaged[place] ^= 1 << place % 8
        with pytest.raises(ValueError, match=r"begin with|checksum"):
            decode_paths(damaged, tables)
    for size in range(0, len(packed), 97):
        with pytest.raises(ValueError, match=r"begin with|checksum"):
            decode_paths(packed[:size], tables)


def test_tables_of_a_lattice_and_bytes_of_a_lattice_are_refused() -> None:
    tensor, tables = example()
    with pytest.raises(ValueError, match="the code tables are not those of lattice paths"):
        decode_paths(encode_paths(tensor, tables), LAPLACE)
    lattice = LatticeTensor(tensor.codes, tensor.lattice)
    with pytest.raises(ValueError, match="entropy-coded paths begin with"):
        decode_paths(encode_lattice(lattice, LAPLACE), tables)
    with pytest.raises(ValueError, match="frequencies are not those of code tables"):
        CodeTables.unpack(CodeTables(tables.frequencies[:-1]).pack())


def test_bytes_of_every_format_begin_differently() -> None:
    kinds = [*KINDS.values(), PROTOTYPE, trellis.MAGIC]
    assert len({kind[:3] for kind in kinds}) == len(kinds)


def test_codes_that_leave_their_path_are_refused() -> None:
    tensor, tables = example()
    codes = tensor.codes.clone()
    codes[0, 0] += 1  # the first code of a path is even
    with pytest.raises(ValueError, match="not on lattice paths"):
        encode_paths(PathTensor(codes, tensor.lattice), tables)


def test_matrix_that_is_only_looked_up_is_encoded_without_feedback() -> None:
    weight, sensitivity = weights(40, 5, 1), torch.rand(40, 5, generator=torch.Generator().manual_seed(2)) + 0.2
    curvature = factor_curvature(Curvature(torch.zeros(40), None, sensitivity))
    lattice = make_lattice(weight, 0.02, curvature.rows, curvature.columns)
    tensor = path_error_feedback(weight, curvature, lattice, first_tables(), 0.0)
    steps = lattice.row_steps()[:, None] * lattice.column_steps()
    assert ((weight - tensor.dequantize()).abs() <= 2.001 * steps).all()
    assert ((weight - tensor.dequantize()) / steps).square().mean() < 0.35  # of single codes of these steps 4 / 12


@pytest.mark.parametrize("step", [0.35, 1.0])
def test_paths_cost_at_most_87_percent_of_the_damage_of_a_lattice_at_equal_bits(step: float) -> None:
    """After two passes, beside error feedback and sweeps that mind lengths, each with tables fitted to it."""
    rows, columns = 6 * STEPS, 24
    generator = torch.Generator().manual_seed(5)
    weight, inputs = torch.randn(rows, columns, generator=generator), torch.randn(96, columns, generator=generator)
    curvature = factor_curvature(Curvature(torch.ones(rows), inputs.T @ inputs / 96, None))
    lattice = make_lattice(weight, step, curvature.rows, curvature.columns)
    halves, tables = dataclasses.replace(lattice, base=lattice.base / 2), first_tables()
    for _ in range(3):
        tensor, counts = with_fitted_sizes(
            path_error_feedback(weight, curvature, halves, tables, GAIN * bit_price(step))
        )
        halves, tables = tensor.lattice, fit_tables(counts.symbols)

    def damage(one: LatticeTensor) -> float:
        return float(curvature.curvature.damage_by_row(weight - one.dequantize()).sum())

    single = lattice_error_feedback(weight, curvature, lattice)
    for _ in range(3):
        single = LatticeTensor(single.codes, single.lattice.fit_sizes(single.codes.abs().float()))
        symbol_counts, bits = _counted(single)
        rate = RateTerm(symbol_counts, bit_price(step))
        single, _ = lattice_descent(weight, single, curvature.curvature, rate, 10)
    _, bits = _counted(single)
    equal = damage(tensor) * 4 ** ((counts.bits(tables) - bits) / weight.numel())
    assert equal <= 0.87 * damage(single), math.log2(equal / damage(single))


def _counted(tensor: LatticeTensor) -> tuple[CodeTables, float]:
    tables = fit_tables(count_symbols([tensor]))
    return tables, float(coded_bits(tensor, tables).sum())
