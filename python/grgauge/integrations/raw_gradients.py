"""Reading gradients where a framework has finished them and has not clipped them yet. Torch alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class RawGradients(torch.optim.Optimizer):
    """An optimizer that moves nothing: for a gauge or GradES on it, gradients are what they are when `step` is called.

    model      whose names its parameters are given
    optimizer  the one that trains, whose parameters it has

    Under a GradScaler call `step` once gradients are unscaled, with `found_inf` set to what the scaler found.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(list(_named(model, optimizer)), {})
        self.found_inf: Tensor | None = None

    def step(self, closure: Any = None) -> Any:
        """Nothing but the hooks."""

    def step_scaled(self, scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> None:
        """`step`, where `scaler` has just unscaled the gradients of `optimizer`."""
        found = list(scaler._found_inf_per_device(optimizer).values())
        self.found_inf = torch.stack([each.to(found[0].device) for each in found]).sum() if found else None
        self.step()


def _named(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    names = {id(p): name for name, p in model.named_parameters()}
    for g, group in enumerate(optimizer.param_groups):
        for i, p in enumerate(group["params"]):
            yield names.get(id(p), f"{g}.{i}"), p
