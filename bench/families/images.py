"""A narrow ResNet-18 with BatchNorm on 5 000 images of MNIST."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from . import Family
from .fetch import data

WIDTH = 8
TRAIN = 4000


class Block(nn.Module):
    """Two 3 × 3 convolutions around a shortcut, as in torchvision's BasicBlock."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def resnet18(width: int = WIDTH, classes: int = 10) -> nn.Sequential:
    """ResNet-18 for one channel, `width` channels in its first stage instead of 64; a stem of stride 2, no pooling."""
    stem = [nn.Conv2d(1, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    widths = [width, width, 2 * width, 4 * width, 8 * width]
    blocks = [
        block
        for k in range(4)
        for block in (Block(widths[k], widths[k + 1], 1 if k == 0 else 2), Block(widths[k + 1], widths[k + 1], 1))
    ]
    model = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, classes))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


class Images(Family):
    name, metric, higher, samples = "images", "accuracy", True, 10_000

    def __init__(self) -> None:
        rows = np.loadtxt(data("mnist_5k.csv.gz"), delimiter=",", dtype=np.uint8)
        rows = rows[np.random.default_rng(0).permutation(len(rows))]
        pixels = torch.from_numpy(rows[:, :-1]).float().view(-1, 1, 28, 28) / 255.0
        pixels, labels = (pixels - 0.1307) / 0.3081, torch.from_numpy(rows[:, -1]).long()
        self.data = TensorDataset(pixels[:TRAIN], labels[:TRAIN])
        self.held_out = TensorDataset(pixels[TRAIN:], labels[TRAIN:])

    def model(self) -> nn.Module:
        return resnet18()

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    def measure(self, model: nn.Module) -> float:
        x, y = self.held_out.tensors
        return float((model(x).argmax(1) == y).double().mean())


FAMILY = Images
