"""Whether a trial among others is worth going on with. Plain numbers, no torch, no search engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median, variance

from .._validation import require, require_count
from ..reading import Reading
from .decisions import Evidence
from .target import BLIND


@dataclass(frozen=True)
class Progress:
    """Where a trial is at one reading.

    reading  what was read
    loss     training loss since the reading before
    trained  samples that its weights have been trained on; None: all steps had the reading's batch size
    """

    reading: Reading
    loss: float
    trained: float | None = None

    @property
    def samples(self) -> float:
        """That its weights have been trained on."""
        return self.reading.step * self.reading.batch_size if self.trained is None else self.trained


@dataclass(frozen=True)
class Pruning:
    """Ends trials by their gauges and their training losses; no validation is needed.

    warm_up   steps before gauges are judged
    patience  readings in a row that must agree
    zone      GR_T of healthy training, with room for noise: a trial inside is never ended for being behind others
    far       GR_T outside of which a learning rate is hopeless unless the loss falls, being ten times too low or more,
              or bouncing
    blind     GR_S above which GR_T is not judged

    1. diverged    the newest loss is not finite, or after warm-up `patience` losses in a row are above all of
                 the first `patience`, and the loss does not fall
    2. far out     `patience` readings in a row are outside `far`, all on one side, and the loss does not fall
    3. behind      `patience` readings in a row are outside `zone`, and the loss does not fall and its mean over them is
                   above the median of other trials' at equal samples. The loss alone would favour low learning rates:
                   what falls fast at first wins early

    Raises ValueError for a number out of range.
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
        """Why to end a trial, None to go on.

        trial   its readings so far, oldest first
        others  those of other trials
        """
        if not trial:
            return None
        newest = trial[-1]
        step = newest.reading.step
        if not math.isfinite(newest.loss):
            return Evidence("diverged", step, "loss", newest.loss)
        judged = [p for p in trial if p.reading.step >= self.warm_up][-self.patience :]
        if len(judged) < self.patience:
            return None
        first = max(p.loss for p in trial[: self.patience])  # a single one may be low by chance
        falling = self._falls(trial)
        if not falling and len(trial) >= 2 * self.patience and all(p.loss > first for p in judged):
            return Evidence("diverged", step, "loss", newest.loss, (-math.inf, first))
        gr_t = [self._gr_t(p.reading) for p in judged]
        known = [value for value in gr_t if value is not None]
        if len(known) < len(gr_t):
            return None
        far_out = all(value < self.far[0] for value in known) or all(value > self.far[1] for value in known)
        if falling:
            return None
        if far_out:
            return Evidence("far out", step, "GR_T", known[-1], self.far)
        low, high = self.zone
        if not (all(value < low for value in known) or all(value > high for value in known)):
            return None
        own = fmean(p.loss for p in judged)
        rivals = [loss for loss in (_loss_over(other, judged) for other in others) if loss is not None]
        if rivals and own > median(rivals):
            return Evidence("behind", step, "loss", own, (-math.inf, median(rivals)))
        return None

    def _falls(self, trial: Sequence[Progress]) -> bool:
        """True if the loss falls by more than chance, over the whole trial or over its newest readings."""
        losses = [p.loss for p in trial]
        return _fall(losses) or _fall(losses[-2 * self.patience :])

    def _gr_t(self, reading: Reading) -> float | None:
        """GR_T as it will be once it has settled; None where it says nothing."""
        blind = reading.gr_s is not None and reading.gr_s > self.blind
        if reading.gr_t is None or reading.finite_time_factor <= 0.0 or blind:
            return None
        return reading.gr_t / reading.finite_time_factor


def _fall(losses: Sequence[float]) -> bool:
    """True if the mean of the newer half is lower by more than twice the standard error of the difference."""
    half = len(losses) // 2
    if half < 2 or not all(map(math.isfinite, losses)):
        return False
    older, newer = losses[:half], losses[-half:]
    error = math.sqrt((variance(older) + variance(newer)) / half)
    return fmean(older) - fmean(newer) > 2.0 * error


def _loss_over(trial: Sequence[Progress], when: Sequence[Progress]) -> float | None:
    """A trial's mean loss at the samples of another one's readings; None where it has not been at one of them."""
    losses = [loss for p in when if (loss := _loss_at(trial, p.samples)) is not None]
    return fmean(losses) if len(losses) == len(when) else None


def _loss_at(trial: Sequence[Progress], samples: float) -> float | None:
    """A trial's loss at that many samples, linear between readings; None outside of them."""
    for left, right in pairwise(trial):
        if left.samples <= samples <= right.samples and math.isfinite(left.loss) and math.isfinite(right.loss):
            share = (samples - left.samples) / (right.samples - left.samples)
            return left.loss + (right.loss - left.loss) * share
    return None
