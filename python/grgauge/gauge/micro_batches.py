"""Micro-batches as the groups of GR_S: what each backward adds to the gradient of the step in progress.

The groups of a step are the micro-batches whose gradients are in the gradient that the step uses. A training loop may
abandon a step halfway, clear its gradients, or change them between two backwards, and `micro_step` cannot see from
their values that this is not accumulation. So one parameter is watched: the norm of its gradient is noted after each
backward and compared before the next. If it differs, something other than a backward has changed it.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.hooks import unserializable_hook

from ..estimators import Groups
from ..optim import BucketSums
from .segments import DELTA_SQ, GRAD_SQ, NONFINITE, Rows
from .sources import Sample, SampledBucket
from .transfer import Array
from .unavailable import NON_FINITE, Unavailable

SMALL = 64
"""The watched parameter has at least this many elements, if any does: with fewer, a gradient is more often all zero."""


class When(enum.Enum):
    """When the watched gradient was compared with what it was before."""

    FIRST = enum.auto()  # before the step's first backward: it must be zero
    BETWEEN = enum.auto()  # before another backward, or on micro_step() after one: it must be as it was
    UNSEEN = enum.auto()  # where no backward was seen, as in a CUDA graph's replay: it must not have been cleared


@dataclass
class Collected:
    """The micro-batches of one step.

    sums     of the accumulated gradient after each, and of its growth since the one before
    shares   (samples, weight) that `micro_step` was given for each
    checks   of the watched gradient, in order of time: the number of micro-batches so far, and when
    norms    float64 [checks, 2]: its norm as it was left, and at each check; None without checks
    cleared  True if there were earlier ones, whose gradients have been cleared
    problem  why they cannot be groups, as far as is known without their values
    """

    sums: list[list[BucketSums]] = field(default_factory=list)
    shares: list[tuple[float | None, float | None]] = field(default_factory=list)
    checks: list[tuple[int, When]] = field(default_factory=list)
    norms: Tensor | None = None
    cleared: bool = False
    problem: Unavailable | None = None

    def judge(self, norms: Array | None) -> None:
        """Drop the micro-batches that turn out not to be in the step's gradient, given the norms on the host."""
        start, found = 0, None
        for (there, when), (before, now) in zip(self.checks, [] if norms is None else norms.tolist(), strict=True):
            if when is When.FIRST:
                if now != 0.0:
                    found = Unavailable("gradients were not cleared before the step", transient=True)
            elif now == 0.0 != before:
                start, found = there, None
            elif when is When.BETWEEN and 0 < there < len(self.sums) and not _same_norm(before, now):
                found = Unavailable("gradients were changed between two micro-batches", transient=True)
        self.problem = self.problem or found  # a problem known without values came later, or holds anyway
        self.cleared |= start > 0
        self.sums, self.shares, self.checks = self.sums[start:], self.shares[start:], []

    def groups(self, rows: Rows, wanted: int | None, batch_size: float) -> Groups | Unavailable:
        """The groups, given the sums on the host, or why there are none."""
        n = len(rows.totals)
        if wanted is not None and wanted < 2:
            return Unavailable(f"groups is {wanted}; it needs at least two micro-batches or ranks")
        if n == 0 and self.cleared:
            return Unavailable("gradients were cleared after the last micro_step()", transient=True)
        if n == 0:
            return Unavailable("call micro_step() after the backward of each of at least two micro-batches")
        if self.problem is not None:
            return self.problem
        if n == 1 or n != (wanted or n):
            return Unavailable(f"micro_step() was called {n} times in the step, not {wanted or 'at least 2'}")
        if any(total[NONFINITE] for total in rows.totals):
            return NON_FINITE
        samples, weights = ([value for value in column if value is not None] for column in zip(*self.shares))  # noqa: B905
        if len(samples) % n or len(weights) % n:
            return Unavailable("micro_step() was given samples or weight for some micro-batches only")
        p = [w / sum(weights) for w in weights] or [1.0 / n] * n
        # Gradients accumulate, so the difference is what micro-batch i has added: p_i G_i. The first has added all.
        added = [rows.totals[0][GRAD_SQ]] + [total[DELTA_SQ] for total in rows.totals[1:]]
        squares = [sq / share**2 for sq, share in zip(added, p, strict=True)]
        return Groups(squares, rows.totals[-1][GRAD_SQ], samples or [batch_size / n] * n, p)


