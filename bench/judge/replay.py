"""Tuners that train nothing: what they ask for is looked up in the table, and charged."""

from __future__ import annotations

import math

import numpy as np

from .protocol import Curve
from .table import CHECKS, SEEDS, Config, Family, nearest

LIMIT = 32.0
"""Static runs that a tuner may spend in all."""
FORWARD = 1 / 3
"""What a validated sample costs of a trained one: a forward pass without a backward one, which is twice as long."""


class Spent(Exception):
    """The budget is used up. Raised in the middle of what a tuner does; the judge catches it."""


class Bench:
    """What a tuner trains on: one budget, one record of all that is spent and of every metric seen from outside.

    family    the recorded curves; a configuration asked for stands for the nearest of the grid
    seed      chooses between the recorded seeds, afresh for each trial
    held_out  samples of a validation that the tuner asks for
    limit     static runs that may be spent
    """

    def __init__(self, family: Family, seed: int, held_out: int, limit: float = LIMIT) -> None:
        self.family, self.held_out, self.budget = family, held_out, limit * family.samples
        self._generator = np.random.default_rng(seed)
        self.samples = self.seconds = 0.0
        self._seen: list[tuple[float, float, float]] = []

    def trial(self, lr: float, batch: float, seed: int | None = None) -> Run:
        """Fresh weights at a configuration; `seed` None: one of those recorded, by chance."""
        chosen = int(self._generator.choice(SEEDS)) if seed is None else seed
        return Run(self, nearest(lr, batch), chosen)

    def charge(self, samples: float, seconds: float, value: float | None = None) -> None:
        """Count what was spent, and note the metric of the weights that it led to."""
        self.samples, self.seconds = self.samples + samples, self.seconds + seconds
        if value is not None:
            self._seen.append((self.samples, self.seconds, value))
        if self.samples >= self.budget:
            raise Spent

    def curve(self) -> Curve:
        """All that was seen. Raises ValueError if nothing was trained."""
        if not self._seen:
            raise ValueError("nothing was trained; a tuner must train before it is judged")
        return Curve(*np.array(self._seen).T)


class Run:
    """A run of the table in progress."""

    def __init__(self, bench: Bench, config: Config, seed: int) -> None:
        self.bench, self.config, self.curve = bench, config, bench.family.curves[config, seed]
        self.rows = 0
        self.samples = self.seconds = 0.0

    def train(self, checks: float) -> None:
        """On to that check, of `CHECKS`, or to the next where the number is not whole, or to where the run fails. The
        judge looks at every check, at no cost."""
        goal, curve = self.bench.family.samples * checks / CHECKS, self.curve
        while self.samples < goal and self.rows < len(curve.samples):
            samples, seconds = float(curve.samples[self.rows]), float(curve.seconds[self.rows])
            spent = samples - self.samples, seconds - self.seconds
            self.rows, self.samples, self.seconds = self.rows + 1, samples, seconds
            self.bench.charge(*spent, float(curve.values[self.rows - 1]))

    def validate(self) -> float:
        """The loss to be minimised (an accuracy with its sign turned), for the price of a validation. Infinite for a
        run that failed."""
        forward = FORWARD * self.bench.held_out
        self.bench.charge(forward, forward * self.seconds / self.samples if self.samples else 0.0)
        return self.bench.family.loss(float(self.curve.values[self.rows - 1]) if self.rows else math.nan)
