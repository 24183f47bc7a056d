"""Numbers as people read them: short, and the same everywhere in a report."""

from __future__ import annotations

import math
from collections.abc import Sequence

UNKNOWN = "unknown"


def scientific(value: float) -> str:
    if not value > 0.0:
        return UNKNOWN if math.isnan(value) else "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def count(value: float) -> str:
    return UNKNOWN if math.isnan(value) else f"{value:,.0f}".replace(",", "\u202f")


def short(value: float) -> str:
    return UNKNOWN if math.isnan(value) else f"{value:#.3g}".removesuffix(".")


def abridged(value: float) -> str:
    """A number on an axis: 250, 20k, 1.5M."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.4g}{letter}" if abs(value) < 1e12 else f"{value:.0e}"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    if seconds < 60.0:
        return f"{seconds:.0f}\u00a0s"
    minutes = round(seconds / 60.0)
    words = f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
    return words.replace(" ", "\u00a0")


def clip(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def listed(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
