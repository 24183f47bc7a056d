"""Trials that survive: an Optuna study for people to look at, and checkpoints to go on from.

The checkpoint is what counts. It names the trial that is running and the one that ended last, so that the study can be
brought up to date with it after a `kill -9` at any moment. One Optuna trial is a stretch at one configuration. Of
several ranks the first alone writes either; all read the checkpoint.

params      lr, batch_size, weight_decay (where the optimizer has one)
value       final training loss, the mean of the last 20 steps. COMPLETE: its weights were carried on, or are the
            result; PRUNED: stopped early; FAIL: the training function failed
user_attrs  of a trial: those of `Segment`, and "error" where it failed
            of the study: "target", "space", "budget", "used", "verdict", "recommendation"
"""

from __future__ import annotations

import hashlib
import math
import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from ..policy import Config, Decision, Retune, Stop
from ..reading import Reading
from .ranks import World
from .training import frozen, thawed

if TYPE_CHECKING:
    import optuna

Method = TypeVar("Method", bound=Callable[..., None])

INSTALL = "pip install 'grgauge-kernels[tune]'"
KEPT = 300
"""Points of a curve that are kept; beyond, every second of its older half goes."""
LAST = 20
"""Steps that the final loss is a mean of."""


@dataclass
class Segment:
    """A stretch of training at one configuration, of one line of weights.

    parent         number of the trial whose weights it inherited, None if it began untrained
    start_samples  samples that the whole study had taken when it began
    samples        it took
    seconds        it took
    readings       {samples, step, gr_t, gr_t_error, settled, gr_s, gr_s_error, noise_scale, grad_norm, ready} each
    losses         [samples, mean loss since the point before] each; `samples` here and in readings are the study's
                   total then, counted from where `start_samples` is
    notes          what happened on the way, in words
    reason         why it ended, in words
    decision       {"kind": "continue" | "retune" | "stop" | "fail", "rule": name, "evidence": {...}}
    state          of Optuna's trial, None while it runs
    last           losses of the newest steps
    """

    lr: float
    batch_size: int
    weight_decay: float | None
    parent: int | None = None
    start_samples: int = 0
    number: int | None = None
    samples: int = 0
    seconds: float = 0.0
    readings: list[dict[str, Any]] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    reason: str = ""
    decision: dict[str, Any] = field(default_factory=dict)
    state: str | None = None
    error: str | None = None
    last: list[float] = field(default_factory=list)
    pending: list[float] = field(default_factory=list)

    @property
    def config(self) -> Config:
        return Config(self.lr, self.batch_size, self.weight_decay)

    @property
    def loss(self) -> float:
        """Mean of the last steps; nan before the first."""
        return sum(self.last) / len(self.last) if self.last else math.nan

    def add(self, loss: float, samples: int, used: int, seconds: float, reading: Reading | None) -> None:
        """One step, the reading that it made, and the study's total behind it."""
        self.samples, self.seconds = self.samples + samples, self.seconds + seconds
        self.last = [*self.last[1 - LAST :], loss]
        self.pending.append(loss)
        if reading is not None:
            kept = ("step", "gr_t", "gr_t_error", "settled", "gr_s", "gr_s_error", "noise_scale", "grad_norm", "ready")
            self.readings.append({"samples": used, **{name: _finite(getattr(reading, name)) for name in kept}})
            self.mark(used)
            _thin(self.readings)

    def mark(self, used: int) -> None:
        """End a point of the loss curve."""
        if self.pending:
            mean = sum(self.pending) / len(self.pending)
            self.pending = []
            if math.isfinite(mean):
                self.losses.append([used, mean])
                _thin(self.losses)

    def end(self, state: str, reason: str, decision: dict[str, Any]) -> None:
        self.state, self.reason, self.decision = state, reason, decision
        self.mark(self.start_samples + self.samples)

    def attributes(self) -> dict[str, Any]:
        """What is stored of it as user attributes."""
        left_out = {"lr", "batch_size", "weight_decay", "number", "state", "last", "pending"}
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in left_out and not (name == "error" and value is None)
        }


