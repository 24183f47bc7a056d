"""What a gauge says, as plain numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class SegmentReading:
    """One parameter's share of a reading.

    name       the parameter's name if the optimizer was given names, else "group.index"
    numel      its elements
    gr_t       its own temporal redundancy, None before its first gradient
    grad_norm  L2 norm of its gradient at the reading
    nonfinite  non-finite elements in that gradient
    """

    name: str
    numel: int
    gr_t: float | None
    grad_norm: float
    nonfinite: int


@dataclass(frozen=True)
class Reading:
    """One reading of the gauges. A quantity that cannot be told is None, and `notes` says why.

    step               optimizer steps the gauge has seen
    batch_size         global batch in samples
    gr_t               temporal redundancy V^/||m^||^2 (1: all agree, 19: no correlation, 361: bounce; at beta = 0.9)
    gr_t_error         standard error of gr_t about its recent level
    settled            share (1-b^t)/(1+b^t) of its final value that uncorrelated gradients would read after t steps;
                       a target for gr_t is multiplied by it
    gr_s               spatial redundancy (G2+S)/(B G2+S), in (0, 1]
    gr_s_error         its standard error
    noise_scale        S/G2 in samples: tr Cov(per-sample gradient) / ||true gradient||^2
    noise_scale_error  its standard error
    grad_norm          L2 norm of the mean gradient, non-finite elements left out
    nonfinite          non-finite gradient elements since the last reading
    ready              True if every gauge that is available has seen enough to be acted on
    notes              why something is missing or not ready, and what was read where that is not plain, in words
    table              makes `segments`
    """

    step: int
    batch_size: float
    gr_t: float | None
    gr_t_error: float | None
    settled: float
    gr_s: float | None
    gr_s_error: float | None
    noise_scale: float | None
    noise_scale_error: float | None
    grad_norm: float
    nonfinite: int
    ready: bool
    notes: tuple[str, ...] = ()
    table: Callable[[], tuple[SegmentReading, ...]] = field(default=tuple, repr=False, compare=False)

    @property
    def segments(self) -> tuple[SegmentReading, ...]:
        """The per-segment table, made when it is asked for."""
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """The reading without its per-segment table, ready for JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "table"}
