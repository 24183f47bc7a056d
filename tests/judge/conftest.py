"""The judge is part of the benchmarks, and these are its tests."""

import sys
from pathlib import Path

sys.path += [str(Path(__file__).parents[2] / "bench"), str(Path(__file__).parent)]
