"""What a search may choose from, and the one dimension of it that is worth searching."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from .._validation import require
from ..policy import Config
from .principle import EARLY, SETTLED, Regime, decay_of, gamma, regime

Range = float | tuple[float, float]


@dataclass(frozen=True)
class Space:
    """What a search may choose from. Each is a number, if it is fixed, or the ends (low, high) of a range.

    Attributes:
        lr: Learning rates, above 0.
        weight_decay: Above 0 in a range; a fixed 0 is allowed.
        batch_size: Samples, at least 1.

    Raises:
        ValueError: For an end out of range.

    Examples:
        >>> space = Space(lr=(1e-5, 1e-2), weight_decay=(0.001, 0.1))
        >>> space.regime(steps=50).salient
        'lr'
        >>> space.reduced(space.regime(steps=50)).config(1e-3, batch_size=32)
        Config(lr=0.001, batch_size=32, weight_decay=0.01)
    """

    lr: Range
    weight_decay: Range = 0.01
    batch_size: Range = 32

    def __post_init__(self) -> None:
        for (name, (low, high)), least in zip(self.ends.items(), (0.0, 0.0, 1.0), strict=True):
            value = getattr(self, name)
            closed = name == "batch_size" or (name == "weight_decay" and low == high)
            must = f"{'at least' if closed else 'above'} {least:g}, a number or (low, high)"
            require((low >= least if closed else low > least) and low <= high < math.inf, name, value, must)

    @property
    def ends(self) -> dict[str, tuple[float, float]]:
        """The lowest and the highest value of each, by name."""
        named = {"lr": self.lr, "weight_decay": self.weight_decay, "batch_size": self.batch_size}
        return {name: _ends(value) for name, value in named.items()}

    @property
    def decay(self) -> float:
        """The geometric middle of the weight decays."""
        low, high = _ends(self.weight_decay)
        return low if low == high else math.sqrt(low * high)

    @property
    def gamma(self) -> tuple[float, float]:
        """The lowest and the highest lr * weight_decay."""
        (lr_low, lr_high), (low, high) = _ends(self.lr), _ends(self.weight_decay)
        return lr_low * low, lr_high * high

    def regime(self, steps: float, *, early: float = EARLY, settled: float = SETTLED) -> Regime:
        """The regime that all runs of this space share after so many iterations.

        If they do not share one, the answer is "both": a search then has to go through both dimensions.

        Args:
            steps: Iterations of a run.
            early: As in `regime`.
            settled: As in `regime`.

        Returns:
            The common regime, or "both".
        """
        least, largest = (regime(steps, g, early=early, settled=settled) for g in self.gamma)
        if least.salient == largest.salient:
            return largest
        return Regime("both", largest.age, f"from {least.reason}; to {largest.reason}")

    def reduced(self, regime: Regime) -> Line:
        """The space along its salient dimension.

        Args:
            regime: The regime of all runs.

        Returns:
            The line to search.

        Raises:
            ValueError: For regime "both", which leaves two dimensions.
        """
        require(regime.salient != "both", "regime", regime.salient, "'lr' or 'gamma': with 'both' nothing can be fixed")
        return Line(self, "lr" if regime.salient == "lr" else "gamma")


@dataclass(frozen=True)
class Line:
    """A `Space` along its salient dimension, on a logarithmic scale.

    Attributes:
        space: The space.
        salient: "lr": the learning rate varies, weight decay is fixed at the geometric middle of its range. "gamma":
            gamma varies from its lowest to its highest value. Weight decay stays in the middle of its range as long as
            the learning rate alone can give that gamma; towards the ends it changes too.

    Raises:
        ValueError: For a space with weight decay 0 along gamma.

    Examples:
        >>> line = Line(Space(lr=(1e-4, 1e-2), weight_decay=0.1), "gamma")
        >>> [f"{end:.0e}" for end in line.ends]
        ['1e-05', '1e-03']
    """

    space: Space
    salient: Literal["lr", "gamma"]

    def __post_init__(self) -> None:
        if self.salient == "gamma":
            decay = self.space.weight_decay
            require(decay != 0.0, "space.weight_decay", decay, "above 0 where gamma is to vary")

    @property
    def ends(self) -> tuple[float, float]:
        """The lowest and the highest value of what varies."""
        return _ends(self.space.lr) if self.salient == "lr" else self.space.gamma

    def config(self, value: float, batch_size: int) -> Config:
        """The configuration where the learning rate, or gamma, has this value.

        Args:
            value: The learning rate, or gamma.
            batch_size: Samples.

        Returns:
            The configuration.

        Raises:
            ValueError: For a value or batch outside the space.
        """
        low, high = self.ends
        # Ends are products, whose last bit may be wrong.
        inside = low * (1 - 1e-12) <= value <= high * (1 + 1e-12)
        require(inside, "value", value, f"a {self.salient} between {low:.4g} and {high:.4g}")
        least, most = _ends(self.space.batch_size)
        require(least <= batch_size <= most, "batch_size", batch_size, f"between {least:g} and {most:g}")
        decay = self.space.decay
        if self.salient == "lr":
            return Config(value, batch_size, decay)
        slowest, fastest = _ends(self.space.lr)
        lr = min(max(value / decay, slowest), fastest)
        return Config(lr, batch_size, value / lr)

    def value(self, config: Config) -> float:
        """Where on the line a configuration lies, itself or one that is equivalent to it.

        Args:
            config: Any configuration of the space.

        Returns:
            Its learning rate or gamma.
        """
        return config.lr if self.salient == "lr" else gamma(config.lr, decay_of(config, "config"))


def unsearched(config: Config, steps: float) -> str:
    """Say whether the weight decay that a search along the learning rate has left fixed matters.

    Args:
        config: The configuration that the search has found.
        steps: Updates that the weights have had.

    Returns:
        One sentence.

    Raises:
        ValueError: For a config without weight decay.

    Examples:
        >>> unsearched(Config(2e-5, 32, 0.01), steps=2000)
        'weight decay 0.01 does not count in 2000 iterations'
    """
    decay = decay_of(config, "config")
    salient = regime(steps, gamma(config.lr, decay)).salient
    if salient == "lr":
        return f"weight decay {decay:.3g} does not count in {steps:.4g} iterations"
    return f"weight decay {decay:.3g} was not searched, and {'may count' if salient == 'both' else 'counts'}"


def _ends(value: Range) -> tuple[float, float]:
    return value if isinstance(value, tuple) else (value, value)
