"""Print which type every tensor of a file for another runtime has, and what it would gain by another one."""

import pathlib

import numpy as np
from rich.console import Console
from rich.table import Table

from nashswarm.errors import require
from nashswarm.methods import compressed_tensors
from nashswarm.methods.gguf_types import certificate
from nashswarm.models import compressed_tensors_folder as folders


def show(path: pathlib.Path, console: Console) -> int:
    """Print the tensors that nashswarm wrote: type, bytes, damage, and regret over all types at the price.

    Raises MissingPackage for a GGUF file without the package ``gguf``, ValueError for a file of another program or a
    damaged one.
    """
    if path.is_file():
        require(f"inspect {path}", ["gguf"], "models")
        game, files = certificate.read_certificate(path), [path]
    else:
        game, files = compressed_tensors.read_certificate(path), [path / folders.WEIGHTS, path / folders.CONFIG]
    regret, players = game.regret(), np.arange(len(game.tensors))
    columns = (game.profile, game.size[players, game.profile], game.damage[players, game.profile], regret)
    table = Table("tensor", "type", "bytes", "damage", "regret", box=None)
    for name, action, size, damage, gain in zip(game.tensors, *columns, strict=True):
        table.add_row(name, game.types[action], f"{size:,}", f"{damage:.2e}", f"{gain:.1e}")
    console.print(table)
    size = sum(file.stat().st_size for file in files)
    console.print(f"{size:,} bytes; damage and regret in nats per token", highlight=False)
    console.print(
        f"price {game.price:.3e} nats per byte; largest regret {regret.max():.1e}; any other types within the same "
        f"bytes would save {regret.sum():.1e} at most", highlight=False,
    )  # fmt: skip
    return 0
