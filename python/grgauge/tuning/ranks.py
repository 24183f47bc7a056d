"""The processes that train one model together, and what is sharded over them.

World           a process group
no_sync         gradients accumulate on each rank
unshard, shard  a state with sharded tensors in one piece, and back
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
from .errors import TrainingError

T = TypeVar("T")


class World:
    """The processes that train one model together: a process group, torch.distributed's default one or this one alone.

    Its methods are collective: all ranks call them in the same order.
    """

    def __init__(self, group: Any = None) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.size, self.rank = (dist.get_world_size(group), dist.get_rank(group)) if together else (1, 0)
        self._group = group

    def mean(self, value: Tensor) -> float:
        """The mean over ranks, by an all_reduce."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value, group=self._group)
        return float(value) / self.size

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on all ranks."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, group=self._group, group_src=0)
        return values[0]

    def broadcast_if_any(self, value: T, device: torch.device) -> T:
        """Rank 0's value, on all ranks, which give None; if it is None too, that costs one byte on that device."""
        if self.size > 1:
            anything = torch.tensor(value is not None, dtype=torch.uint8, device=device)
            dist.broadcast(anything, group=self._group, group_src=0)
            return self.broadcast(value) if anything else value
        return value

    def on_rank_0(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, on all ranks. If it raises, all ranks do: the others a TrainingError that names it."""
        made: list[Any] = [None, None]
        try:
            if self.rank == 0:
                made[0] = make()
        except BaseException as error:
            made[1] = f"{type(error).__name__}: {error}"
            raise
        finally:
            made = self.broadcast(made)
        if made[1] is not None:
            raise TrainingError(f"rank 0 raised {made[1]}")
        value: T = made[0]
        return value

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, on rank 0; an empty list on the others."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values, group=self._group, group_dst=0)
        return values or []


@contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Gradients accumulate on each rank, and are not reduced."""
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


def unshard(state: Any) -> Any:
    """A state with its sharded tensors in one piece, on the host; all ranks take part."""
    if isinstance(state, dict):
        return {key: unshard(value) for key, value in state.items()}
    if isinstance(state, list):
        return [unshard(value) for value in state]
    return state.full_tensor().cpu() if is_sharded(state) else state


def shard(state: Any, like: Any) -> Any:
    """A state in which the tensors are sharded that are so in `like`."""
    if isinstance(state, dict) and isinstance(like, dict):
        return {key: shard(value, like.get(key)) for key, value in state.items()}
    if not is_sharded(like) or is_sharded(state):
        return state
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(state.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
