"""What a model card says beside the record: the model's class, what became of its tensors, and what compressing cost.

The command line compresses without test text, so that the cost is measured on text that was held out of calibration.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from nashswarm.calibration.session import CalibrationSession
from nashswarm.models import evaluation
from nashswarm.models.sources import WEIGHTS
from nashswarm.packed.account import account, by_reason, sizes_in
from nashswarm.packed.native_forward import plain_class

TOKENS = 4096  # of held-out text at most: 99 in 100 of them are below the 99th percentile with some certainty


def gather(session: CalibrationSession, packed: Any, files: Mapping[str, bytes], measure: bool) -> dict[str, Any]:
    """Return the facts as they go into ``nashswarm.json``; ``measure``: also those on held-out text."""
    entries = account(packed, sizes_in(files[WEIGHTS]), sum(map(len, files.values())))
    facts = {"architecture": plain_class(packed).__name__, "tensors": by_reason(entries)}
    return facts | ({"heldout": heldout(session, packed)} if measure else {})


def heldout(session: CalibrationSession, packed: Any) -> dict[str, float]:
    """Measure how far the packed model is from the full one on text that did not calibrate it.

    A model that predicts tokens has ``kl`` (also its median and 99th percentile) and ``top1_agreement``, one that
    writes text also ``nll``; any other has ``distance``, 1 − cosine of its outputs.  Raises ValueError if numbers are
    not finite.
    """
    windows = session.holdout[: max(TOKENS // session.holdout.shape[1], 1)]
    if session.causal:
        full = evaluation.compute_reference(session.full, windows, evaluation.BATCH)
        positions = evaluation.evaluate_positions(packed, windows, evaluation.BATCH, full)
        metrics = evaluation.summarise(evaluation.window_means(positions))
        metrics |= evaluation.distribution(positions["kl"], windows, None)
        if not session.full.can_generate():  # a masked model does not predict the next token
            metrics = {name: value for name, value in metrics.items() if not name.startswith("nll")}
    else:
        full_outputs, outputs = (evaluation.embed_all(model, windows) for model in (session.full, packed))
        metrics = {"distance": evaluation.embedding_distance(full_outputs, outputs), "texts": len(windows)}
    if not np.isfinite(list(metrics.values())).all():
        raise ValueError("the compressed model's logits are not finite on held-out text; raise method.bits")
    return metrics
