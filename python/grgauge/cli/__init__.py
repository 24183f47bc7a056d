"""The command `grgauge`: demo, tune, report, doctor."""

from .main import main

__all__ = ["main"]
