"""Where a reading should be, and how far from there it is."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..reading import Reading

BLIND = 0.95
"""GR_S above which noise hides from GR_T what the learning rate does."""


@dataclass(frozen=True)
class Target:
    """Where healthy training sits in the (GR_T, GR_S) plane, and how large a step towards it is.

    The defaults are the published target, which was nearly the same for five families of models. That of GR_T holds
    for gauges with beta = 0.9 only.

    Attributes:
        gr_t: GR_T to aim at.
        gr_s: GR_S to aim at.
        gr_t_zone: (low, high) around gr_t where the learning rate is left alone: 10 % either way.
        gr_s_zone: (low, high) around gr_s where the batch is left alone: the published zone of healthy training.
        gr_t_power: exponent xi of the power law for the learning rate. A larger one takes smaller steps.
        gr_s_power: the same for the batch.

    Raises:
        ValueError: a zone does not surround its target, gr_s_zone reaches 1, or a power is not above 0.

    Examples:
        >>> from grgauge import Reading, Target
        >>> reading = Reading(
        ...     step=60, batch_size=64, gr_t=2.5, gr_t_error=0.1, finite_time_factor=1.0, gr_s=0.29, gr_s_error=0.02,
        ...     noise_scale=26.0, noise_scale_error=2.0, grad_norm=0.7, nonfinite=0, ready=True,
        ... )
        >>> Target().lr_factor(reading), Target().batch_factor(reading)
        (2.0, 0.5)
    """

    gr_t: float = 20.0
    gr_s: float = 0.58
    gr_t_zone: tuple[float, float] = (18.0, 22.0)
    gr_s_zone: tuple[float, float] = (0.5, 0.65)
    gr_t_power: float = 3.0
    gr_s_power: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("gr_t", self.gr_t), ("gr_s", self.gr_s)):
            low, high = getattr(self, f"{name}_zone")
            if not 0.0 < low <= value <= high:
                raise ValueError(f"{name}_zone is {(low, high)}; it must be (low, high) around {name} = {value}")
        if not (self.gr_s_zone[1] < 1.0 and self.gr_t_power > 0.0 and self.gr_s_power > 0.0):
            raise ValueError(f"gr_s_zone must end below 1 and both powers be positive, not {self}")

    def lr_factor(self, reading: Reading) -> float | None:
        """What one step multiplies the learning rate by: (gr_t / GR_T)^(1/gr_t_power).

        GR_T is first divided by the reading's finite_time_factor, so that early readings can be judged.

        Returns:
            The factor; 1 inside the zone, None without GR_T.
        """
        if reading.gr_t is None or not (0.0 < reading.gr_t < math.inf and reading.finite_time_factor > 0.0):
            return None
        gr_t = reading.gr_t / reading.finite_time_factor
        low, high = self.gr_t_zone
        return 1.0 if low <= gr_t <= high else float((self.gr_t / gr_t) ** (1.0 / self.gr_t_power))

    def batch_factor(self, reading: Reading) -> float | None:
        """What one step multiplies the batch size by: (GR_S / gr_s)^(1/gr_s_power).

        Returns:
            The factor; 1 inside the zone, None without GR_S.
        """
        if reading.gr_s is None or not 0.0 < reading.gr_s < math.inf:
            return None
        low, high = self.gr_s_zone
        return 1.0 if low <= reading.gr_s <= high else float((reading.gr_s / self.gr_s) ** (1.0 / self.gr_s_power))
