"""The configuration in ``conf/``, composed as ``experiments.run`` composes it, without a run."""

from nashswarm.experiment.choices import CONF, compose

__all__ = ["CONF", "compose"]
