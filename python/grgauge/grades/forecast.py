"""What freezing forfeits, forecast from readings of progress: the rule behind `metric="signal"`. Plain numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

LEAST, MOST = 10, 500
"""Readings that a forecast is made from: the last half of all, but no fewer and no more than these."""

UPPER = NormalDist().inv_cdf(0.95)
"""Standard errors between a mean and the end of its one-sided 95 % interval."""


class Forecast:
    """Drift and unrest (see `progress`) over a run, and what follows for the rest of it.

    What a set of matrices would still gain, in units of the loss: its drift, at the present pace for all the steps that
    are left, and its unrest. The upper end of that is what freezing the set forfeits at most. The run's gain is what
    all drifts added up to so far, and what everything would still gain, not counting standard errors.

        forfeit(F) = (sum of max(0, mean drift) + 1.64 standard errors of F's summed drift) * steps left + unrest
        freeze     the largest set, least forfeit first, that with what is frozen forfeits at most epsilon * gain

    The standard error is that of the sum over the set, so correlations between matrices count. Progress slows down as a
    run goes on and the learning rate falls; the present pace overstates it.

    Args:
        matrices: How many there are. A reading has one more column, for all other parameters.
        total_steps: Optimizer steps of the run.
        every: Steps between readings.
        warmup: Readings up to this step count as gain only.
    """

    def __init__(self, matrices: int, total_steps: int, every: int, warmup: int) -> None:
        self._matrices, self._total, self._every, self._warmup = matrices, total_steps, every, warmup
        self.gained = 0.0
        self.forfeited = np.zeros(matrices)
        self._drift: list[Array] = []
        self._unrest: list[Array] = []
        self._probes: list[list[float]] = [[] for _ in range(matrices)]

    def add(self, step: int, drift: Array, unrest: Array, live: npt.NDArray[np.bool_]) -> None:
        """Take in a reading. Columns that are not `live` belong to frozen matrices: what they read is kept apart."""
        self.gained += self._every * float(np.nansum(drift[live]))
        for i in np.flatnonzero(~live & np.isfinite(drift)):
            self._probes[i].append(float(drift[i]))
        if step > self._warmup:
            self._drift.append(np.where(live, drift, np.nan))
            self._unrest.append(np.where(live, unrest, np.nan))
            del self._drift[: -2 * MOST], self._unrest[: -2 * MOST]

    def freeze(self, i: int, forfeit: float) -> None:
        self.forfeited[i], self._probes[i] = forfeit, []

    def thaw(self, i: int) -> None:
        """Begin anew with a matrix: only readings from now on speak for it."""
        self.forfeited[i] = 0.0
        for array in self._drift + self._unrest:
            array[i] = np.nan

    def forfeits(self, step: int) -> Array:
        """What each column alone would forfeit at most if it were frozen now; infinite where too little is known."""
        return np.array([self._upper(step, [i])[0] for i in range(self._matrices + 1)])

    def expected(self, step: int) -> list[tuple[float, float, float]]:
        """Of each column its drift for the steps that are left, the drift's standard error, and its unrest."""
        drift, unrest = self._window()
        rows = []
        for i in range(self._matrices + 1):
            own = drift[np.isfinite(drift[:, i]), i] if len(drift) else np.empty(0)
            error = own.std(ddof=1) / math.sqrt(len(own)) if len(own) > 1 else math.nan
            mean = own.mean() if len(own) else math.nan
            left = self._left(step)
            rows.append((float(mean * left), float(error * left), float(_means(unrest)[i]) if len(own) else math.nan))
        return rows

    def gain(self, step: int) -> float:
        """What the whole run gains, in units of the loss."""
        drift, unrest = self._window()
        if not len(drift):
            return self.gained
        still = np.nan_to_num(_means(drift)).clip(0.0) * self._left(step) + np.nan_to_num(_means(unrest))
        return self.gained + float(still.sum())

    def freezable(self, step: int, epsilon: float) -> list[int]:
        """The matrices that may be frozen now."""
        alone = self.forfeits(step)[:-1]
        order = [int(i) for i in np.argsort(alone) if math.isfinite(alone[i])]
        within = self._upper(step, order) + self.forfeited.sum() <= epsilon * self.gain(step)
        # A set may forfeit less than one of its subsets, so it is the first excess that ends it.
        return order[: int(np.argmin(np.append(within, False)))]

    def wrong(self, step: int, frozen: Sequence[int | None]) -> list[int]:
        """Frozen matrices that by the lower end of what they read since would gain more than was forfeited."""
        found = []
        for i, at in enumerate(frozen):
            probes = np.array(self._probes[i])
            if at is None or len(probes) < 3:
                continue
            lower = probes.mean() - UPPER * probes.std(ddof=1) / math.sqrt(len(probes))
            if lower * max(0, self._total - at) > self.forfeited[i]:
                found.append(i)
        return found

    def _left(self, step: int) -> int:
        return max(0, self._total - step)

    def _window(self) -> tuple[Array, Array]:
        count = min(MOST, max(LEAST, len(self._drift) // 2))
        return np.array(self._drift[-count:]), np.array(self._unrest[-count:])

    def _upper(self, step: int, order: Sequence[int]) -> Array:
        """What each leading part of `order` would forfeit at most."""
        drift, unrest = self._window()
        if not len(drift) or not len(order):
            return np.full(len(order), math.inf)
        drift, unrest = drift[:, order], unrest[:, order]
        known = np.isfinite(drift).all(axis=1) & np.isfinite(unrest).all(axis=1)
        if known.sum() < LEAST:
            return np.full(len(order), math.inf)
        drift, unrest = drift[known], unrest[known]
        error = drift.cumsum(axis=1).std(axis=0, ddof=1) / math.sqrt(len(drift))
        means = drift.mean(axis=0).clip(0.0).cumsum()
        upper: Array = (means + UPPER * error) * self._left(step) + unrest.mean(axis=0).cumsum()
        return upper

    def state_dict(self) -> dict[str, Any]:
        return {
            "gained": self.gained,
            "forfeited": self.forfeited.tolist(),
            "drift": [row.tolist() for row in self._drift],
            "unrest": [row.tolist() for row in self._unrest],
            "probes": [list(probes) for probes in self._probes],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.gained, self.forfeited = state["gained"], np.array(state["forfeited"])
        self._drift, self._unrest = ([np.array(row) for row in state[name]] for name in ("drift", "unrest"))
        self._probes = [list(probes) for probes in state["probes"]]


def _means(rows: Array) -> Array:
    """Means of the finite values of each column; NaN where there is none."""
    finite = np.isfinite(rows)
    counts = finite.sum(axis=0)
    sums = np.where(finite, rows, 0.0).sum(axis=0)
    return np.divide(sums, counts, out=np.full(rows.shape[1], np.nan), where=counts > 0)
