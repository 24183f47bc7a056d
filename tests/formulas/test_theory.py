"""Closed forms against high-precision arithmetic, against simulation, and against the sentences they stand for."""

from __future__ import annotations

import math
import re

import mpmath
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from grgauge import theory

BETAS = st.floats(0.05, 0.995)
NOISE_SCALES = st.floats(0.0, 1e8)
BATCHES = st.floats(1.0, 1e7)


# --- landmarks -------------------------------------------------------------------------------------------------------


def exact_gr_t(correlations: np.ndarray, beta: float) -> float:
    """GR_T of a stationary scalar series after len(correlations) steps, from its autocorrelation function."""
    t = len(correlations)
    weights = (1 - beta) / (1 - beta**t) * beta ** np.arange(t)
    lags = np.abs(np.subtract.outer(np.arange(t), np.arange(t)))
    return float(1.0 / (weights @ correlations[lags] @ weights))


def test_the_published_landmarks():
    assert theory.aligned() == 1.0
    assert theory.uncorrelated() == pytest.approx(19.0, rel=1e-14)
    assert theory.period2() == pytest.approx(361.0, rel=1e-14)
    assert theory.uncorrelated() * theory.finite_time_factor(1) == pytest.approx(1.0, rel=1e-14)
    young = [round(theory.uncorrelated() * theory.finite_time_factor(t), 1) for t in (10, 20, 50)]
    assert young == [9.2, 14.9, 18.8]
    assert [round(theory.steady_signal(s), 1) for s in (1.0, 0.1, 0.01)] == [1.9, 7.2, 16.1]


@given(beta=BETAS, t=st.integers(1, 200))
def test_white_noise_grows_to_its_landmark_by_the_finite_time_factor(beta, t):
    white = np.zeros(t)
    white[0] = 1.0
    expected = theory.uncorrelated(beta) * theory.finite_time_factor(t, beta)
    assert exact_gr_t(white, beta) == pytest.approx(expected, rel=1e-10)


@given(beta=BETAS, t=st.integers(1, 60), s=st.floats(0.0, 1e6))
def test_a_steady_signal_lies_between_agreement_and_noise(beta, t, s):
    correlations = np.full(t, s / (1 + s))
    correlations[0] = 1.0
    assert exact_gr_t(correlations, beta) == pytest.approx(theory.steady_signal(s, beta, t), rel=1e-9)
    assert theory.steady_signal(s, beta, t) <= theory.steady_signal(s, beta) * (1 + 1e-12)


def test_a_steady_signal_has_the_two_landmarks_as_its_ends():
    assert theory.steady_signal(0.0) == theory.uncorrelated()
    assert theory.steady_signal(math.inf) == theory.aligned()
    assert theory.steady_signal(0.003) > 18.0  # blind to the learning rate from here down


@pytest.mark.parametrize("correlation", [1.0, 0.7, 0.0, -0.5, -1.0])
@pytest.mark.parametrize("beta", [0.5, 0.9])
def test_one_curve_runs_through_all_landmarks(correlation, beta):
    long_after = correlation ** np.arange(600.0)
    assert exact_gr_t(long_after, beta) == pytest.approx(theory.autocorrelated(correlation, beta), rel=1e-9)


@given(beta=BETAS, correlation=st.floats(-1.0, 1.0))
def test_autocorrelation_inverts_autocorrelated(beta, correlation):
    gr_t = theory.autocorrelated(correlation, beta)
    assume(theory.aligned() <= gr_t <= theory.period2(beta))  # a rounding error outside is refused
    assert theory.autocorrelation(gr_t, beta) == pytest.approx(correlation, abs=1e-9)


def test_the_published_target_means_no_autocorrelation():
    assert theory.autocorrelation(20.0) == pytest.approx(-0.0285, abs=1e-4)


def test_the_finite_time_factor_keeps_its_digits_for_slow_smoothing():
    beta = 1.0 - 2.0**-40
    with mpmath.workdps(50):
        power = mpmath.mpf(beta) ** 3
        exact = float((1 - power) / (1 + power))
    assert theory.finite_time_factor(3, beta) == pytest.approx(exact, rel=1e-14)
    assert theory.finite_time_factor(0) == 0.0
    assert theory.finite_time_factor(math.inf) == 1.0


# --- Lemma 1 ---------------------------------------------------------------------------------------------------------


