"""Statistics of a model that is compressed already: against calibrating that model, and with a saturated head."""

import copy
import pathlib
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from nashswarm.calibration.cache import Cache
from nashswarm.calibration.moments import calibrate
from nashswarm.calibration.session import CalibrationSession
from nashswarm.models import matrices
from nashswarm.progress import no_track

HEAD = 16  # rows of one of the four heads
QUERIES = "transformer.h.0.attn.c_attn"


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(512, (16, 24), generator=torch.Generator().manual_seed(1))


def session_of(model: Any, windows: Tensor) -> CalibrationSession:
    return CalibrationSession(model, matrices.find_layers(model), windows, windows[:1], 5, Cache(None, {}), no_track)


def noisy(session: CalibrationSession, share: float) -> dict[str, Tensor]:
    """The weights of all layers with errors of a ``share`` of their size."""
    generator = torch.Generator().manual_seed(0)
    return {
        layer.name: layer.weight + share * layer.weight.std() * torch.randn(layer.weight.shape, generator=generator)
        for layer in session.layers
    }


def test_moments_after_have_inputs_of_the_full_model_and_gradients_of_the_one_with_these_weights(
    model: Any, windows: Tensor
) -> None:
    session = session_of(model, windows)
    weights, seen = noisy(session, 0.2), []

    def quantize(moments: Mapping[str, Any]) -> dict[str, Tensor]:
        seen.append(moments)
        return weights

    after = session.moments_after(quantize, {})
    part = session.zipf_moments(share=4)
    names = [module for layer in session.layers for module in layer.modules]

    def calibrated(model: Any, windows: Tensor) -> Mapping[str, Any]:
        return calibrate(model, names, windows, torch.Generator().manual_seed(5), expected="zipf", rounded=True)

    other = copy.deepcopy(model)
    matrices.set_weights(other, weights)
    full, quarter, compressed = calibrated(model, windows), calibrated(model, windows[:4]), calibrated(other, windows)
    for name in names:
        assert torch.equal(seen[0][name].inputs, full[name].inputs)
        assert torch.equal(part[name].coupled, quarter[name].coupled)
        for field in ("inputs", "coupled_inputs"):
            assert torch.equal(getattr(after[name], field), getattr(full[name], field))
        assert torch.equal(after[name].outputs, compressed[name].outputs)
        # There the mean square of the inputs comes from rounded products, here from the inputs.
        torch.testing.assert_close(after[name].coupled, compressed[name].coupled, rtol=2**-8, atol=0)
        assert not torch.allclose(after[name].coupled, full[name].coupled, rtol=0.05)
    for layer in matrices.find_layers(session.candidate_model):  # it is restored
        assert torch.equal(layer.weight, next(one.weight for one in session.layers if one.name == layer.name))


def test_moments_after_calibrates_the_full_model_once(model: Any, windows: Tensor, tmp_path: pathlib.Path) -> None:
    session, calibrated = session_of(model, windows), []
    session.cache = Cache(tmp_path, {})
    session.track = lambda items, description: calibrated.append(len(items)) or items  # type: ignore[func-returns-value]
    session.moments_after(lambda moments: noisy(session, 0.2), {"weights": "noisy"})
    session.moments_after(lambda moments: noisy(session, 0.4), {"weights": "noisier"})
    assert len(calibrated) == 3


def test_moments_after_show_a_saturated_head_that_those_of_the_full_model_hide(model: Any, windows: Tensor) -> None:
    """Queries of one head are so large that its attention looks at one position: their gradients vanish."""
    with torch.no_grad():
        model.get_submodule(QUERIES).weight[:, :HEAD] *= 1e6  # Conv1D: (in, out)
    session = session_of(model, windows)
    layer = next(layer for layer in session.layers if layer.name == QUERIES)
    removed = layer.weight.clone()
    removed[:HEAD] = 0

    def share_of_head(moments: Mapping[str, Any]) -> float:
        rows = moments[QUERIES].coupled
        return float(rows[:HEAD].mean() / rows[HEAD : 4 * HEAD].mean())

    def after_removal(moments: Mapping[str, Any]) -> dict[str, Tensor]:
        return {QUERIES: removed}

    assert share_of_head(session.moments()) < 1e-6
    assert share_of_head(session.zipf_moments()) < 1e-3  # products may be rounded here
    assert share_of_head(session.moments_after(after_removal, {})) > 0.1
    with torch.no_grad():
        full = model(input_ids=windows).logits.log_softmax(-1)
        matrices.set_weights(session.candidate_model, {QUERIES: removed})
        compressed = session.candidate_model(input_ids=windows).logits.log_softmax(-1)
    divergence = float((full.exp() * (full - compressed)).sum(-1).mean())
    moments = session.moments()[QUERIES]
    error = layer.weight - removed
    predicted = float((moments.coupled * ((error @ moments.inputs) * error).sum(1)).sum() / 2)
    assert divergence > 0 and predicted < 0.1 * divergence
