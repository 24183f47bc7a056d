"""How tuners are judged: targets, costs, performance profiles, intervals, regret. Plain numbers in, plain numbers out.

Follows MLCommons AlgoPerf (Dahl et al. 2023, "Benchmarking Neural Network Training Algorithms", arXiv 2306.07179): the
target is what the best known configuration reaches, in the median of fresh seeds; the score is the cost of getting
there; a run that does not costs infinity, and is never dropped; tuners are compared by performance profiles (Dolan and
Moré 2002). Here the cost is in training samples, and in seconds, of everything that a tuner trains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

TAU = 4.0
"""Performance profiles end here."""
LEVEL = 0.9
"""Of intervals."""
FEWEST = 5
"""Starts that an interval needs: the least and the greatest of n values hold the median between them with probability
1 - 2^(1-n), which is below `LEVEL` for four."""
DRAWS = 2000
Costs = Mapping[str, Sequence[float]]
"""Costs of one tuner: of each family one for each start, misses infinite."""


@dataclass(frozen=True)
class Curve:
    """What is seen from outside of a run, or of all that a tuner trains: cumulative samples and seconds, and the
    validation metric of the weights then. A value that is not finite is worse than any."""

    samples: np.ndarray
    seconds: np.ndarray
    values: np.ndarray

    def __post_init__(self) -> None:
        lengths = {len(self.samples), len(self.seconds), len(self.values)}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(
                f"samples, seconds and values have lengths {sorted(lengths)}; they must be equal, and not 0"
            )


@dataclass(frozen=True)
class Cost:
    """Samples and seconds until a target was met; both infinite if it was not."""

    samples: float
    seconds: float

    @property
    def reached(self) -> bool:
        return math.isfinite(self.samples)


MISS = Cost(math.inf, math.inf)


@dataclass(frozen=True)
class Target:
    """A value to be met, and what the best configuration's own runs cost until they met it, in their median."""

    name: str
    value: float
    unit: Cost


def cost(curve: Curve, value: float, higher: bool) -> Cost:
    """Until the metric first was `value` or better."""
    with np.errstate(invalid="ignore"):
        met = np.isfinite(curve.values) & (curve.values >= value if higher else curve.values <= value)
    if not met.any():
        return MISS
    first = int(met.argmax())
    return Cost(float(curve.samples[first]), float(curve.seconds[first]))


def targets(fresh: Sequence[Curve], metric: str, higher: bool) -> list[Target]:
    """The strict target, the median over fresh seeds of the best configuration's metric at the end, and a looser one:
    10 % more loss, or a point less of accuracy or hit rate.

    Raises ValueError if runs with fresh seeds do not train.
    """
    value = float(np.median([curve.values[-1] for curve in fresh]))
    if not math.isfinite(value):
        raise ValueError(f"fresh seeds end at {value} in their median; the best configuration must train")
    loose = 1.1 * value if metric == "loss" else value - 0.01
    return [Target(name, mark, unit(fresh, mark, higher)) for name, mark in (("best", value), ("looser", loose))]


def unit(fresh: Sequence[Curve], value: float, higher: bool) -> Cost:
    """What the best configuration costs itself: the median over its seeds."""
    costs = [cost(curve, value, higher) for curve in fresh]
    return Cost(*(float(np.median([getattr(c, name) for c in costs])) for name in ("samples", "seconds")))


def ratio(own: float, other: float) -> float:
    """Of two costs. Two misses are alike: neither says who is better."""
    if math.isinf(own) and math.isinf(other):
        return 1.0
    return own / other


def profile(costs: Mapping[str, Mapping[str, float]], taus: Sequence[float]) -> dict[str, list[float]]:
    """Of each tuner the share of problems on which it costs at most tau times the cheapest: rho(tau).

    costs   of each tuner, one cost for each problem; all tuners have the same problems

    Nobody solves a problem that all miss. Raises ValueError if tuners have different problems.
    """
    problems = {frozenset(own) for own in costs.values()}
    if len(problems) != 1:
        raise ValueError(f"the tuners have {len(problems)} different sets of problems; they must have the same")
    least = {problem: min(own[problem] for own in costs.values()) for problem in next(iter(problems))}
    return {
        name: [
            float(np.mean([math.isfinite(value) and value <= tau * least[problem] for problem, value in own.items()]))
            for tau in taus
        ]
        for name, own in costs.items()
    }


