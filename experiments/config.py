"""The configuration in ``conf/``, beside this package: composed as ``experiments.run`` composes it, without a run."""

import pathlib

import hydra
from omegaconf import DictConfig

CONF = pathlib.Path(__file__).parents[1] / "conf"


def compose(*overrides: str, return_hydra_config: bool = False) -> DictConfig:
    """Compose ``conf/config.yaml`` with ``overrides``, written as on the command line (``method=gptq``).

    ``return_hydra_config``: include Hydra's own settings, under ``hydra``.  Raises
    ``hydra.errors.ConfigCompositionException`` (or another ``HydraException``) if an override names no choice or key.
    """
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("config", list(overrides), return_hydra_config=return_hydra_config)
