"""What commands say to whom: a person at a terminal, a program that reads JSON, or somebody who has made a mistake."""

from __future__ import annotations

import json
import math
import os
import sys
from importlib import import_module
from typing import Any


class CommandError(Exception):
    """A command cannot do what it was asked to do; the message says why, and what to do. Exit code 2."""


def on_terminal() -> bool:
    """Whether stdout is a terminal on which lines can be redrawn."""
    return sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def installed(package: str) -> bool:
    """Whether an extra can be imported."""
    try:
        import_module(package)
    except ImportError:
        return False
    return True


def print_json(document: dict[str, Any]) -> None:
    """One document on stdout."""
    print(json.dumps(_finite(document), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    """The same, with None for numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
