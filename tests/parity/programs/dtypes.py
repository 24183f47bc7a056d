"""Dtypes, and tensors of no or one element."""

from __future__ import annotations

import torch
from parity.training import Net, program, train
from torch import nn


def _under_default(dtype, make):
    before = torch.get_default_dtype()
    net = Net()
    try:
        torch.set_default_dtype(dtype)
        optimizer = make(net.parameters(), lr=1e-2)
        train(net, optimizer, 3)
    finally:
        torch.set_default_dtype(before)
    return optimizer, list(net.parameters())


@program
def the_default_dtype_is_double(make):
    return _under_default(torch.float64, make)


@program
def the_default_dtype_is_bfloat16(make):
    return _under_default(torch.bfloat16, make)


@program
def parameters_of_double_and_complex(make):
    p, q = nn.Parameter(torch.ones(5, dtype=torch.float64)), nn.Parameter(torch.ones(3, dtype=torch.complex64))
    r = nn.Parameter(torch.ones(4))
    optimizer = make([p, q, r], lr=1e-2)
    for t in range(4):
        optimizer.zero_grad()
        loss = (p * (t + 1)).square().sum() + (q * (1 + 2j)).abs().sum() + (r - t).square().sum()
        loss.backward()
        optimizer.step()
    return optimizer, [p, q, r]


@program
def empty_and_single_elements(make):
    params = [nn.Parameter(torch.ones(shape)) for shape in ((0, 7), (), (1,), (1, 1, 1))]
    optimizer = make(params, lr=1e-2)
    for t in range(3):
        for p in params:
            p.grad = torch.full_like(p, 0.1 + t)
        optimizer.step()
    return optimizer, params
