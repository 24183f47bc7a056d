"""What a gauge must read: the definitions in float64, over the gradients of a loop written by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from grgauge import Reading
from grgauge.smoothing import Spatial

BETA, EVERY = 0.9, 5

Micro = tuple[Callable[[], Tensor], float, float]  # its mean loss, its size in samples, its share in the step's loss


@dataclass
class Truth:
    """One step's GR_T and |g|, of the gradient that the optimizer gets and of the raw one; raw GR_S and S/G2."""

    gr_t: float
    grad_norm: float
    raw_gr_t: float
    raw_grad_norm: float
    gr_s: float
    noise_scale: float


class Redundancy:
    """V^/|m^|^2 at every step."""

    def __init__(self) -> None:
        self.t, self.m, self.v = 0, torch.zeros(()), 0.0

    def update(self, g: Tensor) -> float:
        self.t += 1
        self.m, self.v = BETA * self.m + (1 - BETA) * g, BETA * self.v + (1 - BETA) * float(g @ g)
        warm = 1 - BETA**self.t
        return self.v / warm / float(self.m @ self.m) * warm**2


def plain_loop(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: Sequence[Sequence[Micro]],
    batch_size: float,
    clip: Callable[[list[Tensor]], object] = lambda params: None,
) -> list[Truth]:
    """Trains, and tells the truth of every fifth step."""
    params = list(model.parameters())
    got, raw, spatial, truths = Redundancy(), Redundancy(), Spatial(BETA), []
    for t, step in enumerate(steps, 1):
        optimizer.zero_grad()
        before: Tensor | float = 0.0
        groups = 0.0
        for loss, _, share in step:
            (loss() * share).backward()
            now = flat(params)
            groups += float((now - before).square().sum()) / share  # share |G|^2, where `share G` was added
            before = now
        raw_gr_t = raw.update(now)
        clip(params)
        g = flat(params)
        gr_t = got.update(g)
        if t % EVERY == 0:
            # E[sum p |G|^2] = G2 + S sum p/n and E|sum p G|^2 = G2 + S sum p^2/n
            whole = float(now @ now)
            apart, together = (sum(share**k / size for _, size, share in step) for k in (1, 2))
            s = (groups - whole) / (apart - together)
            spatial.update(s, whole - s * together)
            norms = float(g.norm()), float(now.norm())
            scale, gr_s = spatial.noise_scale, spatial.gr_s(batch_size)
            truths.append(Truth(gr_t, norms[0], raw_gr_t, norms[1], gr_s, scale))
        optimizer.step()
    return truths


def flat(params: list[Tensor]) -> Tensor:
    return torch.cat([p.grad.double().reshape(-1) for p in params if p.grad is not None])


def assert_reads(readings: list[Reading], truths: list[Truth], raw: bool = False, rel: float = 1e-6) -> None:
    """Every reading is true: of the gradient that the optimizer gets, or of the raw one."""
    assert [reading.step for reading in readings] == [EVERY * (i + 1) for i in range(len(truths))]
    for reading, truth in zip(readings, truths, strict=True):
        assert reading.gr_t == pytest.approx(truth.raw_gr_t if raw else truth.gr_t, rel=rel)
        assert reading.grad_norm == pytest.approx(truth.raw_grad_norm if raw else truth.grad_norm, rel=rel)
        assert reading.gr_s == pytest.approx(truth.gr_s, rel=rel)
        assert reading.noise_scale == pytest.approx(truth.noise_scale, rel=10 * rel)  # a ratio of differences
