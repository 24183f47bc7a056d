"""Batches of any size from a user's data, at any place of its order, cut into micro-batches by samples.

Cuts     sizes of the micro-batches of a step
source   makes one of three kinds of a `Source`: rows of a TensorDataset, a dataset read by a DataLoader of our own
         whose collate_fn makes each micro-batch, or what a function of the user's makes of a size

Ranks take equal parts of one batch in turn, rows r, r + ranks, r + 2 ranks and so on; of what a function makes, each
its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler, TensorDataset
from torch.utils.data import default_collate as collate

from .errors import BatchSizeError
from .fingerprint import Fingerprint, fingerprint, parts_of

Factory = Callable[[int], Iterable[Any]]
Data = Dataset[Any] | DataLoader[Any] | Factory

MOST_GROUPS = 8
"""Equal micro-batches that a batch is cut into only for the sake of GR_S, at most."""


@dataclass(frozen=True)
class Cuts:
    """How a rank's part of each batch is cut into micro-batches.

    size    samples of that part
    limit   samples of a micro-batch, at most; None: all
    every   steps between two that are read
    groups  micro-batches of a step that is read, at least: the groups of GR_S; 1 where ranks are the groups
    """

    size: int
    limit: int | None
    every: int
    groups: int

    def sizes(self, step: int) -> list[int]:
        """Of the micro-batches of that step, counted from 1. One sample alone is cut off only where `limit` forces it:
        batch normalisation cannot train on it."""
        parts = math.ceil(self.size / (self.limit or self.size))
        if step % self.every == 0:
            parts = max(parts, min(self.groups, self.size // 2))
        return [stop - start for start, stop in itertools.pairwise(self.size * i // parts for i in range(parts + 1))]

    def equal(self) -> int:
        """A size that all micro-batches of all steps can have: the whole part if it has no other for GR_S's sake."""
        least = math.ceil(self.size / (self.limit or self.size))
        if least == 1:
            some = (n for n in range(self.groups, min(MOST_GROUPS, self.size // 2) + 1) if self.size % n == 0)
            return self.size // next(some, 1)
        return self.size // next(n for n in range(max(least, self.groups), self.size + 1) if self.size % n == 0)


class Source(Protocol):
    def draw(self, cursor: int, step: int, cuts: Cuts) -> Iterator[tuple[int, Any]]:
        """This rank's micro-batches of the batch that begins at place `cursor` of the endless order, each with its
        size in samples."""

    def fingerprint(self) -> Fingerprint | None:
        """What tells these data from others, None for what a function makes."""


def source(data: Data, seed: int, rank: int = 0, ranks: int = 1) -> Source:
    """Raises TypeError for data of no such kind; ValueError for data without samples."""
    options: dict[str, Any] = {}
    shuffle = True
    if isinstance(data, DataLoader):
        if not isinstance(data.sampler, (RandomSampler, SequentialSampler)) or data.batch_size is None:
            raise TypeError("data is a DataLoader with a sampler of its own; pass a function of the batch size instead")
        shuffle = isinstance(data.sampler, RandomSampler)
        names = ("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context")
        options = {name: getattr(data, name) for name in (*names, "prefetch_factor")}
        data = data.dataset
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, IterableDataset):
        rows = _Rows(len(data), seed if shuffle else None, rank, ranks)
        plain = not options.get("num_workers") and options.get("collate_fn", collate) is collate
        if isinstance(data, TensorDataset) and plain and not options.get("pin_memory"):
            return _Tensors(data, rows)
        return _Loaded(data, rows, options)  # type: ignore[arg-type]
    if callable(data):
        return _Made(data)
    raise TypeError(
        f"data is a {type(data).__name__}; it must be a dataset with a length, a DataLoader over one, or a function "
        "that takes a size and returns batches of it"
    )


class _Rows:
    """A rank's rows of a dataset in an endless order, a new shuffle every epoch."""

    def __init__(self, length: int, seed: int | None, rank: int, ranks: int) -> None:
        if length < 1:
            raise ValueError("data has no samples; it must have at least 1")
        self._length, self._seed, self.rank, self.ranks = length, seed, rank, ranks
        self._epoch, self._order = -1, torch.arange(length)

    def take(self, cursor: int, size: int) -> Tensor:
        """Of the rows at places cursor to cursor + size, those of this rank."""
        parts, stop = [], cursor + size
        while cursor < stop:
            epoch, place = divmod(cursor, self._length)
            if epoch != self._epoch and self._seed is not None:
                generator = torch.Generator().manual_seed(self._seed + 0x9E3779B1 * epoch)
                self._order = torch.randperm(self._length, generator=generator)
            self._epoch = epoch
            parts.append(self._order[place : place + stop - cursor])
            cursor += len(parts[-1])
        return torch.cat(parts)[self.rank :: self.ranks]

    def cut(self, cursor: int, step: int, cuts: Cuts) -> tuple[Tensor, ...]:
        """Those of each micro-batch of a step."""
        return self.take(cursor, cuts.size * self.ranks).split(cuts.sizes(step))


class _Tensors:
    """Batches of a TensorDataset, without the detour over single samples."""

    def __init__(self, dataset: TensorDataset, rows: _Rows) -> None:
        self._dataset, self._rows = dataset, rows

    def draw(self, cursor: int, step: int, cuts: Cuts) -> Iterator[tuple[int, Any]]:
        for rows in self._rows.cut(cursor, step, cuts):
            yield len(rows), tuple(tensor[rows.to(tensor.device)] for tensor in self._dataset.tensors)

    def fingerprint(self) -> Fingerprint:
        return fingerprint(self._dataset)


class _Loaded:
    """Batches of a DataLoader of our own, begun again wherever the order of samples breaks."""

    def __init__(self, dataset: Dataset[Any], rows: _Rows, options: dict[str, Any]) -> None:
        self._dataset, self._rows, self._options = dataset, rows, options
        self._next: tuple[int, int, Cuts] | None = None
        self._batches: Iterator[Any] = iter(())

    def draw(self, cursor: int, step: int, cuts: Cuts) -> Iterator[tuple[int, Any]]:
        if self._next != (cursor, step, cuts):
            # else a new loader would draw from the global one, and its workers augment alike on all ranks
            generator = torch.Generator().manual_seed(cursor * self._rows.ranks + self._rows.rank)
            sampler = _Sampler(self._rows, cursor, step, cuts)
            loader: DataLoader[Any] = DataLoader(
                self._dataset, batch_sampler=sampler, generator=generator, **self._options
            )
            self._batches = iter(loader)
        self._next = None  # until all of it is drawn
        for size in cuts.sizes(step):
            yield size, next(self._batches)
        self._next = (cursor + cuts.size * self._rows.ranks, step + 1, cuts)

    def fingerprint(self) -> Fingerprint:
        options = {name: self._options.get(name) for name in ("worker_init_fn", "multiprocessing_context")}
        return fingerprint(self._dataset, num_workers=min(self._options.get("num_workers", 0), 1), **options)


class _Sampler:
    def __init__(self, rows: _Rows, cursor: int, step: int, cuts: Cuts) -> None:
        self._rows, self._cursor, self._step, self._cuts = rows, cursor, step, cuts

    def __iter__(self) -> Iterator[list[int]]:
        for i in itertools.count():
            cursor = self._cursor + i * self._cuts.size * self._rows.ranks
            yield from (rows.tolist() for rows in self._rows.cut(cursor, self._step + i, self._cuts))


class _Made:
    """Batches of what the user's function returns, called anew for each epoch and each size.

    Ready batches cannot be cut by samples, so the function is asked for micro-batches of one size.
    """

    def __init__(self, factory: Factory) -> None:
        self._factory = factory
        self._size, self._drawn = 0, 0
        self._batches: Iterator[Any] = iter(())

    def draw(self, cursor: int, step: int, cuts: Cuts) -> Iterator[tuple[int, Any]]:
        asked = cuts.equal()
        if asked != self._size:
            self._size, self._drawn, self._batches = asked, 0, iter(self._factory(asked))
        left = cuts.size
        while left:
            size, batch = self._take(asked, whole=cuts.size if left == cuts.size else asked)
            left -= size
            yield size, batch

    def _take(self, asked: int, whole: int) -> tuple[int, Any]:
        """A batch of the size asked for, or one of the whole size where the function makes no other."""
        for _ in range(2):
            for batch in self._batches:
                lengths = _lengths(batch)
                fits = [size for some in lengths for size in (asked, whole) if size in some]
                found = next((some[0] for some in lengths if some), None)
                if fits or found is None:
                    self._drawn += 1
                    return (fits or [asked])[0], batch
                if found > asked or not self._drawn:  # the last of an epoch may be short, and is left out
                    raise BatchSizeError(
                        f"the data ignore the trial's batch size: asked for {asked} samples, they gave {found}. "
                        "Pass the argument of the function that makes them on to the DataLoader"
                    )
            self._batches = iter(self._factory(asked))
        raise BatchSizeError(f"the function given to trial.batches() made no batch of {asked} samples")

    def fingerprint(self) -> None:
        return None


def _lengths(batch: Any) -> list[list[int]]:
    """What may be the number of samples, the likeliest first: first axes, second axes, lengths of lists."""
    parts = list(parts_of(batch))
    tensors = [part for part in parts if isinstance(part, Tensor)]
    return [
        [length for tensor in tensors for length in tensor.shape[:1]],
        [length for tensor in tensors for length in tensor.shape[1:2]],
        [len(part) for part in parts if isinstance(part, list)],
    ]
