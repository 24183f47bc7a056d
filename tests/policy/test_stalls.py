"""The measured rules where a loss has stalled: nothing, or another learning rate, on trial."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from policy.healthy import CONFIG, READING, watch

from grgauge import Policy, Retune
from grgauge.policy import Probe


def stalled(loss_at, *, config=CONFIG, checks=400, probed=1.0, **high):
    """Moves of a training on a loss that depends on nothing but the configuration; GR_T leaves its zone at step 60.

    Untrained weights are at 2.0, of which a factor e goes every 5 steps; 1 % of noise from step to step. The other side
    of a probe ends at `probed` times this one's loss.
    """
    high = high or {"gr_t": 34.0, "gr_t_error": 4.0}
    policy, rng = Policy(), random.Random(0)
    moves = []
    policy.observe(None, config, loss=2.0)
    for step in range(1, 5 * checks + 1):
        reading = None
        if step % 5 == 0:
            reading = replace(READING, step=step, **({} if step <= 60 else high))
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


def test_a_stall_under_a_gr_t_too_high_is_left_to_the_average():
    """A lower learning rate has a lower loss there. So has the average, and loses nothing where the loss would fall."""
    assert stalled(lambda config: 0.5 + 500.0 * config.lr) == []
    large = {"gr_s": 0.9, "gr_s_error": 0.01, "noise_scale": 600.0, "noise_scale_error": 60.0}
    assert stalled(lambda config: 0.5 + 10.0 / config.batch_size, **large) == []


JUMPS = {"gr_t": 300.0, "gr_t_error": 300.0}
"""A GR_T that is everywhere says nothing of the learning rate."""


def test_where_gr_t_jumps_a_stall_is_met_by_higher_learning_rates():
    """The same loss at every learning rate below 3.5e-3, and a lower one there."""
    up, on, *_ = stalled(lambda config: 1.0 if config.lr < 3.5e-3 else 0.5, **JUMPS)
    assert up.config == replace(CONFIG, lr=2.0 * CONFIG.lr)
    assert on.config.lr == pytest.approx(4.0 * CONFIG.lr)
    assert (up.evidence.rule, on.evidence.rule) == ("stall", "stall")
    assert up.reuse


@pytest.mark.parametrize(("probed", "factor"), [(1.0, 2.0), (1.1, 2.0), (1.3, 0.5)])
def test_where_a_probe_has_found_a_higher_one_far_worse_it_is_met_by_a_lower_one(probed, factor):
    first, *_ = stalled(lambda config: 1.0, probed=probed, gr_s=0.9, gr_s_error=0.3, **JUMPS)
    assert first.config.lr == pytest.approx(factor * CONFIG.lr)
    assert first.evidence.rule == "stall"


def test_a_learning_rate_raised_against_a_stall_goes_back_where_the_loss_rises():
    """5 % worse above 1.5e-3, never better: up, back, and not up again."""
    up, back, *rest = stalled(lambda config: 1.0 if config.lr < 1.5e-3 else 1.05, **JUMPS)
    assert up.config.lr == 2.0 * CONFIG.lr
    assert back.config.lr == CONFIG.lr
    assert back.evidence.value > back.evidence.interval[1]
    assert back.reuse
    assert not back.rollback, "a small loss is no reason to throw samples away"
    assert all(move.config.lr <= CONFIG.lr * 1.001 for move in rest)


def test_a_loss_that_doubles_on_trial_goes_back_to_saved_weights():
    up, back, *_ = stalled(lambda config: 1.0 if config.lr < 1.5e-3 else 2.2, **JUMPS)
    assert back.rollback
    assert back.config.lr <= CONFIG.lr * 1.001
    assert back.evidence.step - up.evidence.step <= 40


def test_a_trial_ends_where_somebody_else_changes_the_configuration():
    """A weight decay that follows the learning rate is no such change."""
    for change, kept in ({"weight_decay": 0.005}, True), ({"lr": 5e-4}, False), ({"batch_size": 128}, False):
        policy, losses = Policy(), [2.0, 1.5, *(1.0 + 0.001 * (-1) ** i for i in range(80))]
        policy.observe(None, CONFIG, loss=2.3)
        watch(policy, checks=12, losses=losses)
        up = watch(policy, first=65, checks=60, losses=losses[12:], **JUMPS)
        assert up.evidence.rule == "stall"
        decision = watch(policy, replace(up.config, **change), checks=3, first=up.evidence.step + 5, losses=losses[2:])
        assert (decision.reason == "a higher learning rate is on trial") == kept


def test_nothing_moves_while_a_learning_rate_is_on_trial():
    """Not before another tenth of all samples has been seen under it."""
    up, back, *_ = stalled(lambda config: 1.0 if config.lr < 1.5e-3 else 1.05, **JUMPS)
    assert back.evidence.step >= 1.1 * up.evidence.step
