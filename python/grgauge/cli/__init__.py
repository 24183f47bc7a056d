"""The command `grgauge`: demo, tune, report, doctor."""

from .commands import main

__all__ = ["main"]
