"""Which readings advice rests on, and what makes them begin anew."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from grgauge import Reading
from grgauge.policy.watch import Watch

READING = Reading(50, 32, 20.0, 2.0, 1.0, 0.5, 0.05, 30.0, 1.0, 1.0, 0, True)


def watched(*steps, lr=None, **changes):
    watch = Watch()
    for step in steps:
        watch.observe(replace(READING, step=step, **changes), lr)
    return watch


@pytest.mark.parametrize(
    ("steps", "span", "ends"),
    [
        ((10, 15), None, None),  # GR_T still settles
        ((16,), "early", (16, 16)),
        ((20, 25, 30, 35), "early", (25, 35)),  # the newest three
        ((30, 40, 50, 60, 70), "window", (40, 60)),
        ((30, 65, 70, 75), "window", (65, 65)),  # the nearest to the window
        ((30, 80), "early", (30, 30)),
        ((80, 400), "late", (400, 400)),
        ((80, 401), None, None),
    ],
)
def test_the_readings_around_step_50_are_one(steps, span, ends):
    summary = watched(*steps).summary()
    assert (None if summary is None else (summary.span, (summary.first, summary.last))) == (
        None if span is None else (span, ends)
    )


def test_gr_t_and_the_rate_are_medians_and_gr_s_is_the_newest():
    watch = Watch()
    for step, gr_t, gr_s, lr in ((40, 10.0, 0.4, 3e-3), (50, 40.0, 0.5, 2e-3), (55, 20.0, 0.6, 1.9e-3)):
        watch.observe(replace(READING, step=step, gr_t=gr_t, gr_t_error=0.1 * gr_t, gr_s=gr_s), lr)
    watch.observe(replace(READING, step=60, gr_t=None, gr_t_error=None, gr_s=None), 1.8e-3)
    summary = watch.summary()
    assert summary.gr_t == pytest.approx(20.0)
    assert summary.signal == pytest.approx(math.log10(20.0))
    assert summary.gr_t_error == pytest.approx(2.0)
    assert (summary.gr_s, summary.lr) == (0.6, pytest.approx(1.95e-3))
    assert watch.peak == 3e-3


def test_an_early_reading_counts_by_what_it_will_come_to():
    assert watched(50, gr_t=10.0, finite_time_factor=0.5).summary().gr_t == pytest.approx(20.0)


def test_readings_that_share_few_gradients_count_more():
    quiet = {"gr_s": 1.0 / 32.0, "gr_s_error": 0.0}
    one, same, apart = (watched(*steps, **quiet).summary().signal_error for steps in ((50,), (50, 51), (40, 50, 59)))
    assert one > same > apart
    assert apart == pytest.approx(one / math.sqrt(2.0), rel=1e-3)  # 19 steps apart they are independent


@pytest.mark.parametrize(
    ("lr", "batch_size", "start", "peak"),
    [
        (1.02e-3, 32, 60, 1.02e-3),
        (1.005e-3, 32, 0, 1.005e-3),
        (0.7e-3, 32, 0, 1e-3),  # a schedule that decays
        (0.6e-3, 32, 60, 0.6e-3),
        (None, 32, 0, 1e-3),
        (1e-3, 64, 60, 1e-3),
    ],
)
def test_what_begins_a_new_window(lr, batch_size, start, peak):
    watch = watched(50, lr=1e-3)
    watch.observe(replace(READING, step=60, batch_size=batch_size), lr)
    assert (watch.start, watch.peak) == (start, peak)
    assert watch.warming == (lr == 1.02e-3)
    assert (watch.summary() is None) == (start == 60)


@pytest.mark.parametrize(
    ("losses", "diverged"),
    [
        ((2.0, 2.9, 2.9), None),
        ((2.0, 3.1), None),  # a single one may be noise
        ((2.0, 3.1, 3.2), 3.2),
        ((2.0, 3.1, 2.9), None),
        ((2.0, 3.1, 3.2, 2.0), None),
        ((-2.0, -1.1, -1.1), None),
        ((-2.0, -0.9, -0.8), -0.8),
        ((0.0, 0.1, 0.2), 0.2),
        ((math.nan, 2.0, 2.1), None),
        ((2.0, math.inf), math.inf),
    ],
)
def test_an_explosion_is_two_losses_in_a_row_by_half_above_the_first(losses, diverged):
    watch = Watch()
    for loss in losses:
        watch.lost(loss)
    assert watch.diverged == diverged


def test_a_state_continues_in_the_middle_of_everything():
    whole, halved = Watch(), Watch()
    for step in range(5, 80, 5):
        lr = 1e-3 if step < 20 else 2e-3 - 1e-5 * step
        for watch in (whole, halved):
            watch.observe(replace(READING, step=step, gr_t=10.0 + step), lr)
            watch.lost(1.0 if step == 5 else 2.0 + step)
        state = json.loads(json.dumps(halved.state_dict()))
        halved = Watch()
        halved.load_state_dict(state)
        assert halved.summary() == whole.summary()
        assert halved.state_dict() == whole.state_dict()
    assert whole.diverged == 77.0
