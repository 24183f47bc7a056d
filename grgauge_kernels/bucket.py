"""Tensors -> segments -> chunks: what a kernel visits.

A segment is one tensor; a bucket is the segments of one device and one dtype; a chunk is a contiguous run of at most
CHUNK elements inside one segment; a plan is the chunks to visit. Full coverage, a random sample and "all but the
frozen matrices" are just different plans of one bucket.
"""

from __future__ import annotations

import copy
from array import array
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .sampling import BLOCK, Choice, choose, joined, kept_blocks, most_certain

if TYPE_CHECKING:
    from .backends import Repeated

CHUNK = 4096
"""The most elements in a chunk: 16 KiB of fp32. Small enough to share 0.1 M elements evenly between threads."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Plan:
    """The chunks a kernel visits, in order.

    A plan comes from `Bucket.plan`.

    Attributes:
        rows: int64 [chunks, 4]: (segment, offset, length, state offset). The offset counts from the first element of
            the segment, or of the flat buffer. The state offset counts visited elements, so `ema` and `previous` are
            packed: flat float32 tensors of `states` elements.
        segments: Number of segments. Those of the bucket, visited or not; in a sample with replicates or certain
            blocks, one for each part of a tensor, in the order of the tensors.
        tensor: int64 [segments], the tensor of the bucket that a segment is, or is part of.
        stratum: int64 [segments], equal for parts that are samples of the same blocks; see `sampling.Replicated`.
        numel: Visited elements.
        states: Elements of `ema` and `previous`: `numel`, and with `align` the gaps after segments of odd length.
        visited: int64 [segments], visited elements of each segment.
        scale: float64 [segments]. Multiply a sum over the visited elements by it to estimate the sum over the whole
            segment (Horvitz-Thompson); 0 where nothing is visited. Where a tensor is in parts, the products of its
            segments add up to its estimate. `sampling.sampled_sums` has the standard error.
        seen: bool [segments], True where anything is visited.
        complete: True if everything is visited, so that sums need no scale.
        flat: True if offsets count from one flat buffer.
        stream_sizes: uint64, elements of each tensor that a kernel is given: one per segment, or the one flat buffer.
        origins: int64 [segments], where each segment begins in the one flat buffer; None if offsets count from
            segments. Random bits are drawn by offset less origin; of a segment that is a shard, minus the number of
            elements before it gives each shard bits of its own.
        repeated: The newest update of kept streams, of which another need not be checked again; None before one.
    """

    def __init__(self, bucket: Bucket, rows: npt.NDArray[np.int64], choice: Choice | None = None) -> None:
        whole = np.arange(len(bucket.sizes))
        self.tensor, self.stratum = (whole, whole) if choice is None else (choice.tensor, choice.stratum)
        self.segments = len(self.tensor)
        self.in_parts = self.segments > len(bucket.sizes)
        self.bucket = bucket.repeated(self.tensor) if self.in_parts else bucket
        self.flat = bucket.flat
        self.numel = int(rows[:, 2].sum())
        self.states = int((rows[:, 2] + rows[:, 3]).max(initial=0))
        self.visited = np.bincount(rows[:, 0], weights=rows[:, 2], minlength=self.segments).astype(np.int64)
        population = bucket.sizes if choice is None else choice.population
        visited = np.bincount(self.stratum, weights=self.visited)[self.stratum]
        self.scale = np.divide(population, visited, out=np.zeros(self.segments, dtype=np.float64), where=visited > 0)
        self.seen = self.visited > 0
        self.complete = self.numel == bucket.numel
        self.rows = torch.from_numpy(rows).to(bucket.device)
        places = torch.tensor(self.bucket.offsets, dtype=torch.int64)
        self.origins = places.to(bucket.device) if bucket.flat else None
        self.repeated: Repeated | None = None
        self.stream_sizes = array("Q", [bucket.whole] if bucket.flat else self.bucket.sizes)

    def packed(self, state: Tensor) -> list[Tensor]:
        """Views of `ema` or `previous` that hold the visited elements and leave out the gaps between them."""
        if not len(self.rows):
            return [state]
        begin = self.rows[:, 3].cpu()
        end = begin + self.rows[:, 2].cpu()
        cuts = (begin[1:] != end[:-1]).nonzero().flatten().tolist()
        firsts, lasts = [0, *(i + 1 for i in cuts)], [*cuts, -1]
        return [state[int(begin[i]) : int(end[j])] for i, j in zip(firsts, lasts, strict=True)]

    def spread(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The bucket's tensors as an op wants them, one a segment: each once for every part of it.

        The same object where no tensor is in parts, or all are in one flat buffer.
        """
        return [tensors[i] for i in self.tensor.tolist()] if self.in_parts and not self.flat else tensors

    def __repr__(self) -> str:
        return f"Plan({self.numel} of {self.bucket.numel} elements, {len(self.rows)} chunks, {self.segments} segments)"


