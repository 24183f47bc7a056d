"""A family on another device than the CPU."""

from __future__ import annotations

import torch
from families import Family
from torch import Tensor, nn
from torch.utils.data import TensorDataset


def require(name: str) -> torch.device:
    """A device by name. Raises ValueError where there is none of that name, and RuntimeError where torch sees none."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}; it must be a device of torch, as cpu or cuda") from error
    torch.empty(0, device=device)
    return device


class Placed(Family):
    """A family whose model, data and draws are on a device. Families know of no device: their tensors are moved, and
    what they make anew is made there."""

    def __init__(self, family: Family, device: torch.device) -> None:
        self.family, self.device = family, device
        self.name, self.metric = family.name, family.metric  # type: ignore[misc]
        self.higher, self.samples = family.higher, family.samples  # type: ignore[misc]
        for name, value in vars(family).items():
            if isinstance(value, Tensor):
                setattr(family, name, value.to(device))
            elif isinstance(value, TensorDataset):
                setattr(family, name, TensorDataset(*(tensor.to(device) for tensor in value.tensors)))
        self.data, self.held_out = family.data, family.held_out

    def model(self) -> nn.Module:
        with self.device:
            return self.family.model()

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        with self.device:
            return self.family.loss(model, batch)

    def measure(self, model: nn.Module) -> float:
        with self.device:
            return self.family.measure(model)

    def validate(self, model: nn.Module) -> float:
        with torch.random.fork_rng():  # of all devices; a family's own is the CPU's
            return super().validate(model)


def placed(family: Family, device: torch.device) -> Family:
    return family if device.type == "cpu" else Placed(family, device)
