"""What a gauge says, as plain numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import InitVar, asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class SegmentReading:
    """One parameter's share of a reading.

    Attributes:
        name: the parameter's name if the optimizer knows it, else "group.index".
        numel: its elements.
        gr_t: GR_T of it alone, None before its first gradient.
        grad_norm: L2 norm of its gradient at the reading.
        nonfinite: non-finite elements in that gradient.

    Examples:
        >>> SegmentReading("head.weight", numel=640, gr_t=17.5, grad_norm=0.3, nonfinite=0).gr_t
        17.5
    """

    name: str
    numel: int
    gr_t: float | None
    grad_norm: float
    nonfinite: int


@dataclass(frozen=True)
class Reading:
    """One reading of the gauges. A quantity that is not available is None, and `notes` says why.

    Readings compare by value, all but the per-segment table; they pickle, with the table. `dataclasses.asdict` and
    `to_dict` leave it out.

    Attributes:
        step: optimizer steps that the gauge has seen.
        batch_size: global batch in samples.
        gr_t: temporal redundancy V^/|m^|^2 ("GR-Gauge", Eq. 18). At beta = 0.9: 1 if all gradients agree, 19 if
            successive ones are uncorrelated, 361 if each is the opposite of the one before.
        gr_t_error: standard error of gr_t around its recent level.
        finite_time_factor: (1-b^t)/(1+b^t), the share of its final value that uncorrelated gradients read after
            t steps. A target for gr_t is multiplied by it.
        gr_s: spatial redundancy (G2+S)/(B G2+S), in (0, 1] ("GR-Gauge", Lemma 2).
        gr_s_error: its standard error.
        noise_scale: S/G2 in samples: tr Cov(per-sample gradient) / |true gradient|^2.
        noise_scale_error: its standard error.
        grad_norm: L2 norm of the mean gradient, non-finite elements left out; nan if every step since the last reading
            was skipped.
        nonfinite: non-finite gradient elements since the last reading.
        ready: True if every gauge that is available has seen enough to be acted on.
        notes: why a quantity is missing or not ready, and what was read where that is not obvious.

    Args:
        table: called once, to make `segments`.

    Examples:
        >>> from grgauge import Reading
        >>> reading = Reading(
        ...     step=50, batch_size=64, gr_t=12.0, gr_t_error=1.5, finite_time_factor=0.99, gr_s=None, gr_s_error=None,
        ...     noise_scale=None, noise_scale_error=None, grad_norm=0.7, nonfinite=0, ready=True,
        ...     notes=("GR_S not available: groups is 1; it needs at least two micro-batches or ranks",),
        ... )
        >>> Reading.from_dict(reading.to_dict()) == reading
        True
    """

    step: int
    batch_size: float
    gr_t: float | None
    gr_t_error: float | None
    finite_time_factor: float
    gr_s: float | None
    gr_s_error: float | None
    noise_scale: float | None
    noise_scale_error: float | None
    grad_norm: float
    nonfinite: int
    ready: bool
    notes: tuple[str, ...] = ()
    table: InitVar[Callable[[], tuple[SegmentReading, ...]]] = tuple

    def __post_init__(self, table: Callable[[], tuple[SegmentReading, ...]]) -> None:
        self.__dict__["_table"] = table

    @functools.cached_property
    def segments(self) -> tuple[SegmentReading, ...]:
        """The per-segment table, one row for each parameter, made on first use."""
        made: tuple[SegmentReading, ...] = self.__dict__["_table"]()
        self.__dict__["_table"] = tuple  # what it was made from is not needed any more
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {**{f.name: getattr(self, f.name) for f in fields(self)}, "segments": self.segments, "_table": tuple}

    def to_dict(self, *, segments: bool = False) -> dict[str, Any]:
        """The reading as plain values, ready for JSON.

        Args:
            segments: True to include the per-segment table, as a list of dicts.
        """
        plain: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**plain, "segments": [asdict(row) for row in self.segments]} if segments else plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Reading:
        """The reading that `to_dict` was called on, also after a round trip through JSON.

        Args:
            values: all fields, with or without "segments".

        Raises:
            ValueError: a field is missing, or unknown.
        """
        names = {f.name for f in fields(cls)}
        if not names <= set(values) <= names | {"segments"}:
            missing, unknown = sorted(names - set(values)), sorted(set(values) - names - {"segments"})
            raise ValueError(f"values lacks {missing} and has {unknown} too many; it must be what Reading.to_dict made")
        rows = tuple(SegmentReading(**row) for row in values.get("segments", ()))
        plain = {name: values[name] for name in names}
        return cls(**{**plain, "notes": tuple(values["notes"])}, table=lambda: rows)
