"""A batch of tensors, cut into parts by samples."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def _length(batch: Any) -> int:
    """Samples in a batch."""
    parts = list(batch.values()) if isinstance(batch, dict) else list(batch) if isinstance(batch, (tuple, list)) else []
    lengths = {batch.shape[0]} if isinstance(batch, Tensor) else {_length(part) for part in parts}
    if len(lengths) != 1:
        raise ValueError(f"batch has tensors of {sorted(lengths)} samples; it must have tensors, all of one length")
    return int(lengths.pop())


def _part(batch: Any, part: slice) -> Any:
    if isinstance(batch, Tensor):
        return batch[part]
    if isinstance(batch, dict):
        return type(batch)((key, _part(value, part)) for key, value in batch.items())
    return type(batch)(_part(value, part) for value in batch)