def eq_18(x, noise_ratio, beta, t):
    """Eq. 18 as printed, with enough digits that its 0/0 never shows."""
    x, n, b, t = (mpmath.mpf(v) for v in (x, noise_ratio, beta, t))
    r = 1 + n
    if 2 * x == (1 - b) * r or 1 - x == b:
        x -= mpmath.mpf(10) ** -45
    numerator = r**2 * (1 - x - b) ** 2 * (b**t - (1 - 2 * x / r) ** t)
    return numerator / ((1 - b) * (2 * x - (1 - b) * r) * (b**t - (1 - x) ** t) ** 2)


def eq_18_slope(x, noise_ratio, beta, t):
    h = mpmath.mpf(10) ** -30
    x = mpmath.mpf(x)
    return (eq_18(x + h, noise_ratio, beta, t) - eq_18(x - h, noise_ratio, beta, t)) / (2 * h)


def singular(noise_ratio: float, beta: float) -> list[float]:
    return [(1 - beta) * (1 + noise_ratio) / 2, 1 - beta]


@pytest.mark.parametrize("beta", [0.5, 0.9, 0.99, 0.875])
@pytest.mark.parametrize("noise_ratio", [0.0, 0.25, 1.0, 7.0])
@pytest.mark.parametrize("offset", [0.0, 1e-12, -1e-12, 1e-8, -1e-8, 1e-4, -1e-4, 1e-2])
def test_lemma_1_is_stable_around_its_removable_singularities(beta, noise_ratio, offset):
    t = round(1 / (1 - beta))
    for centre in singular(noise_ratio, beta):
        x = centre + offset
        if x < 0.0:
            continue
        with mpmath.workdps(150):
            exact, slope = float(eq_18(x, noise_ratio, beta, t)), float(eq_18_slope(x, noise_ratio, beta, t))
        assert theory.expected_gr_t(x, noise_ratio, beta) == pytest.approx(exact, rel=2e-14)
        assert theory.gr_t_slope(x, noise_ratio, beta) == pytest.approx(slope, rel=2e-13, abs=1e-12 * exact)


@given(
    x=st.floats(0.0, 1.0),
    noise_ratio=st.floats(0.0, 100.0),
    beta=st.floats(0.1, 0.99),
    t=st.one_of(st.integers(1, 300).map(float), st.floats(1.0, 300.0)),
)
def test_lemma_1_equals_the_printed_formula(x, noise_ratio, beta, t):
    assume(2 * x <= 1 + noise_ratio)
    with mpmath.workdps(150):
        exact = float(eq_18(x, noise_ratio, beta, t))
        assume(exact < 1e300)
    # a rounding error in q is multiplied t-fold in q^t: that much the arguments themselves are uncertain
    floor = min(beta, max(1 - x, 1e-3), max(1 - 2 * x / (1 + noise_ratio), 1e-3))
    assert theory.expected_gr_t(x, noise_ratio, beta, t) == pytest.approx(exact, rel=1e-14 * (10 + t / floor))


@given(
    x=st.floats(0.0, 1.0),
    noise_ratio=st.floats(0.0, 100.0),
    beta=st.floats(0.1, 0.99),
    t=st.one_of(st.integers(1, 50).map(float), st.floats(1.0, 50.0)),
)
def test_the_slope_is_the_derivative_of_the_printed_formula(x, noise_ratio, beta, t):
    assume(2 * x < 0.98 * (1 + noise_ratio) and x < 0.98)
    with mpmath.workdps(150):
        value, slope = float(eq_18(x, noise_ratio, beta, t)), float(eq_18_slope(x, noise_ratio, beta, t))
    assert theory.gr_t_slope(x, noise_ratio, beta, t) == pytest.approx(slope, rel=1e-9, abs=1e-11 * value)


@pytest.mark.parametrize("t", [9, 10, 11, 400])
def test_lemma_1_carries_on_past_its_domain_for_whole_t(t):
    for x, noise_ratio in [(1.2, 1.5), (1.5, 3.0), (1.95, 4.0), (0.7, 0.2)]:
        with mpmath.workdps(100):
            exact, slope = float(eq_18(x, noise_ratio, 0.9, t)), float(eq_18_slope(x, noise_ratio, 0.9, t))
        assert theory.expected_gr_t(x, noise_ratio, 0.9, t) == pytest.approx(exact, rel=1e-11)
        assert theory.gr_t_slope(x, noise_ratio, 0.9, t) == pytest.approx(slope, rel=1e-11)


