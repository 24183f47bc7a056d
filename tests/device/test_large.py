"""Buckets of more than 2^31 elements: no offset may be counted in 32 bits."""

from __future__ import annotations

import pytest
import torch

import grgauge_kernels as gk
from grgauge_kernels import CHUNK

NUMEL = 2**31 + 5 * CHUNK + 3
BORDERS = (0, 2**31 - 1, 2**31, 2**31 + CHUNK, NUMEL - 1)


def filled(value: float, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((NUMEL,), value, dtype=dtype, device="cuda")


def need(gigabytes: float) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes:g} GB of free device memory, there are {free:.0f}")


# A second tensor makes the kernels look addresses up in a table; without it offsets count from one base.
@pytest.mark.parametrize("loose", [False, True])
def test_sums_reach_every_element(kernel, loose):
    need(7)
    big = filled(0.5, torch.bfloat16)
    for i, where in enumerate(BORDERS):
        big[where] = 2.0 + i
    big[2**31 + 7] = float("nan")
    tensors = [big, torch.ones(3, dtype=torch.bfloat16, device="cuda")] if loose else [big]
    stats = gk.measure_(tensors, gk.Bucket(tensors).plan(), backend=kernel)
    plain = NUMEL - len(BORDERS) - 1
    marks = range(2, 2 + len(BORDERS))
    # Every partial sum is a multiple of 1/4 below 2^24 / 4: float32 has it exactly.
    assert stats[0, 0].item() == 0.25 * plain + sum(i * i for i in marks)
    assert stats[0, 2].item() == 0.5 * plain + sum(marks)
    assert stats[0, 5].item() == 1
    if loose:
        assert stats[1].tolist() == [3, 0, 3, 0, 0, 0]


@pytest.mark.parametrize("loose", [False, True])
def test_the_update_reaches_every_element(kernel, loose):
    need(32)
    small = [torch.full((3,), value, device="cuda") for value in (1.0, 0.5, 0.0, 0.0)]
    param, grad = filled(1.0, torch.bfloat16), filled(0.5, torch.bfloat16)
    exp_avg, exp_avg_sq = filled(0.0, torch.float32), filled(0.0, torch.float32)
    streams = [[param], [grad], [exp_avg], [exp_avg_sq]]
    if loose:
        for stream, t in zip(streams, small, strict=True):
            stream.append(t.to(stream[0].dtype))
    plan = gk.Bucket(streams[0]).plan()
    options = {"step": 1, "lr": 0.25, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    stats = gk.adamw_(*streams, plan, backend=kernel, **options)
    assert stats[0, 0].item() == 0.25 * NUMEL
    # A first step moves every element by the learning rate, so all of them must now be 3/4.
    for t, value in ((param, 0.75), (exp_avg, 0.05), (exp_avg_sq, 0.00025)):
        low, high = t.aminmax()
        assert low.item() == high.item() == pytest.approx(value, rel=1e-6)


def test_a_sample_of_it_is_read_where_it_lies(kernel):
    need(14)
    big = torch.empty(NUMEL, dtype=torch.bfloat16, device="cuda").normal_()
    plan = gk.Bucket([big]).plan(sample=1_000_000)
    ema = torch.zeros(plan.numel, device="cuda")
    stats = gk.measure_([big], plan, ema=ema, backend=kernel)
    rows = plan.rows.cpu()
    assert int(rows[:, 1].max()) > 2**31 - 2**28
    picked = torch.cat([big[offset : offset + length] for _, offset, length, _ in rows.tolist()]).float()
    torch.testing.assert_close(ema, picked * (1 - 0.9), rtol=1e-6, atol=0)
    torch.testing.assert_close(stats[0, 0], picked.double().square().sum(), rtol=1e-6, atol=0)
