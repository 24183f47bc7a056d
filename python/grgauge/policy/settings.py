"""The arguments of a policy, checked."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, field, replace
from statistics import NormalDist
from typing import Literal

from .._validation import require, require_count
from .decisions import Config
from .target import BLIND, Target

USUAL_LR = 4 / 9
"""As a share of the range of learning rates, in logarithms: 1.7e-3 of 1e-5 to 1."""


@dataclass(eq=False)
class Settings:
    """The arguments of `Policy`, checked. `Policy` explains them."""

    target: Target = field(default_factory=Target)
    _: KW_ONLY
    rules: Literal["measured", "published"] = "measured"
    every: int = 5
    warm_up: int = 20
    grace: int = 20
    window: float = 0.01
    lr_bounds: tuple[float, float] = (1e-7, 10.0)
    min_batch: int = 1
    max_batch: int = 1 << 20
    batch_multiple: int = 1
    max_lr_factor: float = 4.0
    max_batch_factor: float = 4.0
    gain: float = 2.0 / 3.0
    coupling: float = 0.5
    confidence: float = 0.9
    blind: float = BLIND
    max_moves: int = 40

    def __post_init__(self) -> None:
        self.target = self.target or Target()  # None is allowed
        require(self.rules in ("measured", "published"), "rules", self.rules, '"measured" or "published"')
        for name in ("every", "min_batch", "batch_multiple"):
            require_count(name, getattr(self, name), 1)
        for name in ("warm_up", "grace", "max_moves"):
            require_count(name, getattr(self, name), 0)
        low, high = self.lr_bounds
        require(0.0 < low <= high < math.inf, "lr_bounds", self.lr_bounds, "(low, high) with 0 < low <= high, finite")
        room = self.max_batch // self.batch_multiple * self.batch_multiple >= self.min_batch
        words = f"at least {self.min_batch} (min_batch) as a multiple of {self.batch_multiple}"
        require(room, "max_batch", self.max_batch, words)
        require(0.0 <= self.window < math.inf, "window", self.window, "finite and at least 0")
        for name in ("max_lr_factor", "max_batch_factor"):
            require(getattr(self, name) > 1.0, name, getattr(self, name), "above 1")
        require(0.0 < self.gain <= 1.0, "gain", self.gain, "in (0, 1]")
        require(0.0 <= self.coupling <= 1.0, "coupling", self.coupling, "in [0, 1]")
        require(0.0 < self.confidence < 1.0, "confidence", self.confidence, "inside (0, 1)")
        require(0.0 < self.blind <= 1.0, "blind", self.blind, "in (0, 1]")

    @property
    def z(self) -> float:
        """Half the width of an interval of that confidence, in standard errors."""
        return NormalDist().inv_cdf(0.5 + 0.5 * self.confidence)

    @property
    def usual_lr(self) -> float:
        """Where a search begins if nobody says where."""
        low, high = self.lr_bounds
        return low * (high / low) ** USUAL_LR

    def fit(self, config: Config, lr: float, batch_size: float) -> Config:
        """`config` with the allowed learning rate and batch that are nearest to those given."""
        low, high = self.lr_bounds
        m = self.batch_multiple
        most, least = self.max_batch // m * m, -(-self.min_batch // m) * m
        size = min(max(round(min(batch_size, most) / m) * m, least), most)
        return replace(config, lr=min(max(lr, low), high), batch_size=size)
