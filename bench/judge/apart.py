"""GR-Gauge without state reuse: trials with fresh weights, one after the other, by what the library has for those.

Of the paper's ablations no-R leaves out the reuse of state, no-RS the guided search too, no-RT early stopping too. What
a trial reads makes the next configuration (`grgauge.suggest`), or chance does; `grgauge.policy.Pruning` ends a trial,
or nothing does before a whole run.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable

import torch
from families import Family

import grgauge
from grgauge import Gauge, suggest
from grgauge.policy import Progress, Pruning

from .live import LIMIT, Arrived, Looks
from .opponents import start_of
from .table import BOUNDS, Config
from .training import averaged, batches, validated

Next = Callable[[list[Progress], Config], Config]
"""The next trial's configuration, from what a trial has read and its own."""


def guided(trial: list[Progress], config: Config) -> Config:
    """As the gauges say, within the plane; as it was, if nothing was read."""
    if not trial:
        return config
    to = suggest([progress.reading for progress in trial], grgauge.Config(config.lr, config.batch))
    (low, high), (least, most) = BOUNDS["lr"], BOUNDS["batch"]
    return Config(min(max(to.lr, low), high), min(max(to.batch_size, int(least)), int(most)))


def by_chance(seed: int) -> Next:
    """Log-uniform over the plane, the same for the same seed."""
    rng = random.Random(seed)
    return lambda trial, config: start_of(rng.getrandbits(32))


def apart(
    family: Family, start: Config, seed: int, goals: dict[bool, float], following: Next, pruning: Pruning | None
) -> Looks:
    """Trials until all goals are met, or the limit of live tuners is spent."""
    looks, config = Looks(family, goals), start
    others: list[list[Progress]] = []
    with contextlib.suppress(Arrived):
        while looks.spent < LIMIT * family.samples:
            others.append(_trial(looks, config, seed + len(others), pruning, others))
            config = following(others[-1], config)
    return looks


def _trial(
    looks: Looks, config: Config, seed: int, pruning: Pruning | None, others: list[list[Progress]]
) -> list[Progress]:
    """One trial, of a whole run at most; what it read."""
    family = looks.family
    torch.manual_seed(seed)
    model = family.model()
    optimizer = grgauge.AdamW(family.param_groups(model), lr=config.lr)  # type: ignore[arg-type]
    gauge, average = Gauge(optimizer, config.batch), averaged(model)
    read: list[Progress] = []
    losses: list[float] = []
    begun, newest = looks.spent, None
    for batch in batches(family, config.batch, seed):
        losses.append(float(gauge.split_backward(lambda part: family.loss(model, part), batch)))
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        looks.spent += config.batch
        if not math.isfinite(losses[-1]):
            looks.look(looks.spent, lambda: math.nan, lambda: math.nan)
            return read
        if looks.due(looks.spent):
            looks.look(looks.spent, lambda: family.validate(model), lambda: validated(family, average))
        reading = gauge.reading()
        if reading is not None and reading is not newest:
            newest = reading
            read.append(Progress(reading, sum(losses) / len(losses)))
            losses = []
            if pruning is not None and pruning.judge(read, others) is not None:
                return read
        if looks.spent - begun >= family.samples or looks.spent >= LIMIT * family.samples:
            return read
    raise AssertionError("batches() has no end")
