"""Trajectory invariance: which of learning rate and weight decay to search, and when two runs are equivalent.

Under AdamW the curves of loss, gradient norm and gradient noise first depend on the learning rate alone. Later, curves
of equal gamma = lr * weight_decay overlap. So one of the two numbers can be fixed and the other varied, along the
salient direction: gamma in runs of many iterations (long runs, small batches), the learning rate in runs of few.

Source: Li et al., "Efficient Hyperparameter Tuning via Trajectory Invariance Principle", arXiv 2509.25049. That gamma
is the rate at which weights are forgotten, and 1 / gamma their time scale in iterations, follows from AdamW's update:
w <- (1 - lr wd) w - lr u. So gamma * steps, the `age` of a run, is the number that separates the regimes.

Plain numbers in and out, no torch, no I/O. Every function raises ValueError, naming the argument, its value and what it
must be.
"""

from .principle import (
    EARLY,
    EQUAL,
    NEGLIGIBLE,
    SETTLED,
    Collapse,
    Curve,
    Regime,
    Rule,
    collapse_error,
    decay_after,
    decay_within,
    equivalent,
    gamma,
    regime,
    time_scale,
)
from .space import Line, Range, Space, unsearched

__all__ = [
    "EARLY",
    "EQUAL",
    "NEGLIGIBLE",
    "SETTLED",
    "Collapse",
    "Curve",
    "Line",
    "Range",
    "Regime",
    "Rule",
    "Space",
    "collapse_error",
    "decay_after",
    "decay_within",
    "equivalent",
    "gamma",
    "regime",
    "time_scale",
    "unsearched",
]
