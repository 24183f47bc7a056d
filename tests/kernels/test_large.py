"""A bucket of more than 2^31 elements on the CPU: no offset may be counted in 32 bits. 4.4 GB; run with -m slow."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import grgauge_kernels as gk
from grgauge_kernels import CHUNK

NUMEL = 2_200_000_003
BORDERS = (0, 2**31 - 1, 2**31, 2**31 + CHUNK, NUMEL - 1)


def free_gigabytes() -> float:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024 / 1e9
    return 0.0


@pytest.mark.slow
def test_sums_reach_every_element():
    if not Path("/proc/meminfo").exists():
        pytest.skip("cannot tell how much memory is free")
    if free_gigabytes() < 6:
        pytest.skip(f"needs 6 GB of free memory, there are {free_gigabytes():.1f}")
    big = torch.full((NUMEL,), 0.5, dtype=torch.bfloat16)
    for i, where in enumerate(BORDERS):
        big[where] = 2.0 + i
    big[2**31 + 7] = float("nan")
    plan = gk.Bucket([big]).plan()
    assert plan.numel == NUMEL
    stats = gk.measure_([big], plan, backend="cpu")
    plain = NUMEL - len(BORDERS) - 1
    marks = range(2, 2 + len(BORDERS))
    # Every partial sum is a multiple of 1/4 that float32 has exactly.
    assert stats[0, 0].item() == 0.25 * plain + sum(i * i for i in marks)
    assert stats[0, 2].item() == 0.5 * plain + sum(marks)
    assert stats[0, 5].item() == 1

    # The same memory once more in two segments: the second one starts beyond 2^31 of the flat buffer.
    cut = [big[: 2**31 + 3], big[2**31 + 3 :]]
    parts = gk.measure_([big], gk.Bucket(cut, base=big).plan(), backend="cpu")
    assert torch.equal(parts.sum(0), stats[0])
    assert parts[1, 5].item() == 1
