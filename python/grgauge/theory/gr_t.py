"""GR_T: its exact landmarks, and what Lemma 1 expects of it."""

from __future__ import annotations

import math

from .._validation import require


def _require_beta(beta: float) -> None:
    require(0.0 < beta < 1.0, "beta", beta, "inside (0, 1)")


# --- Exact landmarks -------------------------------------------------------------------------------------------------


def aligned() -> float:
    """GR_T when all gradients agree: 1, the smallest value it can take. Exact, for every beta and every t.

    Returns:
        GR_T, without unit.

    Examples:
        >>> aligned()
        1.0
    """
    return 1.0


def uncorrelated(beta: float = 0.9) -> float:
    """GR_T of zero-mean gradients without correlation between iterations: (1+b)/(1-b), 19 at 0.9. Exact, t -> inf.

    Args:
        beta: Smoothing factor of the gauge, inside (0, 1).

    Returns:
        GR_T, without unit.

    Raises:
        ValueError: For an argument out of range.

    Examples:
        >>> round(uncorrelated(), 6)
        19.0
    """
    _require_beta(beta)
    return (1.0 + beta) / (1.0 - beta)


def period2(beta: float = 0.9) -> float:
    """GR_T of a gradient that flips its sign at every iteration: ((1+b)/(1-b))^2, 361 at 0.9. Exact, t -> inf.

    Args:
        beta: Smoothing factor of the gauge, inside (0, 1).

    Returns:
        GR_T, without unit.

    Raises:
        ValueError: For an argument out of range.

    Examples:
        >>> round(period2(), 6)
        361.0
    """
    return uncorrelated(beta) ** 2


def finite_time_factor(t: float, beta: float = 0.9) -> float:
    """(1 - beta^t) / (1 + beta^t): the share of `uncorrelated(beta)` that white noise reads after t iterations. Exact.

    This is for a cold start and bias-corrected moments. It is 0 at t = 0 and 1/19 at t = 1, where GR_T reads exactly 1.
    Scale a target for GR_T by it before comparing it with a young reading.

    Args:
        t: Iterations since a cold start, at least 0.
        beta: Smoothing factor of the gauge, inside (0, 1).

    Returns:
        A factor in [0, 1].

    Raises:
        ValueError: For an argument out of range.

    Examples:
        >>> [round(finite_time_factor(t), 2) for t in (10, 20, 50)]
        [0.48, 0.78, 0.99]
    """
    _require_beta(beta)
    require(t >= 0.0, "t", t, "at least 0")
    # (1 - e^-2y) / (1 + e^-2y) is tanh(y), which keeps its digits for beta near 1
    return math.tanh(-0.5 * t * math.log(beta))


def autocorrelated(correlation: float, beta: float = 0.9) -> float:
    """GR_T when gradients k iterations apart have correlation c^k: (1+b)(1-cb) / ((1-b)(1+cb)). Exact, t -> inf.

    `correlation` c in [-1, 1] is the mean inner product of successive gradients over their mean square. The curve runs
    through all three landmarks. The source's target of 20 is c = -0.028.

    Args:
        correlation: c, in [-1, 1].
        beta: Smoothing factor of the gauge, inside (0, 1).

    Returns:
        GR_T, without unit.

    Raises:
        ValueError: For an argument out of range.

    Examples:
        >>> [round(autocorrelated(c), 3) for c in (1, 0, -1)]
        [1.0, 19.0, 361.0]
    """
    require(-1.0 <= correlation <= 1.0, "correlation", correlation, "in [-1, 1]")
    return uncorrelated(beta) * (1.0 - correlation * beta) / (1.0 + correlation * beta)


def autocorrelation(gr_t: float, beta: float = 0.9) -> float:
    """The inverse of `autocorrelated`: the correlation of successive gradients that belongs to a GR_T long after a cold
    start.

    Args:
        gr_t: GR_T long after a cold start, between `aligned` and `period2`.
        beta: Smoothing factor of the gauge, inside (0, 1).

    Returns:
        The correlation c, in [-1, 1].

    Raises:
        ValueError: For an argument out of range.

    Examples:
        >>> round(autocorrelation(20.0), 3)
        -0.028
    """
    low, high = aligned(), period2(beta)
    require(low <= gr_t <= high, "gr_t", gr_t, f"between {low:g} and {high:g}, the range of GR_T at beta = {beta:g}")
    white = uncorrelated(beta)
    return (white - gr_t) / (beta * (white + gr_t))


