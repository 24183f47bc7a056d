"""The table: configurations of the grid, and the curves that were recorded at them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from .protocol import Curve

LRS = tuple(10.0 ** (-5 + 5 * k / 9) for k in range(10))
BATCHES = (8, 18, 42, 97, 224, 512)
"""Evenly spaced in logarithms, both: a nearest neighbour stands for as much of the plane everywhere."""
SEEDS = (0, 1)
FRESH = (100, 101, 102, 103, 104)
"""Seeds of the runs at the best configuration that set the target."""
CHECKS = 20
BOUNDS = {"lr": (LRS[0], LRS[-1]), "batch": (BATCHES[0], BATCHES[-1])}
PATH = Path(__file__).parents[1] / "results" / "table.parquet"


@dataclass(frozen=True, order=True)
class Config:
    """A learning rate and a batch size in samples."""

    lr: float
    batch: int

    def __str__(self) -> str:
        return f"lr {self.lr:.3g}, batch {self.batch}"


def grid() -> list[Config]:
    return [Config(lr, batch) for lr in LRS for batch in BATCHES]


def nearest(lr: float, batch: float) -> Config:
    """The configuration of the grid that is nearest in logarithms."""
    return Config(
        min(LRS, key=lambda other: abs(math.log(other / lr))), min(BATCHES, key=lambda b: abs(math.log(b / batch)))
    )


class Family:
    """One family's part of the table.

    rows      its rows
    samples   of one run
    higher    whether more of the metric is better
    averaged  take the metric of the averaged weights
    """

    def __init__(self, rows: pd.DataFrame, samples: int, higher: bool, averaged: bool = False) -> None:
        self.samples, self.higher, self.averaged = samples, higher, averaged
        self.curves: dict[tuple[Config, int], Curve] = {}
        column = "metric_averaged" if averaged else "metric"
        for (lr, batch, seed), run in rows.sort_values("check").groupby(["lr", "batch", "seed"]):
            self.curves[nearest(lr, batch), int(seed)] = Curve(
                run["samples"].to_numpy(float), run["seconds_plain"].to_numpy(float), run[column].to_numpy(float)
            )

    def worst(self) -> float:
        return -math.inf if self.higher else math.inf

    def finite(self, value: float) -> float:
        """What is not a number is worse than any."""
        return value if math.isfinite(value) else self.worst()

    def loss(self, value: float) -> float:
        """A value as something to minimise."""
        return -self.finite(value) if self.higher else self.finite(value)

    def final(self, config: Config, seeds: tuple[int, ...] = SEEDS) -> float:
        """Mean over seeds of the metric at the end."""
        return float(np.mean([self.finite(float(self.curves[config, seed].values[-1])) for seed in seeds]))

    @cached_property
    def best(self) -> Config:
        """The configuration of the grid with the best metric at the end."""
        return min(grid(), key=lambda config: self.loss(self.final(config)))


def load(path: Path = PATH) -> dict[str, pd.DataFrame]:
    """The rows of each family that is complete in the table."""
    rows = pd.read_parquet(path)
    return {str(name): part for name, part in rows.groupby("family", observed=True)}
