"""A stored study of trials as plain numbers; nan stands for unknown."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from ..policy import Target
from ..tuning import storage_url

if TYPE_CHECKING:
    from optuna.storages import BaseStorage, RDBStorage
    from optuna.trial import FrozenTrial

from . import numerals
from .numerals import UNKNOWN

INSTALL = "pip install 'grgauge-kernels[tune]'"

OUTCOMES = {
    "COMPLETE": "completed",
    "PRUNED": "stopped early",
    "FAIL": "failed",
    "RUNNING": "running",
    "WAITING": "waiting",
}
"""Optuna's state of a trial -> what the page calls it."""

HUES = 5
"""How many lines of weights have a colour of their own; the others are grey."""


class ReportError(ValueError):
    """There is nothing to report on; the message says why, and what to do."""


# --- the study as plain numbers; nan stands for unknown ---------------------------------------------------------------


class Point(NamedTuple):
    """One reading. `samples`: how many samples the whole study had used by then."""

    samples: float
    gr_t: float
    gr_s: float
    ready: bool


@dataclass(frozen=True)
class Trial:
    """One configuration and what came of it.

    outcome   one of `OUTCOMES`' words
    parent    number of the trial whose weights it inherited
    loss      final smoothed training loss, or the last one that was recorded
    start     samples that the study had used when the trial began
    samples   samples that the trial itself has used
    evidence  the rule that ended it, and the number that the rule used
    notes     what happened on the way, one line each
    compared  whether two learning rates were compared on the way
    losses    (samples, loss), samples as in `Point`
    """

    number: int
    outcome: str
    parent: int | None = None
    lr: float = math.nan
    batch: float = math.nan
    decay: float = math.nan
    loss: float = math.nan
    start: float = 0.0
    samples: float = math.nan
    seconds: float = math.nan
    reason: str = UNKNOWN
    evidence: str = ""
    notes: Sequence[str] = ()
    compared: bool = False
    readings: Sequence[Point] = ()
    losses: Sequence[tuple[float, float]] = ()

    @property
    def end(self) -> float:
        return self.start + (0.0 if math.isnan(self.samples) else self.samples)

    @cached_property
    def path(self) -> list[Point]:
        """Its readings in the plane: those that have both gauges; only the ready ones, if there are any."""
        known = [point for point in self.readings if point.gr_t > 0.0 and point.gr_s >= 0.0]
        return [point for point in known if point.ready] or known

    @cached_property
    def trace(self) -> list[tuple[float, float]]:
        """The path as medians of a few readings each, since single ones scatter; the last of them is `place`."""
        size = max(5, math.ceil(len(self.path) / 12))
        ends = range(len(self.path), 0, -size)
        return [_middle(self.path[max(0, end - size) : end]) for end in ends][::-1]

    @property
    def place(self) -> tuple[float, float] | None:
        """Where its gauges ended, (GR_T, GR_S)."""
        return self.trace[-1] if self.trace else None

    def __str__(self) -> str:
        """What a tooltip says."""
        gauges = "" if self.place is None else f"\nGR_T {self.place[0]:.3g}, GR_S {self.place[1]:.2f}"
        heir = "" if self.parent is None else f", with the weights of #{self.parent}"
        return (
            f"#{self.number} {self.outcome}{heir}\n"
            f"lr {numerals.scientific(self.lr)}, batch {numerals.count(self.batch)}\n"
            f"{numerals.count(self.samples)} samples, loss {numerals.short(self.loss)}{gauges}\n"
            f"{numerals.clip(self.reason, 160)}"
        )


def _middle(points: Sequence[Point]) -> tuple[float, float]:
    return median(point.gr_t for point in points), median(point.gr_s for point in points)


