"""Sums of several steps on the host, and each segment's own share of GR_T."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

import grgauge_kernels as gk

from ..optim import BucketSums
from ..reading import SegmentReading
from .transfer import FEW, Array

GRAD_SQ, EMA_SQ, _, DELTA_SQ, _, NONFINITE = range(len(gk.STATS))

UNFOLDED = 100
"""Passes after which the per-segment table processes them even if nobody has asked for it."""


_complete = operator.attrgetter("plan.complete")


class Ages:
    """Number of updates that each segment's m has had: float64 [segments], all buckets together."""

    def __init__(self, buckets: list[Array]) -> None:
        self.each = buckets[0] if len(buckets) == 1 else np.concatenate(buckets or [np.zeros(0)])
        if len(self.each) <= FEW:
            ages = self.each.tolist()
            self.youngest, self.oldest = min(ages, default=math.inf), max(ages, default=0.0)
        else:
            self.youngest, self.oldest = float(np.minimum.reduce(self.each)), float(np.maximum.reduce(self.each))


class Rows:
    """The sums of several passes over the same segments on the host, all buckets together.

    sums    float64 [passes, segments, 6], scaled up from the sample to the whole of each segment
    seen    bool [passes, segments], False where a pass did not visit a segment; None if all visited all
    totals  the six sums over all segments, a list of six a pass
    taken   the passes that count: the optimizer has skipped the others, as on overflow under GradScaler
    parts   float64 [passes, segments of the plan, 6] of each bucket, as the kernel returned them, if a sample is in
    parts; otherwise empty
    plans   the plan of each of `parts`
    """

    sums: Array = np.empty((0, 0, len(gk.STATS)))
    parts: Sequence[Array] = ()
    plans: Sequence[gk.Plan] = ()
    seen: npt.NDArray[np.bool_] | None = None
    totals: list[list[float]]
    taken: list[int]

    def __init__(self, rows: list[list[BucketSums]], arrays: Iterator[Array]) -> None:
        if not rows:
            self.totals, self.taken = [], []
            return
        parts = [next(arrays) for _ in rows[0]]
        if parts[0].shape[2] > len(gk.STATS):
            # Added up over ranks, already scaled; the last column shows what any rank has seen.
            seen = np.concatenate([part[:, :, -1] for part in parts], axis=1) > 0
            self.seen = None if seen.all() else seen
            parts = [part[:, :, :-1] for part in parts]
        elif not all(map(_complete, chain.from_iterable(rows))):
            if any(bucket.plan.in_parts for bucket in rows[0]):
                self.parts, self.plans = parts, [bucket.plan for bucket in rows[0]]
            scales = [np.stack([row[i].plan.scale for row in rows]) for i in range(len(parts))]
            scaled = [part * scale[:, :, None] for part, scale in zip(parts, scales, strict=True)]
            parts = [_joined(part, bucket.plan, np.add) for part, bucket in zip(scaled, rows[0], strict=True)]
            visited = [
                [_joined(b.plan.seen[None, :, None], b.plan, np.logical_or).ravel() for b in row] for row in rows
            ]
            self.seen = np.array([np.concatenate(row) for row in visited])
        self.sums = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
        one = self.sums.shape[1] == 1
        self.totals = (self.sums[:, 0] if one else np.einsum("psk->pk", self.sums)).tolist()
        self.taken = [i for i, total in enumerate(self.totals) if not math.isnan(total[GRAD_SQ])]

    @property
    def grad_sq(self) -> Array:
        """Sum g^2 of each segment in the passes that count: float64 [passes, segments]."""
        every = self.sums[:, :, GRAD_SQ]
        return every if len(self.taken) == len(every) else every[self.taken]


def _joined(part: npt.NDArray[Any], plan: gk.Plan, how: np.ufunc) -> npt.NDArray[Any]:
    """[passes, segments of the plan, k] -> [passes, tensors, k]."""
    if not plan.in_parts:
        return part
    return np.asarray(how.reduceat(part, np.flatnonzero(np.diff(plan.tensor, prepend=-1)), axis=1))


