"""The processes that train one model together, and what is spread over them.

World        a process group
unreduced    gradients left to accumulate on each rank
unsharded, spread   a state with sharded tensors in one piece, and back
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..optim import is_sharded

T = TypeVar("T")


class TrainingError(Exception):
    """Training cannot go on; the message says why and what to do."""


class World:
    """The processes that train one model together: a process group, torch.distributed's default one or this one alone.

    All ranks call `mean`, `same`, `told`, `first` and `gathered` alike, in the same order.
    """

    def __init__(self, group: Any = None) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.size, self.rank = (dist.get_world_size(group), dist.get_rank(group)) if together else (1, 0)
        self._group = group

    def mean(self, value: Tensor) -> float:
        """The mean over ranks."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value, group=self._group)
        return float(value) / self.size

    def same(self, value: T) -> T:
        """Rank 0's value, on all ranks."""
        told = [value]
        if self.size > 1:
            dist.broadcast_object_list(told, group=self._group, group_src=0)
        return told[0]

    def told(self, value: T, device: torch.device) -> T | None:
        """Rank 0's value, on all ranks; None costs no more than one byte on that device."""
        if self.size > 1:
            anything = torch.tensor(value is not None, dtype=torch.uint8, device=device)
            dist.broadcast(anything, group=self._group, group_src=0)
            return self.same(value) if anything else None
        return value

    def first(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, on all ranks. Where it raises, all ranks do: the others a TrainingError that names it."""
        made: list[Any] = [None, None]
        try:
            if self.rank == 0:
                made[0] = make()
        except BaseException as error:
            made[1] = f"{type(error).__name__}: {error}"
            raise
        finally:
            made = self.same(made)
        if made[1] is not None:
            raise TrainingError(f"rank 0 raised {made[1]}")
        value: T = made[0]
        return value

    def gathered(self, value: T) -> list[T]:
        """The values of all ranks, on rank 0; an empty list on the others."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values, group=self._group, group_dst=0)
        return values or []


@contextmanager
def unreduced(model: nn.Module) -> Iterator[None]:
    """Gradients are left to accumulate on each rank."""
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    elif hasattr(model, "set_requires_gradient_sync"):  # FSDP2
        fsdp: Any = model
        fsdp.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            fsdp.set_requires_gradient_sync(True)
    else:
        yield


def unsharded(state: Any) -> Any:
    """A state with its sharded tensors in one piece, on the host; all ranks take part."""
    if isinstance(state, dict):
        return {key: unsharded(value) for key, value in state.items()}
    if isinstance(state, list):
        return [unsharded(value) for value in state]
    return state.full_tensor().cpu() if is_sharded(state) else state


def spread(state: Any, like: Any) -> Any:
    """A state in which the tensors are sharded that are so in `like`."""
    if isinstance(state, dict) and isinstance(like, dict):
        return {key: spread(value, like.get(key)) for key, value in state.items()}
    if not is_sharded(like) or is_sharded(state):
        return state
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(state.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
