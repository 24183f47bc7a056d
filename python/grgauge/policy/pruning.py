"""Whether a trial among others is worth going on with. Plain numbers, no torch, no search engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median, variance

from .._validation import require, require_count
from ..reading import Reading
from .decisions import Evidence
from .losses import Block, loss_at
from .target import BLIND


@dataclass(frozen=True)
class Progress:
    """Where a trial is at one reading.

    Attributes:
        reading: what was read.
        loss: training loss, of the reading's step or the mean since the reading before.
        trained: samples that the weights have been trained on. None: all steps had the reading's batch size.
    """

    reading: Reading
    loss: float
    trained: float | None = None

    @property
    def samples(self) -> float:
        """Samples that the weights have been trained on."""
        return self.reading.step * self.reading.batch_size if self.trained is None else self.trained


@dataclass(frozen=True)
class Pruning:
    """Ends trials by their gauges and training losses, without validation.

    A trial is ended where one of three rules holds:

    1. **diverged**: the newest loss is not finite. Or the loss no longer falls, and `patience` losses in a row are
       above each of the first `patience`.
    2. **far out**: the loss no longer falls, and `patience` readings in a row have a GR_T below `far`, or all above.
    3. **behind**: the loss no longer falls, `patience` readings in a row have a GR_T below `zone`, or all above, and
       their mean loss is above the median of the other trials' at equal samples.

    Losses alone would end the wrong trials: low learning rates often lead early on and lose later. So a trial inside
    `zone` is never ended for being behind.

    Attributes:
        warm_up: steps before anything but a loss that is not finite ends a trial.
        patience: readings in a row that must agree.
        zone: (low, high) GR_T of healthy training, with room for noise.
        far: (low, high) GR_T. Below, the learning rate is ten or more times too low; above, gradients bounce.
        blind: GR_S above which GR_T is not judged.

    Raises:
        ValueError: a number is out of range.

    Examples:
        >>> from grgauge import Reading
        >>> from grgauge.policy import Progress, Pruning
        >>> def at(step, gr_t, loss):
        ...     reading = Reading(
        ...         step=step, batch_size=64, gr_t=gr_t, gr_t_error=0.1, finite_time_factor=1.0, gr_s=0.6,
        ...         gr_s_error=0.02, noise_scale=90.0, noise_scale_error=2.0, grad_norm=0.7, nonfinite=0, ready=True,
        ...     )
        ...     return Progress(reading, loss)
        >>> print(Pruning().judge([at(step, gr_t=1.2, loss=2.3) for step in range(10, 100, 10)]))
        far out: GR_T 1.2 [2, 100]
    """

    warm_up: int = 50
    patience: int = 4
    zone: tuple[float, float] = (8.0, 40.0)
    far: tuple[float, float] = (2.0, 100.0)
    blind: float = BLIND

    def __post_init__(self) -> None:
        require_count("warm_up", self.warm_up, 0)
        require_count("patience", self.patience, 1)
        ordered = 0.0 < self.far[0] <= self.zone[0] < self.zone[1] <= self.far[1]
        require(ordered, "zone", self.zone, f"(low, high), inside far = {self.far}")
        require(0.0 < self.blind <= 1.0, "blind", self.blind, "in (0, 1]")

    def judge(self, trial: Sequence[Progress], others: Sequence[Sequence[Progress]] = ()) -> Evidence | None:
        """Whether to end a trial.

        Args:
            trial: its readings so far, oldest first.
            others: those of other trials.

        Returns:
            Why to end it, None to go on.
        """
        if not trial:
            return None
        step, newest = trial[-1].reading.step, trial[-1].loss
        if not math.isfinite(newest):
            return Evidence("diverged", step, "loss", newest)
        judged = [p for p in trial if p.reading.step >= self.warm_up][-self.patience :]
        if len(judged) < self.patience:
            return None
        first = max(p.loss for p in trial[: self.patience])  # a single one may be low by chance
        losses = [p.loss for p in trial]
        falling = _falls(losses) or _falls(losses[-2 * self.patience :])  # over the whole trial, or lately
        if not falling and all(p.loss > first for p in judged):
            return Evidence("diverged", step, "loss", newest, (-math.inf, first))
        known = [gr_t for p in judged if (gr_t := self._gr_t(p.reading)) is not None]
        if falling or len(known) < len(judged):
            return None
        if _all_outside(self.far, known):
            return Evidence("far out", step, "GR_T", known[-1], self.far)
        own = fmean(p.loss for p in judged)
        rivals = [loss for other in others if (loss := _loss_over(other, judged)) is not None]
        if _all_outside(self.zone, known) and rivals and own > median(rivals):
            return Evidence("behind", step, "loss", own, (-math.inf, median(rivals)))
        return None

    def _gr_t(self, reading: Reading) -> float | None:
        """GR_T over the reading's finite-time factor; None where it says nothing."""
        blind = reading.gr_s is not None and reading.gr_s > self.blind
        if reading.gr_t is None or reading.finite_time_factor <= 0.0 or blind:
            return None
        return reading.gr_t / reading.finite_time_factor


def _all_outside(zone: tuple[float, float], values: Sequence[float]) -> bool:
    """True if all are below the zone, or all above it."""
    return all(value < zone[0] for value in values) or all(value > zone[1] for value in values)


def _falls(losses: Sequence[float]) -> bool:
    """By more than chance: the newer half's mean is lower by more than two standard errors of the difference."""
    half = len(losses) // 2
    if half < 2 or not all(map(math.isfinite, losses)):
        return False
    older, newer = losses[:half], losses[-half:]
    error = math.sqrt((variance(older) + variance(newer)) / half)
    return fmean(older) - fmean(newer) > 2.0 * error


def _loss_over(trial: Sequence[Progress], when: Sequence[Progress]) -> float | None:
    """A trial's mean loss at the samples of another one's readings; None if it has no loss at one of them."""
    curve = [Block(p.samples, p.loss) for p in trial]
    losses = [loss for p in when if (loss := loss_at(curve, p.samples)) is not None]
    return fmean(losses) if len(losses) == len(when) else None
