"""Explosions: what is one and what is noise, and where training goes from there."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from policy.healthy import CONFIG, READING

from grgauge import Continue, Policy, Retune, Stop


def test_an_explosion_leads_back_to_no_more_than_the_usual_learning_rate():
    high = replace(CONFIG, lr=0.6)
    policy = Policy(lr_bounds=(1e-5, 1.0))
    for loss in (2.0, 200.0):
        policy.observe(None, high, loss=loss)
    decision = policy.observe(replace(READING, step=5), high, loss=200.0)
    assert isinstance(decision, Retune)
    assert not decision.reuse
    assert decision.config.lr == pytest.approx(10 ** (-5 + 5 * 4 / 9))


def lossy(losses, **settings):
    """The decisions on readings that are in the zone, one for each five losses."""
    policy, made = Policy(**settings), []
    for step, loss in enumerate(losses, 1):
        read = replace(READING, step=step) if step % 5 == 0 else None
        decision = policy.observe(read, CONFIG, loss=loss)
        if read is not None:
            made.append(decision)
    return made


def test_one_batch_from_a_long_tail_is_no_explosion():
    calm = [2.0, 2.5, 1.5, 2.2, 1.8]
    for outlier in range(5):
        once = [60.0 if i == outlier else loss for i, loss in enumerate(calm)]
        assert [decision.evidence.rule for decision in lossy(calm + once + calm)] == ["learning rate"] * 3
    twice = lossy([*calm, *calm[:3], 60.0, 60.0])
    assert twice[-1].evidence.rule == "explosion"
    bouncing = lossy([*calm, *[60.0, 2.0, 60.0, 2.0, 60.0], *[2.0, 60.0, 2.0, 60.0, 2.0]])
    assert bouncing[-1].evidence.rule == "explosion"


def test_a_first_loss_low_by_chance_is_no_explosion_however_noisy_the_others_are():
    """Squared errors of few samples, at the usual learning rate."""
    usual = {"lr_bounds": (CONFIG.lr / 1e4, CONFIG.lr * 1e5)}
    for seed in range(20):
        draws = random.Random(seed)
        noisy = [0.5, *(draws.lognormvariate(0.7, 0.8) for _ in range(999))]  # of mean 2.8, one of a hundred is 13
        assert {decision.evidence.rule for decision in lossy(noisy, **usual)} == {"learning rate"}
        lost = lossy([*noisy[:50], *[200.0] * 10], **usual)
        assert lost[-1].evidence.rule == "explosion"


@pytest.mark.parametrize("noise", [0.001, 0.1])
def test_a_loss_that_rises_again_lowers_the_learning_rate_wherever_gauges_are(noise):
    """Far below that of untrained weights: no explosion."""
    draws = random.Random(0)
    falls = [1.5 + 3.0 * math.exp(-step / 30) for step in range(300)]
    rises = [1.5 + 0.002 * step for step in range(300)]
    losses = [loss * (1.0 + noise * draws.gauss(0.0, 1.0)) for loss in (*falls, *rises)]
    first = next(decision for decision in lossy(losses) if isinstance(decision, Retune))
    assert (first.evidence.rule, first.config) == ("rising", replace(CONFIG, lr=CONFIG.lr / 2))
    assert 350 <= first.evidence.step <= 520
    assert first.reuse
    assert not first.rollback
    flat = [loss * (1.0 + noise * draws.gauss(0.0, 1.0)) for loss in (*falls, *[1.5] * 1000)]
    assert not any(isinstance(decision, Retune) for decision in lossy(flat))


def test_at_the_lowest_learning_rate_an_explosion_may_be_recovered_from():
    only = {"lr_bounds": (CONFIG.lr, CONFIG.lr)}
    exploded = lossy([2.0] * 5 + [60.0] * 10 + [2.0] * 5, **only)[1:]
    assert isinstance(exploded[1], Continue)
    assert "exploded at the lowest learning rate allowed" in exploded[1].reason
    assert isinstance(lossy([2.0] * 5 + [60.0] * 100, **only)[-1], Stop)
    assert exploded[2].evidence.rule == "learning rate"
    assert isinstance(lossy([2.0] * 5 + [math.nan] * 5, **only)[-1], Stop)
