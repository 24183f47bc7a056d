"""The measured rules where a loss has stalled."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from policy.healthy import CONFIG, READING

from grgauge import Policy, Retune
from grgauge.policy import Probe


def stalled(loss_at, *, config=CONFIG, checks=400, probed=1.0, **late):
    """Moves of a training on a loss that depends on nothing but the configuration; `late` readings follow step 60.

    Untrained weights are at 2.0, of which a factor e goes every 5 steps; 1 % of noise from step to step. The other side
    of a probe ends at `probed` times this one's loss.
    """
    policy, rng = Policy(), random.Random(0)
    moves = []
    policy.observe(None, config, loss=2.0)
    for step in range(1, 5 * checks + 1):
        reading = None
        if step % 5 == 0:
            reading = replace(READING, step=step, **({} if step <= 60 else late))
        level = loss_at(config) + 2.0 * math.exp(-step / 5)
        decision = policy.observe(reading, config, loss=level * (1.0 + 0.01 * rng.gauss(0.0, 1.0)))
        if isinstance(decision, Probe):
            decision = policy.judge(((1.0, 1.0), (probed, probed)))
        if isinstance(decision, Retune):
            moves.append(decision)
            config = decision.config
            if len(moves) == 4:
                break
    return moves


TOO_HIGH = {"gr_t": 34.0, "gr_t_error": 4.0}
EVERYWHERE = {"gr_t": 300.0, "gr_t_error": 300.0}
NOISY = {"gr_s": 0.9, "gr_s_error": 0.01, "noise_scale": 600.0, "noise_scale_error": 60.0}


@pytest.mark.parametrize("readings", [TOO_HIGH, EVERYWHERE, NOISY], ids=["too high", "everywhere", "noisy"])
def test_a_loss_that_has_stalled_is_left_to_the_average(readings):
    """A lower learning rate and a larger batch have a lower loss. So has the average, and none of it is lost where the
    loss would have fallen again."""
    assert stalled(lambda config: 0.4 + 500.0 * config.lr + 10.0 / config.batch_size, **readings) == []


def test_what_a_comparison_shows_is_followed():
    up, *_ = stalled(lambda config: 1.0, probed=0.9, **NOISY)
    assert up.config.lr == pytest.approx(3.0 * CONFIG.lr)
    assert up.evidence.rule == "probe"
