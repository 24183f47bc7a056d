"""GR_S: what Lemma 2 expects of it, and what is best at a noise scale."""

from __future__ import annotations

import math

from .._validation import require, require_batch


def _require_noise_scale(noise_scale: float) -> None:
    require(0.0 <= noise_scale < math.inf, "noise_scale", noise_scale, "finite and at least 0")


def expected_gr_s(batch_size: float, noise_scale: float) -> float:
    """GR_S at a batch of B samples: (1 + mu) / (B + mu), in (0, 1] (Lemma 2; a ratio of expectations).

    Args:
        batch_size: B, in samples, at least 1.
        noise_scale: mu, in samples, at least 0.

    Returns:
        GR_S, in (0, 1].

    Raises:
        ValueError: For an argument out of range.

    Examples:
        >>> expected_gr_s(batch_size=100, noise_scale=100)
        0.505
    """
    require_batch(batch_size)
    _require_noise_scale(noise_scale)
    return (1.0 + noise_scale) / (batch_size + noise_scale)


def gr_s_slope(batch_size: float, noise_scale: float) -> float:
    """The derivative of `expected_gr_s` in the batch size, per sample: -(1 + mu) / (B + mu)^2 < 0 (Theorem 2, Eq. 30).

    So a GR_S above its target calls for a LARGER batch.

    Args:
        batch_size: B, in samples, at least 1.
        noise_scale: mu, in samples, at least 0.

    Returns:
        The derivative, per sample, below 0.

    Raises:
        ValueError: For an argument out of range.

    Examples:
        >>> gr_s_slope(batch_size=100, noise_scale=100) < 0.0
        True
    """
    return -expected_gr_s(batch_size, noise_scale) / (batch_size + noise_scale)


def batch_for_gr_s(gr_s: float, noise_scale: float) -> float:
    """The batch, in samples (not rounded), whose expected GR_S is `gr_s`, in (0, 1]: Lemma 2 solved for B.

    It is 0.724 mu + 1.72 at the source's target of 0.58.

    Args:
        gr_s: The GR_S to reach, in (0, 1].
        noise_scale: mu, in samples, at least 0.

    Returns:
        B, in samples, not rounded.

    Raises:
        ValueError: For an argument out of range.

    Examples:
        >>> round(batch_for_gr_s(0.58, noise_scale=100), 1)
        74.1
    """
    require(0.0 < gr_s <= 1.0, "gr_s", gr_s, "in (0, 1]")
    _require_noise_scale(noise_scale)
    return (1.0 + noise_scale * (1.0 - gr_s)) / gr_s


def noise_scale_from_gr_s(gr_s: float, batch_size: float) -> float:
    """The noise scale, in samples, at which a batch of B samples has the expected GR_S `gr_s`: Lemma 2 solved for mu.

    `gr_s` lies in [1/B, 1): 1/B means no noise, 1 would mean nothing but noise.

    Args:
        gr_s: In [1/B, 1): 1/B means no noise; 1 would mean nothing but noise.
        batch_size: B, in samples, at least 1.

    Returns:
        mu, in samples.

    Raises:
        ValueError: For an argument out of range.

    Examples:
        >>> round(noise_scale_from_gr_s(0.505, batch_size=100))
        100
    """
    require_batch(batch_size)
    require(
        1.0 / batch_size <= gr_s < 1.0, "gr_s", gr_s, f"in [1/batch_size, 1) = [{1.0 / batch_size:g}, 1), its range"
    )
    return max(gr_s * batch_size - 1.0, 0.0) / (1.0 - gr_s)


def expected_xi(k: float, a: float) -> float:
    """xi_k of k groups, (1 + a) / (k + a) with a = mu / (samples per group) = n mu / B (Eq. 33). k >= 1, a >= 0.

    Args:
        k: Groups, at least 1.
        a: n mu / B, at least 0.

    Returns:
        xi_k, in (0, 1].

    Raises:
        ValueError: For an argument out of range.

    Examples:
        >>> expected_xi(k=4, a=2)
        0.5
    """
    require(1.0 <= k < math.inf, "k", k, "finite and at least 1 group")
    require(0.0 <= a < math.inf, "a", a, "finite and at least 0")
    return (1.0 + a) / (k + a)


# --- Ideal values (App. E) -------------------------------------------------------------------------------------------


def critical_batch(noise_scale: float) -> float:
    """The batch, in samples, beyond which more samples save few steps: the noise scale itself (Eq. 35).

    It is the turning point of McCandlish et al. where curvature and noise are unrelated: tr(H Cov) = mean eigenvalue *
    tr Cov. In pre-training of language models, the batch at which returns really diminish is known to lie well above
    it.

    Args:
        noise_scale: mu, in samples, at least 0.

    Returns:
        B, in samples.

    Raises:
        ValueError: For an argument out of range.

    Examples:
        >>> critical_batch(noise_scale=100.0)
        100.0
    """
    _require_noise_scale(noise_scale)
    return noise_scale


def ideal_gr_s_range(noise_scale: float = math.inf) -> tuple[float, float]:
    """GR_S at the critical batch and at half of it (App. E): (1/2, 2/3) for a large noise scale.

    The source rounds the upper end to 0.65, which is B = 0.54 mu. Where half a critical batch would be less than one
    sample, the range ends at a batch of one sample.

    Args:
        noise_scale: mu, in samples, at least 0; inf is the limit of large mu.

    Returns:
        The lower and the upper end, both in (0, 1].

    Raises:
        ValueError: For an argument out of range.

    Examples:
        >>> low, high = ideal_gr_s_range()
        >>> low, round(high, 2)
        (0.5, 0.67)
    """
    require(noise_scale >= 0.0, "noise_scale", noise_scale, "at least 0")
    if math.isinf(noise_scale):
        return 0.5, 2.0 / 3.0
    critical = critical_batch(noise_scale)
    return expected_gr_s(max(critical, 1.0), noise_scale), expected_gr_s(max(0.5 * critical, 1.0), noise_scale)


def optimal_curvature_lr(batch_size: float, noise_scale: float) -> float:
    """Mean eigenvalue * learning rate that lowers the loss most in one step: 1 / (1 + mu/B), 1/2 at B = mu (Eq. 37).

    Args:
        batch_size: B, in samples, at least 1.
        noise_scale: mu, in samples, at least 0.

    Returns:
        A pure number in (0, 1].

    Raises:
        ValueError: For an argument out of range.

    Examples:
        >>> optimal_curvature_lr(batch_size=100, noise_scale=100)
        0.5
    """
    require_batch(batch_size)
    return batch_size / (batch_size + critical_batch(noise_scale))
