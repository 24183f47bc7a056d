"""The principle: which of learning rate and weight decay counts when, and whether curves show it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from .._validation import require, require_batch
from ..policy import Config

Array = npt.NDArray[np.float64]
Rule = Literal["decay", "gamma", "gamma per batch"]

EARLY = 200
"""Iterations of the early phase, where the learning rate alone counts, whatever gamma is."""

SETTLED = 1.0
"""The age, in time scales 1 / gamma, from which gamma counts: 63 % of the initial weights is then forgotten."""

NEGLIGIBLE = 0.05
"""The age up to which weight decay does not count: it has shrunk no weight by more than 5 %."""

EQUAL = 0.02
"""The relative difference up to which two rates count as equal: other seeds change a run more than that."""


def gamma(lr: float, weight_decay: float) -> float:
    """lr * weight_decay: the share of every weight that AdamW forgets in one iteration.

    Args:
        lr: Learning rate, above 0.
        weight_decay: AdamW's weight decay, at least 0.

    Returns:
        gamma, per iteration.

    Raises:
        ValueError: For an argument out of range.

    Examples:
        >>> gamma(lr=1e-3, weight_decay=0.1)
        0.0001
    """
    _require_lr(lr)
    require(0.0 <= weight_decay < math.inf, "weight_decay", weight_decay, "finite and at least 0")
    return lr * weight_decay


def time_scale(gamma: float) -> float:
    """1 / gamma: the iterations after which weights without updates have fallen to 1/e; inf at 0.

    Args:
        gamma: lr * weight_decay, at least 0.

    Returns:
        Iterations.

    Raises:
        ValueError: For an argument out of range.

    Examples:
        >>> round(time_scale(gamma(lr=2e-5, weight_decay=0.01)))
        5000000
    """
    _require_gamma(gamma)
    return 1.0 / gamma if gamma else math.inf


def decay_within(lr: float, steps: float) -> float:
    """The weight decay whose time scale 1/gamma is twice as long as a run of so many iterations.

    With it gamma does not yet count alone. In bench/invariance.py the smallest of three gammas, whose runs last 1.8
    time scales, ends with the lowest loss at every learning rate. In bench/space.py starts that forget faster take up
    to four times the samples.

    Args:
        lr: Learning rate, above 0.
        steps: Iterations of the run, above 0.

    Returns:
        The weight decay.

    Raises:
        ValueError: For an argument out of range.

    Examples:
        >>> decay_within(lr=1e-3, steps=5000)
        0.1
    """
    _require_lr(lr)
    require(0.0 < steps < math.inf, "steps", steps, "finite and above 0")
    return 0.5 * SETTLED / (lr * steps)


# --- Regimes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Regime:
    """The direction along which curves differ, at one step or over a whole run.

    Attributes:
        salient: "lr": equal learning rates give equal curves; "gamma": equal gammas do; "both": neither does, in
            between.
        age: gamma * step, in time scales of the weights.
        reason: Why, as one sentence.

    Examples:
        >>> regime(step=20_000, gamma=1e-4).age
        2.0
    """

    salient: Literal["lr", "gamma", "both"]
    age: float
    reason: str


def regime(step: float, gamma: float, *, early: float = EARLY, settled: float = SETTLED) -> Regime:
    """The regime at iteration `step`; for a whole run, that of its last iteration.

    Args:
        step: Iterations so far.
        gamma: lr * weight_decay, of the peak learning rate or its mean over the run.
        early: Iterations of the early phase.
        settled: The age gamma * step from which gamma is salient.

    The learning rate is salient up to `early` iterations, and as long as weight decay is negligible (age below 0.05):
    short fine-tuning with lr 2e-5 and wd 0.01 has age 2e-7 * step and never leaves this regime.

    Returns:
        The regime, with its reason.

    Raises:
        ValueError: For an argument out of range.

    Examples:
        >>> regime(step=2000, gamma=2e-7).salient
        'lr'
        >>> regime(step=20_000, gamma=3e-4).salient
        'gamma'
    """
    require(0.0 <= step < math.inf, "step", step, "finite and at least 0")
    require(0.0 <= early < math.inf, "early", early, "finite and at least 0")
    require(NEGLIGIBLE < settled < math.inf, "settled", settled, f"finite and above {NEGLIGIBLE}")
    _require_gamma(gamma)
    age = gamma * step
    scale = f"the weights' time scale 1/gamma of {time_scale(gamma):.3g} iterations"
    if age < NEGLIGIBLE:
        return Regime("lr", age, f"{step:.4g} iterations are {100 * age:.2g} % of {scale}: weight decay is negligible")
    if step < early:
        return Regime("lr", age, f"{step:.4g} iterations are within the early phase of {early:.4g}")
    if age < settled:
        return Regime("both", age, f"{step:.4g} iterations are {age:.2g} times {scale}, less than {settled:g}")
    return Regime("gamma", age, f"{step:.4g} iterations are {age:.2g} times {scale}")


def equivalent(a: Config, b: Config, regime: Regime, tolerance: float = EQUAL) -> bool:
    """True if the curves of two runs of the same length overlap, so that only one needs to be run.

    The batch sizes must be equal. So must what is salient, within the relative `tolerance`: the learning rates, the
    gammas, or both. Both learning rates are taken to be stable: a run that diverges is equivalent to nothing.

    Args:
        a: One configuration, with a weight decay.
        b: The other.
        regime: That of the run with the larger gamma.
        tolerance: Relative difference up to which two rates count as equal.

    Returns:
        True if only one of the two needs to be run.

    Raises:
        ValueError: For a config without weight decay: None means that weight decay stays as it is, which cannot be
            compared.

    Examples:
        >>> equivalent(Config(1e-3, 64, 0.3), Config(3e-3, 64, 0.1), regime(20_000, gamma=3e-4))
        True
    """
    require(0.0 <= tolerance < 1.0, "tolerance", tolerance, "in [0, 1)")
    decays = [decay_of(a, "a"), decay_of(b, "b")]
    if a.batch_size != b.batch_size:
        return False
    same_lr = _close(a.lr, b.lr, tolerance)
    same_gamma = _close(gamma(a.lr, decays[0]), gamma(b.lr, decays[1]), tolerance)
    return {"lr": same_lr, "gamma": same_gamma, "both": same_lr and same_gamma}[regime.salient]


# --- Do curves collapse? ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """One quantity over a run: loss, gradient norm, noise scale or GR_T.

    Attributes:
        group: What is equal in all runs that are expected to overlap: gamma, or the learning rate.
        steps: Ascending.
        values: Above 0, one for each step; NaN where the quantity is unknown.

    Examples:
        >>> Curve(group=1e-3, steps=[0, 100], values=[2.3, 1.1]).group
        0.001
    """

    group: float | str
    steps: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True)
class Collapse:
    """How well curves of a group overlap.

    Attributes:
        within: Root mean square of log(y_i / y_j) over pairs of the same group and points: a relative difference.
        between: The same over pairs of different groups.
        points: Points at which curves were compared.

    Examples:
        >>> Collapse(within=0.25, between=1.0, points=100).error
        0.25
    """

    within: float
    between: float
    points: int

    @property
    def error(self) -> float:
        """within / between. 0: groups collapse to a curve each; 1: a group means nothing. NaN if neither differs."""
        return self.within / self.between if self.between else math.inf if self.within else math.nan


def collapse_error(
    runs: Sequence[Curve], *, after: float = 0.0, before: float = math.inf, points: int = 100
) -> Collapse:
    """How far curves of the same group differ, compared with curves of different groups.

    Each curve is interpolated linearly, in the logarithm of its values, at `points` equidistant steps of the range that
    all curves cover within [after, before]. Logarithms make differences relative, so that a curve which falls by orders
    of magnitude has the same weight everywhere. A pair of groups counts as often as it has pairs of curves. Noise
    between neighbouring steps counts as a difference, so smooth the curves first.

    Args:
        runs: The curves, of at least two groups, one of which has two curves.
        after: The first step to compare.
        before: The last one.
        points: Steps at which the curves are compared.

    Returns:
        The differences within and between groups; `Collapse.error` is their ratio.

    Raises:
        ValueError: For a value that is not above 0, steps that do not ascend, less than two groups, no group with two
            curves, and curves without a common range.

    Examples:
        >>> runs = [Curve(group, [0, 100], [2.0, last]) for group, last in ((1, 1.0), (1, 1.0), (2, 0.5), (2, 0.5))]
        >>> collapse_error(runs).error
        0.0
    """
    require(points >= 2, "points", points, "at least 2")
    axes, logs = zip(*(_log_curve(run, f"runs[{i}]") for i, run in enumerate(runs)), strict=True) if runs else ((), ())
    groups = [run.group for run in runs]
    sizes = {group: groups.count(group) for group in groups}
    require(len(sizes) >= 2, "runs", sizes, "of at least 2 groups")
    require(max(sizes.values()) >= 2, "runs", sizes, "at least 2 in some group")
    low, high = max(after, *(axis[0] for axis in axes)), min(before, *(axis[-1] for axis in axes))
    require(low < high, "runs", (low, high), "curves over a common range of steps within [after, before]")
    at = np.linspace(low, high, points)
    curves = [np.interp(at, axis, log) for axis, log in zip(axes, logs, strict=True)]
    squares: dict[bool, list[float]] = {True: [], False: []}
    for (one, y), (other, z) in itertools.combinations(zip(groups, curves, strict=True), 2):
        squares[one == other].append(float(np.mean((y - z) ** 2)))
    within, between = (math.sqrt(sum(squares[same]) / len(squares[same])) for same in (True, False))
    return Collapse(within, between, points)


def _log_curve(run: Curve, name: str) -> tuple[Array, Array]:
    steps, values = np.asarray(run.steps, dtype=np.float64), np.asarray(run.values, dtype=np.float64)
    require(steps.ndim == 1 and steps.shape == values.shape, f"{name}.values", values.shape, "as long as its steps")
    known = ~np.isnan(values)
    steps, values = steps[known], values[known]
    require(len(steps) >= 2, f"{name}.values", run.values, "known at 2 steps at least")
    require(bool(np.all(np.diff(steps) > 0)), f"{name}.steps", run.steps, "ascending")
    positive = bool(np.all((values > 0) & np.isfinite(values)))
    require(positive, f"{name}.values", float(values.min()), "finite and above 0, or NaN")
    return steps, np.log(values)


# --- Weight decay when learning rate or batch change ------------------------------------------------------------------


def decay_after(before: Config, lr: float, batch_size: float, rule: Rule = "decay") -> tuple[float, str]:
    """The weight decay for a run that goes on with another learning rate or batch size, and the reason.

    Args:
        before: The configuration so far.
        lr: The new learning rate.
        batch_size: The new batch size in samples.
        rule: "decay": weight decay stays, and gamma follows the learning rate, which is torch's own behaviour. "gamma":
            lr * weight_decay stays, so the weights' time scale is the same number of iterations. "gamma per batch":
            gamma follows the batch size, so the time scale is the same number of samples.

    Returns:
        The weight decay, and the reason.

    Raises:
        ValueError: For an unknown rule, and for a config without weight decay.

    Examples:
        >>> decay, why = decay_after(Config(3e-3, 64, 0.1), lr=1e-3, batch_size=64, rule="gamma")
        >>> round(decay, 3)
        0.3
    """
    _require_lr(lr)
    require_batch(batch_size)
    decay = decay_of(before, "before")
    old = gamma(before.lr, decay)
    if rule == "decay":
        new = decay
    elif rule == "gamma":
        new = old / lr
    elif rule == "gamma per batch":
        new = old * batch_size / before.batch_size / lr
    else:
        raise ValueError(f"rule must be 'decay', 'gamma' or 'gamma per batch', got {rule!r}")
    now = gamma(lr, new)
    why = {
        "decay": "Weight decay is kept, so gamma goes with the learning rate",
        "gamma": "Gamma is kept, so that weights are forgotten in as many iterations as before",
        "gamma per batch": "Gamma goes with the batch, so that weights are forgotten in as many samples as before",
    }[rule]
    return new, (
        f"lr {before.lr:.3g} -> {lr:.3g}, batch {before.batch_size:g} -> {batch_size:g}: weight decay {decay:.3g} -> "
        f"{new:.3g}, gamma {old:.3g} -> {now:.3g} (1/gamma {time_scale(now):.3g} iterations). {why}"
    )


def _close(a: float, b: float, tolerance: float) -> bool:
    return abs(a - b) <= tolerance * max(a, b)


def decay_of(config: Config, name: str) -> float:
    """The weight decay of a configuration that must have one."""
    decay = config.weight_decay
    if decay is None:
        raise ValueError(
            f"{name}.weight_decay must be a number, got None: a weight decay that stays as it is cannot be compared"
        )
    return decay


def _require_lr(lr: float) -> None:
    require(0.0 < lr < math.inf, "lr", lr, "finite and above 0")


def _require_gamma(gamma: float) -> None:
    require(0.0 <= gamma < math.inf, "gamma", gamma, "finite and at least 0")