def words_of(decision: Decision) -> dict[str, Any]:
    """A decision as plain values."""
    kind = "retune" if isinstance(decision, Retune) else "stop" if isinstance(decision, Stop) else "continue"
    evidence = {name: _finite(value) for name, value in asdict(decision.evidence).items() if name != "rule"}
    return {"kind": kind, "rule": decision.evidence.rule, "evidence": evidence}


def _by_rank_0(method: Method) -> Method:
    """A method that does nothing on the other ranks."""

    @wraps(method)
    def only(self: Trials, *arguments: Any, **named: Any) -> None:
        if self._world.rank == 0:
            method(self, *arguments, **named)

    return cast(Method, only)


class Trials:
    """An Optuna study and a folder of checkpoints.

    storage   path of an SQLite file, or the URL of any Optuna storage
    name      of the study
    folder    for checkpoints; None: beside the SQLite file, else "grgauge.checkpoints" here
    settings  what a study must have been begun with to be continued
    world     the ranks that train together; `study` is rank 0's alone

    Raises ImportError without Optuna; ValueError if the storage cannot be opened, if the study was begun with other
    settings, or if it has trials but no checkpoint in the folder. Ranks other than 0 raise a TrainingError with it.
    """

    def __init__(
        self,
        storage: str | Path,
        name: str,
        folder: str | Path | None,
        settings: Mapping[str, Any],
        world: World,
    ) -> None:
        self._world = world
        self.folder = world.first(lambda: self._open(storage, name, folder, settings))

    def _open(self, storage: str | Path, name: str, folder: str | Path | None, settings: Mapping[str, Any]) -> Path:
        """Open the study, or make it; the folder of its checkpoints."""
        try:
            import optuna
        except ImportError as error:
            raise ImportError(f"grgauge.tune() stores its trials with optuna: {INSTALL}") from error
        url = str(storage)
        if "://" not in url:
            folder = folder or Path(f"{url}.checkpoints")
            Path(url).absolute().parent.mkdir(parents=True, exist_ok=True)
            url = f"sqlite:///{Path(url).absolute()}"
        try:
            self.study: optuna.Study = optuna.create_study(
                storage=url, study_name=name, direction="minimize", load_if_exists=True
            )
        except Exception as error:  # of Optuna, of SQLAlchemy or of the database's own driver
            raise ValueError(f"storage {storage} cannot be opened: {type(error).__name__}: {error}") from error
        attributes = self.study.user_attrs
        if not {"id", *settings} <= set(attributes):  # also where the first command was killed in the middle of it
            for key, value in {**settings, "id": uuid.uuid4().hex[:8]}.items():
                self.study.set_user_attr(key, value)
            attributes = self.study.user_attrs
        for key, value in settings.items():
            if attributes[key] != value:
                raise ValueError(
                    f"{key} is {value}, but study {name!r} in {storage} was begun with {attributes[key]}; it must be "
                    "the same to go on, or study_name another one"
                )
        path = Path(folder or "grgauge.checkpoints") / f"{_plain(name)}-{attributes['id']}"
        ended = [trial for trial in self._trials() if trial.state.name in ("COMPLETE", "PRUNED")]
        if ended and not (path / "last.pt").exists():
            raise ValueError(
                f"study {name!r} in {storage} has trials, but {path} has no checkpoint to go on from; "
                "checkpoint_dir must be the folder that it was begun with, or study_name another one"
            )
        return path

    def _trials(self) -> list[optuna.trial.FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    @_by_rank_0
    def begin(self, segment: Segment, space: Mapping[str, tuple[float, float]]) -> None:
        """Give a segment its trial: the one that a killed process left running with these params, else a new one."""
        from optuna.distributions import FloatDistribution, IntDistribution
        from optuna.trial import TrialState, create_trial

        params: dict[str, Any] = {"lr": segment.lr, "batch_size": segment.batch_size}
        (low, high), (least, most) = space["lr"], space["batch_size"]
        ranges: dict[str, Any] = {
            "lr": FloatDistribution(min(low, segment.lr), max(high, segment.lr), log=True),
            "batch_size": IntDistribution(
                min(int(least), segment.batch_size), max(int(most), segment.batch_size), log=True
            ),
        }
        if segment.weight_decay is not None:
            params["weight_decay"] = segment.weight_decay
            lowest, highest = space.get("weight_decay", (0.0, 1.0))
            ranges["weight_decay"] = FloatDistribution(
                min(lowest, segment.weight_decay), max(highest, segment.weight_decay), log=lowest > 0.0
            )
        for trial in self._trials():
            if trial.state == TrialState.RUNNING:
                if trial.params == params and trial.user_attrs.get("start_samples") == segment.start_samples:
                    segment.number = trial.number
                    return
                self.study.tell(trial.number, state=TrialState.FAIL)
        self.study.add_trial(
            create_trial(state=TrialState.RUNNING, params=params, distributions=ranges, user_attrs=segment.attributes())
        )
        segment.number = self._trials()[-1].number

    @_by_rank_0
    def write(self, segment: Segment) -> None:
        """Bring a segment's trial up to date, and end it if the segment has ended; one that has ended stays."""
        import optuna
        from optuna.trial import TrialState

        trial = next(trial for trial in self._trials() if trial.number == segment.number)
        if trial.state.is_finished():
            return
        running = optuna.trial.Trial(self.study, trial._trial_id)
        for name, value in segment.attributes().items():
            if trial.user_attrs.get(name) != value:
                running.set_user_attr(name, value)
        if segment.state is None:
            return
        complete = segment.state == "COMPLETE" and math.isfinite(segment.loss)
        state = TrialState[segment.state] if complete or segment.state == "FAIL" else TrialState.PRUNED
        self.study.tell(trial.number, segment.loss if complete else None, state)

    @_by_rank_0
    def note(self, **attributes: Any) -> None:
        """Set attributes of the study."""
        known = self.study.user_attrs
        for name, value in attributes.items():
            if name not in known or known[name] != value:
                self.study.set_user_attr(name, value)

    def segments(self) -> list[Segment]:
        """All trials, in order; for all ranks."""
        return self._world.first(self._segments)

    def _segments(self) -> list[Segment]:
        names = set(Segment.__dataclass_fields__)
        return [
            Segment(
                **{"weight_decay": None, **trial.params},
                **{name: value for name, value in trial.user_attrs.items() if name in names},
                number=trial.number,
                state=None if trial.state.name == "RUNNING" else trial.state.name,
                last=[trial.value]
                if trial.value is not None
                else [loss for _, loss in trial.user_attrs["losses"][-1:]],
            )
            for trial in self._trials()
        ]

    # --- checkpoints --------------------------------------------------------------------------------------------------

    @_by_rank_0
    def save(self, name: str, state: dict[str, Any]) -> None:
        """Write a state so that a crash leaves the file as it was, or as it is to be."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path, part = self.folder / name, self.folder / f"{name}.part"
        with part.open("wb") as file:
            file.write(frozen(state))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        if os.name == "posix":  # the name, too, is only safe once its folder is
            folder = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def load(self, name: str) -> dict[str, Any] | None:
        path = self.folder / name
        return thawed(path.read_bytes()) if path.exists() else None

    @_by_rank_0
    def keep(self, *names: str | None) -> None:
        """Delete checkpoints of other names."""
        for path in self.folder.glob("*"):
            if path.name not in names:
                path.unlink()


def _plain(name: str) -> str:
    """A study's name as a folder's, which may not have all its characters."""
    plain = "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def _thin(points: list[Any]) -> None:
    if len(points) > KEPT:
        points[: KEPT // 2] = points[: KEPT // 2 : 2]


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