def steady_signal(signal_to_noise: float, beta: float = 0.9, t: float | None = None) -> float:
    """GR_T of a constant true gradient under fresh noise: (1+s) / (s + (1-b)/(1+b)), s = B / mu. Exact.

    Below s of about 0.003 the gauge is blind to the learning rate. `t` counts iterations since a cold start; None means
    long after it. (Ratio of expectations.)

    Args:
        signal_to_noise: s = B / mu, at least 0.
        beta: Smoothing factor of the gauge, inside (0, 1).
        t: Iterations since a cold start, at least 1; None: long after it.

    Returns:
        GR_T, without unit.

    Raises:
        ValueError: For an argument out of range.

    Examples:
        >>> [round(steady_signal(s), 1) for s in (1, 0.1, 0.01, 0)]
        [1.9, 7.2, 16.1, 19.0]
    """
    require(signal_to_noise >= 0.0, "signal_to_noise", signal_to_noise, "at least 0")
    require(t is None or t >= 1.0, "t", t, "None or at least 1 iteration")
    white = uncorrelated(beta) * (1.0 if t is None else finite_time_factor(t, beta))
    if math.isinf(signal_to_noise):
        return aligned()
    return (1.0 + signal_to_noise) / (signal_to_noise + 1.0 / white)


# --- Lemma 1 ---------------------------------------------------------------------------------------------------------
#
# With r = 1 + mu/B, x = curvature_lr, q_v = 1 - 2x/r, q_m = 1 - x and D(q) = (q^t - beta^t) / (q - beta), Eq. 18 is
#
#     GR_T = r / (1 - beta) * D(q_v) / D(q_m)^2
#
# and both its removable singularities are D at q = beta. With d = (q - beta) / beta,
# D = beta^(t-1) * ((1+d)^t - 1) / d, which expm1 and log1p evaluate to full precision for any d, since numerator and
# denominator share the same d.


def _lemma1_arguments(
    curvature_lr: float, noise_ratio: float, beta: float, t: float | None
) -> tuple[float, float, float, float]:
    """Checked (r, t, d_v, d_m)."""
    _require_beta(beta)
    require(0.0 <= curvature_lr < math.inf, "curvature_lr", curvature_lr, "finite and at least 0")
    require(0.0 <= noise_ratio < math.inf, "noise_ratio", noise_ratio, "finite and at least 0")
    require(t is None or 1.0 <= t < math.inf, "t", t, "None or finite and at least 1 iteration")
    if t is None:
        t = 1.0 / (1.0 - beta)
        if abs(t - round(t)) <= 1e-9 * t:  # 1 / (1 - 0.9) is 10.000000000000002, and integers carry on below q = 0
            t = float(round(t))
    r = 1.0 + noise_ratio
    d_v = ((1.0 - beta) - 2.0 * curvature_lr / r) / beta
    d_m = ((1.0 - beta) - curvature_lr) / beta
    if 2.0 * curvature_lr <= r:  # a base of exactly 0 may have been rounded to a negative one
        d_v = max(d_v, -1.0)
    if curvature_lr <= 1.0:
        d_m = max(d_m, -1.0)
    if min(d_v, d_m) < -1.0:
        whole, even = t == math.floor(t), t % 2.0 == 0.0
        require(
            whole,
            "curvature_lr",
            curvature_lr,
            f"at most min(1, (1 + noise_ratio) / 2) = {min(1.0, 0.5 * r)!r} when t is not an integer (t = {t!r} is a "
            "power of a negative number)",
        )
        require(
            not (even and d_v <= -2.0),
            "curvature_lr",
            curvature_lr,
            f"below (1 + beta)(1 + noise_ratio) / 2 = {0.5 * (1.0 + beta) * r!r} when t is even (from there on Lemma 1 "
            "has negative mean squares)",
        )
        require(
            not (even and d_m == -2.0),
            "curvature_lr",
            curvature_lr,
            "other than 1 + beta when t is even (a pole of Lemma 1)",
        )
    return r, t, d_v, d_m