def test_the_default_horizon_at_the_published_smoothing_is_a_whole_10():
    assert 1 / (1 - 0.9) != 10.0
    assert theory.expected_gr_t(1.2, 3.0) == theory.expected_gr_t(1.2, 3.0, t=10)


def test_lemma_1_at_the_edge_of_its_domain_needs_no_whole_t():
    for beta in (0.87, 0.3, 0.77):
        for x, noise_ratio in [(0.5, 0.0), (1.0, 1.0), (1.0, 3.0), (0.6, 0.2)]:
            with mpmath.workdps(60):
                exact = float(eq_18(x, noise_ratio, beta, 1 / (1 - beta)))
            assert theory.expected_gr_t(x, noise_ratio, beta) == pytest.approx(exact, rel=1e-12)


def test_lemma_1_neither_overflows_nor_underflows_in_its_parts():
    with mpmath.workdps(60):
        exact = float(eq_18(1e-4, 0.5, 0.9, 20_000))  # beta^t is 1e-915
    assert theory.expected_gr_t(1e-4, 0.5, 0.9, 20_000) == pytest.approx(exact, rel=1e-10)
    assert theory.expected_gr_t(0.9, 1.0, 0.9, 20_000) == math.inf


def test_lemma_1_ideal_value_is_23_not_20():
    assert theory.ideal_gr_t() == theory.expected_gr_t(0.5, 1.0)
    assert theory.ideal_gr_t() == pytest.approx(20 / ((0.9**10 - 0.5**10) / 0.4), rel=1e-14)
    assert round(theory.ideal_gr_t(), 1) == 23.0
    assert round(theory.ideal_gr_t() * (1 - 0.9**10), 1) == 15.0


def test_lemma_1_without_learning_lacks_bias_correction_and_the_noise_in_the_mean():
    for noise_ratio in (0.0, 1.0, 100.0):
        assert theory.expected_gr_t(0.0, noise_ratio) == pytest.approx((1 + noise_ratio) / (1 - 0.9**10), rel=1e-14)
    assert theory.expected_gr_t(0.0, 100.0) > 155.0 > 19.0 > theory.steady_signal(0.01)


def test_eq_21_needs_t_in_its_numerator():
    slope = theory.expected_gr_t_first_order(1.0, 1.0) - theory.expected_gr_t_first_order(0.0, 1.0)
    with mpmath.workdps(60):
        assert slope == pytest.approx(float(eq_18_slope(0, 1, 0.9, 10)), rel=1e-13)
    rest = 1 - 0.9**10
    as_printed = 2 / rest * (1 / rest - 1 / (1 - 0.9))
    assert (round(as_printed, 1), round(slope, 1)) == (-26.0, 16.4)


@given(noise_ratio=st.floats(0.0, 50.0), beta=st.floats(0.1, 0.99), t=st.floats(1.0, 100.0))
def test_the_expansion_is_tangent_to_lemma_1(noise_ratio, beta, t):
    value = theory.expected_gr_t_first_order(0.0, noise_ratio, beta, t)
    slope = (theory.expected_gr_t_first_order(0.25, noise_ratio, beta, t) - value) / 0.25
    assert value == pytest.approx(theory.expected_gr_t(0.0, noise_ratio, beta, t), rel=1e-12)
    assert slope == pytest.approx(theory.gr_t_slope(0.0, noise_ratio, beta, t), rel=1e-9, abs=1e-9 * value)


@given(noise_ratio=st.floats(0.0, 1000.0), share=st.floats(1e-6, 1.0))
def test_theorem_1_holds_at_the_published_smoothing(noise_ratio, share):
    x = share * min(1.0, (1 + noise_ratio) / 2)
    assert theory.gr_t_slope(x, noise_ratio) > 0.0
    assert theory.expected_gr_t(x, noise_ratio) > theory.expected_gr_t(0.0, noise_ratio)


def test_theorem_1_does_not_hold_for_every_smoothing():
    assert theory.gr_t_slope(0.0, 0.0) == pytest.approx(0.0, abs=1e-12)
    assert theory.gr_t_slope(0.3, 0.1, beta=0.5) < 0.0
    assert theory.expected_gr_t(0.3, 0.1, beta=0.5) < theory.expected_gr_t(0.2, 0.1, beta=0.5)


