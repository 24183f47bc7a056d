"""The next configuration for an independent trial, from what a trial before has read. Plain numbers, no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import attrgetter

from .._validation import require
from ..reading import Reading
from .advice import Correction, advise
from .decisions import Config
from .target import Target


def suggest(
    readings: Sequence[Reading],
    config: Config,
    *,
    target: Target | None = None,
    max_lr_factor: float = 10.0,
    max_batch_factor: float = 4.0,
    coupling: float = 0.5,
) -> Config:
    """Learning rate and batch size for the next trial, which begins with fresh weights.

    readings  of a trial at `config`, from its start; advice rests on those around step 50 (see `Gauge.advice`)
    config    what they were read at
    target    where readings should be
    max_lr_factor, max_batch_factor   what a suggestion may multiply by, or divide by
    coupling  a batch that changes by r changes the learning rate by r^coupling (1/2 for Adam: Malladi et al.)

    Where advice knows no direction, that number stays; the learning rate then only follows the batch. Where the
    distance has no upper end, `max_lr_factor` is the step: look again there.

    Raises ValueError for no readings and for a number out of range.
    """
    require(len(readings) > 0, "readings", readings, "at least one reading")
    require(max_lr_factor >= 1.0, "max_lr_factor", max_lr_factor, "at least 1")
    require(max_batch_factor >= 1.0, "max_batch_factor", max_batch_factor, "at least 1")
    require(0.0 <= coupling < math.inf, "coupling", coupling, "finite and at least 0")
    advice = advise(sorted(readings, key=attrgetter("step")), target)
    batch = max(1, round(config.batch_size * _factor(advice.batch, max_batch_factor)))
    lr = config.lr * (batch / config.batch_size) ** coupling * _factor(advice.lr, max_lr_factor)
    return Config(lr, batch, config.weight_decay)


def _factor(correction: Correction, largest: float) -> float:
    wanted = largest if math.isinf(correction.interval[1]) and correction.direction == "raise" else correction.factor
    return min(max(wanted, 1.0 / largest), largest)