class SampleError:
    """How far readings may be off because only a sample is read: `gk.sampling.sampled_ratio` of their sums.

    A sample stays the same for as long as its EMA lives, so time does not average this error away. 0 without a sample.
    """

    def __init__(self, beta: float) -> None:
        self._beta = beta
        self._steps = 0
        self._grad_sq: list[Array] = []  # V of each segment of each plan, not scaled up, without bias correction

    def fold(self, rows: Rows) -> None:
        """Add steps."""
        if not (rows.plans or self._grad_sq):
            return
        if [len(v) for v in self._grad_sq] != [plan.segments for plan in rows.plans]:
            self._steps, self._grad_sq = 0, [np.zeros(plan.segments) for plan in rows.plans]
        for i in rows.taken if rows.plans else ():
            self._steps += 1
            for v, part in zip(self._grad_sq, rows.parts, strict=True):
                v += (1 - self._beta) * (part[i, :, GRAD_SQ] - v)

    def of_gr_t(self, rows: Rows, i: int, ages: Ages) -> float:
        """Standard error of GR_T at step i."""
        if not rows.plans:
            return 0.0
        columns, start = [], 0
        for v, part, plan in zip(self._grad_sq, rows.parts, rows.plans, strict=True):
            age = ages.each[start:][plan.tensor]
            start += int(plan.tensor[-1]) + 1
            moment = part[i, :, EMA_SQ] / (1 - self._beta ** np.maximum(age, 1)) ** 2
            columns.append(np.stack([v / (1 - self._beta**self._steps), moment], axis=-1))
        return _ratio_error(columns, rows.plans)[1]

    @staticmethod
    def of_groups(groups: Rows, shares: Sequence[float]) -> float:
        """Relative standard error of sum p_i |G_i|^2 / |g|^2, from which S and G2 follow."""
        columns = []
        for part in groups.parts:
            added = np.stack([part[0, :, GRAD_SQ], *part[1:, :, DELTA_SQ]]) / np.array(shares)[:, None]
            columns.append(np.stack([added.sum(axis=0), part[-1, :, GRAD_SQ]], axis=-1))
        ratio, error = _ratio_error(columns, groups.plans)
        return error / ratio if ratio > 0.0 else 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps, "grad_sq": [v.tolist() for v in self._grad_sq]}

    @staticmethod
    def from_state(state: dict[str, Any], beta: float) -> SampleError:
        error = SampleError(beta)
        error._steps, error._grad_sq = state["steps"], [np.array(v) for v in state["grad_sq"]]
        return error


def _ratio_error(columns: list[Array], plans: Sequence[gk.Plan]) -> tuple[float, float]:
    """Ratio of two sums over all buckets, given [segments, 2] of each, and its standard error; 0 without a sample."""
    if not columns:
        return 0.0, 0.0
    sums, covariance = np.zeros(2), np.zeros((2, 2))
    for column, plan in zip(columns, plans, strict=True):
        s, c = gk.sampled_sums(column, plan)
        sums, covariance = sums + s.sum(axis=0), covariance + c.sum(axis=0)
    ratio, error = gk.sampled_ratio(sums, covariance)
    return float(ratio), float(error)


