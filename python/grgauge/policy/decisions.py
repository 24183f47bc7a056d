"""What a policy sets, what it decides, and what a decision rests on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .._validation import require
from .rules import RULES


@dataclass(frozen=True)
class Config:
    """What a policy sets.

    Attributes:
        lr: peak learning rate, the one that a schedule multiplies.
        batch_size: global batch in samples.
        weight_decay: handed on as it is; None where the optimizer has none.

    Raises:
        ValueError: a number is out of range.
    """

    lr: float
    batch_size: int
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        require(0.0 < self.lr < math.inf, "lr", self.lr, "finite and above 0")
        whole = isinstance(self.batch_size, int) and self.batch_size >= 1
        require(whole, "batch_size", self.batch_size, "a whole number of at least 1 sample")
        decay = self.weight_decay
        require(decay is None or 0.0 <= decay < math.inf, "weight_decay", decay, "None or finite and at least 0")

    def __str__(self) -> str:
        return f"lr {self.lr:.2e}, batch {self.batch_size}"


@dataclass(frozen=True)
class Evidence:
    """What a decision rests on.

    Attributes:
        rule: the name of the rule that decided.
        step: the reading's step, None where there was no reading.
        quantity: "GR_T", "GR_S", "loss", "gradient norm", or "" where no number was needed.
        value: of that quantity.
        interval: that it was judged by, None where it was judged as it is.

    Examples:
        >>> import grgauge
        >>> print(grgauge.Evidence("learning rate", 40, "GR_T", 5.0, (4.2, 6.0)))
        learning rate: GR_T 5 [4.2, 6]
    """

    rule: str
    step: int | None = None
    quantity: str = ""
    value: float | None = None
    interval: tuple[float, float] | None = None

    def __str__(self) -> str:
        if self.value is None:
            return self.rule
        within = "" if self.interval is None else f" [{self.interval[0]:.3g}, {self.interval[1]:.3g}]"
        return f"{self.rule}: {self.quantity} {self.value:.3g}{within}"


@dataclass(frozen=True)
class Continue:
    """Train on as before.

    Attributes:
        notable: worth a line in a log: something would have been done, but for a reason that comes up once a trial.
    """

    reason: str
    evidence: Evidence
    notable: bool = False

    def __str__(self) -> str:
        return f"go on: {self.reason} ({self.evidence})"


@dataclass(frozen=True)
class Retune:
    """Train on with another configuration.

    Attributes:
        config: the new configuration.
        reuse: True: with the weights and optimizer state at hand, which are to be saved first; False: from untrained
            weights.
        rollback: with `reuse`: with the weights and state that the last `Retune` without rollback saved.
        probed: with `reuse`: with the weights that a `Probe` has trained at the new configuration.
    """

    config: Config
    reuse: bool
    reason: str
    evidence: Evidence
    rollback: bool = False
    probed: bool = False

    def __str__(self) -> str:
        weights = "from saved weights" if self.rollback else "same weights" if self.reuse else "from scratch"
        weights = "the probe's weights" if self.probed else weights
        return f"{self.config}, {weights}: {self.reason} ({self.evidence})"


@dataclass(frozen=True)
class Stop:
    """End this training: no configuration within the bounds is left to try."""

    reason: str
    evidence: Evidence

    def __str__(self) -> str:
        return f"stop: {self.reason} ({self.evidence})"


@dataclass(frozen=True)
class Probe:
    """Compare two configurations where gauges cannot tell: train at each of them, from the weights at hand and on the
    same batches, and tell `Policy.judge` the losses of their averaged weights on the batches after those.

    Attributes:
        configs: the present one, and another of the same batch.
        samples: to train on at each; from untrained weights, at the other one alone.
        untrained: the other one begins with untrained weights, and catches up with those at hand, which wait.
    """

    configs: tuple[Config, Config]
    samples: int
    reason: str
    evidence: Evidence
    untrained: bool = False

    @property
    def batches(self) -> int:
        """Batches that the losses are told of."""
        steps = self.samples // self.configs[0].batch_size
        enough = math.ceil(RULES.compared_samples / self.configs[0].batch_size)
        return max(RULES.compared_least, enough, steps // RULES.compared_part)

    @property
    def cost(self) -> int:
        """Samples that all of it takes, at most."""
        sides = 1 if self.untrained else len(self.configs)
        return sides * self.samples + len(self.configs) * (self.batches + 1) * self.configs[0].batch_size

    def __str__(self) -> str:
        here, there = self.configs
        anew = " from untrained weights" if self.untrained else ""
        return f"compare lr {here.lr:.2e} with {there.lr:.2e}{anew}: {self.reason} ({self.evidence})"


Decision = Continue | Retune | Stop | Probe