def _log_magnitude(d: float) -> float:
    """log |1 + d|."""
    if d == -1.0:
        return -math.inf
    return math.log1p(d) if d > -1.0 else math.log1p(-(2.0 + d))


def _power_difference(d: float, t: float) -> tuple[float, float]:
    """((1+d)^t - 1) / d as (L, F), its value being e^((t-1) L) * F, so that no t overflows or underflows."""
    if d == 0.0:
        return 0.0, t
    log_q = _log_magnitude(d)
    grown = max(log_q, 0.0)
    scale = math.exp(grown) / d
    if d < -1.0 and t % 2.0 == 1.0:
        return grown, -(1.0 + math.exp(-t * abs(log_q))) * scale
    return grown, (-math.expm1(-t * log_q) if log_q > 0.0 else math.expm1(t * log_q)) * scale


def _log_slope(d: float, t: float) -> float:
    """The derivative in d of log(((1+d)^t - 1) / d)."""
    if abs(d) * max(t, 4.0) <= 1.0:
        # The closed form below would be a small remainder of two terms of size 1/d: binomial series in y = t d instead.
        y, value, slope, coefficient, power = t * d, 1.0, 0.0, 1.0, 1.0
        for j in range(1, 25):
            coefficient *= (t - j) / (t * (j + 1))  # C(t, j+1) / t^(j+1)
            slope += j * coefficient * power
            power *= y
            value += coefficient * power
        return t * slope / value
    q, log_q = 1.0 + d, _log_magnitude(d)
    if q == 0.0:
        return 1.0 if t > 1.0 else 0.0
    sign = -1.0 if q < 0.0 and t % 2.0 == 1.0 else 1.0  # the sign of q^t
    # t q^(t-1) / (q^t - 1) - 1/d, divided by the larger of q^t and 1
    if log_q > 0.0:
        rest = -math.expm1(-t * log_q) if sign > 0.0 else 1.0 + math.exp(-t * log_q)
        return t / (q * rest) - 1.0 / d
    rest = math.expm1(t * log_q) if sign > 0.0 else -(1.0 + math.exp(t * log_q))
    return t * sign * math.exp(t * log_q) / (q * rest) - 1.0 / d


def _gr_t(beta: float, r: float, t: float, d_v: float, d_m: float) -> float:
    log_v, f_v = _power_difference(d_v, t)
    log_m, f_m = _power_difference(d_m, t)
    try:
        growth = math.exp((t - 1.0) * (log_v - 2.0 * log_m - math.log(beta)))
    except OverflowError:
        return math.inf
    return r / (1.0 - beta) * growth * f_v / (f_m * f_m)


def expected_gr_t(curvature_lr: float, noise_ratio: float, beta: float = 0.9, t: float | None = None) -> float:
    """GR_T of SGD on a quadratic, as Lemma 1 has it (Eq. 18; Eq. 1 and 19 at the default t = 1 / (1 - beta)).

    It is accurate to rounding everywhere, also on and near its removable singularities (2 curvature_lr =
    (1 - beta)(1 + mu/B) and 1 - curvature_lr = beta).

    Its limits:

    - Its moments have no bias correction; those of a gauge do. With it the value is (1 - beta^t) times this one.
    - It leaves the noise out of |m|^2. So at curvature_lr = 0 it reads (1 + mu/B) / (1 - beta^t), unbounded in mu/B,
      where the truth is `steady_signal(B/mu)`, at most 19. Good for mu/B up to about 1, not for small batches.
    - Its E|g|^2 decays as (1 - 2 curvature_lr / (1 + mu/B))^t, its |E g|^2 as (1 - curvature_lr)^(2t). With noise these
      differ, so for t >> 1 / (1 - beta) the value grows without bound: t counts iterations in one short window.
    - At mu/B = 1, beta = 0.9, curvature_lr = 1/2 (App. E) it gives 23.0, where the source says "about 20"; with bias
      correction it would be 15.0.
    - Its mean squares are positive only for 2 curvature_lr <= 1 + mu/B, and above curvature_lr = 1 the gradient
      overshoots. Beyond, the formula is still evaluated for an integer t.

    Args:
        curvature_lr: Mean eigenvalue * learning rate, at least 0.
        noise_ratio: mu / B, at least 0.
        beta: Smoothing factor of the gauge.
        t: Iterations since a cold start; None: 1 / (1 - beta).

    Returns:
        GR_T; inf where the value exceeds a float.

    Raises:
        ValueError: For a number out of range, and where the formula is infinite or negative or has a power of a
            negative number.

    Examples:
        >>> round(expected_gr_t(0.5, 1.0), 1)
        23.0
    """
    return _gr_t(beta, *_lemma1_arguments(curvature_lr, noise_ratio, beta, t))


