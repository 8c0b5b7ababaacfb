"""Compress language models by game theory and swarm behaviour.

Blocks of weights are players that compete for bits at one price, until no block gains by changing its choice alone.
Each block may take about seven similar blocks into account, as starlings do.

``nashswarm.compress(model)`` compresses a model of transformers.  Once this package is imported, ``from_pretrained`` of
transformers loads compressed models.  ``docs/architecture.md`` has the tree of packages and six files to read first;
``docs/method.md`` has a glossary of the game's words.
"""

import os
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch's large tensors in huge pages: a fault each 2 MB, not 4 KB

from nashswarm.moe import model as _moe  # noqa: F401  makes the architecture known to transformers
from nashswarm.packed import checkpoint as _checkpoint  # noqa: F401  makes the format known to transformers
from nashswarm.packed.modules import set_activations

__all__ = ["Report", "__version__", "compress", "set_activations"]
__version__ = "0.1.0a0"


def __getattr__(name: str) -> Any:
    """``compress`` and ``Report`` are imported when they are first asked for: they bring the games with them."""
    if name in ("Report", "compress"):
        from nashswarm import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
