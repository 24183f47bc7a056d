"""Five families of models on real data, one file each, all of one shape."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

NAMES = ("images", "recommendation", "classification", "diffusion", "language")


class Family(ABC):
    """A model, its training loss and what is measured on held-out data. Random draws come from torch's generator.

    name      of the family, as in `NAMES`
    metric    what `validate` returns
    higher    whether more of it is better
    samples   of one training run
    data      training samples; a batch is a tuple of their rows
    held_out  validation samples
    """

    name: ClassVar[str]
    metric: ClassVar[Literal["accuracy", "HR@10", "loss"]]
    higher: ClassVar[bool]
    samples: ClassVar[int]
    data: TensorDataset
    held_out: TensorDataset

    @abstractmethod
    def model(self) -> nn.Module:
        """Fresh weights."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """The mean training loss of a batch."""

    @abstractmethod
    def measure(self, model: nn.Module) -> float:
        """The metric of a model in evaluation mode, without gradients."""

    def validate(self, model: nn.Module) -> float:
        """The metric; always on the same samples and, where it draws, with the same draws. Training is undisturbed."""
        training = model.training
        model.eval()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            value = self.measure(model)
        model.train(training)
        return value

    def param_groups(self, model: nn.Module, weight_decay: float = 0.01) -> list[dict[str, object]]:
        """Parameter groups for AdamW: matrices and kernels decay, biases and gains do not."""
        matrices = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() <= 1]
        groups = ((matrices, weight_decay), (others, 0.0))
        return [{"params": params, "weight_decay": decay} for params, decay in groups if params]


def kind(name: str) -> type[Family]:
    """The class of a family, by name. Raises ValueError for another name."""
    if name not in NAMES:
        raise ValueError(f"family is {name!r}; it must be one of {', '.join(NAMES)}")
    found: type[Family] = importlib.import_module(f"families.{name}").FAMILY
    return found


def family(name: str) -> Family:
    """A family with its data. Raises ValueError for another name, FileNotFoundError where the data were not fetched."""
    return kind(name)()
