"""Where a reading should be, and how far from there it is."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..reading import Reading

BLIND = 0.95
"""GR_S above which noise hides from GR_T what the learning rate does."""


@dataclass(frozen=True)
class Target:
    """Where healthy training sits in the (GR_T, GR_S) plane.

    gr_t, gr_s            the published target (20, 0.58), found nearly the same for five model families
    gr_t_zone, gr_s_zone  the dead band of +-10 % around GR_T, and the published GR_S health zone
    gr_t_power, gr_s_power  exponents xi of the power laws by which one step towards the target is taken

    The GR_T target belongs to the gauge's beta = 0.9 and to no other.
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
        """What one step multiplies the learning rate by: (GR_T*/GR_T)^(1/xi_T); 1 inside the zone, None if unknown."""
        if reading.gr_t is None or not (0.0 < reading.gr_t < math.inf and reading.finite_time_factor > 0.0):
            return None
        gr_t = reading.gr_t / reading.finite_time_factor
        low, high = self.gr_t_zone
        return 1.0 if low <= gr_t <= high else float((self.gr_t / gr_t) ** (1.0 / self.gr_t_power))

    def batch_factor(self, reading: Reading) -> float | None:
        """What one step multiplies the batch size by: (GR_S/GR_S*)^(1/xi_S); 1 inside the zone, None if unknown."""
        if reading.gr_s is None or not 0.0 < reading.gr_s < math.inf:
            return None
        low, high = self.gr_s_zone
        return 1.0 if low <= reading.gr_s <= high else float((reading.gr_s / self.gr_s) ** (1.0 / self.gr_s_power))
