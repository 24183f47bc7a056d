"""Checks of arguments: what is wrong, what it was and what it must be."""

from __future__ import annotations

import math


def require(ok: bool, name: str, value: object, must: str) -> None:
    """Raise ValueError naming the argument unless `ok`."""
    if not ok:
        raise ValueError(f"{name} must be {must}, got {value!r}")


def require_count(name: str, value: object, least: int) -> None:
    """Raise ValueError unless `value` is an int of at least `least`."""
    require(isinstance(value, int) and value >= least, name, value, f"a whole number of at least {least}")


def require_batch(batch_size: float) -> None:
    """Raise ValueError unless `batch_size` is finite and at least one sample."""
    require(1.0 <= batch_size < math.inf, "batch_size", batch_size, "finite and at least 1 sample")
