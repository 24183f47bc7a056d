"""The gauge: reads GR_T and GR_S off the gradients that training computes anyway."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import grgauge_kernels as gk

from .estimators import two_batch
from .optim import AdamW, BucketSums
from .reading import Reading, SegmentReading
from .smoothing import Spatial, Temporal
from .sources import FusedSource, OwnSource, Sample
from .theory import finite_time_factor
from .transfer import Transfer

Array = npt.NDArray[np.float64]

GRAD_SQ, EMA_SQ, _, DELTA_SQ, _, NONFINITE = range(len(gk.STATS))

WARM_UP = 20
"""Steps before GR_T is ready: uncorrelated gradients then read 79 % of their final value."""

LATE = 20
"""Readings after which readings and the per-segment table are worked out although nobody has asked for them."""


class Gauge:
    """Reads GR_T, GR_S, the gradient noise scale and the gradient norm while an optimizer trains.

    On `grgauge.AdamW` with betas[0] equal to the gauge's beta the sums come from the step itself: the optimizer's first
    moment is the m of GR_T. On any other optimizer the gauge keeps an EMA of its own over `sample` parameters, updated
    before each step through the optimizer's step hooks. Gradients are read as the optimizer gets them.

    optimizer   any torch optimizer with dense gradients
    batch_size  global batch in samples; set it anew when the batch changes
    groups      micro-batches in a step; None: as many as `micro_step` was called for. GR_S needs at least two
    every       steps between readings
    sample      parameters looked at, where a pass of the gauge's own is needed
    beta        smoothing factor of both moments of GR_T, and over readings of S and G2. The published target of GR_T
                belongs to 0.9
    seed        which parameters a sample takes

    Raises ValueError for a number out of range.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        batch_size: float,
        *,
        groups: int | None = None,
        every: int = 5,
        sample: int = 50_000_000,
        beta: float = 0.9,
        seed: int = 0,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("every", every), ("sample", sample)):
            if not value >= 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if groups is not None and groups < 1:
            raise ValueError(f"groups is {groups}; it must be at least 1, or None to count calls of micro_step()")
        if not 0.0 < beta < 1.0:
            raise ValueError(f"beta is {beta}; it must lie in (0, 1)")
        self.batch_size, self.groups, self.every, self.beta = batch_size, groups, every, beta
        self._optimizer = optimizer
        self._temporal, self._spatial = Temporal(beta), Spatial(beta)
        self._table = _Table([], [], beta)
        self._layout: list[list[torch.Tensor]] = []
        self._step = 0
        self._rows: list[list[BucketSums]] = []
        self._groups: list[list[BucketSums]] = []
        self._in_flight: list[_Window] = []
        self._newest: Reading | None = None
        self._sample = Sample(optimizer, sample, seed)
        self._source: FusedSource | OwnSource
        if isinstance(optimizer, AdamW) and FusedSource.fits(optimizer, beta):
            self._source = FusedSource(optimizer, beta, self._on_step)
        else:
            self._source = OwnSource(optimizer, self._sample, beta, self._on_step)

    def micro_step(self) -> None:
        """Call after each micro-batch's backward: the gradient that it has added is one group of GR_S.

        Gradients must accumulate over the step and every micro-batch count alike; whether losses are divided by their
        number does not matter. Costs nothing but on the steps that are read.
        """
        if (self._step + 1) % self.every == 0:
            self._groups.append(self._sample.difference())

    def reading(self) -> Reading | None:
        """The newest finished reading, None before the first. Never waits for the device.

        Steps only gather sums; what they say is worked out here, and not at all if nobody asks.
        """
        while self._in_flight and self._in_flight[0].transfer.done():
            self._finish(self._in_flight.pop(0))
        return self._newest

    def restart(self) -> None:
        """Start cold, as after a change of learning rate or batch: what was seen before no longer counts.

        On `grgauge.AdamW` the optimizer's first moment is m; it carries over, and only V starts anew.
        """
        self._temporal.restart()
        self._spatial.restart()
        self._source.restart()
        self._table = _Table([], [], self.beta)
        self._layout, self._rows, self._groups, self._in_flight = [], [], [], []

    def remove(self) -> None:
        """Unhook the gauge from its optimizer; the newest reading stays."""
        self._source.remove()

    def state_dict(self) -> dict[str, Any]:
        """All that readings depend on, to be taken between two steps. Waits for sums on their way to the host."""
        self._send(read=False)
        while self._in_flight:
            self._finish(self._in_flight.pop(0))
        return {
            "step": self._step,
            "batch_size": self.batch_size,
            "temporal": self._temporal.state_dict(),
            "spatial": self._spatial.state_dict(),
            "table": self._table.state_dict(),
            "source": self._source.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, bit for bit; the optimizer's own state must be loaded as well.

        Raises ValueError if the state belongs to another kind of optimizer or to other parameters; the gauge is then as
        it was.
        """
        temporal, spatial = Temporal(self.beta), Spatial(self.beta)
        temporal.load_state_dict(state["temporal"])
        spatial.load_state_dict(state["spatial"])
        self._source.load_state_dict(state["source"])
        self._temporal, self._spatial = temporal, spatial
        self._table = _Table.from_state(state["table"], self.beta)
        self._step, self.batch_size = state["step"], state["batch_size"]
        self._layout, self._rows, self._groups, self._in_flight = [], [], [], []
        self._newest = None

    def _on_step(self, sums: list[BucketSums]) -> None:
        # A source makes all its lists of parameters anew when one changes, so the first tells of all.
        if len(sums) != len(self._layout) or (sums and sums[0].params is not self._layout[0]):
            self._lay_out([bucket.params for bucket in sums])
        self._step += 1
        self._rows.append(sums)
        if self._step % self.every == 0:
            self._send(read=True)
            if len(self._in_flight) > LATE:
                self.reading()

    def _lay_out(self, layout: list[list[torch.Tensor]]) -> None:
        """Take notice of which parameters the sums are of. Other ones than before: start cold."""
        names = _names(self._optimizer)
        table = _Table([names[id(p)] for ps in layout for p in ps], [p.numel() for ps in layout for p in ps], self.beta)
        if (table.names, table.sizes) != (self._table.names, self._table.sizes):
            if self._table.names:
                self.restart()
            self._table = table
        self._layout = layout

    def _send(self, read: bool) -> None:
        """Let the sums gathered so far travel to the host, to be folded in and, with `read`, to become a reading."""
        if not self._rows:
            return
        rows, groups = self._rows, self._groups if read else []
        tensors = [torch.stack([b.stats for b in bucket]) for bucket in (*zip(*rows), *zip(*groups))]  # noqa: B905
        tensors += [bucket.steps.double() for bucket in rows[-1]]
        transfer = Transfer(tensors)
        window = _Window(rows, groups, transfer, read, self._step, self.batch_size, self._source.problem())
        self._in_flight.append(window)
        self._rows, self._groups = [], []

    def _finish(self, window: _Window) -> None:
        arrays = iter(window.transfer.arrays())
        rows, groups = _Rows(window.rows, arrays), _Rows(window.groups, arrays)
        ages = _Ages([next(arrays) for _ in window.rows[-1]])
        for grad_sq in self._table.fold(rows):
            self._temporal.update(grad_sq)
        if window.read:
            self._newest = self._read(window, rows, ages, groups)

    def _read(self, window: _Window, rows: _Rows, ages: _Ages, groups: _Rows) -> Reading:
        newest = rows.taken[-1] if rows.taken else None
        gr_t, temporal_problem = self._read_temporal(window, rows, newest, ages)
        problem = self._take_groups(window, groups)
        spatial = self._spatial if groups.totals and self._spatial.readings else None
        if spatial is not None and problem is None and not spatial.ready:
            steps = spatial.readings_until_ready * self.every
            problem = f"GR_S not ready: needs {f'~{steps:.0f} more steps' if math.isfinite(steps) else 'more signal'}"
        return Reading(
            step=window.step,
            batch_size=window.batch_size,
            gr_t=gr_t,
            gr_t_error=_known(self._temporal.standard_error) if gr_t is not None else None,
            settled=finite_time_factor(ages.oldest, self.beta),
            gr_s=_known(spatial.gr_s(window.batch_size)) if spatial else None,
            gr_s_error=_known(spatial.gr_s_error(window.batch_size)) if spatial else None,
            noise_scale=_known(spatial.noise_scale) if spatial else None,
            noise_scale_error=_known(spatial.noise_scale_error) if spatial else None,
            grad_norm=math.nan if newest is None else math.sqrt(rows.totals[newest][GRAD_SQ]),
            nonfinite=int(sum(rows.totals[i][NONFINITE] for i in rows.taken)),
            ready=temporal_problem is None and (spatial is None or spatial.ready),
            notes=tuple(note for note in (temporal_problem, problem) if note is not None),
            table=self._table.snapshot(None if newest is None else rows.sums[newest]),
        )

    def _read_temporal(
        self, window: _Window, rows: _Rows, newest: int | None, ages: _Ages
    ) -> tuple[float | None, str | None]:
        """GR_T, and why it is missing or not ready."""
        if newest is None:
            return None, "GR_T not available: every step since the last reading was skipped"
        if window.problem is not None:
            return None, window.problem
        gr_t = _known(self._temporal.read(self._table.moment(rows, newest, ages)))
        if gr_t is None:
            return None, "GR_T not available: all gradients are zero"
        missing = WARM_UP - min(ages.oldest, self._temporal.steps)
        return gr_t, f"GR_T not ready: needs {missing:.0f} more steps" if missing > 0 else None

    def _take_groups(self, window: _Window, groups: _Rows) -> str | None:
        """One reading of S and G2 from the groups of a step. Returns why there is none."""
        n = len(groups.totals)
        if self.groups is not None and self.groups < 2:
            return f"GR_S not available: groups is {self.groups}; it needs at least two micro-batches or ranks"
        if n == 0:
            return "GR_S not available: call micro_step() after the backward of each of at least two micro-batches"
        if n == 1 or n != (self.groups or n):
            wanted = "at least 2" if self.groups is None else str(self.groups)
            return f"GR_S not available: micro_step() was called {n} times in the step, not {wanted}"
        if any(total[NONFINITE] for total in groups.totals):
            return "GR_S skipped a reading: non-finite gradients"
        # Gradients accumulate, so what micro-batch i added is the difference, and the first one's is its whole.
        group_sq = [groups.totals[0][GRAD_SQ]] + [total[DELTA_SQ] for total in groups.totals[1:]]
        mean_sq = groups.totals[-1][GRAD_SQ] / n**2
        if not self._spatial.update(*two_batch(group_sq, mean_sq, [window.batch_size / n] * n)):
            return "GR_S skipped a reading: gradients out of range"
        return None


@dataclass
class _Window:
    """The steps between two readings, on their way to the host."""

    rows: list[list[BucketSums]]
    groups: list[list[BucketSums]]
    transfer: Transfer
    read: bool
    step: int
    batch_size: float
    problem: str | None


class _Ages:
    """Number of updates that each segment's m has had: float64 [segments], all buckets together."""

    def __init__(self, buckets: list[Array]) -> None:
        self.each = np.concatenate(buckets) if len(buckets) != 1 else buckets[0]
        self.youngest = float(self.each.min(initial=math.inf))
        self.oldest = float(self.each.max(initial=0.0))


class _Rows:
    """The sums of several passes over the same segments on the host, all buckets together.

    sums    float64 [passes, segments, 6], scaled up from the sample to the whole of each segment
    seen    bool [passes, segments], False where a pass did not visit a segment; None if all visited all
    totals  the six sums over all segments, a list of six a pass
    taken   the passes that count: the optimizer skipped the others, as GradScaler has it do on overflow
    """

    sums: Array
    seen: npt.NDArray[np.bool_] | None = None
    totals: list[list[float]]
    taken: list[int]

    def __init__(self, rows: list[list[BucketSums]], arrays: Iterator[Array]) -> None:
        if not rows:
            self.sums, self.totals, self.taken = np.empty((0, 0, len(gk.STATS))), [], []
            return
        parts = [next(arrays) for _ in rows[0]]
        if not all(bucket.plan.complete for row in rows for bucket in row):
            scales = [np.stack([row[i].plan.scale for row in rows]) for i in range(len(parts))]
            parts = [part * scale[:, :, None] for part, scale in zip(parts, scales, strict=True)]
            self.seen = np.array([np.concatenate([bucket.plan.seen for bucket in row]) for row in rows])
        self.sums = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
        self.totals = self.sums.sum(axis=1).tolist()
        self.taken = [i for i, total in enumerate(self.totals) if not math.isnan(total[GRAD_SQ])]


class _Table:
    """Each segment's own V, and |m|^2 as last seen. A segment without gradient keeps both, as its optimizer does.

    A reading needs the totals alone, so what belongs to single segments is worked out when somebody asks, or when
    `LATE` readings' worth of it has gathered.
    """

    def __init__(self, names: list[str], sizes: list[int], beta: float) -> None:
        self.names, self.sizes, self.beta = names, sizes, beta
        # Replaced, never changed in place: tables of earlier readings refer to them.
        self.steps = np.zeros(len(names))
        self.grad_sq = np.zeros(len(names))  # V, still without bias correction
        self.moment_sq: Callable[[], Array] = functools.partial(np.zeros, len(names))
        self._late: list[_Rows] = []

    def fold(self, rows: _Rows) -> list[float]:
        """Take in steps; returns the sum g^2 of each, with V standing in where a segment has no gradient."""
        if rows.seen is None:
            self._late.append(rows)
            if len(self._late) == LATE:
                self._settle()
            return [rows.totals[i][GRAD_SQ] for i in rows.taken]
        self._settle()
        totals = []
        for i in rows.taken:
            seen, now = rows.seen[i], rows.sums[i, :, GRAD_SQ]
            totals.append(float(np.where(seen, now, _corrected(self.grad_sq, self.steps, self.beta)).sum()))
            self.steps = self.steps + seen
            self.grad_sq = np.where(seen, self.beta * self.grad_sq + (1 - self.beta) * now, self.grad_sq)
        return totals

    def _settle(self) -> None:
        self.steps, self.grad_sq = _advanced(self.steps, self.grad_sq, self._late, self.beta)
        self._late = []

    def moment(self, rows: _Rows, i: int, ages: _Ages) -> float:
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
        """A function that makes the per-segment table of this moment."""
        steps, grad_sq, late, moment = self.steps, self.grad_sq, tuple(self._late), self.moment_sq
        names, sizes, beta = self.names, self.sizes, self.beta

        def table() -> tuple[SegmentReading, ...]:
            count, uncorrected = _advanced(steps, grad_sq, late, beta)
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
            "steps": self.steps.tolist(),
            "grad_sq": self.grad_sq.tolist(),
            "moment_sq": self.moment_sq().tolist(),
        }

    @staticmethod
    def from_state(state: dict[str, Any], beta: float) -> _Table:
        table = _Table(list(state["names"]), list(state["sizes"]), beta)
        table.steps, table.grad_sq = np.array(state["steps"]), np.array(state["grad_sq"])
        table.moment_sq = functools.partial(np.array, state["moment_sq"])
        return table


def _advanced(steps: Array, grad_sq: Array, late: Sequence[_Rows], beta: float) -> tuple[Array, Array]:
    """`steps` and uncorrected V of each segment after more steps that all segments took part in."""
    for rows in late:
        steps = steps + len(rows.taken)
        for i in rows.taken:
            grad_sq = beta * grad_sq + (1 - beta) * rows.sums[i, :, GRAD_SQ]
    return steps, grad_sq


def _corrected(grad_sq: Array, steps: Array, beta: float) -> Array:
    """V of each segment, bias-corrected; 0 before its first gradient."""
    return np.asarray(grad_sq / (1 - beta ** np.maximum(steps, 1)))


def _moment_sq(ema_sq: Array, ages: Array, beta: float) -> Array:
    return np.asarray(ema_sq / (1 - beta ** np.maximum(ages, 1)) ** 2)


def _names(optimizer: torch.optim.Optimizer) -> dict[int, str]:
    """id of each parameter -> the name that the optimizer was given for it, else "group.index"."""
    return {
        id(p): name
        for g, group in enumerate(optimizer.param_groups)
        for p, name in zip(
            group["params"],
            group.get("param_names") or [f"{g}.{i}" for i in range(len(group["params"]))],
            strict=True,
        )
    }


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
