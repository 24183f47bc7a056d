"""Sums over gradients and their changes, of a sample of the watched parameters: what "delta" and "norm" read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

import grgauge_kernels as gk

from ..optim import local
from .matrix import Matrix

COLUMN = {"delta": gk.STATS.index("delta_abs"), "norm": gk.STATS.index("grad_abs")}
GRAD_ABS, NONFINITE = gk.STATS.index("grad_abs"), gk.STATS.index("nonfinite")

LARGEST_SAMPLE = 2**24
"""Elements, 64 MiB of state: what is sampled of the largest models."""

Metric = Literal["delta", "norm", "signal"]


class GradientBucket:
    """The monitored parameters of one device and dtype; under FSDP2 this rank's shards of them.

    owners  int64 [segments], the matrix that each belongs to
    """

    def __init__(self, params: list[nn.Parameter], owners: list[int], share: float, seed: int) -> None:
        self.params, self.owners = params, np.array(owners, dtype=np.int64)
        self._bucket = gk.Bucket([local(p) for p in params])
        self._sample, self._seed = max(1, round(share * self._bucket.numel)), seed
        self._sizes = torch.tensor(self._bucket.sizes, dtype=torch.float64, device=self._bucket.device)
        self._skipped: frozenset[int] | None = None
        self._lay_out(frozenset())

    def _lay_out(self, skipped: frozenset[int]) -> None:
        """Read all matrices but `skipped`. What `previous` held was laid out otherwise, and is lost."""
        if skipped == self._skipped:
            return
        segments = np.flatnonzero(np.isin(self.owners, list(skipped))).tolist()
        self._plan = self._bucket.plan(self._sample, self._seed, skip=segments)
        self._scale = torch.from_numpy(self._plan.scale).to(self._bucket.device)
        self._skipped = skipped
        self._previous: Tensor | None = None
        # Unusable elements of each segment, in the newest gradients and in those they are compared with.
        self._broken = self._broken_before = torch.ones_like(self._sizes)

    def measure(
        self, metric: Metric, skipped: frozenset[int], inv_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        """Read the gradients, and with "delta" keep their sample for the next call to differ from."""
        self._lay_out(skipped)
        device = self._bucket.device
        if metric == "delta" and self._previous is None:
            self._previous = torch.zeros(self._plan.numel, device=device)
        # A missing gradient has its parameter as a stand-in of the right size.
        grads = [local(p if p.grad is None else p.grad) for p in self.params]
        inv_scale = None if inv_scale is None else inv_scale.to(device)
        self._stats = gk.measure_(grads, self._plan, previous=self._previous, inv_scale=inv_scale)
        self._broken_before, self._broken = self._broken, self._stats[:, NONFINITE].clone()
        for i, p in enumerate(self.params):
            if p.grad is None:
                self._broken[i].fill_(1.0)
        if found_inf is not None:
            self._broken += found_inf.to(device)

    def rows(self, metric: Metric) -> Tensor:
        """float64 [segments, 4]: of each whole segment the metric's sum and sum |g|, its elements, and how many of the
        sampled ones were unusable."""
        broken = self._broken + self._broken_before if metric == "delta" else self._broken
        columns = [self._stats[:, i] * self._scale for i in (COLUMN[metric], GRAD_ABS)]
        return torch.stack([*columns, self._sizes, broken], dim=1)

    def filled(self) -> tuple[Tensor, Tensor] | None:
        """The gradients that the next ones are to differ from, and how much of them is unusable."""
        return None if self._previous is None else (self._previous.clone(), self._broken.clone())

    def refill(self, filled: tuple[Tensor, Tensor] | None, skipped: frozenset[int]) -> None:
        """Take up what `filled` returned; of another sample, or with None, start anew."""
        self._skipped = None
        self._lay_out(skipped)
        if filled is not None and filled[0].numel() == self._plan.numel:
            self._previous, self._broken = (t.to(self._bucket.device, copy=True) for t in filled)


def default_sample(tensors: Iterable[Tensor]) -> int:
    """Elements whose state, in float32, is 0.5 % of the tensors' own size on this rank."""
    size = sum(t.numel() * t.element_size() for t in map(local, tensors))
    return min(LARGEST_SAMPLE, size // 200 // torch.float32.itemsize)


def gradient_buckets(matrices: list[Matrix], sample: int | None, seed: int) -> list[GradientBucket]:
    alike: dict[tuple[torch.device, torch.dtype], tuple[list[nn.Parameter], list[int]]] = {}
    for i, matrix in enumerate(matrices):
        for p in matrix.params:
            params, owners = alike.setdefault((p.device, p.dtype), ([], []))
            params.append(p)
            owners.append(i)
    shards = [local(p) for matrix in matrices for p in matrix.params]
    total = max(1, sum(t.numel() for t in shards))
    if sample is None:
        sample = default_sample(shards)
    share = min(1.0, sample / total)
    return [GradientBucket(params, owners, share, seed) for params, owners in alike.values()]
