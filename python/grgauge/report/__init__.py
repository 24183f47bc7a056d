"""A stored study as one HTML page."""

from .page import page, write
from .study import ReportError, load

__all__ = ["ReportError", "load", "page", "write"]
