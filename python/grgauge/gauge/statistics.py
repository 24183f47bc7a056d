"""What a gauge keeps on the host, and how a window of steps becomes a reading."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ..estimators import Groups, gr_s, two_batch
from ..reading import Reading
from ..smoothing import Spatial, Temporal
from ..theory import finite_time_factor
from .micro_batches import Collected
from .segments import GRAD_SQ, NONFINITE, Ages, Rows, SampleError, Table
from .transfer import Array
from .unavailable import Unavailable

if TYPE_CHECKING:
    from .windows import Window

WARM_UP = 20
"""Steps before GR_T is ready: uncorrelated gradients then read 79 % of their final value."""

NO_ROWS = Rows([], iter(()))

NOTHING_TRAINED = Unavailable("no parameter of the optimizer has a gradient")


class Statistics:
    """Everything that readings depend on and that is kept on the host."""

    def __init__(self, beta: float) -> None:
        self._beta = beta
        self.restart()

    def restart(self) -> None:
        """Start cold."""
        beta = self._beta
        self._temporal, self._spatial = Temporal(beta), Spatial(beta)
        self.table, self.sample_error = Table([], [], beta), SampleError(beta)
        self._last: tuple[Rows, int] | None = None  # the last step since the last reading that was not skipped
        self._nonfinite = 0  # elements since the last reading

    def state_dict(self) -> dict[str, Any]:
        return {
            "temporal": self._temporal.state_dict(),
            "spatial": self._spatial.state_dict(),
            "table": self.table.state_dict(),
            "sample_error": self.sample_error.state_dict(),
            "nonfinite": self._nonfinite,
        }

    @staticmethod
    def from_state(state: dict[str, Any], beta: float) -> Statistics:
        made = Statistics(beta)
        made._temporal.load_state_dict(state["temporal"])
        made._spatial.load_state_dict(state["spatial"])
        made.table = Table.from_state(state["table"], beta)
        made.sample_error = SampleError.from_state(state["sample_error"], beta)
        made._nonfinite = state.get("nonfinite", 0)
        return made

    def restart_temporal(self) -> None:
        """Start GR_T alone cold."""
        self._temporal.restart()

    def fold(self, window: Window) -> Reading | None:
        """Add the steps of a window, waiting for those that have not arrived; return the reading that they make."""
        arrays = iter(window.transfer.arrays())
        ages = Ages([next(arrays) for _ in window.rows[-1]] if window.rows else [])
        rows = Rows(window.rows, arrays)
        for i, grad_sq in zip(rows.taken, self.table.fold(rows), strict=True):
            self._temporal.update(grad_sq)
            self._nonfinite += int(rows.totals[i][NONFINITE])
        self.sample_error.fold(rows)
        if rows.taken:
            self._last = rows, rows.taken[-1]
        if not window.read:
            return None
        sampled, changed = 0.0, None
        groups: Groups | Unavailable
        if window.ranks is not None:
            groups = window.ranks.groups(next(arrays).tolist(), window.batch_size, window.calls)
        else:
            micro = _micro_rows(window.micro, [*arrays])
            groups = window.micro.groups(micro, window.groups, window.batch_size)
            if isinstance(groups, Groups):
                sampled = self.sample_error.of_groups(micro, groups.weights)
            if window.comparable and len(window.rows) - 1 in rows.taken:
                changed = _changed(micro, rows)
        reading = self._read(window, ages, groups, sampled, changed)
        self._last, self._nonfinite = None, 0
        return reading

    def _read(
        self, window: Window, ages: Ages, groups: Groups | Unavailable, sampled: float, changed: str | None
    ) -> Reading:
        gr_t, gr_t_error, temporal_note = self._read_temporal(window, ages)
        spatial, spatial_note = self._read_spatial(window, groups)
        gr_s_error, mu_error = 0.0, 0.0
        if isinstance(groups, Groups):
            gr_s_error, mu_error = _spread(groups, sampled, window.batch_size)
        sums = None if self._last is None else self._last[0].sums[self._last[1]]
        grad_norm = math.nan if self._last is None else math.sqrt(self._last[0].totals[self._last[1]][GRAD_SQ])
        return Reading(
            step=window.step,
            batch_size=window.batch_size,
            gr_t=gr_t,
            gr_t_error=gr_t_error,
            finite_time_factor=finite_time_factor(ages.oldest, self._beta),
            gr_s=_known(spatial.gr_s(window.batch_size)) if spatial else None,
            gr_s_error=_known(math.hypot(spatial.gr_s_error(window.batch_size), gr_s_error)) if spatial else None,
            noise_scale=_known(spatial.noise_scale) if spatial else None,
            noise_scale_error=_known(math.hypot(spatial.noise_scale_error, mu_error)) if spatial else None,
            grad_norm=grad_norm,
            nonfinite=self._nonfinite,
            ready=temporal_note is None and (spatial is None or spatial.ready),
            notes=tuple(note for note in (temporal_note, spatial_note, changed) if note is not None),
            table=self.table.snapshot(sums),
        )

    def _read_temporal(self, window: Window, ages: Ages) -> tuple[float | None, float | None, str | None]:
        """GR_T, its standard error, and a note where it is missing or not ready."""
        if not window.rows:
            return None, None, NOTHING_TRAINED.note("GR_T")
        if self._last is None:
            return None, None, Unavailable("every step since the last reading was skipped").note("GR_T")
        if window.problem is not None:
            return None, None, window.problem.note("GR_T")
        rows, newest = self._last
        gr_t = _known(self._temporal.read(self.table.moment(rows, newest, ages), self.table.uneven_grad_sq))
        if gr_t is None:
            return None, None, Unavailable("all gradients are zero").note("GR_T")
        error = math.hypot(self._temporal.standard_error, self.sample_error.of_gr_t(rows, newest, ages))
        missing = WARM_UP - min(ages.oldest, self._temporal.steps)
        return gr_t, _known(error), f"GR_T not ready: needs {missing:.0f} more steps" if missing > 0 else None

    def _read_spatial(self, window: Window, groups: Groups | Unavailable) -> tuple[Spatial | None, str | None]:
        """S and G2 so far, None without groups, and a note where they are missing, not ready or not of this step."""
        if isinstance(groups, Groups) and not self._spatial.update(*two_batch(*groups)):
            groups = Unavailable("gradients out of range", transient=True)
        if isinstance(groups, Unavailable):
            kept = groups.transient and self._spatial.readings
            return self._spatial if kept else None, groups.note("GR_S")
        if self._spatial.ready:
            return self._spatial, None
        steps = self._spatial.readings_until_ready * window.every
        needs = f"~{steps:.0f} more steps" if math.isfinite(steps) else "more signal"
        return self._spatial, f"GR_S not ready: needs {needs}"


def _micro_rows(micro: Collected, arrays: list[Array]) -> Rows:
    """The sums of the micro-batches that are in the step's gradient, on the host."""
    if not micro.sums:
        return NO_ROWS
    norms = arrays.pop() if micro.norms is not None else None
    before = len(micro.sums)
    micro.judge(norms)
    start = before - len(micro.sums)
    return Rows(micro.sums, iter([array[start:] for array in arrays]))


def _changed(micro: Rows, rows: Rows) -> str | None:
    """A note if the gradient of the step is not the one after its last micro-batch."""
    if not micro.totals:
        return None
    before, after = (math.sqrt(sums.totals[-1][GRAD_SQ]) for sums in (micro, rows))
    if math.isclose(before, after, rel_tol=1e-3):
        return None
    return (
        "GR_T and grad_norm are of a gradient that was changed after the last micro_step(), as clipping does: "
        f"its norm was {before:.3g} before, {after:.3g} after"
    )


def _spread(groups: Groups, error: float, batch_size: float) -> tuple[float, float]:
    """Standard errors of GR_S and of the noise scale that follow from a relative error of the groups' squares."""
    if error == 0.0:
        return 0.0, 0.0
    ends = [two_batch([sq * (1.0 + e) for sq in groups.group_sq], *groups[1:]) for e in (-error, error)]
    low, high = (gr_s(s, g2, batch_size) for s, g2 in ends)
    below, above = (s / g2 if g2 > 0.0 else math.inf for s, g2 in ends)
    return abs(high - low) / 2.0, abs(above - below) / 2.0


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
