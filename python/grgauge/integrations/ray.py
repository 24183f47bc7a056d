"""Ray Tune by gauges: running trials are stopped, cloned and changed, and new ones chosen, by what they read.

    tuner = tune.Tuner(train, param_space={"lr": tune.loguniform(1e-5, 1.0), "batch_size": tune.randint(8, 513)},
                       tune_config=tune.TuneConfig(search_alg=GaugeSearch(), scheduler=GaugeScheduler(), num_samples=8))

    def train(config):
        ...
            reading = gauge.reading()
            if reading is not None and reading.step == step:  # a new one
                tune.report(metrics(reading, loss), checkpoint=checkpoint)

Learning rate and batch size are top-level entries of the configuration. Where the batch size is none, it is not tuned.
"""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .._validation import require, require_count
from ..policy import Config, Evidence, Progress, Pruning, Target
from ..reading import Reading
from .proposals import Proposals, Tried
from .versions import require_version

try:
    import ray
    from ray.train._internal.session import _TrainingResult
    from ray.tune.experiment import Trial
    from ray.tune.schedulers import FIFOScheduler, TrialScheduler
    from ray.tune.search import Searcher
    from ray.tune.search.sample import Categorical, Domain, Float, Integer
except ImportError as error:
    raise ImportError(f"grgauge.integrations.ray needs ray ({error}): pip install 'grgauge-kernels[ray]'") from error
require_version("ray", ray.__version__, (2, 44))

READING, LOSS, SAMPLES = "reading", "loss", "samples"


def metrics(reading: Reading, loss: float, samples: float | None = None) -> dict[str, Any]:
    """What a trial reports, together with whatever else it has to say, for the scheduler and the search here.

    loss     mean training loss since the reading before, or that of this step
    samples  that the weights have been trained on; None: reading.step times the batch size, which is wrong after the
             batch size has changed
    """
    trained = reading.step * reading.batch_size if samples is None else samples
    return {LOSS: float(loss), SAMPLES: float(trained), READING: reading.to_dict()}