class MicroBatches:
    """Collects the micro-batches of each step that is read.

    sample     the parameters to read
    watching   returns True if a backward that runs now belongs to such a step
    inv_scale  returns the factor that undoes a GradScaler's scale, None without one
    """

    def __init__(self, sample: Sample, watching: Callable[[], bool], inv_scale: Callable[[], Tensor | None]) -> None:
        self._sample, self._watching, self._inv_scale = sample, watching, inv_scale
        self._buckets: Sequence[SampledBucket] = ()
        self._watched: Tensor | None = None
        self._hooks: list[Any] = []
        self.drop()

    def drop(self) -> None:
        """Forget the micro-batches of the step in progress."""
        self._step = Collected()
        self._norms: list[tuple[Tensor, Tensor]] = []
        self._before: Tensor | None = None  # the watched gradient's norm as this step's backwards have left it
        self._unclaimed = False  # True if a backward has come since the last micro_step()

    def add(self, samples: float | None, weight: float | None) -> None:
        """Record the growth of the gradient since the last call as one more micro-batch."""
        buckets = self._sample.buckets()
        if not buckets:
            return
        if buckets is not self._buckets:
            if self._step.sums:
                self.drop()
                self._step.problem = Unavailable("parameters came, went or were frozen in the step", transient=True)
            self._buckets = buckets
            self._unwatch()
        if not self._unclaimed:
            self._check(When.UNSEEN)
        elif not (dist.is_available() and dist.is_initialized()):  # DDP puts the mean over ranks there
            self._check(When.BETWEEN)
        self._step.sums.append(self._sample.difference(self._inv_scale()))
        self._step.shares.append((samples, weight))
        self._watch()
        self._unclaimed = False

    def prepare(self) -> None:
        """Choose the parameter to watch on a step that is not read, so that the first one that is can be watched."""
        if self._watched is None:
            self._buckets = self._sample.buckets()
            self._watch()
            self._before = None

    def collect(self) -> Collected:
        """The micro-batches of the step in progress; the next step starts with none."""
        if self._step.sums:
            self._check(When.UNSEEN)
        step = self._step
        if self._unclaimed:
            step.problem = Unavailable("a backward came after the last micro_step()", transient=True)
        if self._norms:
            device = self._norms[0][1].device
            step.norms = torch.stack([torch.stack([norm.to(device) for norm in pair]) for pair in self._norms]).double()
        self.drop()
        return step

    def remove(self) -> None:
        """Stop watching."""
        self.drop()
        self._unwatch()

    def _watch(self) -> None:
        """Note the watched gradient as it is now; choose a parameter if none is watched, or if it has no gradient."""
        p = self._watched
        if p is None or p.grad is None or not p.requires_grad:
            self._unwatch()
            candidates = [p for bucket in self._buckets for p in bucket.params if p.grad is not None and p.numel()]
            if not candidates:
                return
            p = self._watched = min(candidates, key=lambda p: (p.numel() < SMALL, p.numel()))
            self._hooks = [
                p.register_hook(self._before_accumulation),
                p.register_post_accumulate_grad_hook(self._after_accumulation),
            ]
        self._before = _norm(p)

    def _unwatch(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._watched, self._hooks, self._before = None, [], None

    # Autograd calls both hooks in its own threads, while backward() waits.

    @unserializable_hook  # type: ignore[untyped-decorator]
    def _before_accumulation(self, _: Tensor) -> None:
        if self._watching():
            self._check(When.FIRST if self._before is None and not self._step.sums else When.BETWEEN)

    def _after_accumulation(self, p: Tensor) -> None:
        if self._watching():
            self._before, self._unclaimed = _norm(p), True

    def _check(self, when: When) -> None:
        """Compare the watched gradient with what it was. If it is None now, earlier micro-batches are gone."""
        p, before = self._watched, self._before
        if p is None:
            return
        if p.grad is None:
            if before is not None:
                cleared = self._step.cleared or bool(self._step.sums)
                self.drop()
                self._step.cleared = cleared
            return
        now = _norm(p)
        if before is None:
            if when is not When.FIRST:
                return
            before = now
        self._step.checks.append((len(self._step.sums), when))
        self._norms.append((before, now))


def _norm(p: Tensor) -> Tensor:
    assert p.grad is not None
    return torch.linalg.vector_norm(p.grad.detach(), dtype=torch.float32)


def _same_norm(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-5) or not (math.isfinite(a) or math.isfinite(b))
