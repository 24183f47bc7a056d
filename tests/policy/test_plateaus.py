"""Plateaus: the learning rate is raised where the loss does not move, or the plateau is waited for."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from policy.healthy import READING, watch

from grgauge import Config, Continue, Policy, Retune


@pytest.mark.parametrize("gr_t", [8.0, 19.0, 25.0])
def test_a_plateau_is_left_by_the_loss(gr_t):
    """Blind, or in the zone as noise alone would be: where the loss does not move the learning rate goes up."""
    losses, falling = [2.3 + 0.001 * (-1) ** i for i in range(45)], [2.3 - 0.05 * i for i in range(45)]
    blind = {"gr_t": gr_t, "gr_s": 0.99, "gr_s_error": 0.01}
    # below the usual learning rate soon, and one move back when it is left
    policy = Policy(min_batch=64, lr_bounds=(1e-6, 1e3))
    raised = watch(policy, checks=8, losses=losses, **blind)
    assert raised.evidence.rule == "plateau"
    assert raised.config.lr == pytest.approx(3e-3)
    back = watch(policy, raised.config, first=raised.evidence.step + 5, checks=40, losses=falling, **blind)
    assert back.config.lr == pytest.approx(1e-3)
    assert back.reuse
    # at it there is time to wait, and no way back
    policy = Policy(min_batch=64, lr_bounds=(1e-5, 1e-1))
    assert isinstance(watch(policy, checks=35, losses=losses, **blind), Continue)
    raised = watch(policy, first=180, checks=10, losses=losses[35:], **blind)
    assert raised.config.lr == pytest.approx(3e-3)
    left = watch(policy, raised.config, first=raised.evidence.step + 5, checks=10, losses=falling, **blind)
    assert isinstance(left, Continue)


def test_a_plateau_is_explored_at_a_cheap_batch():
    losses = [2.3 + 0.001 * (-1) ** i for i in range(60)]
    raised = watch(Policy(), Config(1e-3, 512), checks=60, gr_s=0.55, losses=losses)
    assert raised.config == Config(1.5e-3, 128)


def test_a_plateau_is_waited_for_once_no_learning_rate_has_moved_the_loss():
    """Below the usual learning rate a raise comes soon, from there on after 200 steps; then again from the start."""
    policy, step, config, moves = Policy(lr_bounds=(1e-5, 1.0), min_batch=64), 0, Config(5.6e-4, 64), []
    for i in range(1000):
        step += 5
        read = replace(READING, step=step, gr_t=19.0, gr_s=0.99, gr_s_error=0.01, batch_size=64)
        decision = policy.observe(read, config, loss=2.3 + 0.001 * (-1) ** i)
        if isinstance(decision, Retune):
            moves.append((step, decision.config.lr, decision.reuse))
            config, step = decision.config, step if decision.reuse else 0
    usual = 10 ** (-5 + 5 * 4 / 9)
    lrs = [5.6e-4 * 3**k for k in (1, 2, 3, 4)]
    assert [lr for _, lr, _ in moves] == pytest.approx([*lrs, usual], rel=0.01)
    assert [reuse for _, _, reuse in moves] == [True] * 4 + [False]
    assert moves[0][0] <= 40
    assert all(later - step >= 200 for (step, *_), (later, *_) in pairwise(moves))
