"""Numbers on the command line: each as the type that argparse calls, which says what it must be."""

from __future__ import annotations

import argparse
import math

LEAST_STEPS = 10


def steps(argument: str) -> int:
    """How long a run is, not too short for the gauges."""
    number = int(argument)
    if number < LEAST_STEPS:
        raise argparse.ArgumentTypeError(f"{number} is too few for the gauges; it must be at least {LEAST_STEPS}")
    return number


def seed(argument: str) -> int:
    """What torch takes as a seed."""
    number = int(argument)
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"{number} is out of range; it must lie in [0, 2^63)")
    return number


def count(argument: str) -> int:
    """A whole number from 1 on."""
    number = int(argument)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too few; it must be at least 1")
    return number


def bounds(argument: str) -> tuple[float, float]:
    """LOW:HIGH, or one number for both."""
    low, colon, high = argument.partition(":")
    ends = float(low), float(high if colon else low)
    if not 0.0 < ends[0] <= ends[1] < math.inf:
        raise argparse.ArgumentTypeError(
            f"{argument} is no range; it must be LOW:HIGH with 0 < LOW <= HIGH, or one number above 0"
        )
    return ends


def whole_bounds(argument: str) -> tuple[int, int]:
    """The same of whole numbers."""
    low, high = bounds(argument)
    if not (low.is_integer() and high.is_integer()):
        raise argparse.ArgumentTypeError(f"{argument} is no range of samples; both ends must be whole numbers")
    return int(low), int(high)


def samples(argument: str) -> int:
    """How many, as 200000samples or 2e5."""
    number = argument.removesuffix("samples").replace("_", "")
    return count(str(int(float(number))) if float(number).is_integer() else number)


def start(argument: str) -> tuple[float, int]:
    """LR:BATCH."""
    lr, colon, batch = argument.partition(":")
    if not (colon and 0.0 < float(lr) < math.inf and int(batch) >= 1):
        raise argparse.ArgumentTypeError(f"{argument} is no start; it must be LR:BATCH, such as 1e-3:32")
    return float(lr), int(batch)
