"""The published rules: the paper's steps, and when they are taken."""

from __future__ import annotations

from dataclasses import replace

import pytest
from policy.healthy import CONFIG, READING, watch

from grgauge import Config, Continue, Policy, Retune, theory


def test_paper_takes_the_published_steps():
    """lr (20/GR_T)^(1/3), B GR_S/0.58, after 20 steps, with the weights at hand."""
    policy = Policy.paper()
    decision = watch(policy, gr_t=2.5, gr_s=0.87)
    assert decision == Retune(Config(2e-3, 96, 0.01), True, decision.reason, decision.evidence), (
        "(20/2.5)^(1/3) = 2 and 64 * 0.87 / 0.58 = 96"
    )
    assert decision.evidence.step == 20
    assert (decision.evidence.quantity, decision.evidence.value) == ("GR_T", 2.5)
    assert decision.evidence.interval == (18.0, 22.0)
    down = watch(Policy.paper(), gr_t=160.0, gr_s=0.29)
    assert (down.config.lr, down.config.batch_size) == (pytest.approx(5e-4), 32)


def test_paper_restarts_what_is_not_back_in_the_zone_within_grace():
    policy = Policy.paper()
    first = watch(policy, gr_t=2.5)
    again = watch(policy, first.config, first=25, gr_t=2.5)
    assert isinstance(again, Retune)
    assert not again.reuse
    assert again.config == first.config
    assert again.evidence.step == 40
    # from scratch, and after the warm-up the next power law
    third = watch(policy, again.config, gr_t=2.5)
    assert third.reuse
    assert third.config.lr == pytest.approx(4e-3)


def test_paper_goes_on_with_what_is_back_in_the_zone():
    policy = Policy.paper()
    first = watch(policy, gr_t=2.5)
    decision = policy.observe(replace(READING, step=25), first.config)
    assert isinstance(decision, Continue)
    assert "within the grace period" in decision.reason
    assert isinstance(watch(policy, first.config, first=30, checks=40), Continue)


@pytest.mark.parametrize("gr_t", [18.0, 20.0, 22.0])
@pytest.mark.parametrize("gr_s", [0.5, 0.58, 0.65])
def test_paper_leaves_the_zone_alone(gr_t, gr_s):
    assert isinstance(watch(Policy.paper(), gr_t=gr_t, gr_s=gr_s), Continue)


def test_paper_checks_every_fifth_step_and_only_in_the_critical_period():
    policy = Policy.paper()
    for step in range(1, 200):
        decision = policy.observe(replace(READING, step=step, gr_t=2.5, grad_norm=1.009 ** (step // 5)), CONFIG)
        assert isinstance(decision, Continue)
        if step >= 10:
            assert decision.evidence.rule == ("waiting" if step % 5 else "window")


def test_paper_compares_a_young_reading_with_the_scaled_target():
    young = theory.finite_time_factor(20)
    assert isinstance(watch(Policy.paper(), checks=4, gr_t=20.0 * young, finite_time_factor=young), Continue)