def score(costs: Mapping[str, Mapping[str, float]], tau: float = TAU) -> dict[str, float]:
    """The integral of each tuner's profile from 1 to tau, divided by tau - 1: 1 is best on every problem, 0 never near.

    Exact: a profile is a staircase, so a problem adds what is left of the range beyond its own ratio.
    """
    profile(costs, [tau])  # checks the problems
    least = {problem: min(own[problem] for own in costs.values()) for problem in next(iter(costs.values()))}
    return {
        name: float(
            np.mean(
                [
                    max(tau - value / least[problem], 0.0) / (tau - 1.0) if math.isfinite(value) else 0.0
                    for problem, value in own.items()
                ]
            )
        )
        for name, own in costs.items()
    }


def medians(costs: Costs) -> dict[str, float]:
    """Of each family the median over starts: infinite if half of them miss."""
    return {family: float(np.median(values)) for family, values in costs.items()}


@dataclass(frozen=True)
class Ratio:
    """A geometric mean over families, its bootstrap interval, and the starts of the family that has fewest."""

    value: float
    low: float
    high: float
    starts: int

    @property
    def verdict(self) -> str:
        """What the interval carries, and no more."""
        if self.starts < FEWEST:
            return "undecided"
        return "cheaper" if self.high < 1.0 else "dearer" if self.low > 1.0 else "undecided"


def compared(own: Costs, other: Costs, seed: int = 0, draws: int = DRAWS) -> Ratio:
    """One tuner's cost in units of another's: median over starts, geometric mean over families; starts are drawn anew,
    of each tuner and family apart, for the interval.

    Raises ValueError if they have different families, or none.
    """
    if set(own) != set(other) or not own:
        raise ValueError(f"families are {sorted(own)} and {sorted(other)}; they must be the same, one at least")
    generator = np.random.default_rng(seed)

    def drawn(values: Sequence[float]) -> np.ndarray:
        array = np.asarray(values, float)
        return np.median(array[generator.integers(len(array), size=(draws, len(array)))], axis=1)

    def mean_of(logs: np.ndarray) -> np.ndarray:
        # A miss of one tuner on one family and of the other on another one cancel: nobody is better for it.
        up, down = np.isposinf(logs).sum(0), np.isneginf(logs).sum(0)
        finite = np.where(np.isfinite(logs), logs, 0.0).sum(0) / len(logs)
        return np.where(up > down, np.inf, np.where(down > up, -np.inf, finite))

    families = sorted(own)
    value = mean_of(np.array([[_log(np.median(own[f]), np.median(other[f]))] for f in families]))[0]
    logs = np.array([[_log(a, b) for a, b in zip(drawn(own[f]), drawn(other[f]), strict=True)] for f in families])
    means = np.sort(mean_of(logs))
    tail = (1.0 - LEVEL) / 2.0
    low, high = means[math.floor(tail * draws)], means[math.ceil((1.0 - tail) * draws) - 1]
    starts = min(len(values) for costs in (own, other) for values in costs.values())
    return Ratio(*(float(np.exp(x)) for x in (value, low, high)), starts)


def paired(differences: Sequence[float], seed: int = 0, draws: int = DRAWS) -> tuple[float, float, float]:
    """The mean of differences between two that share a start, and its bootstrap interval. ValueError for none."""
    if not len(differences):
        raise ValueError("differences is empty; one pair at least is needed")
    values = np.asarray(differences, float)
    means = np.random.default_rng(seed).choice(values, (draws, len(values))).mean(1)
    tail = (1.0 - LEVEL) / 2.0
    return float(values.mean()), *(float(q) for q in np.quantile(means, (tail, 1.0 - tail)))


def _log(own: float, other: float) -> float:
    quotient = ratio(float(own), float(other))
    return math.log(quotient) if quotient > 0.0 else -math.inf


def winner(costs: Mapping[str, Costs], seed: int = 0) -> str | None:
    """The tuner that is cheaper than every other one, by intervals that exclude 1; None if there is none."""
    for name, own in costs.items():
        others = [other for label, other in costs.items() if label != name]
        if others and all(compared(own, other, seed).verdict == "cheaper" for other in others):
            return name
    return None


def regret(curve: Curve, best: float, worst: float, budgets: Sequence[float], higher: bool) -> list[float]:
    """How far the best metric so far is from the table's best, at each budget in samples: 0 there, 1 at its worst or
    before anything was seen. Clipped to [0, 1].

    Raises ValueError if best and worst are equal.
    """
    if best == worst:
        raise ValueError(f"best and worst are both {best}; they must differ")
    values = np.where(np.isfinite(curve.values), curve.values, -math.inf if higher else math.inf)
    so_far = np.maximum.accumulate(values) if higher else np.minimum.accumulate(values)
    result = []
    for budget in budgets:
        seen = int(np.searchsorted(curve.samples, budget, side="right"))
        at = so_far[seen - 1] if seen else worst
        result.append(float(np.clip((best - at) / (best - worst), 0.0, 1.0)))
    return result
