"""The routers by name, as ``config.json`` of a saved model describes them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from nashswarm.moe.loss import LossWeights
from nashswarm.moe.router.dense import Dense, DenseTotal
from nashswarm.moe.router.expert_choice import ExpertChoice
from nashswarm.moe.router.loss_free import LossFree
from nashswarm.moe.router.nash_swarm import NashSwarmRouter
from nashswarm.moe.router.quantile import QuantileBalance
from nashswarm.moe.router.router import RouterSettings
from nashswarm.moe.router.top_k import TopK

KINDS: Mapping[str, Any] = {
    kind.__name__: kind for kind in (Dense, DenseTotal, TopK, LossFree, QuantileBalance, ExpertChoice, NashSwarmRouter)
}


def describe(settings: RouterSettings) -> dict[str, Any]:
    """Return the settings as plain values, with the name of their class as ``kind``."""
    return {"kind": type(settings).__name__, **dataclasses.asdict(settings)}


def from_description(description: Mapping[str, Any]) -> RouterSettings:
    """Return the settings that ``describe`` described.  Raises ValueError if their kind is unknown."""
    fields = dict(description)
    kind = fields.pop("kind")
    if kind not in KINDS:
        raise ValueError(f"unknown router {kind!r} in config.json: choose {', '.join(KINDS)}")
    if isinstance(fields.get("loss"), Mapping):
        fields["loss"] = LossWeights(**fields["loss"])
    settings: RouterSettings = KINDS[kind](**fields)
    return settings
