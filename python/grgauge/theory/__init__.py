"""What the two gauges should read: closed forms for GR_T and GR_S, plain numbers in and out.

"Lemma 1", "Eq. 19", "App. E" and the like are those of the supplement of "GR-Gauge: Cost-efficient Training
Configuration By Gauging the Gradient Redundancy" (Wang and Chen); "exact" marks what is derived here, as a ratio of
expectations, without approximation.

Symbols: beta is the gauge's own smoothing factor (0.9 in the source; never the optimizer's); the noise scale mu is
tr Cov(per-sample gradient) / |true gradient|^2, in samples; the noise ratio is mu / B; curvature_lr is (mean Hessian
eigenvalue) * (learning rate), a pure number. GR_T and GR_S are pure numbers.

Every function raises ValueError, naming the argument, its value and what it must be.
"""

from .gr_s import (
    batch_for_gr_s,
    critical_batch,
    expected_gr_s,
    expected_xi,
    gr_s_slope,
    ideal_gr_s_range,
    noise_scale_from_gr_s,
    optimal_curvature_lr,
)
from .gr_t import (
    aligned,
    autocorrelated,
    autocorrelation,
    expected_gr_t,
    expected_gr_t_first_order,
    finite_time_factor,
    gr_t_slope,
    ideal_gr_t,
    period2,
    steady_signal,
    uncorrelated,
)

__all__ = [
    "aligned",
    "autocorrelated",
    "autocorrelation",
    "batch_for_gr_s",
    "critical_batch",
    "expected_gr_s",
    "expected_gr_t",
    "expected_gr_t_first_order",
    "expected_xi",
    "finite_time_factor",
    "gr_s_slope",
    "gr_t_slope",
    "ideal_gr_s_range",
    "ideal_gr_t",
    "noise_scale_from_gr_s",
    "optimal_curvature_lr",
    "period2",
    "steady_signal",
    "uncorrelated",
]
