"""Which readings of a run advice rests on. Plain numbers, no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from .. import theory
from ..reading import Reading

WINDOW = (40, 60)
"""Steps at a constant learning rate and batch whose readings count most: GR_T has settled, and does not yet climb."""

SPANS = {"early": (15, 40), "window": (40, 75), "late": (75, 400)}
"""Steps of readings, (first, last]; each span has a calibration of its own."""

RISE = 1.01
"""A learning rate that grows by more between two readings is warming up."""

DROP = 1.5
"""One that falls by more between two readings was changed by hand, or by a schedule of steps."""

LEAST, DECADES = 1e-3, 10.0
"""No GR_T is below one, and no error says less than the other: beyond, powers of ten would overflow."""

EXPLODED = 1.5
"""Times the first loss: beyond what noise and a cold optimizer do."""


@dataclass(frozen=True)
class Summary:
    """The readings that advice rests on, as one.

    span   of `SPANS`
    first, last   their steps
    gr_t, gr_t_error       in units of the finite-time factor, and its standard error; None without
    signal, signal_error   see `signal_of`; nan without GR_T
    gr_s, gr_s_error       of the newest that has one
    lr     that they were read at, None if unknown
    """

    span: str
    first: int
    last: int
    gr_t: float | None
    gr_t_error: float
    signal: float
    signal_error: float
    gr_s: float | None
    gr_s_error: float
    lr: float | None


def signal_of(reading: Reading, count: float = 1.0) -> tuple[float, float]:
    """log10 of the GR_T that the true gradients would have without noise, and its standard error.

    Noise pulls GR_T towards 19, so that a learning rate that is far too low reads 1 only where there is little. GR_S
    says how much there is: of the squared norm of the gradient it has the share n = (B GR_S - 1) / (B - 1). Of 1 / GR_T
    it gives n / 19, and the rest is the true gradients' (`theory.steady_signal`). From 19 on GR_T is taken as it is.
    Where the share is near 1 the rest is a small difference, and the standard error says so; without GR_S the share is
    anything from 0 to 1.

    count  independent readings that GR_T is the median of, in effect
    """
    assert reading.gr_t is not None
    gr_t = max(reading.gr_t, LEAST)
    x, error = math.log10(gr_t), (reading.gr_t_error or 0.0) / gr_t / math.log(10.0) / math.sqrt(count)
    error = min(max(error, 0.0), DECADES)
    white = math.log10(theory.uncorrelated() * reading.finite_time_factor)

    def signal(x: float, noise: float) -> float:
        if x >= white:
            return x - white + math.log10(theory.uncorrelated())
        rest = (10.0**-x - noise * 10.0**-white) / (1.0 - noise) if noise < 1.0 else 1.0
        return max(-math.log10(rest), 0.0)

    size = reading.batch_size
    if reading.gr_s is None or size <= 1:
        share, unsure = 0.5, 0.5
    else:
        share = (size * reading.gr_s - 1.0) / (size - 1.0)
        unsure = size * (reading.gr_s_error or 0.0) / (size - 1.0)
    low, middle, high = (min(max(share + by, 0.0), 1.0) for by in (-unsure, 0.0, unsure))
    by_error = signal(x + error, middle) - signal(x - error, middle)
    by_noise = signal(x, low) - signal(x, high)
    return signal(x, middle), math.hypot(by_error, by_noise) / 2.0


class Watch:
    """Picks the readings that advice rests on: those around step 50 after learning rate and batch last changed.

    A schedule that decays is no change; the learning rate is then judged by its peak.
    """

    _plain = ("start", "warming", "peak", "first_loss", "diverged", "_loss", "_lr")

    def __init__(self) -> None:
        self.restart()

    def restart(self, step: int = 0) -> None:
        """A new run begins, or the gauge starts cold, after that step."""
        self.newest: Reading | None = None
        self.start = step
        self.warming = False
        self.peak: float | None = None
        self.first_loss: float | None = None
        self.diverged: float | None = None
        self._kept: list[tuple[Reading, float | None]] = []
        self._loss: float | None = None
        self._lr: float | None = None

    def observe(self, reading: Reading, lr: float | None = None) -> None:
        """Take in a newer reading, and the learning rate that it was read at if that is known."""
        before, self.newest = self.newest, reading
        risen = lr is not None and self._lr is not None and lr > RISE * self._lr
        fallen = lr is not None and self._lr is not None and DROP * lr < self._lr
        resized = before is not None and before.batch_size != reading.batch_size
        self.warming = risen
        if risen or fallen or resized:
            self.start, self._kept, self.peak = reading.step, [], None
        if lr is not None:
            self._lr, self.peak = lr, max(lr, self.peak or 0.0)
        age = reading.step - self.start
        if SPANS["early"][0] < age <= SPANS["window"][1]:
            self._kept.append((replace(reading), lr))  # without the per-segment table

    def lost(self, loss: float) -> None:
        """Take in a training loss. Two in a row far above the first one are an explosion, a single one may be noise."""
        if self.first_loss is None and math.isfinite(loss):
            self.first_loss = loss
        first = loss if self.first_loss is None else self.first_loss
        high = first + (EXPLODED - 1.0) * abs(first)
        exploded = self._loss is not None and min(self._loss, loss) > high
        self.diverged = loss if exploded or not math.isfinite(loss) else None
        self._loss = loss if math.isfinite(loss) else None

    def summary(self) -> Summary | None:
        """None where there is nothing to rest on yet, or nothing any more."""
        if self.newest is None:
            return None
        aged = [(reading.step - self.start, reading, lr) for reading, lr in self._kept]
        low, high = WINDOW
        inside = [(reading, lr) for age, reading, lr in aged if low <= age <= high]
        past = [(reading, lr) for age, reading, lr in aged if age > high]
        chosen = inside or past[:1] or self._kept[-3:]
        if not chosen:
            return self.late()
        middle = median(reading.step for reading, _ in chosen) - self.start
        span = next(name for name, (_, last) in SPANS.items() if middle <= last)
        return _summary(span, chosen)

    def late(self) -> Summary | None:
        """The newest reading by itself, if it is past the window and not too late."""
        first, last = SPANS["late"]
        if self.newest is None or not first < self.newest.step - self.start <= last:
            return None
        return _summary("late", [(self.newest, self._lr)])

    def state_dict(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in self._plain}
        newest = None if self.newest is None else self.newest.to_dict()
        return {**plain, "newest": newest, "kept": [(reading.to_dict(), lr) for reading, lr in self._kept]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        plain = {name: state[name] for name in self._plain}
        newest = None if state["newest"] is None else Reading.from_dict(state["newest"])
        kept = [(Reading.from_dict(values), lr) for values, lr in state["kept"]]
        vars(self).update(plain, newest=newest, _kept=kept)


def _summary(span: str, chosen: Sequence[tuple[Reading, float | None]]) -> Summary:
    temporal = [r for r, _ in chosen if r.gr_t is not None and r.gr_t > 0.0 and r.finite_time_factor > 0.0]
    spatial = [(r.gr_s, r.gr_s_error or 0.0) for r, _ in chosen if r.gr_s is not None]
    gr_s, gr_s_error = spatial[-1] if spatial else (None, 0.0)
    # readings that many steps apart are independent (`Temporal.read`); GR_S is smoothed already
    count = 1.0 + (chosen[-1][0].step - chosen[0][0].step) / theory.uncorrelated()
    signal = [signal_of(r, count) for r in temporal] or [(math.nan, math.nan)]
    lrs = [lr for _, lr in chosen if lr is not None]
    return Summary(
        span=span,
        first=chosen[0][0].step,
        last=chosen[-1][0].step,
        gr_t=median((r.gr_t or 0.0) / r.finite_time_factor for r in temporal) if temporal else None,
        gr_t_error=median((r.gr_t_error or 0.0) / r.finite_time_factor for r in temporal) if temporal else 0.0,
        signal=median(value for value, _ in signal),
        signal_error=median(error for _, error in signal),
        gr_s=gr_s,
        gr_s_error=gr_s_error,
        lr=median(lrs) if lrs else None,
    )
