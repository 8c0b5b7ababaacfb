"""Products with trellis-coded matrices by Triton, in its interpreter."""

import importlib
import sys

import pytest
import torch

from nashswarm.kernels import trellis as form
from nashswarm.kernels.trellis_codes import INT8


def _matrix(rows, columns, rotated, ordered, seed=0):
    generator = torch.Generator().manual_seed(seed)
    groups, across = form.groups_of(rows), form.tiles_across(columns)
    rates = torch.randint(0, INT8 + 1, (groups, across), generator=generator).to(torch.uint8)
    rates.view(-1)[: INT8 + 1] = torch.arange(INT8 + 1)[: rates.numel()]
    top = (1 << rates.long()).repeat_interleave(64, 0).repeat_interleave(16, 1)
    codes = torch.randint(0, 256, top.shape, generator=generator) % top

    def draw(low, high, size):
        return torch.randint(low, high, (size,), generator=generator).to(torch.uint8)

    orders = [torch.randperm(size, generator=generator) if ordered else None for size in (rows, columns)]
    return form.build(
        rates, codes.to(torch.uint8), rows, columns, rotated, 0.5, draw(0, 16, groups * 64), draw(110, 140, rows),
        draw(110, 140, across * 16), *orders,
    )  # fmt: skip


@pytest.mark.parametrize(("rows", "columns"), [(128, 80), (70, 33)])
@pytest.mark.parametrize(("rotated", "ordered"), [(True, True), (False, False)])
def test_triton_matmul_in_interpreter_matches_float64(rows, columns, rotated, ordered, monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read when the module is imported
    monkeypatch.delitem(sys.modules, "nashswarm.kernels.triton_trellis", raising=False)
    triton_trellis = importlib.import_module("nashswarm.kernels.triton_trellis")
    matrix = _matrix(rows, columns, rotated, ordered)
    for batch in (1, 19):
        x = torch.randn(batch, columns, generator=torch.Generator().manual_seed(batch))
        expected = x.double() @ form.dequantize(matrix).double().T
        error = (triton_trellis.matmul(x, matrix).double() - expected).norm() / expected.norm()
        assert error < 1e-6
    monkeypatch.delitem(sys.modules, "nashswarm.kernels.triton_trellis")
