"""Symmetric matrices by halves, and tables of moments that share them."""

import pathlib

import pytest
import safetensors.torch
import torch
from torch import nn

from nashswarm.calibration.moments import calibrate
from nashswarm.calibration.moments_table import BLOCK, MomentsTable, SymmetricMatrix
from nashswarm.layers import Moments


@pytest.mark.parametrize("size", [1, 5, BLOCK, BLOCK + 1, 3 * BLOCK - 7])
def test_symmetric_matrix_adds_grams_like_full_products(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    half, expected = SymmetricMatrix.zeros(size), torch.zeros(size, size, dtype=torch.float64)
    for count in (1, 4, 30):
        rows = torch.randn(count, size, generator=generator)
        half.add_gram(rows)
        expected += rows.double().T @ rows.double()
    torch.testing.assert_close(half.full().double(), expected, rtol=1e-5, atol=1e-4)
    assert half.trace() == pytest.approx(float(expected.trace()), rel=1e-5)
    assert half.entries.numel() <= size * (size + BLOCK) // 2
    assert torch.equal(SymmetricMatrix.of(half.full()).entries, half.entries)


def test_symmetric_matrix_clone_changes_alone() -> None:
    half = SymmetricMatrix.of(torch.eye(3))
    half.clone().add_gram(torch.ones(1, 3))
    assert torch.equal(half.full(), torch.eye(3))


def moments_of(size: int, seed: int) -> Moments:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2, 4 * size, size, generator=generator)
    return Moments(rows[0].T @ rows[0], torch.rand(3), torch.rand(3), rows[1].T @ rows[1])


def test_moments_table_returns_what_was_put_in() -> None:
    table, expected = MomentsTable(), moments_of(BLOCK + 3, 0)
    table["matrix"] = expected
    for field in ("inputs", "outputs", "coupled", "coupled_inputs"):
        torch.testing.assert_close(getattr(table["matrix"], field), getattr(expected, field))


def test_moments_table_survives_safetensors_with_shared_matrices(tmp_path: pathlib.Path) -> None:
    table, share = MomentsTable(), torch.rand(5)
    table["query"], table["table"] = moments_of(6, 1), Moments(share, torch.rand(2), torch.rand(2), share)
    table.data["key"] = table.data["query"]
    tensors = table.tensors()
    assert len(tensors) == 4 + 3  # of query and key together, and of the table of lookups
    safetensors.torch.save_file(tensors, tmp_path / "moments.safetensors")
    again = MomentsTable.from_tensors(safetensors.torch.load_file(tmp_path / "moments.safetensors"))
    assert set(again) == {"query", "key", "table"}
    assert again.data["query"].inputs is again.data["key"].inputs
    for name in again:
        for field in ("inputs", "outputs", "coupled", "coupled_inputs"):
            assert torch.equal(getattr(again[name], field), getattr(table[name], field))


def test_moments_table_of_another_loses_modules_alone() -> None:
    table = MomentsTable({"one": moments_of(4, 2), "two": moments_of(4, 3)})
    copy = MomentsTable.of(table)
    del copy["one"]
    assert set(table) == {"one", "two"} and set(copy) == {"two"}
    assert copy.data["two"] is table.data["two"]
    assert set(MomentsTable.of({"three": moments_of(4, 4)})) == {"three"}


class Fork(nn.Module):
    """Two products with the same input, but for windows that begin with token 0, where one has twice the input."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 4)
        self.left, self.right = nn.Linear(4, 3, bias=False), nn.Linear(4, 2, bias=False)

    def forward(self, window: torch.Tensor) -> torch.Tensor:
        x = self.table(window)
        return self.left(x).sum() + self.right(2 * x if window[0] == 0 else x).square().sum()

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def get_output_embeddings(self) -> None:
        return None


@pytest.mark.parametrize("first", [1, 0])
def test_calibrate_shares_inputs_of_modules_while_they_are_the_same(first: int) -> None:
    torch.manual_seed(0)
    fork = Fork()
    windows = torch.tensor([[1, 2, 3], [first, 5, 1], [7, 2, 6]])
    table = calibrate(
        fork, ["left", "right"], windows, torch.Generator(), score=lambda model, window, generator: model(window)
    )
    assert (table.data["left"].inputs is table.data["right"].inputs) == (first == 1)
    x = fork.table.weight.detach()[windows]
    factors = torch.tensor([1.0, 2.0 if first == 0 else 1.0, 1.0])[:, None, None]
    for name, inputs in (("left", x), ("right", factors * x)):
        rows = inputs.flatten(0, 1).double()
        torch.testing.assert_close(table[name].inputs.double(), rows.T @ rows / 9, rtol=1e-5, atol=1e-6)