class GaugeScheduler(FIFOScheduler):
    """Stops, clones and changes running trials by their gauges and training losses; no validation is needed.

    space        ranges of learning rate and batch size, as in `param_space`; None: unbounded
    lr, batch_size   their names in the configuration
    max_changes  of one trial; after them it is stopped
    target, max_lr_factor, max_batch_factor   as for `grgauge.suggest`
    seed         of scattered learning rates
    options      as for `grgauge.policy.Pruning`, which has the rules

    A trial whose learning rate is far too low goes on from its own newest checkpoint, with what `grgauge.suggest` says.
    One that has diverged, is far out above, or is out of the zone and behind others, goes on from the newest checkpoint
    of the best trial that runs, with what that one's readings suggest; where they are in the zone, with its batch size
    and a learning rate scattered around its own by up to a factor of three. Where no running trial is better, it is
    stopped.

    Trials must report checkpoints, go on from `tune.get_checkpoint()` and then set the learning rate from their
    configuration. `changes` lists what was done: (trial, "change" | "clone" | "stop", evidence, configuration).

    Raises ValueError for a number out of range.
    """

    def __init__(
        self,
        space: Mapping[str, Any] | None = None,
        *,
        lr: str = "lr",
        batch_size: str = "batch_size",
        max_changes: int = 5,
        target: Target | None = None,
        max_lr_factor: float = 10.0,
        max_batch_factor: float = 4.0,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        require_count("max_changes", max_changes, 0)
        self.changes: list[tuple[str, str, Evidence, dict[str, Any]]] = []
        self._space = dict(space or {})
        self._lr, self._max_changes = lr, max_changes
        self._rules = Pruning(**options)
        self._proposals = Proposals(target, max_lr_factor, max_batch_factor, seed)
        self._courses = _Courses(lr, batch_size)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """What is to be done with a trial that reports."""
        if not self._courses.note(trial.trial_id, result):
            return TrialScheduler.CONTINUE
        own = self._courses.tried(trial.trial_id)
        others = [t for t in tune_controller.get_trials() if t is not trial and self._courses.tried(t.trial_id)]
        courses = [tried.progress for t in others if (tried := self._courses.tried(t.trial_id))]
        assert own is not None
        evidence = self._rules.judge(own.progress, courses)
        if evidence is None:
            return TrialScheduler.CONTINUE
        changed = sum(name == trial.trial_id and what != "stop" for name, what, _, _ in self.changes)
        if changed >= self._max_changes:
            return self._did(trial, "stop", evidence, TrialScheduler.STOP)
        if evidence.rule == "far out" and evidence.value is not None and evidence.value < self._rules.far[0]:
            suggested = self._configured(trial.config, own, self._proposals.suggest(own))
            if suggested != trial.config:
                trial.set_config(suggested)
                return self._did(trial, "change", evidence, TrialScheduler.PAUSE)  # and resumed from its checkpoint
        source = self._better(own, [t for t in others if not t.is_finished() and t.checkpoint is not None])
        if source is None:
            return self._did(trial, "stop", evidence, TrialScheduler.STOP)
        best = self._courses.tried(source.trial_id)
        assert best is not None
        suggested = self._configured(source.config, best, self._proposals.suggest(best))
        if suggested == source.config:
            suggested = self._configured(source.config, best, self._proposals.beside(best.config))
        # As Ray's own PopulationBasedTraining does it: no public way leads from one trial's checkpoint to another.
        tune_controller.pause_trial(trial, should_checkpoint=False)
        trial.set_config(suggested)
        manager = trial.run_metadata.checkpoint_manager
        assert manager is not None
        manager._latest_checkpoint_result = _TrainingResult(copy.copy(source.checkpoint), source.last_result)
        return self._did(trial, "clone", evidence, TrialScheduler.NOOP)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Say so if a trial ends that has shown no reading."""
        if self._courses.tried(trial.trial_id) is None:
            warnings.warn(
                f"trial {trial.trial_id} has reported no reading; it must report "
                "grgauge.integrations.ray.metrics(reading, loss)",
                stacklevel=2,
            )

    def debug_string(self) -> str:
        """One line for Ray's status."""
        count = {what: sum(done == what for _, done, _, _ in self.changes) for what in ("change", "clone", "stop")}
        return f"Gauges: {count['change']} changed, {count['clone']} cloned, {count['stop']} stopped"

    def _did(self, trial: Trial, what: str, evidence: Evidence, decision: str) -> str:
        self.changes.append((trial.trial_id, what, evidence, dict(trial.config)))
        if what != "stop":
            self._courses.forget(trial.trial_id)
        return decision

    def _better(self, own: Tried, trials: list[Trial]) -> Trial | None:
        ranked = [(self._proposals.rank(tried), t) for t in trials if (tried := self._courses.tried(t.trial_id))]
        best = min(ranked, key=lambda pair: pair[0], default=None)
        return best[1] if best is not None and best[0] < self._proposals.rank(own) else None

    def _configured(self, config: Mapping[str, Any], tried: Tried, chosen: Config) -> dict[str, Any]:
        return {**config, **self._courses.values(config, chosen, self._space)}


class GaugeSearch(Searcher):
    """Chooses learning rate and batch size by what trials before have read, with `grgauge.suggest`.

    space       as `param_space`, which it may be left to; of numbers, strings and Ray's domains, without grid_search
    lr, batch_size   names of the two in it; the batch may be an integer range or a choice
    target, max_lr_factor, max_batch_factor   as for `grgauge.suggest`
    seed        of everything random

    The first trials, and all other entries, are drawn from the space. A new trial goes on from the newest one with
    readings that no other went on from; where there is none, or its gauges are in the zone, it is placed near the best.

    Raises ValueError for a number out of range and for a space that it cannot draw from.
    """

    def __init__(
        self,
        space: Mapping[str, Any] | None = None,
        *,
        lr: str = "lr",
        batch_size: str = "batch_size",
        target: Target | None = None,
        max_lr_factor: float = 10.0,
        max_batch_factor: float = 4.0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self._lr, self._batch_size = lr, batch_size
        self._space = None if space is None else _checked(space, lr, batch_size)
        self._proposals = Proposals(target, max_lr_factor, max_batch_factor, seed)
        self._drawn = np.random.default_rng(seed)
        self._courses = _Courses(lr, batch_size)
        self._parents: dict[str, str] = {}

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """Take `param_space`, where no space was given."""
        if self._space is not None:
            return not config
        self._space = _checked(config, self._lr, self._batch_size)
        return True

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """The configuration of a new trial."""
        require(self._space is not None, "space", self._space, "given to GaugeSearch, or to the Tuner as param_space")
        assert self._space is not None
        values = {
            name: each.sample(random_state=self._drawn) if isinstance(each, Domain) else each
            for name, each in self._space.items()
        }
        tried = self._courses.all()
        if not tried:
            return values
        self._parents[trial_id], chosen = self._proposals.next(tried, set(self._parents.values()))
        return {**values, **self._courses.values(values, chosen, self._space)}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Remember a reading."""
        self._courses.note(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Remember the last reading, which a trial that was stopped brings only now."""
        if result:
            self._courses.note(trial_id, result)

    def save(self, checkpoint_path: str) -> None:
        """Ray does this once in a while, so that a search can go on."""
        Path(checkpoint_path).write_bytes(pickle.dumps(self.__dict__))

    def restore(self, checkpoint_path: str) -> None:
        """What `save` saved."""
        self.__dict__.update(pickle.loads(Path(checkpoint_path).read_bytes()))


class _Courses:
    """What trials have read at the configuration that they have now, from Ray's flat results."""

    def __init__(self, lr: str, batch_size: str) -> None:
        self._lr, self._batch_size = lr, batch_size
        self._tried: dict[str, tuple[Config, list[Progress]]] = {}

    def note(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        """False if a result brings no reading, or one that has been seen."""
        prefix = f"{READING}/"
        fields = {name.removeprefix(prefix): value for name, value in result.items() if name.startswith(prefix)}
        if not fields:
            return False
        reading = Reading.from_dict(fields)
        lr = result.get(f"config/{self._lr}")
        require(isinstance(lr, float | int), f"config[{self._lr!r}]", lr, "the learning rate that the trial trains at")
        batch_size = int(result.get(f"config/{self._batch_size}", round(reading.batch_size)))
        config = Config(float(lr), batch_size)  # type: ignore[arg-type]
        known, course = self._tried.get(trial_id, (config, []))
        if known != config:
            course = []
        if course and course[-1].reading == reading:
            return False
        # A trial that goes on from a checkpoint reads some steps again.
        course = [p for p in course if p.reading.step < reading.step]
        self._tried[trial_id] = config, [*course, Progress(reading, float(result[LOSS]), float(result[SAMPLES]))]
        return True

    def tried(self, trial_id: str) -> Tried | None:
        """One trial's, None before its first reading."""
        found = self._tried.get(trial_id)
        return None if found is None else Tried(trial_id, *found)

    def all(self) -> list[Tried]:
        """Those with readings, in the order of their first ones."""
        return [Tried(trial_id, *found) for trial_id, found in self._tried.items()]

    def forget(self, trial_id: str) -> None:
        """A trial goes on with another configuration."""
        del self._tried[trial_id]

    def values(self, config: Mapping[str, Any], chosen: Config, space: Mapping[str, Any]) -> dict[str, Any]:
        """Learning rate, and batch size where the configuration has one, within their ranges."""
        values = {self._lr: _fitted(chosen.lr, space.get(self._lr))}
        if self._batch_size in config:
            values[self._batch_size] = _fitted(chosen.batch_size, space.get(self._batch_size))
        return values


def _checked(space: Mapping[str, Any], lr: str, batch_size: str) -> dict[str, Any]:
    require(isinstance(space.get(lr), Float), f"space[{lr!r}]", space.get(lr), "a range of floats, such as loguniform")
    batch = space.get(batch_size)
    possible = batch is None or isinstance(batch, int | Integer | Categorical)
    require(possible, f"space[{batch_size!r}]", batch, "a range of integers, a choice, or an int")
    for name, each in space.items():
        require(not isinstance(each, Mapping), f"space[{name!r}]", each, "a value or a domain: no grid_search, no dict")
    return dict(space)


def _fitted(value: float, domain: Any) -> Any:
    """The nearest value of a range."""
    if isinstance(domain, Categorical):
        return min(domain.categories, key=lambda choice: abs(math.log(choice / value)))
    if isinstance(domain, Integer):
        return min(max(round(value), domain.lower), domain.upper - 1)  # Ray's upper end is exclusive
    if isinstance(domain, Float):
        return min(max(value, domain.lower), domain.upper)
    return value if domain is None else domain
