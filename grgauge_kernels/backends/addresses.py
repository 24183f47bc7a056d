"""Addresses of loose tensors in device memory: uploaded when one has changed, otherwise reused.

A call captured in a CUDA graph reads a table that an earlier call has uploaded.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_captured: set[Tensor] = set()
"""Tables that a CUDA graph reads whenever it is replayed: kept for as long as the process lives."""


def on_device(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 [len(addresses)], ready for the device's current stream."""
    table, uploaded = _upload(addresses, device)
    if uploaded is None:
        return table
    stream = torch.cuda.current_stream(device)
    if torch.cuda.is_current_stream_capturing():
        _captured.add(table)
    else:
        stream.wait_event(uploaded)
        table.record_stream(stream)
    return table


@functools.lru_cache(maxsize=64)
def _upload(addresses: tuple[int, ...], device: torch.device) -> tuple[Tensor, torch.cuda.Event | None]:
    """The table, and the event that marks the end of its upload; None where there is nothing to wait for."""
    table = torch.tensor(addresses, dtype=torch.int64)
    if device.type == "cpu":
        return table, None
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the addresses of these tensors are not on the device yet: call once with the same tensors before the "
            "CUDA graph is captured, or use a flat plan"
        )
    table = table.pin_memory().to(device, non_blocking=True)
    uploaded = torch.cuda.Event()
    uploaded.record(torch.cuda.current_stream(device))
    return table, uploaded
