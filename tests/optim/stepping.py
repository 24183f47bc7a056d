"""What the optimizer's tests share: parameters of many shapes, gradients for them, and steps."""

from __future__ import annotations

import pytest
import torch
import truth
from torch import nn

FLAT = pytest.mark.parametrize("flat", [False, True], ids=["loose", "flat"])


def parameters(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(64, 33), (33,), (5000,), (), (4, 3, 3, 3), (0, 7)]
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def gradients(t, like, scale=1.0):
    generator = torch.Generator().manual_seed(1000 + t)
    return [(torch.randn(p.shape, generator=generator) * scale).to(p.dtype) for p in like]


def advance(optimizer, params, steps, start=0, scale=1.0):
    for t in range(start, start + steps):
        for p, g in zip(params, gradients(t, params, scale), strict=True):
            if p.grad is None:
                p.grad = g.clone()
            else:
                p.grad.copy_(g)
        optimizer.step()


def assert_close(ours, theirs, tolerance=1e-6):
    for p, q in zip(ours, theirs, strict=True):
        assert truth.relative(p, q) <= tolerance


def two_dtypes():
    params = parameters()
    half = [p.detach().bfloat16().requires_grad_() for p in parameters(seed=1)[:2]]
    return [*params, *half], [{"params": params}, {"params": half, "lr": 1e-2, "weight_decay": 0.0}]
