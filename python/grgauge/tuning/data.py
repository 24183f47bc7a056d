"""Batches of any size out of a user's data, at any place of its order: `source` makes one of three kinds of a `Source`.

tensors   rows of a TensorDataset, taken all at once
loaded    any dataset with a length, by a DataLoader of our own
made      what a function of the user's makes of a batch size

Ranks take equal parts of one batch in turn, rows r, r + ranks, r + 2 ranks and so on; of what a function makes, each
its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler, TensorDataset
from torch.utils.data import default_collate as collate

from ..gauge.gauge import _length

Factory = Callable[[int], Iterable[Any]]
Data = Dataset[Any] | DataLoader[Any] | Factory


class BatchSizeError(Exception):
    """The data do not follow the batch size."""


class Source(Protocol):
    def draw(self, cursor: int, size: int) -> Any:
        """This rank's part of the batch of `size` samples that begins at place `cursor` of the endless order."""


def source(data: Data, seed: int, rank: int = 0, ranks: int = 1) -> Source:
    """Raises TypeError for data of no such kind; ValueError for data without samples."""
    options: dict[str, Any] = {}
    shuffle = True
    if isinstance(data, DataLoader):
        if not isinstance(data.sampler, (RandomSampler, SequentialSampler)) or data.batch_size is None:
            raise TypeError("data is a DataLoader with a sampler of its own; pass a function of the batch size instead")
        shuffle = isinstance(data.sampler, RandomSampler)
        names = ("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context")
        options = {name: getattr(data, name) for name in names}
        data = data.dataset
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, IterableDataset):
        rows = _Rows(len(data), seed if shuffle else None, rank, ranks)
        plain = not options.get("num_workers") and options.get("collate_fn", collate) is collate
        if isinstance(data, TensorDataset) and plain and not options.get("pin_memory"):
            return _Tensors(data, rows)
        return _Loaded(data, rows, options)  # type: ignore[arg-type]
    if callable(data):
        return _Made(data, ranks)
    raise TypeError(
        f"data is a {type(data).__name__}; it must be a dataset with a length, a DataLoader over one, or a function "
        "that takes a batch size and returns batches"
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


class _Tensors:
    """Batches of a TensorDataset, without the detour over single samples."""

    def __init__(self, dataset: TensorDataset, rows: _Rows) -> None:
        self._tensors, self._rows = dataset.tensors, rows

    def draw(self, cursor: int, size: int) -> Any:
        rows = self._rows.take(cursor, size)
        return tuple(tensor[rows.to(tensor.device)] for tensor in self._tensors)


class _Loaded:
    """Batches of a DataLoader of our own, begun again wherever the order of samples breaks."""

    def __init__(self, dataset: Dataset[Any], rows: _Rows, options: dict[str, Any]) -> None:
        self._dataset, self._rows, self._options = dataset, rows, options
        self._next: tuple[int, int] | None = None
        self._batches: Iterator[Any] = iter(())

    def draw(self, cursor: int, size: int) -> Any:
        if self._next != (cursor, size):
            sampler = _Sampler(self._rows, cursor, size)
            # else a new loader would draw from the global one, and its workers augment alike on all ranks
            generator = torch.Generator().manual_seed(cursor * self._rows.ranks + self._rows.rank)
            loader: DataLoader[Any] = DataLoader(
                self._dataset,
                batch_sampler=sampler,
                generator=generator,
                **self._options,
            )
            self._batches = iter(loader)
        self._next = (cursor + size, size)
        return next(self._batches)


class _Sampler:
    def __init__(self, rows: _Rows, cursor: int, size: int) -> None:
        self._rows, self._cursor, self._size = rows, cursor, size

    def __iter__(self) -> Iterator[list[int]]:
        cursor = self._cursor
        while True:
            yield self._rows.take(cursor, self._size).tolist()
            cursor += self._size


class _Made:
    """Batches of what the user's function returns, called anew for each epoch and each size."""

    def __init__(self, factory: Factory, ranks: int) -> None:
        self._factory, self._ranks = factory, ranks
        self._size, self._drawn = 0, 0
        self._batches: Iterator[Any] = iter(())

    def draw(self, cursor: int, size: int) -> Any:
        size //= self._ranks
        if size != self._size:
            self._size, self._drawn, self._batches = size, 0, iter(self._factory(size))
        for _ in range(2):
            for batch in self._batches:
                found = _length(batch)
                if found == size:
                    self._drawn += 1
                    return batch
                if found > size or not self._drawn:  # the last of an epoch may be short, and is left out
                    raise BatchSizeError(
                        f"the data ignore the trial's batch size: asked for {size} samples, they gave {found}. Pass "
                        "the argument of the function that makes them on to the DataLoader"
                    )
            self._batches = iter(self._factory(size))
        raise BatchSizeError(f"the function given to trial.batches() made no batch of {size} samples")
