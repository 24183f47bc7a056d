"""What is stored of a trial: a stretch of training at one configuration, as plain numbers and words."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from ..policy import Config, Decision, Retune, Stop
from ..reading import Reading
from ..smoothing import thin

KEPT = 300
"""Points of a curve that are kept."""
LAST = 20
"""Steps that the final loss is a mean of."""


@dataclass
class TrialRecord:
    """A stretch of training at one configuration, of one line of weights.

    Attributes:
        lr: peak learning rate.
        batch_size: global batch in samples.
        weight_decay: None where the optimizer has none.
        parent: number of the trial whose weights it inherited, None if it began untrained.
        start_samples: samples that the whole study had taken when it began.
        number: of Optuna's trial, None before it is stored.
        samples: it took.
        seconds: it took.
        readings: {samples, step, gr_t, gr_t_error, finite_time_factor, gr_s, gr_s_error, noise_scale, grad_norm, ready}
            each.
        losses: [samples, mean loss since the point before] each; `samples` here and in readings are the study's total
            then, counted from where `start_samples` is.
        notes: what happened on the way, in words.
        probes: comparisons of two learning rates that were made on the way.
        reason: why it ended, in words.
        decision: {"kind": "continue" | "retune" | "stop" | "fail", "rule": name, "evidence": {...}}.
        state: of Optuna's trial, None while it runs.
        error: why it failed, None if it did not.
        last: losses of the newest steps.
        pending: losses since the last point of the curve.

    Examples:
        >>> from grgauge.tuning.records import TrialRecord
        >>> record = TrialRecord(lr=1e-3, batch_size=32, weight_decay=None)
        >>> record.add(loss=2.0, samples=32)
        >>> record.add(loss=1.0, samples=32)
        >>> record.samples, record.loss
        (64, 1.5)
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
    probes: int = 0
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

    def add(self, loss: float, samples: int) -> None:
        """One step."""
        self.samples += samples
        self.last = [*self.last[1 - LAST :], loss]
        self.pending.append(loss)

    def read(self, reading: Reading) -> None:
        """The reading that the newest step has made."""
        kept = (
            "step",
            "gr_t",
            "gr_t_error",
            "finite_time_factor",
            "gr_s",
            "gr_s_error",
            "noise_scale",
            "grad_norm",
            "ready",
        )
        at = self.start_samples + self.samples
        self.readings.append({"samples": at, **{name: _finite(getattr(reading, name)) for name in kept}})
        self._mark()
        self.readings = thin(self.readings, KEPT)

    def end(self, state: str, reason: str, decision: dict[str, Any]) -> None:
        self.state, self.reason, self.decision = state, reason, decision
        self._mark()

    def _mark(self) -> None:
        """End a point of the loss curve."""
        if self.pending:
            mean = sum(self.pending) / len(self.pending)
            self.pending = []
            if math.isfinite(mean):
                self.losses = thin([*self.losses, [self.start_samples + self.samples, mean]], KEPT)

    def attributes(self) -> dict[str, Any]:
        """What is stored of it as user attributes."""
        left_out = {"lr", "batch_size", "weight_decay", "number", "state", "last", "pending"}
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in left_out and not (name == "error" and value is None)
        }


def in_words(decision: Decision) -> dict[str, Any]:
    """A decision as plain values."""
    kind = "retune" if isinstance(decision, Retune) else "stop" if isinstance(decision, Stop) else "continue"
    evidence = {name: _finite(value) for name, value in asdict(decision.evidence).items() if name != "rule"}
    return {"kind": kind, "rule": decision.evidence.rule, "evidence": evidence}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
