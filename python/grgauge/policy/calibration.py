"""How far from the best learning rate and batch a reading is, as measured: intervals fitted on recorded trainings.

The numbers are in calibration.json, made by `python -m judge.calibrate` in bench/, which says on what and how well they
hold on a family of models that they were not fitted on.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

LEVELS = (0.05, 0.2, 0.5, 0.8, 0.95)
"""Of the best value: the shares below the numbers of an `Interval`."""

FAMILIES = tuple(NormalDist().inv_cdf((i + 0.5) / 21) for i in range(21))
"""Families of models that stand for all, in standard deviations between families."""

PLACES = 61
"""Distances that are tried."""

_erf = np.vectorize(math.erf, otypes=[float])


@dataclass(frozen=True)
class Interval:
    """Of log10 of the factor that leads to the best value: 90 % from `low` to `high`, 80 %, or the share that was asked
    for, above `least` and below `most`. An end that nobody knows is infinite."""

    low: float
    least: float
    middle: float
    most: float
    high: float

    def shifted(self, by: float) -> Interval:
        return Interval(*(value + by for value in (self.low, self.least, self.middle, self.most, self.high)))


@dataclass(frozen=True)
class Curve:
    """What a gauge reads over the distance to the best.

    away     log10 of best / value, increasing
    gauge    what it reads there, falling or rising throughout
    scatter  of runs there beyond the standard errors of their readings, as a standard deviation
    between  standard deviation, in `away`, by which the curve of a family not seen is shifted
    """

    away: Sequence[float]
    gauge: Sequence[float]
    scatter: Sequence[float]
    between: float

    def read(self, value: float, error: float, share: float = LEVELS[3]) -> Interval:
        """All distances at which a family may read `value`, with that standard error: those at which neither a lower
        reading nor a higher one is rarer than one in twenty. `share` of them lie above `least`, and below `most`.

        No distance explains a value beyond all of the curve, and none may be ruled out by it alone: it counts as one
        that is a standard deviation beyond.
        """
        away = np.linspace(self.away[0], self.away[-1], PLACES)
        at = away[:, None] + np.array(FAMILIES) * self.between
        deviation = np.hypot(np.interp(at, self.away, self.scatter), error)
        expected = np.interp(at, self.away, self.gauge)
        value = np.clip(value, (expected - deviation).min(), (expected + deviation).max())
        scores = (value - expected) / deviation
        if self.gauge[-1] > self.gauge[0]:
            scores = -scores
        lower = 0.5 + 0.5 * _erf(scores / math.sqrt(2.0)).mean(axis=1)  # rises with the distance
        low, least = np.interp((LEVELS[0], 1.0 - share), lower, away, left=-math.inf)
        most, high = np.interp((share, LEVELS[4]), lower, away, right=math.inf)
        return Interval(*map(float, (low, least, np.interp(LEVELS[2], lower, away), most, high)))


@dataclass(frozen=True)
class Calibration:
    """What readings say of the distance to the best.

    lr        of each span of steps the curve of `Summary.signal`
    batch     of each span the curve of GR_S
    diverged  the learning rate of a run whose loss has exploded
    provenance  where the numbers come from, and how well they hold
    """

    lr: Mapping[str, Curve]
    batch: Mapping[str, Curve]
    diverged: Interval
    provenance: Mapping[str, Any]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Calibration:
        lr, batch = ({span: Curve(**own) for span, own in values[what].items()} for what in ("lr", "batch"))
        return cls(lr, batch, Interval(**values["diverged"]), values["provenance"])


@functools.cache
def calibration() -> Calibration:
    """The one that comes with the package."""
    text = importlib.resources.files(__package__).joinpath("calibration.json").read_text(encoding="utf-8")
    return Calibration.from_dict(json.loads(text))
