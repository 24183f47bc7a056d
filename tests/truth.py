"""The formula once more, in float64 and without chunks: what every backend is judged by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = 1e16


def sums(g: Tensor, m: Tensor | None, delta: Tensor | None, finite: Tensor) -> Tensor:
    """The six sums of one segment's visited elements, float64 [6]."""
    zero = torch.zeros((), dtype=torch.float64)
    m = zero if m is None else m.double()[m.double().abs() <= LARGEST]
    delta = zero if delta is None else delta[finite]
    g = g[finite]
    return torch.stack(
        [g.square().sum(), m.square().sum(), g.abs().sum(), delta.square().sum(), delta.abs().sum(), (~finite).sum()]
    )


def finite(g: Tensor) -> Tensor:
    return g.abs() <= LARGEST  # False for NaN


@dataclass
class Adamw:
    """float64 AdamW of one segment, as torch documents it."""

    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    def step(
        self,
        grad: Tensor,
        t: float,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        maximize: bool = False,
    ) -> None:
        beta1, beta2 = betas
        g = -grad.double() if maximize else grad.double()
        self.param = self.param * (1 - lr * weight_decay)
        self.exp_avg = beta1 * self.exp_avg + (1 - beta1) * g
        self.exp_avg_sq = beta2 * self.exp_avg_sq + (1 - beta2) * g * g
        root = (self.exp_avg_sq / (1 - beta2**t)).sqrt()
        self.param = self.param - lr * (self.exp_avg / (1 - beta1**t)) / (root + eps)


def relative(a: Tensor, b: Tensor) -> float:
    """Largest |a - b| relative to the largest |b|; 0 for two empty tensors."""
    a, b = a.detach().double(), b.detach().double()
    if not b.numel():
        return 0.0
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-300))
