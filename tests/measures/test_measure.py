"""What every measure is, and several of them together."""

import importlib.metadata

import pytest

from nashswarm.measures.generation import Bleu, LmEval
from nashswarm.measures.layers import Layers
from nashswarm.measures.load import Load
from nashswarm.measures.measure import EvaluationTarget, Measure, Several, require
from nashswarm.measures.quality import Quality
from nashswarm.measures.size import Size
from nashswarm.measures.speed import Speed


def test_measures_of_the_package_follow_the_protocol() -> None:
    assert all(
        isinstance(measure, Measure) for measure in (Quality(), Size(), Speed(), Load(), Layers(), Bleu(), LmEval())
    )


def test_several_measures_equal_each_alone(target: EvaluationTarget) -> None:
    parts = [Size(), Quality(batch_size=2)]
    metrics, series = Several(parts).measure(target)
    alone = [part.measure(target) for part in parts]
    assert metrics == alone[0][0] | alone[1][0] and series == alone[1][1]


def test_require_missing_package_raises_naming_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    for measure, package in ((Bleu(), "sacrebleu"), (LmEval(), "lm-eval")):
        with pytest.raises(ValueError, match=rf"needs {package}: pip install 'nashswarm\[eval\]'"):
            require(Several([Quality(), measure]))
    require(Several([Quality(), Size()]))
