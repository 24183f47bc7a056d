"""What a gauge's readings mean: of real trainings, and of readings made by hand."""

from __future__ import annotations

import copy
import json
import math
import pickle
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from grgauge import Advice, Gauge, Reading, Target, verdict
from grgauge.gauge.windows import _lr_on_host
from grgauge.policy import advise
from grgauge.policy.advice import advice_of
from grgauge.policy.watch import Watch

READING = Reading(50, 32, 20.0, 4.0, 1.0, 0.58, 0.05, 30.0, 1.0, 1.0, 0, True)


def reading(**changes):
    return replace(READING, **changes)


def trained(lr, steps=60, *, schedule=None, every=5, loss=True, state_at=None):
    """A regression of noisy labels by a small network, batch 64: its gauge, and the advice after each step."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
    weights, generator = torch.randn(20, 1), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr)
    scheduler = schedule(optimizer) if schedule else None
    gauge = Gauge(optimizer, 64, every=every)
    found = []
    for step in range(steps):
        optimizer.zero_grad()
        x = torch.randn(64, 20, generator=generator)
        y = torch.tanh(x @ weights) + 0.3 * torch.randn(64, 1, generator=generator)
        value = gauge.split_backward(lambda b: (net(b[0]) - b[1]).square().mean(), (x, y))
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        if step == state_at:
            fresh = Gauge(optimizer, 64, every=every)
            fresh.load_state_dict(pickle.loads(pickle.dumps(gauge.state_dict())))
            gauge.remove()
            gauge = fresh
        found.append(gauge.advice(value if loss else None))
    return gauge, found


# --- real trainings --------------------------------------------------------------------------------------------------


def test_far_too_low_is_raised_without_an_upper_end_and_far_too_high_is_lowered():
    _, low = trained(1e-6)
    _, high = trained(1.0)
    assert low[-1].lr.direction == "raise"
    assert low[-1].lr.interval[0] >= 3.0
    assert math.isinf(low[-1].lr.interval[1])
    assert "look again" in str(low[-1])
    assert high[-1].lr.direction == "lower"


def test_none_before_the_first_reading_and_no_direction_before_there_is_one():
    _, found = trained(1e-3, 20)
    assert found[:4] == [None] * 4
    assert [advice.lr.direction for advice in found[4:14]] == ["unknown"] * 10
    assert "too early" in found[4].lr.why


def test_later_advice_rests_on_the_window_and_says_when_it_was():
    _, found = trained(1e-6, 150)
    assert found[149].step == 150
    assert found[149].lr == found[59].lr
    assert "at steps 40 to 60" in found[149].lr.why


def test_warm_up_is_waited_for_and_decay_is_judged_by_the_peak():
    lr = torch.optim.lr_scheduler.LambdaLR
    _, found = trained(1e-6, 120, schedule=lambda o: lr(o, lambda t: min(1.0, (t + 1) / 50)))
    assert all(
        a is None or (a.lr.direction, a.lr.why) == ("unknown", "the learning rate is warming up") for a in found[9:49]
    )
    assert found[119].lr.direction == "raise"
    assert "at steps 90 to 110" in found[119].lr.why
    _, flat = trained(1e-6)
    _, halved = trained(2e-6, schedule=lambda o: lr(o, lambda t: 1.0 if t < 5 else max(0.5, 1.0 - (t - 5) / 60)))
    ratio = halved[-1].lr.interval[0] / flat[-1].lr.interval[0]
    assert 0.45 <= ratio < 0.75  # of a peak that is twice the rate at which it was read, or nearly


def test_a_change_by_hand_begins_a_new_window():
    torch.manual_seed(0)
    watch = Watch()
    for step in range(5, 66, 5):
        watch.observe(reading(step=step, gr_t=1.1, gr_t_error=0.02), 1e-5)
    assert advice_of(watch).lr.direction == "raise"
    watch.observe(reading(step=70, gr_t=30.0), 1e-3)
    watch.observe(reading(step=75, gr_t=30.0), 1e-3)
    assert advice_of(watch).lr.direction == "unknown"
    assert "look at step 130" in advice_of(watch).lr.why
    for step in range(80, 135, 5):
        watch.observe(reading(step=step, gr_t=90.0), 1e-3)
    assert advice_of(watch).lr.direction == "lower"
    watch.observe(reading(step=135, batch_size=64), 1e-3)
    assert "too early" in advice_of(watch).lr.why


def test_a_loss_that_explodes_is_divergence_whatever_the_gauges_say():
    gauge, _ = trained(1e-3, loss=False)
    for loss in (2.0, 1.0, 4.0, 1.0):  # one that is high by itself may be noise
        assert "diverged" not in str(gauge.advice(loss))
    gauge.advice(4.0)
    assert "diverged: the loss is 3.9" in str(gauge.advice(3.9))
    assert "diverged" not in str(gauge.advice(1.0))
    for loss in (float("nan"), torch.tensor(float("inf"))):
        advice = gauge.advice(loss)
        assert (advice.lr.direction, advice.batch.direction) == ("lower", "unknown")
        assert "diverged" in advice.lr.why
        assert advice.lr.factor < 0.3
    gauge.restart()
    assert gauge.advice() is None


def test_without_finite_gradients_only_the_loss_can_tell():
    watch = Watch()
    watch.observe(reading(gr_t=None, gr_t_error=None, notes=("GR_T not available: every step was skipped",)))
    assert advice_of(watch).lr.why == "GR_T not available: every step was skipped"
    watch.lost(math.nan)
    assert advice_of(watch).lr.direction == "lower"


def test_stored_and_loaded_in_the_middle_it_says_the_same():
    _, one = trained(1e-6, 90)
    _, two = trained(1e-6, 90, state_at=47)
    assert one[48:] == two[48:]


@pytest.mark.parametrize(
    ("lrs", "known"),
    [
        ((1e-3, 2e-3), 2e-3),
        ((torch.tensor(0.5), 0.25), 0.5),
        ((1e-3, None), None),
        ((1e-3, torch.tensor(1e-3, device="meta")), None),  # on a device: it would have to be waited for
    ],
    ids=str,
)
def test_the_highest_rate_is_known_where_it_need_not_be_waited_for(lrs, known):
    optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in lrs], lr=1.0)
    for group, lr in zip(optimizer.param_groups, lrs, strict=True):
        group["lr"] = lr
    assert _lr_on_host(optimizer) == known


def test_a_state_of_before_there_was_advice_loads():
    gauge, _ = trained(1e-3, 30)
    state = gauge.state_dict()
    del state["watch"]
    gauge.load_state_dict(state)
    assert gauge.advice() is None


# --- readings made by hand -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "direction"),
    [
        ({"gr_t": 1.1, "gr_t_error": 0.02}, "raise"),
        ({"gr_t": 2.5, "gr_t_error": 0.2}, "raise"),
        ({"gr_t": 11.0, "gr_t_error": 0.4}, "raise"),
        ({"gr_t": 20.0, "gr_t_error": 2.0}, "unknown"),
        ({"gr_t": 11.0, "gr_t_error": 0.4, "gr_s": 0.93}, "raise"),  # as low as noise lets it be
        ({"gr_t": 15.0, "gr_t_error": 0.01, "gr_s": 0.985, "gr_s_error": 1e-4}, "raise"),
        ({"gr_t": 20.0, "gr_t_error": 0.01, "gr_s": 0.985, "gr_s_error": 0.1}, "unknown"),  # noise alone reads 19
        ({"gr_t": 200.0, "gr_t_error": 80.0}, "lower"),
        ({"gr_t": 43.0, "gr_t_error": 73.0}, "unknown"),
        ({"gr_t": None, "gr_t_error": None}, "unknown"),
    ],
)
def test_directions(changes, direction):
    assert advise([reading(**changes)]).lr.direction == direction


def test_a_larger_error_widens_the_interval_and_never_narrows_it():
    found = [advise([reading(gr_t=12.0, gr_t_error=error)]).lr.interval for error in (0.5, 2.0, 4.0, 8.0)]
    assert all(a[0] >= b[0] and a[1] <= b[1] for a, b in pairwise(found))
    assert found[-1][1] / found[-1][0] > found[0][1] / found[0][0]


def test_the_distance_falls_with_gr_t():
    found = [advise([reading(gr_t=g, gr_t_error=0.0)]).lr.interval for g in (1.0, 2.0, 5.0, 10.0, 40.0, 100.0, 300.0)]
    assert all(a[0] >= b[0] and a[1] >= b[1] for a, b in pairwise(found))
    assert found[0][0] > 1.0 > found[-1][1]


def test_where_noise_hides_the_rate_the_batch_comes_first():
    advice = advise([reading(gr_t=27.0, gr_s=0.98)])
    assert advice.lr.direction == "unknown"
    assert advice.lr.why.endswith("GR_S 0.98 says that noise hides the rate: enlarge the batch first")


def test_past_the_window_nothing_is_kept():
    late = advise([reading(step=300)])
    assert late.lr.direction == "unknown"
    never = advise([reading(step=1000)])
    assert "past the window" in never.lr.why


def test_another_target_shifts_the_advice():
    doubled = Target(gr_t=40.0, gr_t_zone=(36.0, 44.0))
    quiet = {"gr_t_error": 0.0, "gr_s": 1.0 / 32.0, "gr_s_error": 0.0}
    shifted, usual = advise([reading(gr_t=8.0, **quiet)], doubled).lr, advise([reading(gr_t=4.0, **quiet)]).lr
    assert shifted.interval == pytest.approx(usual.interval)
    assert shifted.interval != pytest.approx(advise([reading(gr_t=8.0, **quiet)]).lr.interval)


def test_advice_is_a_value():
    advice = advise([reading(gr_t=1.1, gr_t_error=0.02)])
    assert math.isinf(advice.lr.interval[1])
    assert pickle.loads(pickle.dumps(advice)) == copy.deepcopy(advice) == advice
    assert len({advice, Advice.from_dict(json.loads(json.dumps(advice.to_dict(), allow_nan=False)))}) == 1
    with pytest.raises(AttributeError):
        advice.step = 3
    with pytest.raises(ValueError, match=r"values is .*; it must be what Advice\.to_dict made"):
        Advice.from_dict({"step": 3})
    with pytest.raises(ValueError, match="readings is empty"):
        advise([])


def test_the_verdict_is_the_advice_in_a_line():
    for gr_t in (1.1, 20.0, 150.0):
        one = reading(gr_t=gr_t)
        assert verdict(one) == str(advise([one]))
        assert "\n" not in verdict(one)
