"""What rows of the table and of costs come to: readings near step 50, costs in units of the best static run's."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pandas as pd

from grgauge import theory

from .protocol import FEWEST, Costs, medians
from .table import SEEDS

HEALTH = {"gr_t": (18.0, 22.0), "gr_s": (0.5, 0.65)}
"""The published zone."""
STEP = 50
"""Gauges are looked at near this step: the published target of GR_T belongs there."""


def gauges(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each configuration the readings of the check nearest to step 50, and the metric over the whole run: medians
    over seeds. A run whose readings are not ready by then has none."""
    rows = rows[rows["seed"].isin(SEEDS)]
    keys = ["lr", "batch", "seed"]
    read = rows[rows["ready"].eq(True)].assign(away=lambda r: (np.log(r["read_at"].astype(float) / STEP)).abs())
    near = read.sort_values("away").groupby(keys).first()[["gr_t", "gr_s", "noise_scale", "read_at"]]
    curve = rows.groupby(keys).agg(
        mean=("metric", "mean"), final=("metric", "last"), failed=("metric", lambda m: m.isna().any())
    )
    return curve.join(near).groupby(["lr", "batch"]).median(numeric_only=True).reset_index()


def noise_scale(seen: pd.DataFrame) -> float:
    """One for a whole family: the median over its configurations."""
    known = seen["noise_scale"][seen["noise_scale"].between(0, math.inf, inclusive="neither")]
    return float(known.median())


def lemma2(batches: Iterable[float], mu: float) -> list[float]:
    """GR_S by Lemma 2, at one noise scale for the family. (At each configuration's own one it would hold by itself:
    both come from the same two sums.)"""
    return [theory.expected_gr_s(float(batch), mu) for batch in batches]


def lemma1(seen: pd.DataFrame, curvature: float, held: bool = False) -> pd.Series:
    """GR_T by Lemma 1 at that curvature and each configuration's own noise scale. Not a number where Lemma 1 is not
    for: noise scales above the batch, and learning rates at which its mean squares turn negative. `held`: these read as
    the highest one that it is for."""

    def of(row: pd.Series) -> float:
        noise, x = float(row["noise_scale"]) / float(row["batch"]), curvature * float(row["lr"])
        highest = 0.5 * (1.0 + noise)
        if not 0.0 <= noise <= 1.0 or (x > highest and not held):
            return math.nan
        return theory.expected_gr_t(min(x, highest), noise)

    return seen.apply(of, axis=1)


def curvature(seen: pd.DataFrame) -> float:
    """Of Lemma 1, one for a family: the least mean square of log GR_T. Not a number for fewer than three readings."""

    def error(value: float) -> float:
        return float((np.log(lemma1(seen, value, held=True)) - np.log(seen["gr_t"])).pow(2).mean())

    if (lemma1(seen, 0.0).notna() & seen["gr_t"].notna()).sum() < 3:
        return math.nan
    return float(min(np.geomspace(1e-3, 1e6, 181), key=error))


def within(predicted: Iterable[float], measured: pd.Series, factor: float = 1.5) -> tuple[int, int]:
    """How many readings a prediction is near to, of how many it is for."""
    off = (np.log(np.array(list(predicted))) - np.log(measured)).abs().dropna()
    return int((off <= math.log(factor)).sum()), len(off)


def exponent(x: pd.Series, y: pd.Series) -> float:
    """Of a power law fitted to positive values; not a number for fewer than three."""
    both = (x > 0) & (y > 0)
    return float(np.polyfit(np.log(x[both]), np.log(y[both]), 1)[0]) if both.sum() >= 3 else math.nan


def in_zone(seen: pd.DataFrame) -> pd.Series:
    (low_t, high_t), (low_s, high_s) = HEALTH["gr_t"], HEALTH["gr_s"]
    return seen["gr_t"].between(low_t, high_t) & seen["gr_s"].between(low_s, high_s)


def top(seen: pd.DataFrame, higher: bool) -> pd.Series:
    """The best tenth of the configurations, by the mean of the metric over training."""
    return (seen["mean"] if higher else -seen["mean"]).rank(ascending=False, na_option="bottom") <= len(seen) / 10


def costs_of(rows: pd.DataFrame, weights: str, target: str, quantity: str) -> dict[str, Costs]:
    """Of each tuner its costs in units of the best static run's, by family."""
    chosen = rows[(rows["weights"] == weights) & (rows["target"] == target)]
    relative = (chosen[quantity] / chosen[f"unit_{quantity}"]).where(chosen["reached"], math.inf)
    tuners: dict[str, Costs] = {}
    for (tuner, family), part in relative.groupby([chosen["tuner"], chosen["family"]]):
        tuners.setdefault(str(tuner), {})[str(family)] = part.tolist()  # type: ignore[index]
    return tuners


def problems_of(tuners: dict[str, Costs]) -> dict[str, dict[str, float]]:
    """Median costs of the tuners that were run on every family, from as many starts as an interval needs."""
    every = {family for own in tuners.values() for family in own}
    return {
        tuner: medians(own)
        for tuner, own in tuners.items()
        if set(own) == every and all(len(values) >= FEWEST for values in own.values())
    }
