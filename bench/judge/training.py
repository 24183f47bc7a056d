"""One run of a family at one configuration, with everything that is recorded of it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from families import Family
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

from grgauge import AdamW, Gauge

from .table import CHECKS, Config

HORIZON = 10
"""Averaged weights are a mean over about the last tenth of the steps so far."""
BN_SAMPLES = 256
"""Training samples that BatchNorm's statistics of averaged weights are computed from."""


def polynomial_decay(averages: list[Tensor], weights: list[Tensor], updates: Tensor | int) -> None:
    """Step t's weights enter with 10 / (t + 9), those before keep the rest (Shamir and Zhang 2013, eta = 9)."""
    torch._foreach_lerp_(averages, weights, HORIZON / (int(updates) + HORIZON))


def averaged(model: nn.Module) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=polynomial_decay)


def validated(family: Family, average: AveragedModel) -> float:
    """The metric of averaged weights; BatchNorm's statistics are computed anew, as none belong to them."""
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in average.modules()):
        update_bn([family.data[:BN_SAMPLES]], average)
    return family.validate(average.module)


def batches(family: Family, size: int, seed: int) -> Iterator[tuple[Tensor, ...]]:
    """Batches without end; every epoch is shuffled anew, and a batch may reach into the next one."""
    generator, count = torch.Generator().manual_seed(seed), len(family.data)
    rows = torch.empty(0, dtype=torch.long)
    while True:
        while len(rows) < size:
            rows = torch.cat([rows, torch.randperm(count, generator=generator)])
        yield family.data[rows[:size]]
        rows = rows[size:]


def marks(samples: int) -> list[int]:
    """Samples at which a run is looked at."""
    return [math.ceil(samples * k / CHECKS) for k in range(1, CHECKS + 1)]


def recorded(family: Family, config: Config, seed: int) -> list[dict[str, Any]]:
    """One row a check. A run whose loss is not finite ends there, with a last row that says so.

    Seconds are CPU seconds of the one thread that trains: `seconds` with gauges and their divided batches,
    `seconds_plain` as if no step had been read, validation in neither.
    """
    torch.manual_seed(seed)
    model = family.model()
    optimizer = AdamW(family.param_groups(model), lr=config.lr)
    gauge = Gauge(optimizer, config.batch)
    average = averaged(model)
    rows: list[dict[str, Any]] = []
    due, losses, samples, step = marks(family.samples), list[float](), 0, 0
    spent = {True: 0.0, False: 0.0}  # seconds of steps that are read, of others
    count = {True: 0, False: 0}
    for batch in batches(family, config.batch, seed):
        step, samples = step + 1, samples + config.batch
        read, start = step % gauge.every == 0, time.thread_time()
        loss = float(gauge.split_backward(lambda part: family.loss(model, part), batch))
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        spent[read], count[read] = spent[read] + time.thread_time() - start, count[read] + 1
        losses.append(loss)
        failed = not math.isfinite(loss)
        if samples < due[0] and not failed:
            continue
        reading = gauge.reading()
        names = "gr_t", "gr_t_error", "gr_s", "gr_s_error", "noise_scale", "noise_scale_error", "grad_norm", "ready"
        rows.append(
            {
                "family": family.name,
                "lr": config.lr,
                "batch": config.batch,
                "seed": seed,
                "check": CHECKS - len(due),
                "samples": samples,
                "step": step,
                "seconds": sum(spent.values()),
                "seconds_plain": spent[False] / max(count[False], 1) * step,
                "loss": sum(losses) / len(losses),
                "read_at": None if reading is None else reading.step,
                **{name: None if reading is None else getattr(reading, name) for name in names},
                "metric": math.nan if failed else family.validate(model),
                "metric_averaged": math.nan if failed else validated(family, average),
            }
        )
        losses = []
        while due and samples >= due[0]:
            due.pop(0)
        if failed or not due:
            return rows
    raise AssertionError("batches() has no end")
