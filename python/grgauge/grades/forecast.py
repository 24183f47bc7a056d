"""What freezing forfeits, forecast from readings of progress: the rule behind `metric="signal"`. Plain numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

LEAST, MOST = 20, 500
"""Readings that a forecast is made from: the last half of all, but no fewer and no more than these."""

SHARE = 0.5
"""Of the budget, for freezing matrices while others train on."""

UPPER = NormalDist().inv_cdf(0.95)
"""Standard errors between a mean and the end of its one-sided 95 % interval."""

END = NormalDist().inv_cdf(0.99)
"""The same for all parameters at once: an end is asked for in every reading, and is final. At 95 % one of twelve runs
in which every step helps, read every third step, ended at 127 of 300."""


class Forecast:
    """By how much each matrix makes the loss fall (see `progress`) over a run, and what follows for the rest of it.

    Progress slows down. Taken to fall off as 1 / step, it is the same in every doubling of the steps:

        left       (b - a) ln(T / b) / ln(b / a)    of readings from step a (at least b / 2) to b, the run's end being T
        forfeit    (mean fall + 1.64 standard errors) * left
        budget     epsilon * the most that all falls ever added up to

    Everything rests if the forfeit of all parameters' sum, with 2.33 standard errors, is within the budget. Short of
    that, the largest set of matrices may be frozen, least forfeit first, that together with what is frozen forfeits no
    more than half of it: the other half is left for the end, which saves more. Here a matrix whose mean is negative
    counts as zero: of many, the one that reads lowest does so by chance.

    The standard error is that of the sum over the set, so correlations between matrices count.

    Args:
        matrices: How many there are. A reading has one more column, for all other parameters.
        total_steps: Optimizer steps of the run.
        every: Steps between readings.
        warmup: Readings up to this step count as gain only.
    """

    def __init__(self, matrices: int, total_steps: int, every: int, warmup: int) -> None:
        self._matrices, self._total, self._every, self._warmup = matrices, total_steps, every, warmup
        self.gained = 0.0
        self.gain = 0.0
        """The most that `gained` ever was, in units of the loss."""
        self.forfeited = 0.0
        """What all that is frozen forfeits at most."""
        self._falls: list[Array] = []

    def add(self, step: int, falls: Array) -> None:
        """Take in a reading: NaN for matrices that are frozen or have no gradient."""
        self.gained += self._every * float(np.nansum(falls))
        self.gain = max(self.gain, self.gained)
        if step > self._warmup:
            self._falls.append(falls.copy())
            del self._falls[: -2 * MOST]

    def freeze(self, step: int, matrices: Sequence[int]) -> None:
        """Count as forfeited what a set of matrices would still gain."""
        self.forfeited += max(0.0, float(self._upper(step, matrices, least=0.0)[-1]))

    def forfeits(self, step: int) -> Array:
        """What each column alone would forfeit at most if it were frozen now; infinite where too little is known."""
        mean, error, count = self._columns()
        return np.where(count < LEAST, math.inf, (mean + UPPER * error) * self._left(step))

    def expected(self, step: int) -> list[tuple[float, float]]:
        """Of each column what it would still gain, and the standard error of that; NaN where too little is known."""
        mean, error, count = self._columns()
        rows = np.stack([mean, error], axis=1) * self._left(step)
        return [(gain, error) for gain, error in np.where(count[:, None] < 2, math.nan, rows).tolist()]

    def rests(self, step: int, epsilon: float, live: Sequence[int]) -> bool:
        """True if ending the training here is within the budget; `live` are the matrices that still train."""
        columns = [*live, self._matrices]
        return bool(self._upper(step, columns, errors=END)[-1] + self.forfeited <= epsilon * self.gain)

    def freezable(self, step: int, epsilon: float, live: Sequence[int]) -> list[int]:
        """Those of the matrices that still train that may be frozen now."""
        if self.rests(step, epsilon, live):
            return list(live)
        alone = self.forfeits(step)
        order = sorted((i for i in live if math.isfinite(alone[i])), key=lambda i: float(alone[i]))
        within = self._upper(step, order, least=0.0) + self.forfeited <= SHARE * epsilon * self.gain
        # A set may forfeit less than one of its subsets, so it is the first excess that ends it.
        return order[: int(np.argmin(np.append(within, False)))]

    def _count(self) -> int:
        return min(MOST, max(LEAST, len(self._falls) // 2))

    def _left(self, step: int) -> float:
        """Steps that at the mean pace of the window gain what is to be expected of the rest."""
        a = step - min(step / 2, self._every * self._count())
        return (step - a) * math.log(max(1.0, self._total / step)) / math.log(step / a)

    def _window(self) -> Array:
        return np.array(self._falls[-self._count() :]).reshape(-1, self._matrices + 1)

    def _columns(self) -> tuple[Array, Array, Array]:
        """(mean, its standard error, number of readings) of each column in the window."""
        falls = self._window()
        known = np.isfinite(falls)
        count = known.sum(axis=0, dtype=np.float64)
        mean = np.where(known, falls, 0.0).sum(axis=0) / np.maximum(count, 1.0)
        square = np.where(known, falls - mean, 0.0) ** 2
        return mean, np.sqrt(square.sum(axis=0) / np.maximum((count - 1.0) * count, 1.0)), count

    def _upper(self, step: int, order: Sequence[int], least: float = -math.inf, errors: float = UPPER) -> Array:
        """What each leading part of `order` would forfeit at most; no mean below `least` counts."""
        falls = self._window()[:, list(order)]
        falls = falls[np.isfinite(falls).all(axis=1)]
        if len(falls) < LEAST or not len(order):
            return np.full(len(order), math.inf)
        error = falls.cumsum(axis=1).std(axis=0, ddof=1) / math.sqrt(len(falls))
        upper: Array = (falls.mean(axis=0).clip(least).cumsum() + errors * error) * self._left(step)
        return upper

    def state_dict(self) -> dict[str, Any]:
        return {
            "gained": self.gained,
            "gain": self.gain,
            "forfeited": self.forfeited,
            "falls": [row.tolist() for row in self._falls],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.gained, self.gain, self.forfeited = state["gained"], state["gain"], state["forfeited"]
        self._falls = [np.array(row) for row in state["falls"]]
