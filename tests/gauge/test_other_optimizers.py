"""Gauges on optimizers of other kinds and other packages: they read what a float64 run over the same gradients does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from grgauge import Gauge

BETA, STEPS = 0.9, 30


def adamw_8bit(params):
    from torchao.optim import AdamW8bit

    return AdamW8bit(params, lr=1e-3)


def matrices_by_muon(params):
    """Muon takes matrices alone; a model's other parameters have an optimizer and a gauge of their own."""
    return torch.optim.Muon([p for p in params if p.ndim == 2], lr=1e-2)


OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "Adam, beta1 = 0.8": lambda params: torch.optim.Adam(params, lr=1e-3, betas=(0.8, 0.999)),
    "Adafactor": lambda params: torch.optim.Adafactor(params, lr=1e-2),
    "Muon": matrices_by_muon,
    "AdamW8bit of torchao": adamw_8bit,
}


@pytest.mark.filterwarnings("ignore")  # of the other packages, about themselves
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_gauge_reads_the_gradients_that_any_optimizer_gets(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    params = [p for group in optimizer.param_groups for p in group["params"]]
    gauge = Gauge(optimizer, batch_size=32)
    m, v = torch.zeros(sum(p.numel() for p in params), dtype=torch.float64), 0.0
    teacher = torch.randn(64, 64)
    for _ in range(STEPS):
        x = torch.randn(32, 64)
        optimizer.zero_grad()
        whole = torch.zeros_like(m)
        for half in x.chunk(2):
            (nn.functional.mse_loss(model(half), half @ teacher) / 2).backward()
            gauge.micro_step()
        whole = torch.cat([p.grad.double().reshape(-1) for p in params])
        m, v = BETA * m + (1 - BETA) * whole, BETA * v + (1 - BETA) * float(whole @ whole)
        with torch.compiler.set_stance("force_eager"):  # torchao would compile its update for half a minute
            optimizer.step()
    warm = 1 - BETA**STEPS
    reading = gauge.reading()
    assert reading.gr_t == pytest.approx(v / warm / float(m @ m) * warm**2, rel=1e-6)
    assert reading.grad_norm == pytest.approx(float(whole.norm()), rel=1e-6)
    assert 1 / 32 <= reading.gr_s <= 1
    assert len(reading.segments) == len(params)
