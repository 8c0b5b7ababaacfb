"""The choices in ``conf/``: composed into the config of a run, in a checkout and in an installed package."""

import pathlib

import hydra
from omegaconf import DictConfig

from nashswarm.experiment import plan  # noqa: F401  registers the types of the root config

PACKAGE = pathlib.Path(__file__).parents[1]
INSTALLED = PACKAGE / "conf"
CONF = INSTALLED if INSTALLED.exists() else PACKAGE.parent / "conf"


def compose(*overrides: str, return_hydra_config: bool = False) -> DictConfig:
    """Compose ``conf/config.yaml`` with ``overrides``, written as on the command line (``method=gptq``).

    ``return_hydra_config``: include Hydra's own settings, under ``hydra``.  Raises
    ``hydra.errors.ConfigCompositionException`` (or another ``HydraException``) if an override names no choice or key.
    """
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("config", list(overrides), return_hydra_config=return_hydra_config)


def methods_of(experiment: str) -> list[str]:
    """Return the methods that an experiment sweeps over, in its order.  Raises ``HydraException`` if there is none."""
    swept = compose(f"experiment={experiment}", return_hydra_config=True).hydra.sweeper.params.method
    return [name.strip() for name in str(swept).split(",")]
