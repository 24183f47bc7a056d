"""Options of the benchmarks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # benchmarks share modules


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("grgauge benchmarks")
    group.addoption("--quick", action="store_true", help="run every measurement once, tiny; no rows are written")
    group.addoption("--bench-csv", metavar="PATH", help="append rows to this file, also with --quick")
    group.addoption("--bench-device", metavar="NAME", help="cpu or cuda (default: cuda where there is one)")
