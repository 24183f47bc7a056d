"""A small network and its batches, the same on every rank: what tests of gauges train."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

BATCH, BETA = 64, 0.9


class Net(nn.Module):
    """Sizes that no number of ranks divides."""

    def __init__(self, inputs: int = 13, width: int = 37, outputs: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(inputs, width), nn.Linear(width, width), nn.Linear(width, width)])
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


def network() -> Net:
    """The same weights on every rank."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


@functools.cache
def samples() -> tuple[Tensor, Tensor]:
    """Inputs [2000, 13] and noisy targets [2000, 3]."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2000, 13, generator=generator)
    return x, x[:, :3] + x[:, 3:6].sin() + 1.5 * torch.randn(2000, 3, generator=generator)


def batch(t: int, part: int = 0, parts: int = 1, size: int = BATCH) -> tuple[Tensor, Tensor]:
    """Part `part` of `parts` of step t's batch, drawn with replacement."""
    x, y = samples()
    rows = torch.randint(len(x), (size,), generator=torch.Generator().manual_seed(1000 + t)).chunk(parts)[part]
    return x[rows], y[rows]


def smoothed(values: list[float]) -> float:
    """The bias-corrected EMA after the last of them."""
    ema = 0.0
    for value in values:
        ema = BETA * ema + (1 - BETA) * value
    return ema / (1 - BETA ** len(values))
