"""Optuna by gauges: trials are ended, and the next ones chosen, by what they read; no validation is needed.

    study = optuna.create_study(sampler=GaugeSampler(), pruner=GaugePruner())

    def objective(trial):
        lr = trial.suggest_float("lr", 1e-5, 1.0, log=True)
        batch_size = trial.suggest_int("batch_size", 8, 512, log=True)
        ...
            if (reading := gauge.reading()) is not None:
                report(trial, reading, loss)
                if trial.should_prune():
                    raise optuna.TrialPruned

Readings travel with the trial in the study's storage, so any number of workers may share one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from ..policy import Config, Progress, Pruning, Target
from ..reading import Reading
from .proposals import Proposals, Tried
from .versions import require_version

try:
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler, TPESampler
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial, TrialState
except ImportError as error:
    raise ImportError("grgauge.integrations.optuna needs optuna: pip install 'grgauge-kernels[tune]'") from error
require_version("optuna", optuna.__version__, (4,))

READING, PRUNED, PARENT = "grgauge:reading:", "grgauge:pruned", "grgauge:parent"


def report(trial: Trial, reading: Reading, loss: float) -> bool:
    """Hand a reading and the training loss to pruner and sampler; False if this reading has been handed over before.

    loss  mean training loss since the reading before, or that of this step. Becomes the trial's value at reading.step
    """
    key = f"{READING}{reading.step:09d}"
    if key in trial.user_attrs:
        return False
    trial.report(float(loss), reading.step)
    trial.set_user_attr(key, json.dumps({**reading.to_dict(), "loss": float(loss)}))
    return True


def progress(trial: FrozenTrial) -> list[Progress]:
    """What a trial has reported, oldest first."""
    found = []
    for key in sorted(key for key in trial.user_attrs if key.startswith(READING)):
        fields: dict[str, Any] = json.loads(trial.user_attrs[key])
        loss = fields.pop("loss")
        found.append(Progress(Reading.from_dict(fields), loss))
    return found


class GaugePruner(BasePruner):
    """Prunes by gauges and the training loss: what has diverged, what is hopeless, what is out of the zone and behind.

    options  as for `grgauge.policy.Pruning`, which has the rules

    Why a trial was pruned is kept in its user attribute "grgauge:pruned". Raises ValueError for a number out of range.
    """

    def __init__(self, **options: Any) -> None:
        self._rules = Pruning(**options)

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """True if the trial is to end."""
        others = [progress(other) for other in study.get_trials(deepcopy=False) if other.number != trial.number]
        evidence = self._rules.judge(progress(trial), others)
        if evidence is not None:
            study._storage.set_trial_user_attr(trial._trial_id, PRUNED, str(evidence))
        return evidence is not None


class GaugeSampler(BaseSampler):
    """Chooses learning rate and batch size by what trials before have read, with `grgauge.suggest`.

    independent_sampler  chooses the first trial's, and all other parameters; None: TPESampler
    lr, batch_size       names of the two parameters; the batch may be an int or a categorical of ints
    batch                the batch size where it is no parameter
    target, max_lr_factor, max_batch_factor   as for `grgauge.suggest`
    seed                 of the scatter described below

    A new trial goes on from the newest one with readings that no other went on from. Where there is none, or its
    gauges are in the zone, the parent is the one of lowest training loss among those in the zone, and the learning rate
    is scattered around its own by up to a factor of three: within that gauges cannot tell, and losses can.
    """

    def __init__(
        self,
        independent_sampler: BaseSampler | None = None,
        *,
        lr: str = "lr",
        batch_size: str = "batch_size",
        batch: int | None = None,
        target: Target | None = None,
        max_lr_factor: float = 10.0,
        max_batch_factor: float = 4.0,
        seed: int | None = None,
    ) -> None:
        self._independent = independent_sampler or TPESampler(seed=seed)
        self._lr, self._batch_size, self._batch = lr, batch_size, batch
        self._proposals = Proposals(target, max_lr_factor, max_batch_factor, seed)

    def reseed_rng(self) -> None:
        """For workers that are forked from one process."""
        self._proposals.random.seed()
        self._independent.reseed_rng()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Learning rate and batch size, as trials with readings have them."""
        read = [other for other in study.get_trials(deepcopy=False) if self._lr in other.params and progress(other)]
        if not read:
            return {}
        names = (self._lr, self._batch_size)
        return {name: read[-1].distributions[name] for name in names if name in read[-1].distributions}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The next learning rate and batch size."""
        if self._lr not in search_space:
            return {}
        trials = study.get_trials(deepcopy=False)
        tried = [self._tried(t) for t in trials if set(search_space) <= set(t.params) and progress(t)]
        parent, chosen = self._proposals.next(tried, {t.user_attrs.get(PARENT) for t in trials})
        study._storage.set_trial_user_attr(trial._trial_id, PARENT, parent)
        values: dict[str, float] = {self._lr: chosen.lr, self._batch_size: chosen.batch_size}
        return {name: _fitted(values[name], space) for name, space in search_space.items()}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Everything else."""
        return self._independent.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._independent.before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self._independent.after_trial(study, trial, state, values)

    def _tried(self, trial: FrozenTrial) -> Tried:
        course = progress(trial)
        batch_size = trial.params.get(self._batch_size, self._batch or round(course[-1].reading.batch_size))
        return Tried(trial.number, Config(trial.params[self._lr], batch_size), course)


def _fitted(value: float, space: BaseDistribution) -> Any:
    """The nearest value that the parameter may have."""
    if isinstance(space, CategoricalDistribution):
        return min(space.choices, key=lambda choice: abs(math.log(float(choice) / value)))  # type: ignore[arg-type]
    if not isinstance(space, FloatDistribution | IntDistribution):
        raise ValueError(f"learning rate and batch size must be floats, ints or categoricals of them, not {space}")
    value = min(max(value, space.low), space.high)
    if space.step is not None and not space.log:
        value = space.low + round((value - space.low) / space.step) * space.step
    return round(value) if isinstance(space, IntDistribution) else value
