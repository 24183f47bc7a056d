"""Tuners and optimizers that train: GR-Gauge, and opponents that need no search."""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from families import Family
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

import grgauge
from grgauge import Result, TrainingError, Trial, tune
from grgauge.tuning.tuner import default_start

from .protocol import Curve
from .table import BATCHES, BOUNDS, CHECKS, Config
from .training import BN_SAMPLES, averaged, batches, validated

LIMIT = 4.0
"""Static runs that a live tuner may spend."""
BATCH = BATCHES[2]
"""Of optimizers that set their own learning rate and no batch."""
_LR, _BATCH = default_start({"lr": BOUNDS["lr"], "batch_size": BOUNDS["batch"]})
DEFAULT = Config(_LR, round(_BATCH))
"""Where `tune` begins in these bounds if it is not told."""


class Arrived(BaseException):
    """All targets are met: leaves the training function. No Exception, which tune() would take for a failure."""


@dataclass
class Looks:
    """What is seen of live training from outside, at the marks of static runs, at no cost to the one who trains.

    goals   of raw and of averaged weights the value to be met; when both are, looking raises `Arrived`
    spent   samples before the weights at hand
    """

    family: Family
    goals: dict[bool, float]
    seen: list[tuple[float, float, float, float]] = field(default_factory=list)
    looking: float = 0.0
    spent: int = 0

    def __post_init__(self) -> None:
        self.started, self._step = time.thread_time(), self.family.samples / CHECKS

    def due(self, samples: int) -> bool:
        last = self.seen[-1][0] if self.seen else 0.0
        return samples // self._step > last // self._step

    def look(self, samples: int, raw: Callable[[], float], average: Callable[[], float]) -> None:
        start = time.thread_time()
        self.seen.append((samples, start - self.started - self.looking, raw(), average()))
        self.looking += time.thread_time() - start
        if self.arrived:
            raise Arrived

    @property
    def arrived(self) -> bool:
        return all(self._met(column, self.goals[which]) for which, column in ((False, 2), (True, 3)))

    def _met(self, column: int, goal: float) -> bool:
        values = [row[column] for row in self.seen if math.isfinite(row[column])]
        return any(value >= goal if self.family.higher else value <= goal for value in values)

    def curves(self) -> dict[bool, Curve]:
        """Of raw and of averaged weights. Raises ValueError if nothing was seen."""
        if not self.seen:
            raise ValueError("nothing was trained; a tuner must train before it is judged")
        samples, seconds, raw, average = np.array(self.seen).T
        return {False: Curve(samples, seconds, raw), True: Curve(samples, seconds, average)}


Optimizers = Callable[[Family, nn.Module], torch.optim.Optimizer]


def trained(
    family: Family,
    optimizer_of: Optimizers,
    batch: int,
    seed: int,
    goals: dict[bool, float],
    looks: Looks | None = None,
) -> Looks:
    """One run of an optimizer that is left alone; with `looks`, after what has been spent there."""
    looks = looks or Looks(family, goals)
    torch.manual_seed(seed)
    model = family.model()
    optimizer, samples = optimizer_of(family, model), looks.spent
    average = averaged(model)
    # Schedule-Free holds the weights to be used apart from those that gradients are taken at.
    to_use, to_train = (getattr(optimizer, name, lambda: None) for name in ("eval", "train"))

    def raw() -> float:
        to_use()
        if hasattr(optimizer, "eval"):  # as its README says: no statistics of BatchNorm belong to those weights yet
            update_bn([family.data[:BN_SAMPLES]], model)
        value = family.validate(model)
        to_train()
        return value

    to_train()
    try:
        for rows in batches(family, batch, seed):
            loss = family.loss(model, rows)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(model)
            samples += batch
            if not math.isfinite(float(loss.detach())):
                looks.look(samples, lambda: math.nan, lambda: math.nan)
                break
            if looks.due(samples):
                looks.look(samples, raw, lambda: validated(family, average))
            if samples >= LIMIT * family.samples:
                break
    except Arrived:
        pass
    return looks


def adamw(lr: float) -> Optimizers:
    return lambda family, model: grgauge.AdamW(family.param_groups(model), lr=lr)  # type: ignore[arg-type]


def prodigy(family: Family, model: nn.Module) -> torch.optim.Optimizer:
    """As its README says: a learning rate of 1, and nothing to set."""
    from prodigyopt import Prodigy

    return Prodigy(family.param_groups(model), lr=1.0)


def schedule_free(family: Family, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW without a schedule, at its default learning rate."""
    from schedulefree import AdamWScheduleFree

    return AdamWScheduleFree(family.param_groups(model))


def gr_gauge(family: Family, start: Config | None, seed: int, goals: dict[bool, float], paper: bool = False) -> Looks:
    """`grgauge.tune` over the whole plane; no validation is shown to it. `start` None: where it begins by default."""
    looks = Looks(family, goals)
    with contextlib.suppress(Arrived):
        tuned(family, start, seed, looks, LIMIT, paper)
    return looks


def tuned(
    family: Family, start: Config | None, seed: int, looks: Looks, limit: float, paper: bool = False
) -> Result | None:
    """`grgauge.tune` with a budget of `limit` static runs; None if it failed, and why is printed."""

    def look(trial: Trial) -> None:
        model, average = trial.model, trial.averaged
        if model is not None and average is not None and not trial.probing and looks.due(trial.used):
            looks.look(trial.used, lambda: family.validate(model), lambda: validated(family, AveragedModel(average)))

    def train(trial: Trial) -> None:
        model = family.model()
        trial.watch(model, grgauge.AdamW(family.param_groups(model), lr=trial.lr))  # type: ignore[arg-type]
        for batch in trial.batches(family.data):
            trial.step(family.loss(model, batch))

    with tempfile.TemporaryDirectory() as folder:
        try:
            return tune(
                train,
                {"lr": BOUNDS["lr"], "batch_size": BOUNDS["batch"]},
                budget=round(limit * family.samples),
                storage=Path(folder) / "run.db",
                policy=grgauge.Policy.paper if paper else grgauge.Policy.default,
                start=None if start is None else grgauge.Config(start.lr, start.batch),
                seed=seed,
                on_step=look,
            )
        except TrainingError as error:  # a start that failed has not arrived
            print(f"{family.name}, seed {seed}: {error}")
            return None
