"""A Hydra sweeper that searches by an Optuna study; its trials are jobs of the chosen launcher."""

import json
import logging
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

log = logging.getLogger(__name__)
ASIDE = (
    "hydra",
    "records",
    "cache",
    "wandb",
    "viewer",
    "rerun",
    "save",
)  # keys that change no number, so that the study stays the same


class Study(Sweeper):
    """A multi-objective study that continues where it stopped, unless something that can change a number has changed.

    ``params``: the search space in Hydra's syntax for sweeps: ``interval(low, high)``, ``range(low, stop, step)``,
    choices, ``tag(log, ...)``.  ``minimize``: metrics of the records.  ``trials``: successful trials to reach, those of
    earlier starts included.  ``batch``: trials at a time.  ``seed``: of the sampler.  ``storage``: the SQLite file.
    """

    def __init__(
        self, params: dict[str, str], minimize: list[str], trials: int, batch: int, seed: int, storage: str
    ) -> None:
        self.params, self.minimize, self.trials = dict(params), list(minimize), trials
        self.batch, self.seed, self.storage = batch, seed, pathlib.Path(storage)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context: HydraContext = hydra_context
        self.config: DictConfig = config
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Ask and tell until enough trials have succeeded; one that fails is not tried again in this start."""
        try:
            import optuna
        except ImportError:
            sys.exit("hydra/sweeper=study needs Optuna: pip install -e '.[search]'")
        from nashswarm.records import files, record

        parser = OverridesParser.create(config_loader=self.context.config_loader)
        words = [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        overrides = {one.get_key_element(): one for one in parser.parse_overrides(words)}  # the last of a key counts
        space = {key: distribution(one) for key, one in overrides.items() if one.is_sweep_override()}
        fixed = {key: one.get_value_element_as_str() for key, one in overrides.items() if not one.is_sweep_override()}
        if not space:
            sys.exit("there is nothing to search; give hydra.sweeper.params, for example method.bits: interval(2, 4)")
        name = record.fingerprint(self.identity(fixed, space))
        folder, storage = pathlib.Path(self.config.hydra.sweep.dir), f"sqlite:///{self.storage}"
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with files.claim(self.storage):
            study = optuna.create_study(
                storage=storage,
                study_name=name,
                directions=["minimize"] * len(self.minimize),
                load_if_exists=True,
            )
            # The seed counts the known trials: with the same seed the sampler would repeat its first proposals.
            study.sampler = optuna.samplers.TPESampler(seed=self.seed + len(study.trials))
            for trial in study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING]):
                study.tell(trial.number, state=optuna.trial.TrialState.FAIL)  # its sweep was killed
                study.enqueue_trial(trial.params)
            known = len(study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE]))
            log.info("study %s in %s: %d of %d trials known", name, self.storage, known, self.trials)
            if others := len(optuna.get_all_study_names(storage)) - 1:
                log.info("other studies in that file, of other settings, threads or code: %d", others)
            for start in range(0, self.trials - known, self.batch):
                asked = [study.ask(space) for _ in range(min(self.batch, self.trials - known - start))]
                jobs = [[f"{key}={value}" for key, value in (fixed | trial.params).items()] for trial in asked]
                self.launcher.launch(jobs, initial_job_idx=start)
                for number, trial in enumerate(asked, start):
                    values = objectives(folder / str(number) / "outcome.json", self.minimize)
                    study.tell(trial, values, state=None if values else optuna.trial.TrialState.FAIL)
            for trial in sorted(study.best_trials, key=lambda trial: trial.values[-1]):
                objective_values = zip(self.minimize, trial.values, strict=True)
                log.info(
                    "on the front: %s: %s",
                    " ".join(f"{key}={value}" for key, value in trial.params.items()),
                    ", ".join(f"{metric} {value:.6g}" for metric, value in objective_values),
                )

    def identity(self, fixed: Mapping[str, str], space: Mapping[str, Any]) -> dict[str, Any]:
        """Return everything that can change a value of the study.

        That is the number of threads, the code, the search space, the objectives, and the config of a trial, once for
        every choice, because a choice can bring a config of its own.
        """
        import torch
        from optuna.distributions import CategoricalDistribution, distribution_to_json

        from nashswarm.records import provenance

        chosen = {key: one.choices for key, one in space.items() if isinstance(one, CategoricalDistribution)}
        first = {key: chosen[key][0] if key in chosen else one.low for key, one in space.items()}
        trials = [first, *(first | {key: choice} for key, choices in chosen.items() for choice in choices[1:])]
        return {
            "trials": [self.composed({**fixed, **trial}) for trial in trials],
            "space": {key: distribution_to_json(one) for key, one in space.items()},
            "minimize": self.minimize,
            "threads": torch.get_num_threads(),
            "code": provenance.code_digest(),
        }

    def composed(self, values: Mapping[str, Any]) -> Any:
        """Compose the config of a job with these values, resolved, without the keys in ``ASIDE``."""
        words = [f"{key}={value}" for key, value in values.items()]
        config = self.context.config_loader.load_sweep_config(self.config, words)
        counts = OmegaConf.masked_copy(config, [str(key) for key in config if key not in ASIDE])
        return OmegaConf.to_container(counts, resolve=True)


def distribution(override: Override) -> Any:
    """Translate a sweep of Hydra into a distribution of Optuna.  A range ends before its stop, as in Hydra.

    Exits with one sentence for a sweep that Optuna cannot express.
    """
    from optuna import distributions

    sweep: Any = override.value()
    log_scale = "log" in getattr(sweep, "tags", ())
    if log_scale and not isinstance(sweep, IntervalSweep):
        sys.exit(f"{override.input_line}: only an interval can be searched on a logarithmic scale")
    if isinstance(sweep, IntervalSweep):
        assert sweep.start is not None and sweep.end is not None
        if sweep.start > sweep.end or (log_scale and sweep.start <= 0):
            least = "begins above 0" if log_scale else "begins with its smaller end"
            sys.exit(f"{override.input_line}: an interval {least}, for example interval(0.1, 10)")
        return distributions.FloatDistribution(float(sweep.start), float(sweep.end), log=log_scale)
    if isinstance(sweep, RangeSweep):
        values: list[Any] = list(sweep.range()) if sweep.step > 0 else []
        if not values:
            sys.exit(f"{override.input_line}: a range to be searched goes upwards, for example range(3, 12)")
        kind = distributions.IntDistribution if isinstance(values[0], int) else distributions.FloatDistribution
        return kind(values[0], values[-1], step=sweep.step)
    return distributions.CategoricalDistribution(list(override.sweep_string_iterator()))


def objectives(path: pathlib.Path, metrics: Sequence[str]) -> list[float] | None:
    """Read the metrics of the record that a job made or reused; None if the job has no record.

    Raises ValueError for a metric that the record lacks.
    """
    from nashswarm.records import record

    outcome = json.loads(path.read_text()) if path.exists() else {"record": None}
    if outcome["record"] is None:
        return None
    recorded = record.read(pathlib.Path(outcome["record"])).metrics
    if missing := [name for name in metrics if name not in recorded]:
        raise ValueError(
            f"hydra.sweeper.minimize: no record has {', '.join(missing)}; choose among {', '.join(recorded)}"
        )
    return [recorded[name] for name in metrics]
