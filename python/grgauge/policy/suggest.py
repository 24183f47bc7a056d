"""The next configuration for an independent trial, from what a trial before has read. Plain numbers, no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .._validation import require
from ..reading import Reading
from .decisions import Config
from .target import Target

STEP = 50
"""The published target belongs to about this step: GR_T climbs with time at a fixed learning rate."""

FAR = 2.0
"""GR_T below which the learning rate is at least ten times too low, and nobody can tell how much: 10 to 3000 times,
over 12 sweeps of three models."""

BLIND = 0.95
"""GR_S above which GR_T says nothing about the learning rate."""


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

    readings  of a trial at `config`; the one nearest to step 50 of those that are ready is what counts, else of all
    config    what they were read at
    target    where readings should be
    max_lr_factor, max_batch_factor   what a suggestion may multiply by, or divide by
    coupling  a batch that changes by r changes the learning rate by r^coupling (1/2 for Adam: Malladi et al.)

    Batch first, learning rate second: where GR_S says that the batch is far too small, GR_T is blind, and the learning
    rate only follows the batch. Where GR_T is near 1 the distance has no upper end; the suggestion is then the whole
    `max_lr_factor`, which means "at least". What has not been read stays as it is.

    Raises ValueError for no readings and for a number out of range.
    """
    target = target or Target()
    require(len(readings) > 0, "readings", readings, "at least one reading")
    require(max_lr_factor >= 1.0, "max_lr_factor", max_lr_factor, "at least 1")
    require(max_batch_factor >= 1.0, "max_batch_factor", max_batch_factor, "at least 1")
    require(0.0 <= coupling < math.inf, "coupling", coupling, "finite and at least 0")
    reading = min([r for r in readings if r.ready] or readings, key=lambda r: abs(r.step - STEP))
    wanted = target.batch_factor(reading) or 1.0
    batch = max(1, round(config.batch_size * _bounded(wanted, max_batch_factor)))
    lr = config.lr * (batch / config.batch_size) ** coupling
    if reading.gr_s is None or reading.gr_s <= BLIND:
        lr *= _lr_factor(reading, target, max_lr_factor)
    return Config(lr, batch, config.weight_decay)


def _lr_factor(reading: Reading, target: Target, largest: float) -> float:
    factor = target.lr_factor(reading)
    if factor is None:
        return 1.0
    assert reading.gr_t is not None
    far = target.gr_t_zone[0] > FAR >= reading.gr_t / reading.finite_time_factor
    return largest if far else _bounded(factor, largest)


def _bounded(factor: float, largest: float) -> float:
    return min(max(factor, 1.0 / largest), largest)
