"""Learning rates and weight decays of an optimizer and the schedulers on it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler


def peak_lr(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate that a schedule multiplies, the highest of all groups."""
    return max(
        float(group.get("max_lr", group.get("initial_lr", group["lr"])))  # OneCycleLR's, any scheduler's, none
        for group in optimizer.param_groups
    )


def highest_lr(optimizer: torch.optim.Optimizer) -> float:
    return max(float(group["lr"]) for group in optimizer.param_groups)


def scale(optimizer: torch.optim.Optimizer, others: Iterable[Any], ratio: float) -> None:
    """Multiply the learning rates of all groups, and all that schedulers compute the next ones from."""
    for group in optimizer.param_groups:
        for name in ("lr", "initial_lr", "max_lr", "min_lr"):
            if name == "lr" and isinstance(group[name], Tensor):
                group[name].mul_(ratio)  # a captured graph reads this very tensor
            elif name in group:
                group[name] = group[name] * ratio
    for other in others:
        if isinstance(other, LRScheduler):
            _scale_scheduler(other, ratio)


def scale_decay(optimizer: torch.optim.Optimizer, ratio: float) -> None:
    for group in optimizer.param_groups if ratio != 1.0 else ():
        if "weight_decay" in group:
            group["weight_decay"] *= ratio


def _scale_scheduler(scheduler: LRScheduler, ratio: float) -> None:
    for name in ("base_lrs", "max_lrs", "min_lrs", "_last_lr"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, [lr * ratio for lr in getattr(scheduler, name)])
    if hasattr(scheduler, "eta_min"):
        scheduler.eta_min *= ratio
    for inner in getattr(scheduler, "_schedulers", ()):
        _scale_scheduler(inner, ratio)
