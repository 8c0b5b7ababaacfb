"""The certificate of a solved game: what no player can gain by deviating alone, and what a saved model keeps for it.

``nashswarm.experiment.certify`` computes the same regrets a second time from a saved model, sharing none of this code.
"""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import sparse
from torch import Tensor

from nashswarm.games.potential import Game


def regret_metrics(
    game: Game, profile: Int[np.ndarray, " blocks"], code_regret: Float[np.ndarray, " blocks"]
) -> dict[str, float]:
    """Return the potential at ``profile``, and the largest and the mean regret of a block, in nats per token.

    A block's regret is the larger of two gains: by its best other offset, enumerated in ``game``, and by other codes
    for its weights (``code_regret``), each weight changing alone and the gains added up.
    """
    step_regret = game.regret(profile)
    regret = np.maximum(step_regret, code_regret)
    return {
        "potential_end": game.potential(profile),
        "regret_max": float(regret.max()),
        "regret_mean": float(regret.mean()),
        "regret_of_steps": float(step_regret.max()),
        "regret_of_codes": float(code_regret.max()),
    }


def certificate_tensors(choices: Mapping[str, Tensor], coupling: sparse.csr_array | None) -> dict[str, Tensor]:
    """Return what the certificate needs and cannot read from the packed bytes, as tensors by name.

    ``choices``: row weights and offsets by name.  ``coupling``: of the flock, if blocks pay for disagreeing with it.
    """
    if coupling is None:
        return dict(choices)
    links = coupling.tocoo()
    pairs = torch.from_numpy(np.stack([links.row, links.col]).astype(np.int64))
    return dict(choices) | {"flock/pairs": pairs, "flock/weights": torch.from_numpy(links.data)}
