"""The configuration of an independent trial, from the readings of an earlier one. Plain numbers, no torch."""

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
    """Learning rate and batch size for the next trial, which begins with untrained weights.

    Both are multiplied by the factors of `Gauge.advice`. Where that cannot tell a direction, the number stays as it is,
    except that the learning rate still follows the batch. Where it can only say "at least", as when all gradients
    agree, the step is `max_lr_factor`; the next trial's readings show whether it was far enough.

    Args:
        readings: of one trial at `config`, from its start, in any order. Those around step 50 count.
        config: what they were read at.
        target: where readings should be, if not at the published target.
        max_lr_factor: the most that the learning rate is multiplied or divided by, before it follows the batch.
        max_batch_factor: the most that the batch is multiplied or divided by.
        coupling: a batch multiplied by r multiplies the learning rate by r^coupling (1/2 for Adam: Malladi et al.).

    Returns:
        The next configuration, with the weight decay of `config`.

    Raises:
        ValueError: there are no readings, or a number is out of range.

    Examples:
        >>> import grgauge
        >>> reading = grgauge.Reading(
        ...     step=50, batch_size=64, gr_t=1.2, gr_t_error=0.1, finite_time_factor=0.99, gr_s=None, gr_s_error=None,
        ...     noise_scale=None, noise_scale_error=None, grad_norm=0.7, nonfinite=0, ready=True,
        ... )  # all gradients agree: the learning rate is far too low
        >>> print(grgauge.suggest([reading], grgauge.Config(lr=1e-5, batch_size=64)))
        lr 1.00e-04, batch 64
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
    low, high = correction.interval
    if correction.direction == "raise" and math.isinf(high):
        return largest
    if correction.direction == "lower" and low == 0.0:
        return 1.0 / largest
    return min(max(correction.factor, 1.0 / largest), largest)
