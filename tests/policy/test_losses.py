"""Losses in blocks: their noise, their trend, and how many are kept."""

from __future__ import annotations

import random

import pytest

from grgauge.policy.losses import Losses, loss_at
from grgauge.policy.rules import RULES


def test_losses_know_their_noise_whatever_their_trend():
    rng, losses = random.Random(0), Losses()
    for i in range(400):
        losses.add(5.0 - 0.01 * i + rng.gauss(0.0, 0.2))
        if i % 5 == 4:
            losses.close(i)
    assert losses.variance == pytest.approx(0.04, rel=0.6)
    assert losses.fall(20, -1.0) == pytest.approx(0.5, abs=0.2)
    assert loss_at(losses.curve, 201.0) == pytest.approx(5.0 - 2.0, abs=0.4)
    assert loss_at(losses.curve, 1e6) is None


def test_losses_stay_small_and_keep_their_span():
    losses = Losses()
    for i in range(10_000):
        losses.add(1.0)
        losses.close(i)
    assert len(losses.curve) <= RULES.kept_blocks
    assert losses.curve[0].samples == 0
    assert losses.curve[-1].samples == 9999
