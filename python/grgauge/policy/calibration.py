"""How far from the best learning rate and batch a reading is, as measured: quantiles fitted on recorded trainings.

The numbers are in calibration.json, made by `python -m judge.calibrate` in bench/, which says on what and how well they
hold on a family of models that they were not fitted on.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LEVELS = (0.05, 0.25, 0.35, 0.5, 0.65, 0.75, 0.95)
"""Of the quantiles; the outer two are a 90 % interval."""

Quantiles = tuple[float, ...]
"""Of log10 of the factor that leads to the best value, at `LEVELS`."""


@dataclass(frozen=True)
class Curve:
    """Quantiles over one gauge, within a band of the other.

    band       of the other gauge, (low, high]
    at         knots, increasing
    quantiles  at each knot
    error      the standard error that is usual at each knot
    """

    band: tuple[float, float]
    at: Sequence[float]
    quantiles: Sequence[Quantiles]
    error: Sequence[float]

    def read(self, x: float) -> Quantiles:
        return tuple(float(np.interp(x, self.at, column)) for column in zip(*self.quantiles, strict=True))

    def usual_error(self, x: float) -> float:
        return float(np.interp(x, self.at, self.error))


@dataclass(frozen=True)
class Calibration:
    """All curves.

    lr        of each span of steps the curves over log10 GR_T, the first for any GR_S, the others for bands of it
    batch     of each span the curves over GR_S, the first for any GR_T, the others for bands of it
    diverged  quantiles for the learning rate of a run whose loss has exploded
    provenance  where the numbers come from, and how well they hold
    """

    lr: Mapping[str, Sequence[Curve]]
    batch: Mapping[str, Sequence[Curve]]
    diverged: Quantiles
    provenance: Mapping[str, Any]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Calibration:
        def curves(spans: Mapping[str, Any]) -> dict[str, list[Curve]]:
            return {
                span: [
                    Curve(tuple(c["band"]), c["at"], [tuple(row) for row in c["quantiles"]], c["error"]) for c in own
                ]
                for span, own in spans.items()
            }

        return cls(curves(values["lr"]), curves(values["batch"]), tuple(values["diverged"]), values["provenance"])


def spread(curves: Sequence[Curve], x: float, error: float, other: tuple[float, float] | None) -> Quantiles:
    """Quantiles at `x`, wider where `x` or the other gauge is less certain than usual.

    error  standard error of `x`; what is beyond the usual one at that place counts
    other  the ends of an interval of the other gauge, None where it is not known
    """
    chosen = curves[:1] if other is None else [c for c in curves[1:] if c.band[0] < other[1] and other[0] <= c.band[1]]
    read: list[Quantiles] = []
    for curve in chosen or curves[:1]:
        excess = max(error - curve.usual_error(x), 0.0)
        read += [curve.read(x + shift) for shift in ((0.0, -excess, excess) if excess else (0.0,))]
    widest = {True: min, False: max}
    return tuple(
        float(np.mean(column)) if level == 0.5 else widest[level < 0.5](column)
        for level, column in zip(LEVELS, zip(*read, strict=True), strict=True)
    )


@functools.cache
def calibration() -> Calibration:
    """The one that comes with the package."""
    text = importlib.resources.files(__package__).joinpath("calibration.json").read_text(encoding="utf-8")
    return Calibration.from_dict(json.loads(text))
