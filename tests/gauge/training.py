"""What the gauge's tests share: optimizers, a small regression, and steps of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from grgauge import AdamW, Gauge

OPTIMIZERS = {
    "ours, fused": lambda p: AdamW(p, lr=1e-3),
    "ours, flat": lambda p: AdamW(p, lr=1e-3, flat=True),
    "ours, clipping": lambda p: AdamW(p, lr=1e-3, max_grad_norm=0.3),
    "ours, clipping, flat": lambda p: AdamW(p, lr=1e-3, max_grad_norm=0.3, flat=True),
    "ours, other beta1": lambda p: AdamW(p, lr=1e-3, betas=(0.8, 0.99)),
    "torch AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-3),
}
EVERY_OPTIMIZER = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 3))


DATA = torch.Generator().manual_seed(11)
X = torch.randn(2000, 10, generator=DATA)
Y = torch.randn(2000, 3, generator=DATA) + X[:, :3]


def loss_of(net, rows, reduction="mean"):
    return nn.functional.mse_loss(net(X[rows]), Y[rows], reduction=reduction)


def drive(optimizer, params, make_gradient, steps, gauge):
    """Steps on given gradients; the last reading."""
    for t in range(steps):
        for p, g in zip(params, make_gradient(t), strict=True):
            p.grad = g if p.grad is None else p.grad.copy_(g)
        optimizer.step()
    return gauge.reading()


def run(make, steps, n=4, gauge=None, net=None, optimizer=None, start=0):
    net = net or network()
    optimizer = optimizer or make(net.parameters())
    gauge = gauge or Gauge(optimizer, 32)
    for t in range(start, start + steps):
        optimizer.zero_grad()
        for k in range(n):
            loss_of(net, slice((t * 32 + k * 8) % 1900, (t * 32 + k * 8) % 1900 + 8)).backward()
            gauge.micro_step()
        optimizer.step()
    return net, optimizer, gauge
