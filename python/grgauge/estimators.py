"""One step's sums of squares -> GR_T, S and G2, GR_S: plain numbers in and out, no torch, no I/O.

    gr_t           V / |m|^2, the temporal gauge
    two_batch      (S, G2): unbiased estimates of tr Cov(per-sample gradient) and of |true gradient|^2
    gr_s           (G2 + S) / (B G2 + S), the spatial gauge
    noise_scale_from_xi   the noise scale from xi_k, as in the source; at k = n it is S / G2 of `two_batch`

Sources: "GR-Gauge" (Wang and Chen), supplement, App. C and D; McCandlish et al., "An Empirical Model of Large-Batch
Training", App. A.1. Sizes are in samples, or in tokens where losses are means over tokens: then so is the noise scale.

A malformed argument raises a ValueError that names the argument, its value and what it must be. A measurement that is
not finite is no error: the result is then nan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from ._validation import require, require_batch

__all__ = ["Groups", "gr_s", "gr_t", "noise_scale_from_xi", "two_batch"]


def gr_t(grad_sq_mean: float, ema_sq: float) -> float:
    """GR_T, the temporal gauge: V / |m|^2.

    Args:
        grad_sq_mean: V, the bias-corrected moving mean of sum g^2.
        ema_sq: |m|^2, the sum of squares of the bias-corrected EMA of g.

    Returns:
        At least 1, except for rounding. inf if the EMA is exactly 0 and the gradients are not; nan if both are 0 or
        either is not finite.

    Raises:
        ValueError: For a negative number.

    Examples:
        >>> gr_t(grad_sq_mean=40.0, ema_sq=2.0)
        20.0
    """
    require(not grad_sq_mean < 0.0, "grad_sq_mean", grad_sq_mean, "at least 0")
    require(not ema_sq < 0.0, "ema_sq", ema_sq, "at least 0")
    if not (math.isfinite(grad_sq_mean) and math.isfinite(ema_sq)):
        return math.nan
    if ema_sq == 0.0:
        return math.inf if grad_sq_mean > 0.0 else math.nan
    return grad_sq_mean / ema_sq


class Groups(NamedTuple):
    """The measurements of one step's groups (ranks or micro-batches): the arguments of `two_batch`, in its order.

    Attributes:
        group_sq: |G_i|^2 of each group.
        grad_sq: |g|^2 of the step.
        group_sizes: b_i, in samples.
        weights: p_i, on any scale.

    Examples:
        >>> two_batch(*Groups([3.0, 3.0], 2.0, [8, 8], [0.5, 0.5]))
        (16.0, 1.0)
    """

    group_sq: list[float]
    grad_sq: float
    group_sizes: list[float]
    weights: list[float]


def two_batch(
    group_sq: Sequence[float],
    grad_sq: float,
    group_sizes: Sequence[float],
    weights: Sequence[float] | None = None,
) -> tuple[float, float]:
    """(S, G2): unbiased estimates of tr Cov(per-sample gradient) and |true gradient|^2, from n >= 2 independent groups.

    With G_i the mean gradient of group i over b_i samples, and g = sum p_i G_i that of the step,

        A = sum p_i |G_i|^2,  E A = G2 + a S,  a = sum p_i   / b_i
        C = |g|^2,            E C = G2 + c S,  c = sum p_i^2 / b_i

    S = (A - C) / (a - c) and G2 = C - c S: for equal groups the two-batch-size estimator of McCandlish et al.

    Args:
        group_sq: |G_i|^2 of each group.
        grad_sq: |g|^2.
        group_sizes: b_i, in samples.
        weights: p_i, on any scale; None: p_i = b_i / B, the mean over all samples. Ranks of unequal batches whose
            gradients are simply averaged have equal weights.

    Returns:
        S and G2. Either may be negative, and G2 often is. nan when a square is not finite.

    Raises:
        ValueError: For fewer than two groups, and for lists of unequal length or numbers out of range.

    Examples:
        >>> s, g2 = two_batch(group_sq=[3.0, 3.0], grad_sq=2.0, group_sizes=[8, 8])
        >>> s, g2, s / g2  # tr Cov, |true gradient|^2, noise scale in samples
        (16.0, 1.0, 16.0)
    """
    n = len(group_sizes)
    if n < 2:
        raise ValueError(
            f"GR_S not available: group_sizes must have at least 2 groups (ranks or micro-batches), got {group_sizes!r}"
        )
    require(len(group_sq) == n, "group_sq", group_sq, f"as long as group_sizes ({n})")
    require(weights is None or len(weights) == n, "weights", weights, f"as long as group_sizes ({n})")
    shares = group_sizes if weights is None else weights
    for i in range(n):
        require(0.0 < group_sizes[i] < math.inf, f"group_sizes[{i}]", group_sizes[i], "finite and above 0")
        require(0.0 < shares[i] < math.inf, f"weights[{i}]", shares[i], "finite and above 0")
        require(not group_sq[i] < 0.0, f"group_sq[{i}]", group_sq[i], "at least 0")
    require(not grad_sq < 0.0, "grad_sq", grad_sq, "at least 0")
    if not (math.isfinite(grad_sq) and all(map(math.isfinite, group_sq))):
        return math.nan, math.nan
    total = math.fsum(shares)
    p = [share / total for share in shares]
    excess = math.fsum(p_i * (sq - grad_sq) for p_i, sq in zip(p, group_sq, strict=True))  # A - C
    gap = math.fsum(p_i * (1.0 - p_i) / b_i for p_i, b_i in zip(p, group_sizes, strict=True))  # a - c
    c = math.fsum(p_i * p_i / b_i for p_i, b_i in zip(p, group_sizes, strict=True))
    s = excess / gap
    return s, grad_sq - c * s


def gr_s(s: float, g2: float, batch_size: float) -> float:
    """GR_S, the spatial gauge: (G2 + S) / (B G2 + S), with S and G2 clipped to at least 0 (Lemma 2 with mu = S / G2).

    Args:
        s: Estimate of tr Cov(per-sample gradient).
        g2: Estimate of |true gradient|^2.
        batch_size: B, in samples.

    Returns:
        A number in (0, 1]; 1 where G2 is 0 or negative, which means nothing but noise; nan when both are, or when
        either is not finite.

    Raises:
        ValueError: For an argument out of range.

    Examples:
        >>> round(gr_s(s=16.0, g2=1.0, batch_size=16), 3)
        0.531
    """
    require_batch(batch_size)
    if not (math.isfinite(s) and math.isfinite(g2)) or (s <= 0.0 and g2 <= 0.0):
        return math.nan
    # divided by the larger of the two, so that no product overflows
    if g2 >= s:
        ratio = max(s, 0.0) / g2
        return (1.0 + ratio) / (batch_size + ratio)
    ratio = max(g2, 0.0) / s
    return (1.0 + ratio) / (1.0 + batch_size * ratio)


def noise_scale_from_xi(xi: Sequence[float], batch_size: float, groups: int, first: int = 2) -> float:
    """The noise scale mu from xi_k = sum_{i<=k} |G_i|^2 / |sum_{i<=k} G_i|^2 of equal groups (Eq. 31, 34).

    It is the mean of ((k-1) / (1 - xi_k) - k) B / n over k, from `first` to the last one given. Since n/B is one
    constant, the source's linear fit is this mean. With `first` = `groups` = n it is S / G2 of `two_batch`, and that is
    the one to use: each term is a ratio of noisy numbers that may be negative or huge, above all for small k.

    Args:
        xi: xi[k - 1] is xi_k, so xi[0] is 1 and says nothing.
        batch_size: B, in samples.
        groups: n.
        first: The smallest k that counts.

    Returns:
        The noise scale in samples; inf where a xi_k is 1 (orthogonal sums), nan where one is not finite.

    Raises:
        ValueError: For an argument out of range.

    Examples:
        >>> noise_scale_from_xi([1.0, 0.75, 0.6, 0.5], batch_size=32, groups=4)
        16.0
    """
    require_batch(batch_size)
    require(2 <= groups <= batch_size, "groups", groups, "at least 2 and at most batch_size")
    require(2 <= first <= groups, "first", first, "between 2 and groups")
    require(first <= len(xi) <= groups, "xi", xi, f"between first ({first}) and groups ({groups}) numbers long")
    terms = []
    for k in range(first, len(xi) + 1):
        value = xi[k - 1]
        require(not value < 0.0, f"xi[{k - 1}]", value, "at least 0")
        if not math.isfinite(value):
            return math.nan
        terms.append((k - 1) / (1.0 - value) - k if value != 1.0 else math.inf)
    return sum(terms) / len(terms) * batch_size / groups
