"""Tensors -> segments -> chunks: what a kernel is told to visit.

A segment is one tensor; a bucket is the segments of one device and one dtype; a chunk is a contiguous run of at most
CHUNK elements inside one segment; a plan is the chunks to visit. Full coverage, a random sample and "all but the
frozen matrices" are just different plans of one bucket.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .sampling import sampled_runs

CHUNK = 4096
"""Elements in a chunk at most: 16 KiB of fp32. Small enough to share 0.1 M elements evenly between threads."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Plan:
    """The chunks a kernel visits, in order.

    rows      int64 [chunks, 4]: (segment, offset, length, state offset). The offset counts from the segment's first
              element, or from the flat buffer's; the state offset counts visited elements, so `ema` and `previous`
              are packed: flat float32 tensors of `numel` elements.
    segments  number of segments of the bucket, visited or not
    numel     visited elements
    visited   int64 [segments], visited elements of each segment
    scale     float64 [segments], what a sum over the visited elements is multiplied by to estimate the sum over the
              whole segment (Horvitz-Thompson); 0 where nothing is visited
    seen      bool [segments], True where anything is visited
    complete  True if everything is visited, so that sums need no scale
    flat      True if offsets count from one flat buffer
    stream_sizes  elements of each tensor that a kernel is given: one a segment, or the one flat buffer
    """

    def __init__(self, bucket: Bucket, rows: npt.NDArray[np.int64]) -> None:
        self.bucket = bucket
        self.segments = len(bucket.sizes)
        self.flat = bucket.flat
        self.numel = int(rows[:, 2].sum())
        self.visited = np.bincount(rows[:, 0], weights=rows[:, 2], minlength=self.segments).astype(np.int64)
        self.scale = np.divide(
            bucket.sizes, self.visited, out=np.zeros(self.segments, dtype=np.float64), where=self.visited > 0
        )
        self.seen = self.visited > 0
        self.complete = self.numel == bucket.numel
        self.rows = torch.from_numpy(rows).to(bucket.device)
        self.checked: dict[str, tuple[Tensor, ...]] = {}  # streams that an op has found in order, for `ops`
        self.stream_sizes = [bucket.whole] if bucket.flat else bucket.sizes

    def __repr__(self) -> str:
        return f"Plan({self.numel} of {self.bucket.numel} elements, {len(self.rows)} chunks, {self.segments} segments)"


class Bucket:
    """Segments of one device and one dtype.

    tensors   dense tensors; nothing of them is kept but size, dtype, device and place
    base      the flat buffer that all tensors are views of; offsets then count from its first element

    Raises TypeError for a dtype other than float32, bfloat16 and float16, ValueError for sparse or overlapping memory
    layouts, mixed dtypes or devices, or a tensor outside `base`.
    """

    def __init__(self, tensors: Sequence[Tensor], *, base: Tensor | None = None) -> None:
        if base is None and not tensors:
            raise ValueError("tensors is empty: a bucket needs at least one tensor")
        first = tensors[0] if base is None else base
        self.device, self.dtype, self.flat = first.device, first.dtype, base is not None
        if self.dtype not in DTYPES:
            raise TypeError(f"tensors[0] has dtype {self.dtype}; a bucket holds float32, bfloat16 or float16")
        for i, t in enumerate(tensors):
            if t.dtype != self.dtype:
                raise ValueError(f"tensors[{i}] has dtype {t.dtype}, the bucket {self.dtype}: one bucket, one dtype")
            if t.device != self.device:
                raise ValueError(f"tensors[{i}] is on {t.device}, the bucket on {self.device}: one bucket, one device")
            require_dense(t, f"tensors[{i}]")
        self.sizes: list[int] = [t.numel() for t in tensors]
        self.numel = sum(self.sizes)
        self.offsets: list[int] = [_offset(t, base, i) for i, t in enumerate(tensors)]
        self.whole = self.numel if base is None else base.numel()
        self.extent = max((o + n for o, n in zip(self.offsets, self.sizes, strict=True)), default=0)

    def plan(self, sample: int | None = None, seed: int = 0, skip: Iterable[int] = ()) -> Plan:
        """The chunks to visit: every element, or about `sample` of them, without the segments in `skip`.

        Raises ValueError if sample < 1 or a number in `skip` is not a segment.
        """
        return Plan(self, self.plan_rows(sample, seed, skip))

    def plan_rows(self, sample: int | None = None, seed: int = 0, skip: Iterable[int] = ()) -> npt.NDArray[np.int64]:
        """The rows of `plan`, on the host."""
        if sample is not None and sample < 1:
            raise ValueError(f"sample is {sample}; it counts elements and must be at least 1, or None for all")
        skipped = frozenset(skip)
        if not skipped <= set(range(len(self.sizes))):
            raise ValueError(f"skip is {sorted(skipped)}; it must name segments 0 to {len(self.sizes) - 1}")
        if sample is None or sample >= self.numel:
            runs = [np.array([(0, n)], dtype=np.int64) for n in self.sizes]
        else:
            runs = sampled_runs(self.sizes, sample, seed)
        chunks = [
            _chunks(i, self.offsets[i], run)
            for i, segment in enumerate(runs)
            if i not in skipped
            for run in segment
            if run[1]
        ]
        rows = np.concatenate([np.empty((0, 4), dtype=np.int64), *chunks])
        rows[:, 3] = np.cumsum(rows[:, 2]) - rows[:, 2]
        return rows

    def __repr__(self) -> str:
        kind = "flat" if self.flat else "loose"
        return f"Bucket({self.numel} elements, {len(self.sizes)} segments, {kind}, {self.dtype}, {self.device})"


def require_dense(t: Tensor, name: str) -> None:
    """Raise ValueError unless the elements of `t` fill one contiguous run of memory, in whatever order."""
    if t.layout != torch.strided:
        raise ValueError(f"{name} has layout {t.layout}; it must be dense (torch.strided)")
    if not t.is_contiguous() and not torch.ops.aten.is_non_overlapping_and_dense(t):
        raise ValueError(f"{name} has shape {tuple(t.shape)} and strides {t.stride()}, with gaps; use .contiguous()")


def _chunks(segment: int, offset: int, run: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    begin, length = int(run[0]), int(run[1])
    starts = np.arange(0, length, CHUNK, dtype=np.int64)
    rows = np.empty((len(starts), 4), dtype=np.int64)
    rows[:, 0] = segment
    rows[:, 1] = offset + begin + starts
    rows[:, 2] = np.minimum(CHUNK, length - starts)
    return rows


def _offset(t: Tensor, base: Tensor | None, i: int) -> int:
    if base is None:
        return 0
    offset = t.storage_offset() - base.storage_offset()
    inside = offset >= 0 and offset + t.numel() <= base.numel()
    if t.untyped_storage().data_ptr() != base.untyped_storage().data_ptr() or not inside:
        raise ValueError(f"tensors[{i}] is no view of base: it lies outside the flat buffer")
    return int(offset)