@dataclass(frozen=True)
class Study:
    """All that the page shows. `lr`, `batch` and `decay` are the recommended ones."""

    name: str
    trials: Sequence[Trial] = ()
    target: Target = field(default_factory=Target)
    verdict: str = ""
    lr: float = math.nan
    batch: float = math.nan
    decay: float = math.nan
    used: float = math.nan
    budget: float = math.nan

    @cached_property
    def best(self) -> Trial | None:
        """The newest trial at the recommended configuration; a failed one cannot be what recommended it."""
        same = [
            trial
            for trial in self.trials
            if math.isclose(trial.lr, self.lr, rel_tol=1e-6) and trial.batch == self.batch and trial.outcome != "failed"
        ]
        return same[-1] if same else None

    @cached_property
    def lines(self) -> list[list[Trial]]:
        """Lines of trials that passed weights on, oldest trial first. The recommended line comes first, the others by
        cost.

        If several trials inherited the same weights, the newest continues the line: the others were rolled back.
        """
        known = {trial.number: trial for trial in self.trials}
        heirs = {trial.parent: trial.number for trial in self.trials if trial.parent in known}
        lines: dict[int, list[Trial]] = {}
        for trial in self.trials:
            carries_on = trial.parent in lines and heirs[trial.parent] == trial.number
            line = lines[trial.parent] if carries_on and trial.parent is not None else []
            lines[trial.number] = line
            line.append(trial)
        once = {id(line): line for line in lines.values()}
        return sorted(once.values(), key=lambda line: (self.best not in line, -sum(t.end - t.start for t in line)))

    @cached_property
    def hues(self) -> dict[int, str]:
        """Number of a trial -> the class that colours its line."""
        return {trial.number: f"l{min(i, HUES)}" for i, line in enumerate(self.lines) for trial in line}

    @property
    def outcomes(self) -> Counter[str]:
        return Counter(trial.outcome for trial in self.trials)

    @property
    def running(self) -> Trial | None:
        """The trial that is being trained, as long as there is no verdict."""
        newest = self.trials[-1] if self.trials else None
        return newest if newest and newest.outcome == "running" and not self.verdict else None

    @property
    def headline(self) -> str:
        """The verdict's first line, which is the finding; `rest` has the others."""
        if self.verdict:
            return self.verdict.partition("\n")[0]
        if self.running:
            lr, batch = numerals.scientific(self.running.lr), numerals.count(self.running.batch)
            return f"Still training: trial {self.running.number}, lr {lr}, batch {batch}. No verdict yet."
        return "No verdict has been stored yet." if self.trials else "No trial has been stored yet."

    @property
    def rest(self) -> str:
        """What the verdict says after the finding."""
        return self.verdict.partition("\n")[2]

    def to_dict(self) -> dict[str, Any]:
        """The key figures, ready for JSON except for numbers that are not finite."""
        return {
            "study": self.name,
            "verdict": self.verdict or None,
            "recommendation": {"lr": self.lr, "batch_size": _whole(self.batch), "weight_decay": self.decay},
            "trial": None if self.best is None else self.best.number,
            "used": _whole(self.used),
            "budget": _whole(self.budget),
            "trials": len(self.trials),
            "outcomes": dict(self.outcomes),
        }


def load(storage: str | Path | BaseStorage, study_name: str | None = None) -> Study:
    """The study in an SQLite file, at an Optuna storage URL, or in an open storage; nothing is written to it.

    Raises ReportError if optuna is missing, if there is no such storage, or if it is not clear which study is meant.
    """
    try:
        import optuna
        from sqlalchemy.exc import SQLAlchemyError  # optuna brings it
    except ImportError as error:
        raise ReportError(f"reading a study needs optuna: {INSTALL}") from error
    opened = _open(str(storage)) if isinstance(storage, (str, Path)) else None
    at: Any = opened or storage
    try:
        names = sorted(optuna.get_all_study_names(at))
        if not names:
            raise ReportError(f"{storage} holds no study")
        if study_name is None and len(names) > 1:
            raise ReportError(f"{storage} holds {len(names)} studies, choose one of them: {numerals.listed(names)}")
        if study_name is not None and study_name not in names:
            raise ReportError(f"{storage} holds no study {study_name!r}, only {numerals.listed(names)}")
        found = optuna.load_study(study_name=study_name or names[0], storage=at)
        return _study(found.study_name, found.user_attrs, found.get_trials(deepcopy=False))
    except (SQLAlchemyError, optuna.exceptions.OptunaError, RuntimeError) as error:
        raise _unreadable(storage, error) from error
    finally:
        if opened is not None:
            opened.remove_session()
            opened.engine.dispose()


def _open(storage: str) -> RDBStorage:
    from optuna.exceptions import OptunaError
    from optuna.storages import RDBStorage
    from sqlalchemy import make_url
    from sqlalchemy.exc import SQLAlchemyError

    try:
        url = storage_url(storage)
        database = make_url(url).database if url.startswith("sqlite:") else None
    except (SQLAlchemyError, ValueError) as error:
        raise _unreadable(storage, error) from error
    # otherwise a mistyped name would make a new file with empty tables
    if database is not None and not Path(database).is_file():
        raise ReportError(f"there is no file {database if '://' in storage else storage}")
    try:
        return RDBStorage(url, skip_table_creation=True)
    except (SQLAlchemyError, OptunaError, ImportError, RuntimeError, ValueError) as error:
        raise _unreadable(storage, error) from error


