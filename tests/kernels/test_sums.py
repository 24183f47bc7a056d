"""measure_ on every backend that runs on tensors here: six sums and two states against float64."""

from __future__ import annotations

import pytest
import torch
import truth
from hypothesis import given, settings
from hypothesis import strategies as st

import grgauge_kernels as gk
from grgauge_kernels import CHUNK

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = [0, 1, 3, 15, 16, 17, 997, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 513]
LAYOUTS = ["loose", "misaligned", "flat"]


def gradients(sizes, dtype, layout, seed=0):
    """Loose tensors of `sizes`, and what measure_ takes for them: (segments, stream, bucket)."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(n, generator=generator).to(dtype) for n in sizes]
    if layout == "loose":
        return made, made, gk.Bucket(made)
    pad = 1  # one element off any alignment
    buffer = torch.zeros(sum(n + pad for n in sizes) + pad, dtype=dtype)
    views, start = [], pad
    for g in made:
        views.append(buffer[start : start + g.numel()].copy_(g))
        start += g.numel() + pad
    if layout == "misaligned":
        return views, views, gk.Bucket(views)
    return views, [buffer], gk.Bucket(views, base=buffer)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_and_states_match_float64(backend, dtype, layout):
    segments, stream, bucket = gradients(SIZES, dtype, layout)
    plan = bucket.plan()
    ema, previous = torch.randn(plan.numel), torch.randn(plan.numel)
    ema_before, previous_before = ema.clone().split(SIZES), previous.clone().split(SIZES)
    scale = torch.tensor(0.375)
    stats = gk.measure_(stream, plan, ema=ema, previous=previous, beta=0.9, inv_scale=scale, backend=backend)
    assert stats.shape == (len(SIZES), 6)
    assert stats.dtype == torch.float64
    for i, (g, m_old, p_old, m, p) in enumerate(
        zip(segments, ema_before, previous_before, ema.split(SIZES), previous.split(SIZES), strict=True)
    ):
        g = (g.float() * scale).double()
        # Two terms, each rounded: the error is relative to them, not to what may cancel between them.
        error = (m - (0.9 * m_old.double() + 0.1 * g)).abs()
        assert (error <= 1.5e-7 * (0.9 * m_old.abs() + 0.1 * g.abs())).all()
        assert torch.equal(p.double(), g)
        # The sums are judged on the float32 states and differences that they are sums of.
        delta = (g.float() - p_old).double()
        expected = truth.sums(g, m, delta, truth.finite(g))
        torch.testing.assert_close(stats[i], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_states_their_columns_are_zero(backend, dtype):
    _, stream, bucket = gradients([5000, 7], dtype, "loose")
    stats = gk.measure_(stream, bucket.plan(), backend=backend)
    assert (stats[:, [1, 3, 4]] == 0).all()
    assert (stats[:, [0, 2]] > 0).all()


def test_300_mixed_tensors(backend):
    sizes = [(i * i * 37) % 700 for i in range(300)]
    segments, stream, bucket = gradients(sizes, torch.bfloat16, "loose")
    stats = gk.measure_(stream, bucket.plan(), backend=backend)
    for row, g in zip(stats, segments, strict=True):
        expected = truth.sums(g.double(), None, None, truth.finite(g.double()))
        torch.testing.assert_close(row, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("where", [0, 15, 16, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e16])
def test_a_nonfinite_element_is_counted_and_harms_nothing(backend, where, bad):
    n = 2 * CHUNK + 1
    (g,), stream, bucket = gradients([n], torch.float32, "loose")
    g[where] = bad
    ema, previous = torch.full((n,), 0.5), torch.full((n,), 0.25)
    stats = gk.measure_(stream, bucket.plan(), ema=ema, previous=previous, backend=backend)
    assert stats[0, 5] == 1
    assert stats.isfinite().all()
    assert ema[where] == 0.5
    assert previous[where] == 0.25
    rest = torch.arange(n) != where
    torch.testing.assert_close(stats[0, 0], g[rest].double().square().sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(stats[0, 1], ema.double().square().sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(stats[0, 4], (g[rest] - 0.25).double().abs().sum(), rtol=1e-6, atol=0)


def test_denormals_count_in_full(backend):
    g = torch.full((1000,), 1e-41)
    stats = gk.measure_([g], gk.Bucket([g]).plan(), backend=backend)
    assert stats[0, 2] == pytest.approx(g.double().sum().item(), rel=1e-6)
    assert stats[0, 5] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_every_run_and_for_every_number_of_threads(dtype):
    _, stream, bucket = gradients([70_001, 13, 40_000], dtype, "loose")
    plan = bucket.plan()
    usual = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2, 3, 1):
            torch.set_num_threads(threads)
            ema = torch.ones(plan.numel)
            results.append((gk.measure_(stream, plan, ema=ema, backend="cpu"), ema))
    finally:
        torch.set_num_threads(usual)
    for stats, ema in results[1:]:
        assert torch.equal(stats, results[0][0])
        assert torch.equal(ema, results[0][1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_aligned_states_hold_the_same_values(backend, layout):
    segments, stream, bucket = gradients([1, 5003, 13, CHUNK + 1], torch.float32, layout)
    packed, plan = bucket.plan(), bucket.plan(align=8)
    starts = [0, 8, 5016, 5032]
    assert [s for i, offset, _, s in plan.rows.tolist() if offset == bucket.offsets[i]] == starts
    results = []
    for p in (packed, plan):
        ema, previous = torch.zeros(p.states), torch.zeros(p.states)
        for _ in range(2):
            stats = gk.measure_(stream, p, ema=ema, previous=previous, backend=backend)
        if p is plan:
            ema, previous = (
                torch.cat([t[s : s + len(g)] for s, g in zip(starts, segments, strict=True)]) for t in (ema, previous)
            )
        results.append((stats, ema, previous))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(results[0][2], torch.cat(segments))


def test_a_sampled_plan_reads_only_its_elements(backend):
    segments, stream, bucket = gradients([50_000, 100, 30_000], torch.float32, "flat")
    plan = bucket.plan(sample=20_000, seed=3)
    ema = torch.zeros(plan.numel)
    stats = gk.measure_(stream, plan, ema=ema, backend=backend)
    visited = [torch.zeros(g.numel(), dtype=torch.bool) for g in segments]
    for segment, offset, length, _ in plan.rows.tolist():
        begin = offset - bucket.offsets[segment]
        visited[segment][begin : begin + length] = True
    for i, (g, mask) in enumerate(zip(segments, visited, strict=True)):
        assert mask.sum() == plan.visited[i]
        torch.testing.assert_close(stats[i, 0], g[mask].double().square().sum(), rtol=1e-6, atol=0)
    picked = torch.cat([g[mask] for g, mask in zip(segments, visited, strict=True)])
    torch.testing.assert_close(ema, picked * (1 - 0.9), rtol=1e-6, atol=0)


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 3 * CHUNK), min_size=1, max_size=5),
    power=st.integers(-40, 40),
    seed=st.integers(0, 2**31),
)
def test_sums_scale_as_they_must(sizes, power, seed):
    """A power of two moves through every sum exactly: g -> c g turns sums of squares into c^2 of them."""
    _, stream, bucket = gradients(sizes, torch.float32, "loose", seed)
    plan = bucket.plan()
    c = 2.0**power
    previous = torch.zeros(plan.numel)
    one = gk.measure_(stream, plan, previous=previous.clone())
    scaled = gk.measure_([g * c for g in stream], plan, previous=previous.clone())
    by = torch.tensor([c * c, 1.0, c, c * c, c, 1.0], dtype=torch.float64)
    assert torch.equal(scaled, one * by)
    assert torch.equal(one[:, 0], one[:, 3])  # from zero, the difference is the gradient


@settings(max_examples=40)
@given(n=st.integers(1, 2 * CHUNK), cut=st.integers(0, 2 * CHUNK), seed=st.integers(0, 2**31))
def test_sums_add_up_over_segments(n, cut, seed):
    g = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    cut = min(cut, n)
    whole = gk.measure_([g], gk.Bucket([g]).plan())
    parts = gk.measure_([g[:cut], g[cut:]], gk.Bucket([g[:cut], g[cut:]]).plan())
    torch.testing.assert_close(parts.sum(0, keepdim=True), whole, rtol=1e-6, atol=0)
