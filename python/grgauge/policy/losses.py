"""What the training loss says that gauges cannot: whether a network was damaged. Plain numbers, no torch, no I/O."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from ..smoothing import thin
from .rules import RULES


@dataclass(frozen=True)
class Block:
    """The losses from one check to the next: their mean, and the age of the weights in samples at its end."""

    samples: float
    loss: float


@dataclass
class Losses:
    """Training losses of one line of weights, in blocks from check to check."""

    first: float | None = None  # that of untrained weights if it was given
    curve: list[Block] = field(default_factory=list)  # so far, thinned where it is old
    variance: float = 0.0  # of single losses: half the mean square of successive differences, which no trend enters
    differences: float = 0.0  # how many, with old ones fading
    size: int = 1  # losses in the newest block
    total: float = 0.0
    count: int = 0
    last: float | None = None
    before: float | None = None  # the one before the last
    variance_then: float | None = None  # `variance` at the end of the newest block, once it is known, ...
    variance_before: float | None = None  # ... and of the one before

    def add(self, loss: float) -> None:
        """Take in a finite loss, of one step or the mean of several."""
        if self.first is None:
            self.first = loss
        self.total, self.count = self.total + loss, self.count + 1
        if self.last is not None:
            square = 0.5 * (loss - self.last) ** 2
            if self.differences >= RULES.noise_differences:
                square = min(square, RULES.jump * self.variance)
            self.differences = RULES.fading * self.differences + 1.0
            self.variance += (square - self.variance) / self.differences
        self.before, self.last = self.last, loss

    def close(self, samples: float) -> float | None:
        """End the block, at that age of the weights in samples; its mean, None without losses."""
        if not self.count:
            return None
        mean = self.total / self.count
        self.variance_before = self.variance_then
        self.variance_then = self.variance if self.differences >= RULES.noise_differences else None
        self.curve.append(Block(samples, mean))
        self.total, self.count, self.size = 0.0, 0, self.count
        self.curve = thin(self.curve, RULES.kept_blocks)
        return mean

    def level(self, blocks: int, since: float = -math.inf) -> float | None:
        """Mean of the newest `blocks` blocks that ended after `since` samples, None where there are fewer."""
        values = [block.loss for block in self.curve[-blocks:] if block.samples > since]
        return sum(values) / blocks if len(values) == blocks > 0 else None

    def untrained(self) -> float | None:
        """The loss of untrained weights, from the first loss and the first block; None before them."""
        if self.first is None or not self.curve:
            return None
        return min(self.first, 0.5 * (self.first + self.curve[0].loss))

    def learned(self, blocks: int = RULES.learned_blocks) -> bool:
        """The newest blocks are clearly below untrained weights. True where there is no loss to tell."""
        untrained, now = self.untrained(), self.level(blocks)
        if untrained is None or now is None:
            return untrained is None
        error = self.error(blocks)
        return now < untrained - max(RULES.learned_errors * error, RULES.learned * abs(untrained))

    def lowest(self, blocks: int, since: float) -> float | None:
        """The lowest mean of so many blocks in a row that ended after `since` samples, None where there are fewer."""
        sums = [0.0, *accumulate(block.loss for block in self.curve if block.samples > since)]
        means = [(end - begin) / blocks for begin, end in zip(sums, sums[blocks:], strict=False)]
        return min(means, default=None)

    def blocks(self, since: float) -> int:
        """How many blocks have ended after `since` samples."""
        return sum(block.samples > since for block in self.curve)

    def above(self, level: float, blocks: int) -> bool:
        """So many newest blocks are all above."""
        return len(self.curve) >= blocks and all(block.loss > level for block in self.curve[-blocks:])

    def stays_above(self, level: float) -> bool:
        """The newest two losses are above, or the newest two blocks: a single one may be, where few samples are drawn
        from a long tail."""
        newest = [loss for loss in (self.before, self.last) if loss is not None]
        return (len(newest) == 2 and min(newest) > level) or self.above(level, 2)

    def error(self, blocks: int) -> float:
        """Standard error of a `level` of that many blocks."""
        return math.sqrt(self.variance / (self.size * blocks))

    def fall(self, blocks: int, since: float) -> float | None:
        """By how much the loss fell from one half of the newest `blocks` blocks to the other; None if too few."""
        now, both = self.level(blocks // 2, since), self.level(blocks // 2 * 2, since)
        return None if now is None or both is None else 2.0 * (both - now)

    def cut(self, samples: float) -> None:
        """Forget what came after that age: the weights have gone back to it."""
        self.curve = [block for block in self.curve if block.samples <= samples]
        self.total, self.count, self.last, self.before = 0.0, 0, None, None


def loss_at(curve: Sequence[Block], samples: float) -> float | None:
    """The loss at that many samples, linear between blocks that are finite; None outside of them."""
    for left, right in pairwise(curve):
        if left.samples <= samples <= right.samples and math.isfinite(left.loss) and math.isfinite(right.loss):
            span = right.samples - left.samples
            return left.loss + (right.loss - left.loss) * (samples - left.samples) / span if span else right.loss
    return None
