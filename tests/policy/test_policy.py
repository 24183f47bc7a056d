"""The policy: single decisions on readings and losses made by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy.healthy import CONFIG, READING, watch
from policy.simulated import EVERY

from grgauge import Config, Continue, Policy, Retune, Stop, Target, theory
from grgauge.policy.gauge_rules import full_grown

# --- the five ways in which simpler controllers failed; whole trainings are in test_simulated ------------------------


def test_b_without_its_loss_a_dead_network_cannot_be_told():
    """Why `loss` is asked for: by the gauges alone the same run is in the zone."""
    assert isinstance(watch(Policy(), checks=40), Continue)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_b_a_loss_that_is_not_finite_ends_weights_but_once_is_no_harm(loss):
    policy = Policy()
    for value in (2.3, loss, 2.2, loss):
        assert isinstance(policy.observe(None, CONFIG, loss=value), Continue)
    decision = policy.observe(None, CONFIG, loss=loss)
    assert isinstance(decision, Retune)
    assert not decision.reuse
    assert decision.config.lr == pytest.approx(1e-3 / 30)


def test_b_a_raise_that_makes_the_loss_worse_is_taken_back():
    policy = Policy()
    raised = watch(policy, gr_t=2.0, losses=[2.3 - 0.01 * i for i in range(20)])
    assert raised.config.lr == pytest.approx(4e-3)
    back = watch(policy, raised.config, first=25, gr_t=10.0, losses=[2.6, 3.0, 3.1, 3.2] * 5)
    assert isinstance(back, Retune)
    assert back.rollback
    assert back.reuse
    assert back.config.lr < raised.config.lr
    # and what failed is not tried again
    third = watch(policy, back.config, first=60, gr_t=2.0, losses=[2.2] * 20)
    assert isinstance(third, Continue) or third.config.lr <= 0.5 * raised.config.lr


def test_c_early_and_noisy_readings_settle_nothing():
    """An interval wide open, or a GR_T half way up at 10 steps, moves nothing."""
    young = theory.finite_time_factor(10)
    assert isinstance(watch(Policy(), checks=2, gr_t=14.0 * young, finite_time_factor=young), Continue)
    assert isinstance(watch(Policy(), checks=5, gr_t=14.0, gr_t_error=12.0), Continue)


def test_a_gr_t_above_its_zone_moves_nothing_where_it_was_in_it_before():
    """It rises with progress at good learning rates too."""
    policy = Policy()
    losses = [2.0 - 0.03 * i for i in range(12)] + [1.6] * 400
    assert isinstance(watch(policy, checks=10, losses=losses), Continue)
    late = watch(policy, first=55, checks=200, gr_t=60.0, losses=losses[10:])
    assert isinstance(late, Continue)
    assert "above the zone" in late.reason


def test_d_an_estimate_of_the_noise_scale_that_is_lost_in_noise_is_not_solved_for():
    decision = watch(Policy(), Config(1e-3, 4), gr_s=0.97, gr_s_error=0.05, noise_scale=2e6, noise_scale_error=3e6)
    assert 4 < decision.config.batch_size <= 16


@pytest.mark.parametrize("gr_t", [2.0, 20.0, 60.0])
def test_e_the_blind_gauge_settles_nothing(gr_t):
    policy = Policy(max_batch=64)
    losses = [2.3 - 0.03 * i for i in range(60)]
    assert isinstance(watch(policy, checks=40, gr_t=gr_t, gr_s=0.99, gr_s_error=0.01, losses=losses), Continue)
    assert not settled(policy, first=205, losses=losses[40:])


def settled(policy, first, losses):
    """A learning rate that was found good is not raised for a GR_T just below its zone; any other is."""
    return isinstance(watch(policy, first=first, checks=15, gr_t=10.0, losses=losses), Continue)


def test_e_a_gauge_that_may_be_blind_settles_nothing():
    losses = [2.3 - 0.05 * i for i in range(35)]
    for error, found in ((0.3, False), (0.02, True)):
        policy = Policy(max_batch=64)
        watch(policy, gr_s=0.6, gr_s_error=error, losses=losses)
        assert settled(policy, first=105, losses=losses[20:]) == found


# --- schedules -------------------------------------------------------------------------------------------------------


def test_a_schedule_that_warms_up_is_no_reason_to_raise():
    warm = [0.05 * (i + 1) for i in range(20)]
    assert isinstance(watch(Policy(), gr_t=1.5, lr_factors=warm), Continue)
    assert watch(Policy(), gr_t=1.5, lr_factors=[1.0] * 20).config.lr > CONFIG.lr


def test_a_loss_that_does_not_move_during_warm_up_is_no_plateau():
    policy = Policy()
    warm, flat = [0.05 * (i + 1) for i in range(20)], [2.3 + 0.001 * (-1) ** i for i in range(20)]
    assert isinstance(watch(policy, losses=flat, lr_factors=warm), Continue)
    assert isinstance(watch(policy, checks=3, first=105, losses=flat), Continue)


def test_a_schedule_that_decays_is_not_worked_against():
    policy = Policy()
    assert isinstance(watch(policy, checks=10), Continue)
    decay = [math.cos(0.04 * i) for i in range(39)]
    assert isinstance(
        watch(policy, checks=39, first=55, gr_t=5.0, lr_factors=[0.9 * f for f in decay][3:] + [0.0] * 3), Continue
    )


# --- how training begins ---------------------------------------------------------------------------------------------


def test_weights_hurt_by_their_first_steps_are_given_up_rather_than_pushed_on():
    """GR_T reads far too low in a network that too high a learning rate has wrecked: no reason to raise it further."""
    losses = [3.4] + [2.9 - 0.02 * i for i in range(19)]
    policy = Policy()
    policy.observe(None, CONFIG, loss=2.3)
    decision = watch(policy, losses=losses, gr_t=3.0)
    assert isinstance(decision, Retune)
    assert not decision.reuse
    assert decision.config.lr == pytest.approx(CONFIG.lr / 30.0)
    assert decision.evidence.step <= 30
    healthy = Policy()
    healthy.observe(None, CONFIG, loss=2.3)
    raised = watch(healthy, losses=[2.3 - 0.02 * i for i in range(20)], gr_t=3.0)
    assert raised.reuse
    assert raised.config.lr > CONFIG.lr


def test_a_first_loss_low_by_chance_costs_one_restart_and_no_more():
    """With small batches the losses behind it then look like harm, at any learning rate."""
    policy, config, moves = Policy(), CONFIG, []
    for _ in range(3):
        policy.observe(None, config, loss=0.3)
        decision = watch(policy, config, losses=[0.55 - 0.005 * i for i in range(20)], gr_t=3.0)
        moves.append(decision)
        config = decision.config
        if decision.reuse:
            break
    assert [move.reuse for move in moves] == [False, True]
    assert moves[1].config.lr > moves[0].config.lr


def test_at_a_usual_learning_rate_a_first_loss_low_by_chance_costs_nothing():
    policy = Policy(lr_bounds=(1e-4, 10.0))
    policy.observe(None, CONFIG, loss=0.3)
    assert watch(policy, losses=[0.55 - 0.005 * i for i in range(20)], gr_t=3.0).reuse


def test_what_is_equivalent_to_a_trial_before_is_not_begun_again():
    """Started too high, where nothing lower is allowed. From elsewhere the same start is one like any other."""

    def decisions(policy, config, first, start=2.0):
        policy.observe(None, config, loss=2.3)
        for i in range(7):
            reading = replace(READING, step=first + EVERY * i, gr_t=60.0, gr_t_error=2.0)
            yield policy.observe(reading, config, loss=start - 0.02 * i)

    bounds = {"lr_bounds": (1e-3, 5e-3)}
    fixed = list(decisions(Policy(**bounds), CONFIG, 5))
    assert all(isinstance(decision, Continue) for decision in fixed)
    assert [decision.evidence.rule for decision in fixed].count("repeat") == 1
    assert any("lr 1.00e-03, batch 64 is equivalent to a trial that was run" in str(decision) for decision in fixed)
    policy = Policy(**bounds)
    moved = next(d for d in decisions(policy, replace(CONFIG, lr=4e-3), 5, 2.9) if isinstance(d, Retune))
    assert (moved.config.lr, moved.reuse) == (1e-3, False)
    again = list(decisions(policy, moved.config, 5))
    assert not any(isinstance(decision, Retune) and not decision.reuse for decision in again)
    assert [decision.evidence.rule for decision in again].count("repeat") == 1


def test_early_a_batch_is_lowered_to_16_and_further_only_once_gauges_have_settled():
    small = {"gr_s": 0.05, "gr_s_error": 0.01, "noise_scale": 2.0, "noise_scale_error": 0.2, "gr_t": 20.0}
    losses = [2.0 - 0.05 * i for i in range(20)]
    policy = Policy()
    policy.observe(None, CONFIG, loss=2.3)
    first = watch(policy, losses=losses, **small)
    assert first.config.batch_size == 16
    policy = Policy()
    config = replace(CONFIG, batch_size=16)
    policy.observe(None, config, loss=2.3)
    later = watch(policy, config, losses=losses, **small)
    assert later.config.batch_size < 16
    assert later.evidence.step >= 50


def test_a_batch_of_one_which_reads_1_whatever_the_noise_is_grows_step_by_step():
    policy, config = Policy(), Config(1e-3, 1)
    policy.observe(None, config, loss=2.3)
    losses = [2.0 - 0.05 * i for i in range(20)]
    decision = watch(policy, config, losses=losses, batch_size=1, gr_s=1.0, gr_s_error=0.0, noise_scale=None)
    assert isinstance(decision, Retune)
    assert decision.config.batch_size == 4
    assert decision.evidence.quantity == "GR_S"


# --- the caller's own ways -------------------------------------------------------------------------------------------


def test_a_configuration_out_of_bounds_is_brought_in_at_once():
    decision = Policy(max_batch=50, batch_multiple=16, lr_bounds=(1e-5, 1e-4)).observe(None, CONFIG, loss=2.3)
    assert isinstance(decision, Retune)
    assert decision.config == Config(1e-4, 48, 0.01)
    assert decision.reuse


def test_a_proposal_that_is_not_followed_is_made_again_after_some_time():
    """The advisor's case: nobody acts on it."""
    policy = Policy()
    steps = [
        step
        for step in range(5, 200, 5)
        if isinstance(policy.observe(replace(READING, step=step, gr_t=2.0), CONFIG), Retune)
    ]
    assert len(steps) > 2
    assert all(b - a >= 10 for a, b in pairwise(steps))


