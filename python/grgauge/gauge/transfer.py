"""Small tensors on their way from the device to the host, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

Array = npt.NDArray[np.float64]

FEW = 32
"""Numbers up to which Python handles them faster than numpy or torch, to the same bits."""


def stacked(tensors: Sequence[Tensor]) -> Tensor | Array:
    """Tensors of one shape as one of float64 that shares no memory with them; on the CPU an array.

    A stack by torch costs more than these few numbers are worth: 23 against 4 us with cold caches.
    """
    first = tensors[0]
    if not first.is_cpu:
        return torch.stack(tuple(tensors)).double()
    values = np.array([t.tolist() if first.numel() <= FEW else t.numpy() for t in tensors], dtype=np.float64)
    return values.reshape(len(tensors), *first.shape)  # lists of nothing have no shape


class Transfer:
    """Float64 tensors that no longer change, as arrays once the device has computed them.

    tensors  arrive as they are, and so do arrays
    summed   arrive added up over the ranks of `group`, by one all-reduce for all of them
    """

    def __init__(self, tensors: Sequence[Tensor | Array], summed: Sequence[Tensor] = (), group: Any = None) -> None:
        self._events: list[Any] = []
        self._copies = [t if isinstance(t, np.ndarray) or t.is_cpu else self._copy(t) for t in tensors]
        self._shapes = [tuple(t.shape) for t in summed]
        self._work: Any = None
        if summed:
            together = torch.cat([t.reshape(-1) for t in summed])
            self._work = dist.all_reduce(together, group=group, async_op=True)
            if not together.is_cpu:
                self._work.wait()  # the stream waits, not the host: the copy comes after the sum
                self._work = None
            self._copies.append(together if together.is_cpu else self._copy(together))

    def _copy(self, t: Tensor) -> Tensor:
        pinned = torch.empty(t.shape, dtype=torch.float64, pin_memory=True)
        pinned.copy_(t, non_blocking=True)
        event = torch.Event(t.device)
        event.record()
        self._events.append(event)
        return pinned

    def done(self) -> bool:
        return all(event.query() for event in self._events) and (self._work is None or self._work.is_completed())

    def arrays(self) -> list[Array]:
        """The values, those of `summed` last. Waits for the device and the ranks if they are not done.

        Raises RuntimeError if a rank is gone or does not answer within its group's timeout.
        """
        for event in self._events:
            event.synchronize()
        if self._work is not None:
            self._work.wait()
        arrays: list[Array] = [t if isinstance(t, np.ndarray) else t.numpy() for t in self._copies]
        if self._shapes:
            together = arrays.pop()
            ends = np.cumsum([int(np.prod(shape)) for shape in self._shapes])
            arrays += [part.reshape(s) for part, s in zip(np.split(together, ends[:-1]), self._shapes, strict=True)]
        return arrays
