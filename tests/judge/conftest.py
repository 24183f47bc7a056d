"""The judge is part of the benchmarks, and these are its tests."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "bench"))