def test_divergence_at_the_lowest_rate_stops():
    policy = Policy(lr_bounds=(1e-3, 1.0))
    policy.observe(None, CONFIG, loss=math.nan)
    decision = policy.observe(None, CONFIG, loss=math.nan)
    assert isinstance(decision, Stop)
    assert "lowest" in decision.reason
    assert str(decision).startswith("stop: ")


def test_weights_that_fall_behind_abandoned_ones_go_back_towards_their_rate():
    """In the zone is not enough where an earlier trial had come further at equal samples."""
    policy, high = Policy(), Config(1e-2, 64)
    policy.observe(None, high, loss=2.3)
    assert isinstance(watch(policy, high, checks=9, losses=[2.3 - 0.19 * i for i in range(9)]), Continue)
    low = watch(policy, high, first=50, gr_t=300.0, losses=[0.6] * 20)
    assert not low.reuse  # a start that high is not trusted
    policy.observe(None, low.config, loss=2.3)
    back = watch(policy, low.config, losses=[2.3 - 0.05 * i for i in range(20)])
    assert back.evidence.rule == "behind"
    assert back.reuse
    assert low.config.lr < back.config.lr <= high.lr


# --- its parts -------------------------------------------------------------------------------------------------------


@given(st.floats(0.0, 100.0), st.integers(3, 200))
def test_full_grown_inverts_the_cold_start(signal, t):
    """A constant signal under noise reads `steady_signal(s, t=t)` and would read `steady_signal(s)`."""
    young = theory.steady_signal(signal, t=t)
    assert full_grown(young, theory.finite_time_factor(t)) == pytest.approx(theory.steady_signal(signal), rel=1e-3)


def test_a_target_of_ones_own_is_the_one_that_is_aimed_at():
    target = Target(gr_t=10.0, gr_t_zone=(9.0, 11.0))
    assert isinstance(watch(Policy(target), gr_t=10.0), Continue)
    assert isinstance(watch(Policy.paper(target=target), gr_t=20.0), Retune)