# --- GR_S ------------------------------------------------------------------------------------------------------------


@given(batch=BATCHES, noise_scale=NOISE_SCALES)
def test_lemma_2_stays_in_its_range_and_inverts(batch, noise_scale):
    gr_s = theory.expected_gr_s(batch, noise_scale)
    assert 0.0 < gr_s <= 1.0
    assert theory.batch_for_gr_s(gr_s, noise_scale) == pytest.approx(batch, rel=1e-6)
    assert theory.expected_gr_s(2 * batch, noise_scale) < gr_s


@given(batch=st.floats(2.0, 1e6), noise_scale=st.floats(0.0, 1e6))
def test_the_noise_scale_comes_back_from_gr_s(batch, noise_scale):
    gr_s = max(theory.expected_gr_s(batch, noise_scale), 1.0 / batch)
    assume(gr_s < 1.0)
    assert theory.noise_scale_from_gr_s(gr_s, batch) == pytest.approx(noise_scale, rel=1e-6, abs=1e-8)


@given(batch=st.floats(1.5, 1e4), noise_scale=st.floats(0.0, 1e5))
def test_theorem_2_is_the_slope_of_lemma_2(batch, noise_scale):
    h = 1e-3 * batch
    secant = (theory.expected_gr_s(batch + h, noise_scale) - theory.expected_gr_s(batch - h, noise_scale)) / (2 * h)
    assert theory.gr_s_slope(batch, noise_scale) < 0.0
    assert theory.gr_s_slope(batch, noise_scale) == pytest.approx(secant, rel=1e-5)


def test_the_published_target_and_zone_as_batches():
    constant = theory.batch_for_gr_s(0.58, 0.0)
    assert (round(theory.batch_for_gr_s(0.58, 1.0) - constant, 3), round(constant, 2)) == (0.724, 1.72)
    large = 1e9
    zone = [theory.batch_for_gr_s(gr_s, large) / large for gr_s in (0.65, 0.5)]
    assert [round(share, 2) for share in zone] == [0.54, 1.0]


def test_gr_s_of_real_vectors_has_the_expectations_of_lemma_2_and_of_xi():
    """Per-sample gradients with a known noise scale; numerator and denominator averaged apart, as the lemma does."""
    rng = np.random.default_rng(0)
    d, groups, per_group, trials = 40, 4, 3, 4000
    mean = np.full(d, 0.5)
    sigma = 1.3
    noise_scale = d * sigma**2 / (mean @ mean)
    g = mean + sigma * rng.standard_normal((trials, groups * per_group, d))
    top, bottom = (g**2).sum((1, 2)), (g.sum(1) ** 2).sum(1)
    assert_ratio(top, bottom, theory.expected_gr_s(groups * per_group, noise_scale))
    grouped = g.reshape(trials, groups, per_group, d).mean(2)
    for k in range(1, groups + 1):
        top, bottom = (grouped[:, :k] ** 2).sum((1, 2)), (grouped[:, :k].sum(1) ** 2).sum(1)
        assert_ratio(top, bottom, theory.expected_xi(k, noise_scale / per_group))


def assert_ratio(top: np.ndarray, bottom: np.ndarray, expected: float) -> None:
    """mean(top) / mean(bottom) is `expected` within four standard errors."""
    excess = top - expected * bottom
    assert abs(excess.mean()) <= 4 * excess.std(ddof=1) / math.sqrt(len(excess)) + 1e-12


def test_xi_at_all_groups_of_one_sample_is_gr_s():
    for noise_scale in (0.0, 3.0, 1e4):
        assert theory.expected_xi(32, noise_scale) == theory.expected_gr_s(32, noise_scale)
        assert theory.expected_xi(1, noise_scale) == 1.0


# --- ideal values ----------------------------------------------------------------------------------------------------


def test_ideal_values():
    assert theory.critical_batch(123.0) == 123.0
    assert theory.ideal_gr_s_range() == (0.5, pytest.approx(2 / 3))
    assert theory.ideal_gr_s_range(1e9) == pytest.approx((0.5, 2 / 3), rel=1e-6)
    assert theory.ideal_gr_s_range(10.0) == (theory.expected_gr_s(10, 10.0), theory.expected_gr_s(5, 10.0))
    assert theory.ideal_gr_s_range(0.1) == (1.0, 1.0)  # never less than one sample
    assert theory.optimal_curvature_lr(50, 50.0) == 0.5
    assert theory.optimal_curvature_lr(1e7, 0.0) == 1.0


