"""What readings mean for learning rate and batch size. Plain numbers, no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from ..reading import Reading
from .calibration import Calibration, Interval, calibration
from .target import BLIND, Target
from .watch import SPANS, WINDOW, Summary, Watch

Direction = Literal["raise", "lower", "keep", "unknown"]

NEAR = math.log10(3.0)
"""A learning rate or batch that is off by less counts as right."""

STEP = 3.0
"""The largest factor to be taken before looking again."""

LIKELY = 0.6
"""The share of such runs that must need a direction for it to be given, where GR_T can be read and the interval ends on
the other side: how wrong the direction may be is known then. Elsewhere it must be four runs of five."""


@dataclass(frozen=True)
class Correction:
    """What to do with one number.

    Attributes:
        direction: "raise", "lower", "keep", or "unknown" where the gauges cannot tell.
        factor: what to multiply by; 1 for "keep" and "unknown", 3 times at most where nobody knows how far it is.
        interval: a 90 % interval of the factor that leads to the best value, for a family of models that was not
            recorded; 0 or inf where an end is not known.
        why: in words.
    """

    direction: Direction
    factor: float
    interval: tuple[float, float]
    why: str

    def describe(self, name: str) -> str:
        """In words, without the reason, such as "raise LR 2.1× [1.2, 6]".

        A factor beyond 3 is known too roughly to be taken in one step.
        """
        low, high = self.interval
        if self.direction == "unknown":
            return f"{name}: cannot tell"
        if self.direction == "keep":
            return f"keep {name} [{_number(low)}, {_number(high)}]"
        if self.direction == "lower":
            low, high = (math.inf if end == 0.0 else 1.0 / end for end in (high, low))
        times = self.factor if self.direction == "raise" else 1.0 / self.factor
        if times > STEP or math.isinf(high):
            return f"{self.direction} {name} ≥ {_number(min(STEP, times))}×, look again"
        return f"{self.direction} {name} {_number(times)}× [{_number(low)}, {_number(high)}]"


@dataclass(frozen=True)
class Advice:
    """What the readings of a run mean for its learning rate and batch size. `str` of it is one line.

    Attributes:
        step: of the newest reading.
        lr: for the learning rate, the peak of a schedule.
        batch: for the batch size, at equal samples.

    Examples:
        >>> from grgauge import Advice, Reading, verdict
        >>> from grgauge.policy import advise
        >>> reading = Reading(
        ...     step=50, batch_size=64, gr_t=1.2, gr_t_error=0.1, finite_time_factor=0.99, gr_s=0.3, gr_s_error=0.02,
        ...     noise_scale=25.0, noise_scale_error=2.0, grad_norm=0.7, nonfinite=0, ready=True,
        ... )
        >>> advice = advise([reading])
        >>> advice.lr.direction
        'raise'
        >>> Advice.from_dict(advice.to_dict()) == advice
        True
        >>> str(advice) == verdict(reading)
        True
    """

    step: int
    lr: Correction
    batch: Correction

    def __str__(self) -> str:
        if self.lr == self.batch:  # for one reason neither can be told
            return f"{self.short} ({self.lr.why})"
        return f"{self.lr.describe('LR')} ({self.lr.why}); {self.batch.describe('batch')} ({self.batch.why})"

    @property
    def short(self) -> str:
        """The line without the reasons."""
        if self.lr == self.batch:
            return self.lr.describe("LR and batch")
        return f"{self.lr.describe('LR')}; {self.batch.describe('batch')}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; an interval without an upper end has None there."""
        plain = asdict(self)
        for name in ("lr", "batch"):
            low, high = plain[name]["interval"]
            plain[name]["interval"] = [low, None if math.isinf(high) else high]
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Advice:
        """The advice that `to_dict` made plain, also after a round trip through JSON.

        Args:
            values: all fields.

        Raises:
            ValueError: a field is missing, or unknown.
        """
        parts_of = {field.name for field in fields(Correction)}
        if set(values) != {"step", "lr", "batch"} or any(set(values[name]) != parts_of for name in ("lr", "batch")):
            raise ValueError(f"values is {dict(values)}; it must be what Advice.to_dict made")
        parts = {}
        for name in ("lr", "batch"):
            low, high = values[name]["interval"]
            parts[name] = Correction(**{**values[name], "interval": (low, math.inf if high is None else high)})
        return cls(step=values["step"], **parts)


def advise(readings: Sequence[Reading], target: Target | None = None) -> Advice:
    """What readings of one run from its start, oldest first, at a constant learning rate, mean for it and the batch.

    Where learning rates and losses are to be heard, use `Gauge.advice`.

    Raises ValueError for no readings.
    """
    if not readings:
        raise ValueError("readings is empty; it must have at least one reading")
    watch = Watch()
    for reading in readings:
        watch.observe(reading)
    advice = advice_of(watch, target)
    assert advice is not None
    return advice


def verdict(reading: Reading, target: Target | None = None) -> str:
    """What a single reading says about learning rate and batch size: the line of `Advice`.

    A reading at step 40 to 60 says most; `Gauge.advice` rests on all readings there, and knows the schedule.
    """
    return str(advise([reading], target))


