"""Small tensors on their way from the device to the host, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class Transfer:
    """Float64 tensors that nobody writes to any more, as arrays as soon as the device has got that far."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._events: list[Any] = []
        self._copies = [self._copy(t) for t in tensors]

    def _copy(self, t: Tensor) -> Tensor:
        if t.device.type == "cpu":
            return t
        pinned = torch.empty(t.shape, dtype=torch.float64, pin_memory=True)
        pinned.copy_(t, non_blocking=True)
        event = torch.Event(t.device)
        event.record()
        self._events.append(event)
        return pinned

    def done(self) -> bool:
        return all(event.query() for event in self._events)

    def arrays(self) -> list[npt.NDArray[np.float64]]:
        """The values; waits for the device where it is not done."""
        for event in self._events:
            event.synchronize()
        return [t.numpy() for t in self._copies]
