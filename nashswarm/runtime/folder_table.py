"""Print what is in the folder of a compressed model: its matrices, and all other tensors by the reason to keep them."""

import pathlib
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from nashswarm.packed.account import account, by_reason, stored_sizes
from nashswarm.packed.matrix import PackedMatrix


def show(folder: pathlib.Path, model: Any, files: Sequence[str], console: Console) -> int:
    """Print the matrices of a model, its other tensors, and the bytes of both; return all bytes.

    ``model``: as loaded from ``folder``.  ``files``: those that count as the model: its weights and config.
    """
    table = Table("matrix", "shape", "format", "bits in file", "in memory", "tiles by width", box=None)
    listed: set[PackedMatrix] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        matrix = getattr(module, "matrix", None)
        if isinstance(matrix, PackedMatrix) and matrix not in listed:
            listed.add(matrix)
            table.add_row(name, *_cells(matrix))
    console.print(table)
    sizes: dict[str, tuple[str, int]] = {}
    for name in files:
        if name.endswith(".safetensors"):
            with (folder / name).open("rb") as file:
                sizes |= stored_sizes(file)
    size = sum((folder / name).stat().st_size for name in files)
    entries = account(model, sizes, size)
    parameters = sum(entry.parameters for entry in entries)
    table = Table("tensors", "", "number", "parameters", "of all", "bytes", "of all", box=None)
    for row in by_reason(entries):
        shares = (f"{row['parameters'] / parameters:.1%}", f"{row['bytes'] / size:.1%}")
        table.add_row(
            row["state"], row["reason"], str(row["tensors"]), f"{row['parameters']:,}", shares[0],
            f"{row['bytes']:,}", shares[1],
        )  # fmt: skip
    table.add_row("all", "", str(len(entries)), f"{parameters:,}", "", f"{size:,}", "")
    console.print(table)
    return size


def _cells(matrix: PackedMatrix) -> tuple[str, ...]:
    """Return shape, format, bits per weight in the file and in memory, and the tiles by their widths."""
    weights = matrix.shape[0] * matrix.shape[1]
    widths, counts = (part.tolist() for part in matrix.tile_widths().unique(return_counts=True))
    tiles_by_width = ", ".join(f"{count}×{width}" for width, count in zip(widths, counts, strict=True))
    escapes = f", {matrix.escapes} escapes" if matrix.escapes else ""
    stored, resident = (f"{8 * size / weights:.3f}" for size in (len(matrix.encode()), matrix.nbytes))
    shape = "x".join(map(str, matrix.shape))
    return shape, matrix.kind + (", coded" if matrix.coded else ""), stored, resident, tiles_by_width + escapes
