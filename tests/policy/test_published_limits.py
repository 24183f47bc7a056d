"""The published rules: how far and how often they move, and what they forget after a move."""

from __future__ import annotations

from dataclasses import replace

import pytest
from policy.healthy import CONFIG, READING, watch

from grgauge import Config, Continue, Policy, Retune


def test_a_move_keeps_its_factors():
    bounded = {"rules": "published", "max_lr_factor": 1.5, "max_batch_factor": 1.25}
    up = watch(Policy(**bounded), gr_t=2.5, gr_s=0.87)
    assert (up.config.lr, up.config.batch_size) == (pytest.approx(1.5e-3), 80)
    down = watch(Policy(**bounded), gr_t=160.0, gr_s=0.29)
    assert (down.config.lr, down.config.batch_size) == (pytest.approx(1e-3 / 1.5), 51)


def test_untrained_weights_have_a_warm_up_and_those_at_hand_a_grace():
    policy = Policy.paper(warm_up=40, grace=10)
    first = watch(policy, gr_t=2.5)
    again = watch(policy, first.config, first=45, gr_t=2.5)
    third = watch(policy, again.config, gr_t=2.5)
    assert [(move.evidence.step, move.reuse) for move in (first, again, third)] == [(40, True), (50, False), (40, True)]


def test_what_came_back_and_leaves_again_is_moved_and_not_begun_again():
    policy = Policy.paper()
    config = watch(policy, gr_t=2.5).config
    assert isinstance(policy.observe(replace(READING, step=25, grad_norm=2.0), config), Continue)
    assert watch(policy, config, first=30, gr_t=2.5).reuse


def test_all_moves_count_those_from_untrained_weights_too():
    policy = Policy.paper(max_moves=2)
    first = watch(policy, gr_t=2.5)
    again = watch(policy, first.config, first=25, gr_t=2.5)
    assert not again.reuse
    last = watch(policy, again.config, gr_t=2.5)
    assert isinstance(last, Continue)
    assert last.reason == "out of the zone, but all 2 moves are made"


def test_a_gradient_norm_is_not_compared_with_that_of_before_a_move():
    for reuse in (True, False):
        policy = Policy.paper()
        move, step = watch(policy, gr_t=2.5), 25
        if not reuse:
            move, step = watch(policy, move.config, first=25, gr_t=2.5), 5
        assert move.reuse == reuse
        norm = 1.1**3  # of the step before the move
        rules = [
            policy.observe(replace(READING, step=at, gr_t=2.5, grad_norm=norm), move.config).evidence.rule
            for at in (step, step + 5)
        ]
        assert rules == ["zone", "window"]


def test_a_missing_gauge_leaves_all_as_it_is():
    for missing in ("gr_t", "gr_s"):
        assert watch(Policy.paper(), **{"gr_t": 2.5, "gr_s": 0.87, missing: None}).reason == "a gauge is missing"


def test_what_is_out_of_bounds_is_brought_inside_at_once():
    policy = Policy.paper(lr_bounds=(1e-4, 1e-2), max_batch=50)
    move = policy.observe(None, replace(CONFIG, lr=1.0))
    assert isinstance(move, Retune)
    assert move.config == Config(1e-2, 50, 0.01)
    assert (move.evidence.rule, move.reason) == ("bounds", "configuration out of bounds")
    assert isinstance(policy.observe(None, move.config), Continue)
    stuck = Policy.paper(lr_bounds=(1e-4, 1e-2), max_moves=0).observe(None, replace(CONFIG, lr=1.0))
    assert (type(stuck), stuck.evidence.rule) == (Continue, "waiting")