class Table:
    """Each segment's own V, and |m|^2 at the last reading. A segment without gradient keeps both, as optimizers do.

    A reading needs only totals, so values of single segments are computed when they are asked for, or after `UNFOLDED`
    passes.
    """

    def __init__(self, names: list[str], sizes: list[int], beta: float) -> None:
        self.names, self.sizes, self.beta = names, sizes, beta
        # Replaced, never changed in place: the tables of earlier readings refer to them.
        self.steps = np.zeros(len(names))
        self.grad_sq = np.zeros(len(names))  # V, still without bias correction
        self.moment_sq: Callable[[], Array] = functools.partial(np.zeros, len(names))
        self._recent: list[Rows] = []  # passes that `steps` and `grad_sq` do not have yet
        self._unfolded = 0  # their number
        self._uneven = False

    def fold(self, rows: Rows) -> list[float]:
        """Add passes. Returns the sum g^2 of each, where V stands in for a segment without gradient."""
        if not rows.totals:  # no parameter was trained, and there are no segments
            return []
        if rows.seen is None:
            self._recent.append(rows)
            self._unfolded += len(rows.totals)
            if self._unfolded >= UNFOLDED:
                self._settle()
            return [rows.totals[i][GRAD_SQ] for i in rows.taken]
        self._settle()
        totals = []
        for i in rows.taken:
            seen, now = rows.seen[i], rows.sums[i, :, GRAD_SQ]
            totals.append(float(np.where(seen, now, _corrected(self.grad_sq, self.steps, self.beta)).sum()))
            self.steps = self.steps + seen
            self._uneven = self._uneven or not bool(seen.all())
            self.grad_sq = np.where(seen, self.beta * self.grad_sq + (1 - self.beta) * now, self.grad_sq)
        return totals

    def _settle(self) -> None:
        self.steps, self.grad_sq = _advanced(self.steps, self.grad_sq, self._recent, self.beta)
        self._recent, self._unfolded = [], 0

    @property
    def uneven_grad_sq(self) -> float | None:
        """V, bias-corrected, if segments have had gradients at different steps; otherwise None."""
        if not self._uneven:
            return None
        self._settle()
        return float(_corrected(self.grad_sq, self.steps, self.beta).sum())

    def moment(self, rows: Rows, i: int, ages: Ages) -> float:
        """|m^|^2 over all segments at step i, bias-corrected by the number of updates each one's m has had."""
        now = rows.sums[i, :, EMA_SQ]
        if rows.seen is None:
            self.moment_sq = functools.partial(_moment_sq, now, ages.each, self.beta)
            if ages.youngest == ages.oldest > 0:
                return rows.totals[i][EMA_SQ] / (1 - self.beta**ages.oldest) ** 2
        else:
            known = np.where(rows.seen[i], _moment_sq(now, ages.each, self.beta), self.moment_sq())
            self.moment_sq = functools.partial(np.copy, known)
        return float(self.moment_sq().sum())

    def snapshot(self, sums: Array | None) -> Callable[[], tuple[SegmentReading, ...]]:
        """A function that makes the per-segment table as of now."""
        steps, grad_sq, recent, moment = self.steps, self.grad_sq, tuple(self._recent), self.moment_sq
        names, sizes, beta = self.names, self.sizes, self.beta

        def table() -> tuple[SegmentReading, ...]:
            count, uncorrected = _advanced(steps, grad_sq, recent, beta)
            v, m = _corrected(uncorrected, count, beta), moment()
            now = np.zeros((len(names), len(gk.STATS))) if sums is None else sums
            return tuple(
                SegmentReading(
                    name=names[i],
                    numel=sizes[i],
                    gr_t=float(v[i] / m[i]) if m[i] > 0 else None,
                    grad_norm=math.sqrt(now[i, GRAD_SQ]),
                    nonfinite=int(now[i, NONFINITE]),
                )
                for i in range(len(names))
            )

        return table

    def state_dict(self) -> dict[str, Any]:
        self._settle()
        return {
            "names": list(self.names),
            "sizes": list(self.sizes),
            "uneven": self._uneven,
            "steps": self.steps.tolist(),
            "grad_sq": self.grad_sq.tolist(),
            "moment_sq": self.moment_sq().tolist(),
        }

    @staticmethod
    def from_state(state: dict[str, Any], beta: float) -> Table:
        table = Table(list(state["names"]), list(state["sizes"]), beta)
        table._uneven = state["uneven"]
        table.steps, table.grad_sq = np.array(state["steps"]), np.array(state["grad_sq"])
        table.moment_sq = functools.partial(np.array, state["moment_sq"])
        return table


def _advanced(steps: Array, grad_sq: Array, recent: Sequence[Rows], beta: float) -> tuple[Array, Array]:
    """`steps` and uncorrected V of each segment after more steps that all segments took part in."""
    if not recent:
        return steps, grad_sq
    passes = np.concatenate([rows.grad_sq for rows in recent])
    passes *= 1 - beta
    # One pass after the other, so that the bits do not depend on how many come at once.
    if len(grad_sq) <= FEW:
        columns = zip(passes.T.tolist(), grad_sq.tolist(), strict=True)
        grad_sq = np.array([functools.reduce(lambda v, now: beta * v + now, column, v) for column, v in columns])
    else:
        grad_sq = grad_sq.copy()
        for now in passes:
            grad_sq *= beta
            grad_sq += now
    return steps + len(passes), grad_sq


def _corrected(grad_sq: Array, steps: Array, beta: float) -> Array:
    """V of each segment, bias-corrected; 0 before the segment's first gradient."""
    return np.asarray(grad_sq / (1 - beta ** np.maximum(steps, 1)))


def _moment_sq(ema_sq: Array, ages: Array, beta: float) -> Array:
    return np.asarray(ema_sq / (1 - beta ** np.maximum(ages, 1)) ** 2)