def test_the_optimal_learning_rate_lowers_a_quadratic_most():
    """E loss after one step on h w^2 / 2 is h w^2 / 2 * ((1 - x)^2 + x^2 mu / B) with x = h * lr."""
    batch, noise_scale = 30.0, 70.0
    x = np.linspace(0, 1, 100_001)
    loss = (1 - x) ** 2 + x**2 * noise_scale / batch
    assert x[loss.argmin()] == pytest.approx(theory.optimal_curvature_lr(batch, noise_scale), abs=2e-5)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "name", "shown"),
    [
        (lambda: theory.uncorrelated(1.0), "beta", "1.0"),
        (lambda: theory.uncorrelated(math.nan), "beta", "nan"),
        (lambda: theory.period2(0.0), "beta", "0.0"),
        (lambda: theory.finite_time_factor(-1), "t", "-1"),
        (lambda: theory.finite_time_factor(math.nan), "t", "nan"),
        (lambda: theory.autocorrelated(1.5), "correlation", "1.5"),
        (lambda: theory.autocorrelation(0.5), "gr_t", "0.5"),
        (lambda: theory.autocorrelation(400.0), "gr_t", "400.0"),
        (lambda: theory.steady_signal(-0.1), "signal_to_noise", "-0.1"),
        (lambda: theory.steady_signal(0.1, t=0), "t", "0"),
        (lambda: theory.expected_gr_t(-0.1, 1.0), "curvature_lr", "-0.1"),
        (lambda: theory.expected_gr_t(math.inf, 1.0), "curvature_lr", "inf"),
        (lambda: theory.expected_gr_t(0.1, -1.0), "noise_ratio", "-1.0"),
        (lambda: theory.expected_gr_t(0.1, 1.0, t=0.5), "t", "0.5"),
        (lambda: theory.expected_gr_t(0.1, 1.0, beta=2.0), "beta", "2.0"),
        (lambda: theory.expected_gr_t(1.01, 9.0, t=9.5), "curvature_lr", "1.01"),  # negative number, fractional power
        (lambda: theory.expected_gr_t(0.51, 0.0, beta=0.87), "curvature_lr", "0.51"),
        (lambda: theory.expected_gr_t(0.96, 0.0), "curvature_lr", "0.96"),  # negative mean square
        (lambda: theory.expected_gr_t(1.5, 9.0, beta=0.5), "curvature_lr", "1.5"),  # the pole
        (lambda: theory.expected_gr_t_first_order(0.1, math.nan), "noise_ratio", "nan"),
        (lambda: theory.gr_t_slope(-1.0, 0.0), "curvature_lr", "-1.0"),
        (lambda: theory.expected_gr_s(0.5, 1.0), "batch_size", "0.5"),
        (lambda: theory.expected_gr_s(8, -1.0), "noise_scale", "-1.0"),
        (lambda: theory.gr_s_slope(8, math.inf), "noise_scale", "inf"),
        (lambda: theory.batch_for_gr_s(0.0, 1.0), "gr_s", "0.0"),
        (lambda: theory.batch_for_gr_s(1.1, 1.0), "gr_s", "1.1"),
        (lambda: theory.noise_scale_from_gr_s(0.1, 8), "gr_s", "0.1"),
        (lambda: theory.noise_scale_from_gr_s(1.0, 8), "gr_s", "1.0"),
        (lambda: theory.expected_xi(0, 1.0), "k", "0"),
        (lambda: theory.expected_xi(2, -1.0), "a", "-1.0"),
        (lambda: theory.critical_batch(math.nan), "noise_scale", "nan"),
        (lambda: theory.ideal_gr_s_range(-1.0), "noise_scale", "-1.0"),
        (lambda: theory.optimal_curvature_lr(0, 1.0), "batch_size", "0"),
    ],
)
def test_bad_input_is_named_with_its_value(call, name, shown):
    with pytest.raises(ValueError, match=rf"^{name} must be .*, got {re.escape(shown)}$"):
        call()


def test_every_public_name_exists_and_is_documented():
    for name in theory.__all__:
        assert getattr(theory, name).__doc__