class Bucket:
    """Segments of one device and one dtype.

    Examples:
        >>> bucket = Bucket([torch.zeros(5000), torch.zeros(7)])
        >>> bucket
        Bucket(5007 elements, 2 segments, loose, torch.float32, cpu)
        >>> bucket.plan()
        Plan(5007 of 5007 elements, 3 chunks, 2 segments)
        >>> bucket.plan(skip=[0]).numel
        7

    Args:
        tensors: Dense tensors. Only their sizes, dtype, device and places in `base` are kept.
        base: The flat buffer that all tensors are views of; offsets then count from its first element.

    Raises:
        TypeError: For a dtype other than float32, bfloat16 and float16.
        ValueError: For sparse or overlapping memory layouts, mixed dtypes or devices, or a tensor outside `base`.
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

    def plan(
        self,
        sample: int | None = None,
        seed: int = 0,
        skip: Iterable[int] = (),
        replicates: int = 0,
        certain: Sequence[npt.NDArray[np.int64]] | None = None,
        align: int = 1,
    ) -> Plan:
        """The chunks to visit: every element, or about `sample` of them, without the segments in `skip`.

        With replicates or certain blocks, a plan has a segment for each part of a tensor, and an op is given
        `plan.spread(tensors)`.

        Args:
            sample: About how many elements to visit; None for all.
            seed: Which blocks a sample takes: the same ones for the same seed, on every rank.
            skip: Numbers of segments to leave out.
            replicates: 0, or about how many separate samples the sample consists of, for standard errors.
            certain: Blocks to visit in any case, from `heavy_blocks` with the same `sample`.
            align: State offsets are multiples of it. With 8, one tensor of odd length does not push all states after it
                off the alignment that GPU kernels need for wide loads; see `Plan.states`.

        Raises:
            ValueError: If sample < 1, replicates < 0, align < 1, a number in `skip` is not a segment or `certain` does
                not fit.
        """
        if align < 1:
            raise ValueError(f"align is {align}; it counts elements and must be at least 1")
        choice = self._choice(sample, seed, replicates, certain)
        return Plan(self, self._rows(choice, skip, align), choice)

    def plan_rows(
        self, sample: int | None = None, seed: int = 0, skip: Iterable[int] = (), align: int = 1
    ) -> npt.NDArray[np.int64]:
        """The rows of `plan`, on the host."""
        return self._rows(self._choice(sample, seed, 0, None), skip, align)

    @torch.no_grad()
    def heavy_blocks(self, tensors: Sequence[Tensor], sample: int) -> list[npt.NDArray[np.int64]]:
        """The blocks of each segment with the largest sums of squares, ascending, as many as a plan may always visit.

        Reads all of `tensors`, waits for the device, and needs memory for one number per block, one tensor at a time.
        Blocks whose sum is zero or not finite are left out. Equal tensors give equal blocks on all ranks.

        Args:
            tensors: One per segment; gradients, in general.
            sample: Elements to visit, as for `plan`.

        Raises:
            ValueError: If sample < 1, or if `tensors` are not the segments.
        """
        if sample < 1:
            raise ValueError(f"sample is {sample}; it counts elements and must be at least 1")
        if [t.numel() for t in tensors] != self.sizes:
            raise ValueError(f"tensors must be the {len(self.sizes)} segments of the bucket, of the same sizes")
        none = np.empty(0, dtype=np.int64)
        if sample >= self.numel:
            return [none for _ in tensors]
        sizes = np.array(self.sizes, dtype=np.int64)
        most = most_certain(-(-sizes // BLOCK), kept_blocks(sizes, sample)).tolist()
        return [_heaviest(t, k) if k else none for t, k in zip(tensors, most, strict=True)]

    def _choice(
        self, sample: int | None, seed: int, replicates: int, certain: Sequence[npt.NDArray[np.int64]] | None
    ) -> Choice | None:
        """None: everything."""
        if sample is not None and sample < 1:
            raise ValueError(f"sample is {sample}; it counts elements and must be at least 1, or None for all")
        if replicates < 0:
            raise ValueError(f"replicates is {replicates}; it must be at least 1, or 0 for no standard errors")
        if sample is None or sample >= self.numel:
            return None
        return choose(self.sizes, sample, seed, replicates, certain)

    def _rows(self, choice: Choice | None, skip: Iterable[int], align: int) -> npt.NDArray[np.int64]:
        skipped = frozenset(skip)
        if not skipped <= set(range(len(self.sizes))):
            raise ValueError(f"skip is {sorted(skipped)}; it must name segments 0 to {len(self.sizes) - 1}")
        if choice is None:
            parts = [(i, np.array([(0, n)], dtype=np.int64)) for i, n in enumerate(self.sizes)]
        else:
            tensors = choice.tensor.tolist()
            parts = [(i, joined(taken, self.sizes[i])) for i, taken in zip(tensors, choice.blocks, strict=True)]
        chunks = [_chunks(k, self.offsets[i], runs) for k, (i, runs) in enumerate(parts) if i not in skipped]
        rows = np.concatenate([np.empty((0, 4), dtype=np.int64), *chunks])
        room = -(-rows[:, 2] // align) * align
        rows[:, 3] = np.cumsum(room) - room
        return rows

    def repeated(self, tensor: npt.NDArray[np.int64]) -> Bucket:
        """This bucket with its segments listed anew: number i is what segment tensor[i] was. Everything else stays."""
        other = copy.copy(self)
        other.sizes = [self.sizes[i] for i in tensor.tolist()]
        other.offsets = [self.offsets[i] for i in tensor.tolist()]
        return other

    def __repr__(self) -> str:
        kind = "flat" if self.flat else "loose"
        return f"Bucket({self.numel} elements, {len(self.sizes)} segments, {kind}, {self.dtype}, {self.device})"


def is_dense(t: Tensor) -> bool:
    """True if the elements of `t`, a strided tensor, fill one contiguous run of memory, in whatever order."""
    return t.is_contiguous() or bool(torch.ops.aten.is_non_overlapping_and_dense(t))


def require_dense(t: Tensor, name: str) -> None:
    """Raise ValueError unless the elements of `t` fill one contiguous run of memory, in whatever order."""
    if t.layout != torch.strided:
        raise ValueError(f"{name} has layout {t.layout}; it must be dense (torch.strided)")
    if not is_dense(t):
        raise ValueError(f"{name} has shape {tuple(t.shape)} and strides {t.stride()}, with gaps; use .contiguous()")


def _chunks(segment: int, offset: int, runs: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Runs int64 [runs, 2] of one segment, cut into chunks: rows without state offset."""
    counts = -(-runs[:, 1] // CHUNK)
    # The first element of each chunk, counted from the start of its run: 0, CHUNK, 2 CHUNK, ...
    starts = CHUNK * (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts))
    rows = np.empty((len(starts), 4), dtype=np.int64)
    rows[:, 0] = segment
    rows[:, 1] = offset + np.repeat(runs[:, 0], counts) + starts
    rows[:, 2] = np.minimum(CHUNK, np.repeat(runs[:, 1], counts) - starts)
    return rows


def _heaviest(t: Tensor, most: int) -> npt.NDArray[np.int64]:
    """The numbers of the `most` blocks of `t` with the largest sums of squares, ascending."""
    flat = t.as_strided((t.numel(),), (1,))
    even = flat[: len(flat) // BLOCK * BLOCK].view(-1, BLOCK)
    tail = flat[even.numel() :].view(1, -1)
    norms = torch.cat([torch.linalg.vector_norm(x, dim=1, dtype=torch.float32) for x in (even, tail) if x.numel()])
    norms = torch.where(norms.isfinite(), norms, 0)
    order = norms.argsort(descending=True, stable=True)[:most]
    return np.sort(order[norms[order] > 0].cpu().numpy())


def _offset(t: Tensor, base: Tensor | None, i: int) -> int:
    if base is None:
        return 0
    offset = t.storage_offset() - base.storage_offset()
    inside = offset >= 0 and offset + t.numel() <= base.numel()
    if t.untyped_storage().data_ptr() != base.untyped_storage().data_ptr() or not inside:
        raise ValueError(f"tensors[{i}] is no view of base: it lies outside the flat buffer")
    return int(offset)
