"""Trials as an Optuna study, for people and reports to look at.

The checkpoint is what counts. It names the trial that is running and the one that ended last, so that the study can be
brought up to date with it after a `kill -9` at any moment. One Optuna trial is a stretch at one configuration. Of
several ranks rank 0 alone reads and writes the study.

params      lr, batch_size, weight_decay (where the optimizer has one)
value       final training loss, the mean of the last 20 steps. COMPLETE: its weights were carried on, or are the
            result; PRUNED: stopped early; FAIL: the training function failed
user_attrs  of a trial: those of `TrialRecord`, and "error" where it failed
            of the study: "target", "space", "budget", "used", "verdict", "recommendation"
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import uuid
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from filelock import FileLock, Timeout

from .checkpoints import Checkpoints
from .errors import StorageError
from .ranks import World
from .records import TrialRecord

if TYPE_CHECKING:
    import optuna

Method = TypeVar("Method", bound=Callable[..., None])

INSTALL = "pip install 'grgauge-kernels[tune]'"
AGAIN = "fresh=True begins again"


def storage_url(storage: str | Path) -> str:
    """The URL of an SQLite file, whatever characters its path has; a URL as it is."""
    if "://" in str(storage):
        return str(storage)
    from sqlalchemy import URL, make_url

    path = str(Path(storage).absolute())
    url = URL.create("sqlite", database=path).render_as_string()
    if make_url(url).database != path:
        raise ValueError(f"storage {storage} has characters that this SQLAlchemy cannot express; version 2.1 can")
    return url


def _by_rank_0(method: Method) -> Method:
    """A method that does nothing on the other ranks, and raises StorageError if the database cannot be written."""

    @wraps(method)
    def only(self: Trials, *arguments: Any, **named: Any) -> None:
        if self._world.rank > 0:
            return
        try:
            method(self, *arguments, **named)
        except self._errors as error:
            cause = error.__cause__ or error
            raise StorageError(
                f"storage {self.storage} cannot be written: {getattr(cause, 'orig', cause)}. Nothing that was written "
                "before is lost: make room, and the same call goes on from the newest checkpoint"
            ) from error

    return cast(Method, only)


class Trials:
    """An Optuna study, and the folder of its checkpoints. Use it as a context manager: while it is open, no other
    process can open the same study.

    storage   path of an SQLite file, or the URL of any Optuna storage
    name      of the study
    folder    for checkpoints; None: beside the SQLite file, else "grgauge.checkpoints" here
    settings  what a study must have been begun with to be continued
    world     the ranks that train together; `study` is rank 0's alone
    fresh     begin again; a study of that name is kept, with its checkpoints, under the name and a number

    Raises ImportError without Optuna; ValueError if the storage cannot be opened, if another process has the study
    open, if the study was begun with other settings, or if it has trials but no checkpoint in the folder. Ranks other
    than 0 raise a TrainingError with it.
    """

    _lock: FileLock | None = None
    _errors: tuple[type[Exception], ...]  # of a storage that cannot be written

    def __init__(
        self,
        storage: str | Path,
        name: str,
        folder: str | Path | None,
        settings: Mapping[str, Any],
        world: World,
        fresh: bool = False,
    ) -> None:
        self.storage, self.name, self._world = storage, name, world
        own = "grgauge.checkpoints" if "://" in str(storage) else f"{storage}.checkpoints"
        base = Path(own if folder is None else folder)
        try:
            self.checkpoints = Checkpoints(world.on_rank_0(lambda: self._open(base, settings, fresh)))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Trials:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def _open(self, base: Path, settings: Mapping[str, Any], fresh: bool) -> Path:
        """Open the study, or make it; the folder of its checkpoints."""
        try:
            import optuna
            from sqlalchemy.exc import SQLAlchemyError
        except ImportError as error:
            raise ImportError(f"grgauge.tune() stores its trials with optuna: {INSTALL}") from error
        self._errors = (OSError, SQLAlchemyError, optuna.exceptions.StorageInternalError)
        url = storage_url(self.storage)
        file = "://" not in str(self.storage)  # else there may be no such storage, and then nothing is to be made
        try:
            if file:
                Path(self.storage).absolute().parent.mkdir(parents=True, exist_ok=True)
                base.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unopened(error) from error
        if file:
            self._acquire(base, url)
        try:
            opened = optuna.storages.get_storage(url)
        except Exception as error:  # of Optuna, of SQLAlchemy or of the database's own driver
            raise self._unopened(error) from error
        if not file:
            base.mkdir(parents=True, exist_ok=True)
            self._acquire(base, url)
        if fresh:
            self._set_aside(opened, base)
        self.study: optuna.Study = optuna.create_study(
            storage=opened, study_name=self.name, direction="minimize", load_if_exists=True
        )
        for key, value in {**settings, "id": uuid.uuid4().hex[:8]}.items():
            if key not in self.study.user_attrs:
                self.study.set_user_attr(key, value)
        attributes = self.study.user_attrs
        for key, value in settings.items():
            if attributes[key] != value:
                raise ValueError(
                    f"{key} is {value!r}, but study {self.name!r} in {self.storage} was begun with "
                    f"{attributes[key]!r}; it must be the same to go on, or study_name another one, or {AGAIN}"
                )
        path = base / _folder(self.name, attributes["id"])
        ended = [trial for trial in self._trials() if trial.state.name in ("COMPLETE", "PRUNED")]
        if ended and not Checkpoints(path):
            raise ValueError(
                f"study {self.name!r} in {self.storage} has trials, but {path} has no checkpoint to go on from; "
                f"checkpoint_dir must be the folder that it was begun with, or study_name another one, or {AGAIN}"
            )
        return path

    def _unopened(self, error: Exception) -> ValueError:
        return ValueError(f"storage {self.storage} cannot be opened: {type(error).__name__}: {error}")

    def _acquire(self, base: Path, url: str) -> None:
        """Lock the study. The system keeps the lock, and drops it with the process, however that dies."""
        of = hashlib.sha256(url.encode()).hexdigest()[:6]
        lock = FileLock(base / f"{_plain(self.name)}-{of}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise ValueError(
                f"study {self.name!r} in {self.storage} is being trained by another process, which holds "
                f"{lock.lock_file}: wait for it or end it, or choose another study_name"
            ) from None
        self._lock = lock

    def _set_aside(self, storage: optuna.storages.BaseStorage, base: Path) -> None:
        """Keep a study of that name, and its checkpoints, under the first name-1, name-2, ... that is free."""
        import optuna

        studies = {study.study_name: study for study in storage.get_all_studies()}
        if self.name not in studies:
            return
        other = next(name for i in itertools.count(1) if (name := f"{self.name}-{i}") not in studies)
        optuna.copy_study(from_study_name=self.name, from_storage=storage, to_storage=storage, to_study_name=other)
        identity = studies[self.name].user_attrs.get("id", "")
        if (base / _folder(self.name, identity)).exists():
            os.replace(base / _folder(self.name, identity), base / _folder(other, identity))
        optuna.delete_study(study_name=self.name, storage=storage)

    def _trials(self) -> list[optuna.trial.FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    @_by_rank_0
    def begin(self, record: TrialRecord, space: Mapping[str, tuple[float, float]]) -> None:
        """Give a record its trial: the one that a killed process left running with these params, else a new one."""
        from optuna.distributions import FloatDistribution, IntDistribution
        from optuna.trial import TrialState, create_trial

        params: dict[str, Any] = {"lr": record.lr, "batch_size": record.batch_size}
        (low, high), (least, most) = space["lr"], space["batch_size"]
        ranges: dict[str, Any] = {
            "lr": FloatDistribution(min(low, record.lr), max(high, record.lr), log=True),
            "batch_size": IntDistribution(
                min(int(least), record.batch_size), max(int(most), record.batch_size), log=True
            ),
        }
        if record.weight_decay is not None:
            params["weight_decay"] = record.weight_decay
            lowest, highest = space.get("weight_decay", (0.0, 1.0))
            ranges["weight_decay"] = FloatDistribution(
                min(lowest, record.weight_decay), max(highest, record.weight_decay), log=lowest > 0.0
            )
        for trial in self._trials():
            if trial.state == TrialState.RUNNING:
                if trial.params == params and trial.user_attrs.get("start_samples") == record.start_samples:
                    record.number = trial.number
                    return
                self.study.tell(trial.number, state=TrialState.FAIL)
        self.study.add_trial(
            create_trial(state=TrialState.RUNNING, params=params, distributions=ranges, user_attrs=record.attributes())
        )
        record.number = self._trials()[-1].number

    @_by_rank_0
    def write(self, record: TrialRecord) -> None:
        """Bring a record's trial up to date, and end it if the record has ended; one that has ended stays."""
        import optuna
        from optuna.trial import TrialState

        trial = next(trial for trial in self._trials() if trial.number == record.number)
        if trial.state.is_finished():
            return
        running = optuna.trial.Trial(self.study, trial._trial_id)
        for name, value in record.attributes().items():
            if trial.user_attrs.get(name) != value:
                running.set_user_attr(name, value)
        if record.state is None:
            return
        complete = record.state == "COMPLETE" and math.isfinite(record.loss)
        state = TrialState[record.state] if complete or record.state == "FAIL" else TrialState.PRUNED
        self.study.tell(trial.number, record.loss if complete else None, state)

    @_by_rank_0
    def note(self, **attributes: Any) -> None:
        """Set attributes of the study."""
        known = self.study.user_attrs
        for name, value in attributes.items():
            if name not in known or known[name] != value:
                self.study.set_user_attr(name, value)

    def records(self) -> list[TrialRecord]:
        """All trials, in order; for all ranks."""
        return self._world.on_rank_0(self._records)

    def _records(self) -> list[TrialRecord]:
        names = set(TrialRecord.__dataclass_fields__)
        return [
            TrialRecord(
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


def _folder(name: str, identity: str) -> str:
    return f"{_plain(name)}-{identity}"


def _plain(name: str) -> str:
    """A study's name as a folder's, which may not have all its characters."""
    plain = "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
