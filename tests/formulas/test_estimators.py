"""The estimators against hand calculation, against vectors with a known noise scale, and against their own claims."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from grgauge import theory
from grgauge.estimators import gr_s, gr_t, noise_scale_from_xi, two_batch
from grgauge.smoothing import Spatial

SCALES = st.floats(1e-12, 1e12)
SEEDS = st.integers(0, 2**32 - 1)


def squares(vectors: np.ndarray) -> list[float]:
    return [float(v @ v) for v in vectors]


def groups_of(rng: np.random.Generator, sizes: list[int], mean: np.ndarray, sigma: float) -> np.ndarray:
    """Mean gradients of groups of these sizes, per-sample gradients being Normal(mean, sigma^2 I)."""
    noise = rng.standard_normal((len(sizes), len(mean)))
    return mean + sigma * noise / np.sqrt(np.array(sizes, dtype=float))[:, None]


def signal(d: int) -> np.ndarray:
    """A true gradient with |.|^2 = 1, so that the noise scale is d sigma^2."""
    return np.full(d, 1 / math.sqrt(d))


# --- gr_t, gr_s ------------------------------------------------------------------------------------------------------


def test_gr_t_is_a_plain_ratio_with_its_edges_defined():
    assert gr_t(6.0, 2.0) == 3.0
    assert gr_t(1.0, 0.0) == math.inf
    for grad_sq, ema_sq in [(0.0, 0.0), (math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0), (1.0, math.inf)]:
        assert math.isnan(gr_t(grad_sq, ema_sq))


def test_gr_s_by_hand():
    assert gr_s(3.0, 1.0, 5) == 0.5  # mu = 3: (1 + 3) / (5 + 3)
    assert gr_s(1.0, 4.0, 8) == pytest.approx(5 / 33)
    assert gr_s(2.0, -1.0, 5) == 1.0  # clipped: nothing but noise
    assert gr_s(2.0, 0.0, 5) == 1.0
    assert gr_s(-1.0, 2.0, 5) == pytest.approx(0.2)  # clipped: no noise
    for s, g2 in [(0.0, 0.0), (-1.0, -1.0), (math.nan, 1.0), (1.0, math.inf)]:
        assert math.isnan(gr_s(s, g2, 5))
    assert gr_s(1e300, 1e300, 1e9) == pytest.approx(2e-9)


@given(s=st.floats(-1e9, 1e9), g2=st.floats(-1e9, 1e9), batch=st.floats(1.0, 1e6))
def test_gr_s_is_in_its_range_and_falls_with_the_batch(s, g2, batch):
    assume(s > 0.0 or g2 > 0.0)
    value = gr_s(s, g2, batch)
    assert 0.0 < value <= 1.0
    assert gr_s(s, g2, 2 * batch) <= value
    if g2 > 0.0 and s / g2 < 1e6:
        assert gr_s(s, g2, 2 * batch) < value
        assert value == pytest.approx(theory.expected_gr_s(batch, max(s, 0.0) / g2), rel=1e-12)


# --- two_batch -------------------------------------------------------------------------------------------------------


def test_two_groups_by_hand():
    """G_1 = (1, 0), G_2 = (0, 1), one sample each: the sample covariance has trace 1, and g = (1/2, 1/2)."""
    assert two_batch([1.0, 1.0], 0.5, [1, 1]) == (1.0, 0.0)
    # of four samples each, tr Cov per sample is four times that
    assert two_batch([1.0, 1.0], 0.5, [4, 4]) == (4.0, 0.0)
    # G_1 = 3 of 1 sample, G_2 = 0 of 2: g = 1, A = 3, a - c = (1/3)(2/3)/1 + (2/3)(1/3)/2 = 1/3, c = 1/3
    assert two_batch([9.0, 0.0], 1.0, [1, 2]) == pytest.approx((6.0, -1.0))
    # the same groups, plainly averaged: g = 3/2, A = 9/2, a - c = 1/4 + 1/8, c = 1/4 + 1/8
    assert two_batch([9.0, 0.0], 2.25, [1, 2], weights=[1, 1]) == pytest.approx((6.0, 0.0))


@given(seed=SEEDS, n=st.integers(2, 9), b=st.integers(1, 64))
def test_equal_groups_are_the_two_batch_size_estimator(seed, n, b):
    groups = groups_of(np.random.default_rng(seed), [b] * n, signal(7), 2.0)
    group_sq, grad_sq, batch = squares(groups), float((groups.mean(0) ** 2).sum()), n * b
    small = sum(group_sq) / n
    s, g2 = two_batch(group_sq, grad_sq, [b] * n)
    scale = small + grad_sq
    assert s == pytest.approx((small - grad_sq) / (1 / b - 1 / batch), rel=1e-9, abs=1e-12 * scale * b)
    assert g2 == pytest.approx((batch * grad_sq - b * small) / (batch - b), rel=1e-9, abs=1e-12 * scale)


@pytest.mark.parametrize(
    ("sizes", "weights"),
    [([8] * 4, None), ([1, 2, 13, 16], None), ([1, 2, 13, 16], [1, 1, 1, 1]), ([3, 3], [0.2, 0.8]), ([1, 1], None)],
)
def test_both_estimates_are_unbiased(sizes, weights):
    rng = np.random.default_rng(5)
    trials, d, sigma = 20_000, 6, 2.0
    mean = signal(d)
    scale = sigma / np.sqrt(np.array(sizes, dtype=float))[:, None]
    groups = mean + scale * rng.standard_normal((trials, len(sizes), d))
    p = np.array(sizes if weights is None else weights, dtype=float)
    p /= p.sum()
    group_sq, grad_sq = (groups**2).sum(2).tolist(), (np.einsum("i,tid->td", p, groups) ** 2).sum(1).tolist()
    estimates = np.array([two_batch(*pair, sizes, weights) for pair in zip(group_sq, grad_sq, strict=True)])
    errors = estimates.std(0, ddof=1) / math.sqrt(trials)
    assert np.all(np.abs(estimates.mean(0) - [d * sigma**2, 1.0]) <= 4 * errors)


@given(seed=SEEDS, scale=SCALES, sizes=st.lists(st.integers(1, 50), min_size=2, max_size=8))
def test_a_scaled_loss_reads_the_same(seed, scale, sizes):
    """A sum-reduced loss, or a loss scale, multiplies g and every G_i alike."""
    groups = groups_of(np.random.default_rng(seed), sizes, signal(5), 1.0)
    p = np.array(sizes) / sum(sizes)
    batch = sum(sizes)
    readings = []
    for factor in (1.0, scale):
        scaled = factor * groups
        s, g2 = two_batch(squares(scaled), float(((p @ scaled) ** 2).sum()), sizes)
        smoothed = Spatial()
        smoothed.update(s, g2)
        readings.append((s, g2, gr_s(s, g2, batch), smoothed.gr_s(batch), smoothed.noise_scale))
    (s, g2, *plain), (s_scaled, g2_scaled, *scaled_readings) = readings
    assert s_scaled == pytest.approx(s * scale**2, rel=1e-8)
    assume(abs(g2) > 1e-6 * s)  # else g2 is a rounding error, and so is its sign
    assert g2_scaled == pytest.approx(g2 * scale**2, rel=1e-6)
    assert scaled_readings == pytest.approx(plain, rel=1e-6, nan_ok=True)


def test_identical_groups_have_no_noise():
    s, g2 = two_batch([2.0, 2.0, 2.0], 2.0, [4, 4, 4])
    assert (s, g2) == (0.0, 2.0)
    assert gr_s(s, g2, 12) == 1 / 12


def test_a_square_that_is_not_finite_is_handed_on():
    for bad in (math.nan, math.inf):
        assert all(map(math.isnan, two_batch([1.0, bad], 1.0, [1, 1])))
        assert all(map(math.isnan, two_batch([1.0, 1.0], bad, [1, 1])))


@pytest.mark.parametrize("sizes", [[], [32]])
def test_one_group_has_no_gr_s(sizes):
    with pytest.raises(ValueError, match=r"^GR_S not available: group_sizes must have at least 2 groups .*, got \["):
        two_batch([1.0] * len(sizes), 1.0, sizes)


# --- xi --------------------------------------------------------------------------------------------------------------


def xis(groups: np.ndarray) -> list[float]:
    ks = range(1, len(groups) + 1)
    return [float((groups[:k] ** 2).sum() / (groups[:k].sum(0) ** 2).sum()) for k in ks]


@given(seed=SEEDS, n=st.integers(2, 12), b=st.integers(1, 32))
def test_xi_of_all_groups_is_the_two_batch_estimate(seed, n, b):
    groups = groups_of(np.random.default_rng(seed), [b] * n, signal(20), 0.5)
    s, g2 = two_batch(squares(groups), float((groups.mean(0) ** 2).sum()), [b] * n)
    assume(abs(g2) > 1e-3)
    assert noise_scale_from_xi(xis(groups), n * b, n, first=n) == pytest.approx(s / g2, rel=1e-10)


def test_xi_recovers_the_noise_scale_it_follows_from():
    n, batch, noise_scale = 8, 64, 150.0
    xi = [theory.expected_xi(k, n * noise_scale / batch) for k in range(1, n + 1)]
    assert noise_scale_from_xi(xi, batch, n) == pytest.approx(noise_scale, rel=1e-12)
    assert noise_scale_from_xi(xi[:3], batch, n) == pytest.approx(noise_scale, rel=1e-12)
    assert noise_scale_from_xi([1.0, 1.0], 2, 2) == math.inf  # orthogonal groups
    assert math.isnan(noise_scale_from_xi([1.0, math.nan], 2, 2))


def test_xi_averages_over_all_k():
    n, batch = 3, 12
    xi = [1.0, 0.75, 0.6]  # k = 2: 1/0.25 - 2 = 2; k = 3: 2/0.4 - 3 = 2
    assert noise_scale_from_xi(xi, batch, n) == pytest.approx(2 * batch / n)
    xi[1] = 0.8  # 1/0.2 - 2 = 3
    assert noise_scale_from_xi(xi, batch, n) == pytest.approx(2.5 * batch / n)


def test_xi_of_real_vectors_follows_its_law():
    """The mean over 4000 steps of numerator and denominator of xi_k gives back the noise scale."""
    rng = np.random.default_rng(8)
    n, b, d, noise_scale = 4, 8, 30, 60.0
    groups = signal(d) + math.sqrt(noise_scale / d / b) * rng.standard_normal((4000, n, d))
    xi = []
    for k in range(1, n + 1):
        xi.append(float((groups[:, :k] ** 2).sum() / (groups[:, :k].sum(1) ** 2).sum()))
        assert xi[-1] == pytest.approx(theory.expected_xi(k, noise_scale / b), rel=0.02)
    assert noise_scale_from_xi(xi, n * b, n) == pytest.approx(noise_scale, rel=0.05)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "name", "shown"),
    [
        (lambda: gr_t(-1.0, 1.0), "grad_sq_mean", "-1.0"),
        (lambda: gr_s(1.0, 1.0, 0.5), "batch_size", "0.5"),
        (lambda: two_batch([1.0], 1.0, [1, 1]), "group_sq", "[1.0]"),
        (lambda: two_batch([1.0, -1.0], 1.0, [1, 1]), "group_sq[1]", "-1.0"),
        (lambda: two_batch([1.0, 1.0], -1.0, [1, 1]), "grad_sq", "-1.0"),
        (lambda: two_batch([1.0, 1.0], 1.0, [1, 0]), "group_sizes[1]", "0"),
        (lambda: two_batch([1.0, 1.0], 1.0, [1, 1], [1.0]), "weights", "[1.0]"),
        (lambda: two_batch([1.0, 1.0], 1.0, [1, 1], [0.0, 1.0]), "weights[0]", "0.0"),
        (lambda: noise_scale_from_xi([1.0, 0.5], 8, 1), "groups", "1"),
        (lambda: noise_scale_from_xi([1.0, 0.5], 2, 4), "groups", "4"),
        (lambda: noise_scale_from_xi([1.0, 0.5], 8, 2, first=3), "first", "3"),
        (lambda: noise_scale_from_xi([1.0], 8, 2), "xi", "[1.0]"),
        (lambda: noise_scale_from_xi([1.0, -0.5], 8, 2), "xi[1]", "-0.5"),
        (lambda: noise_scale_from_xi([1.0, 0.5], 0, 2), "batch_size", "0"),
    ],
)
def test_bad_input_is_named_with_its_value(call, name, shown):
    with pytest.raises(ValueError, match=rf"^{re.escape(name)} must be .*, got {re.escape(shown)}$"):
        call()