def _unreadable(storage: object, error: BaseException) -> ReportError:
    # optuna wraps the database's own message
    why = str(error.__cause__ or error).partition("\n")[0]
    return ReportError(f"cannot read {storage} as an Optuna storage: {numerals.clip(why, 200)}")


def _study(name: str, attributes: Mapping[str, Any], stored: Iterable[FrozenTrial]) -> Study:
    trials: list[Trial] = []
    for frozen in stored:
        # trials run one after another: without a recorded start, a trial began when the one before it ended
        trials.append(_trial(frozen, trials[-1].end if trials else 0.0))
    recommended = _mapping(attributes.get("recommendation"))
    return Study(
        name=_words(name),
        trials=trials,
        target=_target(_mapping(attributes.get("target"))),
        verdict=_words(attributes.get("verdict")),
        lr=_number(recommended.get("lr")),
        batch=_number(recommended.get("batch_size")),
        decay=_number(recommended.get("weight_decay")),
        used=_number(attributes.get("used")),
        budget=_number(attributes.get("budget")),
    )


def _trial(frozen: FrozenTrial, start: float) -> Trial:
    said = frozen.user_attrs
    losses = [(_number(pair[0]), _number(pair[1])) for pair in _list(said.get("losses")) if len(_list(pair)) == 2]
    readings = [
        Point(_number(at.get("samples")), _number(at.get("gr_t")), _number(at.get("gr_s")), at.get("ready") is True)
        for at in map(_mapping, _list(said.get("readings")))
    ]
    begun, samples = _number(said.get("start_samples")), _number(said.get("samples"))
    start = start if math.isnan(begun) else begun
    reached = [point[0] - start for point in (*losses, *readings) if point[0] >= start]
    parent = said.get("parent")
    ends = [_words(said.get("reason")), _words(said.get("error"))]
    return Trial(
        number=frozen.number,
        outcome=OUTCOMES[frozen.state.name],
        parent=parent if isinstance(parent, int) and 0 <= parent < frozen.number else None,
        lr=_number(frozen.params.get("lr")),
        batch=_number(frozen.params.get("batch_size")),
        decay=_number(frozen.params.get("weight_decay")),
        loss=_number(frozen.values[0]) if frozen.values else losses[-1][1] if losses else math.nan,
        start=start,
        samples=max(reached, default=math.nan) if math.isnan(samples) else samples,
        seconds=_number(said.get("seconds")),
        reason=": ".join(dict.fromkeys(filter(None, ends))) or UNKNOWN,
        evidence=_evidence(_mapping(said.get("decision"))),
        notes=[_words(note) for note in _list(said.get("notes"))],
        compared=_number(said.get("probes")) > 0.0,
        readings=[point for point in readings if point.samples >= 0.0],
        losses=[(samples, loss) for samples, loss in losses if samples >= 0.0],
    )


def _evidence(decision: Mapping[str, Any]) -> str:
    """The decision and what it is based on, such as "retune · too low: GR_T 4.1 in [3.7, 4.6]"."""
    evidence = _mapping(decision.get("evidence"))
    value, interval = _number(evidence.get("value")), [_number(end) for end in _list(evidence.get("interval"))]
    rule = _words(decision.get("rule")) or _words(evidence.get("rule"))
    number = "" if math.isnan(value) else f"{_words(evidence.get('quantity'))} {value:.3g}"
    if number and len(interval) == 2 and not any(map(math.isnan, interval)):
        # a comparison's interval is that of the loss it is compared with
        word = "against" if rule == "probe" else "in"
        number += f" {word} [{interval[0]:.3g}, {interval[1]:.3g}]"
    return " · ".join(filter(None, [_words(decision.get("kind")), ": ".join(filter(None, [rule, number]))]))


def _target(stored: Mapping[str, Any]) -> Target:
    """The stored target; the published one if none, or none that is valid, was stored."""
    known = {
        key: tuple(map(_number, value)) if isinstance(value, (list, tuple)) else _number(value)
        for key, value in stored.items()
        if key in ("gr_t", "gr_s", "gr_t_zone", "gr_s_zone")
    }
    try:
        return Target(**known)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return Target()


def _number(value: object) -> float:
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else math.nan  # type: ignore[arg-type]


def _words(value: object) -> str:
    """Text that XML allows: no control characters, no lone surrogates."""
    text = re.sub(r"[^\S\n]|[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff]", " ", value if isinstance(value, str) else "")
    return text.encode("utf-8", "replace").decode("utf-8").strip()


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else ()


def _whole(value: float) -> float:
    return int(value) if value.is_integer() else value
