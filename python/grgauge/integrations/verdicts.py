"""What a callback says of a run once a window, and by how much it may change the learning rate. Plain numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from .._validation import require, require_count
from ..policy import Target, verdict
from ..policy.target import BLIND
from ..reading import Reading

LARGEST_FACTOR = 4.0
"""What a learning rate may be multiplied by, or divided by, at once."""


class Verdicts:
    """Readings in; at the end of each window a line, and a factor for the learning rate.

    window  steps between two verdicts
    act     "advise": factors are 1. "lr": the verdict's own, at the ends of windows in the first tenth of the training
            (of the first window at least), unless the schedule is warming up or GR_S says that GR_T is blind
    target  what verdicts are about

    Where GR_S is not read every time, the newest one counts. Raises ValueError for a value out of range.
    """

    def __init__(self, window: int, act: Literal["advise", "lr"], every: int, target: Target | None) -> None:
        require_count("window", window, every)
        require(act in ("advise", "lr"), "act", act, '"advise" or "lr"')
        self.window, self.act, self.target = window, act, target or Target()
        self._spatial: Reading | None = None
        self._lr = 0.0

    def restart(self, lr: float) -> None:
        """A training begins."""
        self._spatial, self._lr = None, lr

    def observe(self, reading: Reading | None, lr: float, total_steps: float) -> tuple[str, float] | None:
        """What there is to say after a step: at the end of a window its line and factor.

        reading      if it is a new one
        lr           what the next step is taken with
        total_steps  of the training
        """
        warming, self._lr = lr > self._lr, lr
        if reading is None:
            return None
        if reading.gr_s is not None:
            self._spatial = reading
        if reading.step % self.window:
            return None
        reading = self._with_gr_s(reading)
        line = f"step {reading.step}: {verdict(reading, self.target)}"
        if warming:
            return f"{line}, while the schedule is warming up", 1.0
        factor = self.target.lr_factor(reading) or 1.0
        early = reading.step <= max(self.window, total_steps / 10)
        blind = reading.gr_s is not None and reading.gr_s > BLIND
        if self.act == "advise" or factor == 1.0 or blind or not early:
            return line, 1.0
        factor = min(max(factor, 1.0 / LARGEST_FACTOR), LARGEST_FACTOR)
        return f"{line}; learning rate multiplied by {factor:.2f}", factor

    def changed(self, factor: float) -> None:
        """The learning rate has been multiplied, which is no warm-up."""
        self._lr *= factor

    def _with_gr_s(self, reading: Reading) -> Reading:
        last = self._spatial
        if last is None or last is reading:
            return reading
        return replace(
            reading,
            gr_s=last.gr_s,
            gr_s_error=last.gr_s_error,
            noise_scale=last.noise_scale,
            noise_scale_error=last.noise_scale_error,
        )


def values(reading: Reading) -> dict[str, float]:
    """What a logger is given of a reading: what exists."""
    known = {"gr_t": reading.gr_t, "gr_s": reading.gr_s, "noise_scale": reading.noise_scale}
    return {name: value for name, value in known.items() if value is not None}