def expected_gr_t_first_order(
    curvature_lr: float, noise_ratio: float, beta: float = 0.9, t: float | None = None
) -> float:
    """Lemma 1 to first order in `curvature_lr` (Eq. 21), arguments and defaults as for `expected_gr_t`.

        (1 + n)/(1 - beta^t) + 2n/(1 - beta^t) * (t/(1 - beta^t) - 1/(1 - beta)) * curvature_lr,      n = mu/B

    The source prints 1/(1 - beta^t) where this has t/(1 - beta^t). As printed the slope at beta = 0.9, n = 1 is -26.0;
    the derivative of Eq. 19 there is +16.4, as given here and as the inequality the proof rests on (Eq. 23) has it.
    Eq. 22 carries a factor of the mean eigenvalue that belongs only to the derivative in the learning rate.

    Args:
        curvature_lr: Mean eigenvalue * learning rate, at least 0.
        noise_ratio: mu / B, at least 0.
        beta: Smoothing factor of the gauge, inside (0, 1).
        t: Iterations since a cold start; None: 1 / (1 - beta).

    Returns:
        GR_T, without unit.

    Raises:
        ValueError: As for `expected_gr_t`.

    Examples:
        >>> slope = (expected_gr_t_first_order(1e-3, 1.0) - expected_gr_t_first_order(0.0, 1.0)) / 1e-3
        >>> round(slope, 1)
        16.4
    """
    r, t, _, _ = _lemma1_arguments(curvature_lr, noise_ratio, beta, t)
    rest = -math.expm1(t * math.log(beta))
    return (r + 2.0 * noise_ratio * (t / rest - 1.0 / (1.0 - beta)) * curvature_lr) / rest


def gr_t_slope(curvature_lr: float, noise_ratio: float, beta: float = 0.9, t: float | None = None) -> float:
    """The derivative of `expected_gr_t` in `curvature_lr` (Theorem 1). Times the mean eigenvalue it is that in the LR.

    Theorem 1 says that it is positive. At beta = 0.9 that is so wherever mean squares are positive (2 curvature_lr <=
    1 + mu/B), except that at mu = 0 it starts from 0. It is not so for every beta, because the proof is of first order
    only: at beta = 0.5, mu/B = 0.1 it is negative from curvature_lr = 0.15 on. Arguments and errors are those of
    `expected_gr_t`.

    Args:
        curvature_lr: Mean eigenvalue * learning rate, at least 0.
        noise_ratio: mu / B, at least 0.
        beta: Smoothing factor of the gauge, inside (0, 1).
        t: Iterations since a cold start; None: 1 / (1 - beta).

    Returns:
        The derivative, without unit.

    Raises:
        ValueError: As for `expected_gr_t`.

    Examples:
        >>> gr_t_slope(0.1, 1.0) > 0.0
        True
    """
    r, t, d_v, d_m = _lemma1_arguments(curvature_lr, noise_ratio, beta, t)
    return _gr_t(beta, r, t, d_v, d_m) * 2.0 / beta * (_log_slope(d_m, t) - _log_slope(d_v, t) / r)


def ideal_gr_t(beta: float = 0.9) -> float:
    """Lemma 1 at the best learning rate of a batch of mu samples (App. E). The source says "about 20".

    Args:
        beta: Smoothing factor of the gauge, inside (0, 1).

    Returns:
        GR_T, without unit.

    Raises:
        ValueError: For an argument out of range.

    Examples:
        >>> round(ideal_gr_t(), 1)
        23.0
    """
    return expected_gr_t(0.5, 1.0, beta)
