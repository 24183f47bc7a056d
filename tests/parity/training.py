"""What the programs of the table share: the table, a small model, its data and its steps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

PROGRAMS = {}
"""Name of each program -> the program."""


def program(function):
    PROGRAMS[function.__name__] = function
    return function


class Net(nn.Module):
    """Convolution, norm, two experts and a head, of which no batch meets both experts."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.head = nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x, expert=0):
        x = F.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.head(self.experts[expert](x)) * self.scale


def data(t, dtype=torch.float32):
    generator = torch.Generator().manual_seed(100 + t)
    x = torch.randn(6, 3, 5, 5, generator=generator, dtype=torch.float32)
    y = torch.randint(0, 3, (6,), generator=generator)
    return x.to(dtype), y


def backward(net, t, expert=0):
    x, y = data(t, net.head.weight.dtype)
    loss = F.cross_entropy(net(x, expert), y)
    loss.backward()
    return loss


def train(net, optimizer, steps, expert=lambda t: 0, start=0, clear=lambda optimizer, t: optimizer.zero_grad()):
    for t in range(start, start + steps):
        clear(optimizer, t)
        backward(net, t, expert(t))
        optimizer.step()


def started(make, steps=3, **options):
    net = Net()
    optimizer = make(net.parameters(), lr=1e-2, **options)
    train(net, optimizer, steps)
    return net, optimizer
