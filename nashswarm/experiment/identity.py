"""Names that stay: what records and saved models call a class, wherever its code lives today.

A record is named by a hash over its config, and a config names classes by their import path (``_target_``).  Code that
moves must not rename records, so recorded configs use the path that a class had when it was first recorded.  A class
that moves or is renamed gets a line in ``IMPORT_PATHS``; a new class needs none until it moves.
"""

from collections.abc import Callable
from typing import Any

TARGET = "_target_"
IMPORT_PATHS = {  # recorded name -> where the class can be imported from today
    "nashswarm.data.HubText": "nashswarm.data.corpus.HubText",
    "nashswarm.data.StdlibDocs": "nashswarm.data.corpus.StdlibDocs",
    "nashswarm.glue.Glue": "nashswarm.data.glue.Glue",
    "nashswarm.glue.Training": "nashswarm.data.glue.Training",
    "nashswarm.measures.Layers": "nashswarm.measures.layers.Layers",
    "nashswarm.measures.Load": "nashswarm.measures.load.Load",
    "nashswarm.measures.Official": "nashswarm.measures.quality.Official",
    "nashswarm.measures.Quality": "nashswarm.measures.quality.Quality",
    "nashswarm.measures.Several": "nashswarm.measures.measure.Several",
    "nashswarm.measures.Size": "nashswarm.measures.size.Size",
    "nashswarm.measures.Speed": "nashswarm.measures.speed.Speed",
    "nashswarm.methods.AsPublished": "nashswarm.methods.prototype.AsPublished",
    "nashswarm.methods.FixedWidth": "nashswarm.methods.fixed_width.FixedWidth",
    "nashswarm.methods.Flock": "nashswarm.methods.swarm.Flock",
    "nashswarm.methods.Gptq": "nashswarm.methods.gptq.Gptq",
    "nashswarm.methods.Split": "nashswarm.methods.fixed_width.Split",
    "nashswarm.methods.Uniform": "nashswarm.methods.uniform.Uniform",
    "nashswarm.models.ModelSource": "nashswarm.models.sources.ModelSource",
    "nashswarm.models.PackagedModel": "nashswarm.models.sources.PackagedModel",
    "nashswarm.models.RandomModel": "nashswarm.models.sources.RandomModel",
    "nashswarm.moe.router.Dense": "nashswarm.moe.router.dense.Dense",
    "nashswarm.moe.router.ExpertChoice": "nashswarm.moe.router.expert_choice.ExpertChoice",
    "nashswarm.moe.router.LossFree": "nashswarm.moe.router.loss_free.LossFree",
    "nashswarm.moe.router.NashSwarmRouter": "nashswarm.moe.router.nash_swarm.NashSwarmRouter",
    "nashswarm.moe.router.TopK": "nashswarm.moe.router.top_k.TopK",
    "nashswarm.moe_measures.QuickValidation": "nashswarm.measures.moe.quick_validation.QuickValidation",
    "nashswarm.moe_measures.Routed": "nashswarm.measures.moe.routed.Routed",
    "nashswarm.moe_measures.RoutingTime": "nashswarm.measures.moe.routing_time.RoutingTime",
    "nashswarm.moe_training.Training": "nashswarm.moe.training.Training",
    "nashswarm.peers.Peer": "nashswarm.methods.peers.peer.Peer",
    "nashswarm.published.Published": "nashswarm.measures.prototype.Published",
    "nashswarm.rate_game.NashSwarm": "nashswarm.methods.nash_lattice.settings.NashLattice",
    "nashswarm.recovery.Recovery": "nashswarm.methods.distillation.Recovery",
}
RECORDED_NAMES = {path: name for name, path in IMPORT_PATHS.items()}


def to_recorded(config: Any) -> Any:
    """Return a copy of ``config`` in which every ``_target_`` is the recorded name of its class."""
    return _renamed(config, lambda path: RECORDED_NAMES.get(path, path))


def to_importable(config: Any) -> Any:
    """Return a copy of ``config`` in which every ``_target_`` can be imported; undoes ``to_recorded``."""
    return _renamed(config, lambda name: IMPORT_PATHS.get(name, name))


def _renamed(config: Any, rename: Callable[[str], str]) -> Any:
    if isinstance(config, dict):
        return {key: rename(value) if key == TARGET else _renamed(value, rename) for key, value in config.items()}
    return [_renamed(item, rename) for item in config] if isinstance(config, list) else config
