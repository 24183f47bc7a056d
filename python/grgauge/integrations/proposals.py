"""Which trial the next one goes on from, with what learning rate and batch size. Plain numbers, no search engine."""

from __future__ import annotations

import math
import random
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

from .._validation import require
from ..policy import Config, Progress, Target, suggest


@dataclass(frozen=True)
class Tried:
    """A trial that has readings.

    key       by which the engine knows it
    config    what it trains with
    progress  its readings and losses, oldest first, one at least
    """

    key: Any
    config: Config
    progress: Sequence[Progress]


class Proposals:
    """Configurations for new trials, from what others have read.

    target, max_lr_factor, max_batch_factor   as for `grgauge.suggest`
    seed   of the scatter

    A new trial goes on from the newest one with readings that no other went on from. Where there is none, or its
    gauges are in the zone, the parent is the one of lowest training loss among those in the zone, and the learning rate
    is scattered around its own by up to a factor of three: within that gauges cannot tell, and losses can.

    Raises ValueError for a number out of range.
    """

    def __init__(
        self,
        target: Target | None = None,
        max_lr_factor: float = 10.0,
        max_batch_factor: float = 4.0,
        seed: int | None = None,
    ) -> None:
        for name, value in (("max_lr_factor", max_lr_factor), ("max_batch_factor", max_batch_factor)):
            require(value >= 1.0, name, value, "at least 1")
        self.random = random.Random(seed)
        self._target = target or Target()
        self._options: dict[str, Any] = {
            "target": self._target,
            "max_lr_factor": max_lr_factor,
            "max_batch_factor": max_batch_factor,
        }

    def next(self, tried: Sequence[Tried], taken: Container[Any]) -> tuple[Any, Config]:
        """The key of the trial to go on from, and what to train with.

        tried  oldest first, one at least
        taken  keys of those that others went on from
        """
        parent = next((t for t in reversed(tried) if t.key not in taken), None)
        chosen = None if parent is None else self.suggest(parent)
        if parent is None or chosen is None or chosen == parent.config:
            best = min(tried, key=self.rank)
            return (parent or best).key, self.beside(best.config)
        return parent.key, chosen

    def suggest(self, trial: Tried) -> Config:
        """What the trial's own readings suggest."""
        return suggest([p.reading for p in trial.progress], trial.config, **self._options)

    def beside(self, config: Config) -> Config:
        """Another learning rate, up to three times higher or lower."""
        return Config(config.lr * 3.0 ** self.random.uniform(-1.0, 1.0), config.batch_size, config.weight_decay)

    def rank(self, trial: Tried) -> tuple[bool, float]:
        """Lowest is best: those in the zone before others, then by the newest loss."""
        low, high = self._target.gr_t_zone
        newest = trial.progress[-1]
        gr_t, settled = newest.reading.gr_t, newest.reading.finite_time_factor
        outside = gr_t is None or not low / 2.0 <= gr_t / settled <= high * 2.0
        return outside, newest.loss if math.isfinite(newest.loss) else math.inf