def advice_of(watch: Watch, target: Target | None = None, known: Calibration | None = None) -> Advice | None:
    """What the readings that a watch has picked mean; None before the first reading."""
    if watch.newest is None:
        return None
    known, target = known or calibration(), target or Target()
    return Advice(watch.newest.step, _lr(watch, target, known), _batch(watch, target, known))


def _lr(watch: Watch, target: Target, known: Calibration) -> Correction:
    assert watch.newest is not None
    if watch.diverged is not None:
        return _correction(
            known.diverged, f"diverged: the loss is {watch.diverged:.3g}; begin again from fresh weights"
        )
    if watch.warming:
        return _unknown("the learning rate is warming up")
    summary, late = watch.summary(), watch.late()
    if summary is None:
        return _unknown(_nothing(watch))
    found = _lr_from(watch, summary, target, known)
    if found.direction == "unknown" and late is not None and late.last > summary.last:
        return _lr_from(watch, late, target, known)
    return found


def _lr_from(watch: Watch, summary: Summary, target: Target, known: Calibration) -> Correction:
    if summary.gr_t is None:
        return _unknown(_missing(watch, "GR_T"))
    x = summary.signal - math.log10(target.gr_t / Target.gr_t)
    share = 1.0 if summary.lr is None or watch.peak is None else summary.lr / watch.peak
    curve, blind = known.lr[summary.span], summary.gr_s is not None and summary.gr_s > BLIND
    interval = curve.read(x, summary.signal_error)
    if not blind and (summary.gr_t_error or 0.0) <= summary.gr_t:
        likely = curve.read(x, summary.signal_error, LIKELY)
        if math.isfinite(likely.low if likely.middle > 0.0 else likely.high):
            interval = likely
    error = f" ± {summary.gr_t_error:.2g}" if summary.gr_t_error else ""
    found = _correction(interval.shifted(math.log10(share)), f"GR_T {summary.gr_t:.3g}{error} {_when(summary)}")
    if found.direction == "unknown" and blind:
        why = f"{found.why}, and GR_S {summary.gr_s:.2f} says that noise hides the rate: enlarge the batch first"
        return replace(found, why=why)
    return found


def _batch(watch: Watch, target: Target, known: Calibration) -> Correction:
    if watch.diverged is not None:
        return _unknown("diverged")
    summary = watch.summary()
    if summary is None:
        return _unknown(_nothing(watch))
    if summary.gr_s is None:
        return _unknown(_missing(watch, "GR_S"))
    error = summary.gr_s_error
    # GR_S = (1 + mu) / (B + mu): another target asks for another multiple of the noise scale
    ratio = (1.0 / target.gr_s - 1.0) / (1.0 / Target.gr_s - 1.0)
    found = known.batch[summary.span].read(summary.gr_s, error).shifted(math.log10(ratio))
    # Families contradict each other about the batch: a direction takes the whole interval.
    interval = replace(found, least=found.low, most=found.high)
    within = f" ± {error:.2f}" if error else ""
    return _correction(interval, f"GR_S {summary.gr_s:.2f}{within} {_when(summary)}")


def _correction(found: Interval, why: str) -> Correction:
    """A direction where enough of such runs need it, "keep" where all of the interval is near the best."""
    interval = (10.0**found.low, 10.0**found.high)
    factor = 10.0**found.middle
    if found.least > 0.0:
        return Correction("raise", min(factor, STEP) if math.isinf(found.high) else factor, interval, why)
    if found.most < 0.0:
        return Correction("lower", max(factor, 1.0 / STEP) if math.isinf(found.low) else factor, interval, why)
    if found.low >= -NEAR and found.high <= NEAR:
        return Correction("keep", 1.0, interval, why)
    if interval == (0.0, math.inf):
        return _unknown(f"{why}, which families read far below the best as well as far above it")
    low, high = map(_number, interval)
    return Correction("unknown", 1.0, interval, f"{why}: the best is anywhere from {low}× to {high}× it")


def _unknown(why: str) -> Correction:
    return Correction("unknown", 1.0, (0.0, math.inf), why)


def _nothing(watch: Watch) -> str:
    assert watch.newest is not None
    age = watch.newest.step - watch.start
    if age <= WINDOW[0]:
        return f"too early: {age} steps at this configuration; look at step {watch.start + WINDOW[1]}"
    return f"past the window: no reading within {SPANS['late'][1]} steps of the start of this configuration"


def _missing(watch: Watch, quantity: str) -> str:
    assert watch.newest is not None
    return next((note for note in watch.newest.notes if note.startswith(quantity)), f"{quantity} not available")


def _when(summary: Summary) -> str:
    return (
        f"at step {summary.first}" if summary.first == summary.last else f"at steps {summary.first} to {summary.last}"
    )


def _number(value: float) -> str:
    return "∞" if math.isinf(value) else f"{value:.2g}" if value < 100.0 else f"{value:.0f}"
