"""GradES: the forecast behind "signal", on numbers whose future is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from grgauge.grades.forecast import LEAST, SHARE, UPPER, Forecast

LIVE = [0, 1, 2]


def forecast(rows, steps=1000, every=10, warmup=0):
    """Three matrices and the rest; the reading of step 10, 20, ..."""
    one = Forecast(3, steps, every, warmup)
    for i, row in enumerate(rows, 1):
        one.add(every * i, np.array(row, dtype=float))
    return one


def noisy(means, readings, deviation, seed=0):
    return np.array(means) + deviation * np.random.default_rng(seed).standard_normal((readings, 4))


def test_a_pace_that_falls_off_as_one_over_the_step_is_forecast_exactly():
    """From 500 on to 1000 all gain what they did from 250 to 500."""
    steps = np.arange(1, 1001)
    paces = np.array([3.0, 1.0, 0.0, 6.0])
    rows = [(paces / steps[10 * i : 10 * (i + 1), None]).mean(axis=0) for i in range(50)]
    one = forecast(rows)
    gains = [gain for gain, _ in one.expected(500)]
    assert gains == pytest.approx(list(paces * math.log(2)), rel=0.01)
    assert one.gained == pytest.approx(10 * (1 / steps[:500]).sum())
    assert one.gain == one.gained


@pytest.mark.parametrize("readings", [20, 60, 90])
def test_exact_readings_have_no_interval(readings):
    step = 10 * readings
    one = forecast([[3e-3, 1e-3, 0.0, 6e-3]] * readings)
    left = step / 2 * math.log(1000 / step) / math.log(2)
    assert left < 1000 - step
    assert one.forfeits(step) == pytest.approx([3e-3 * left, 1e-3 * left, 0.0, 6e-3 * left])
    for forfeit, expected in ((0.0, [2]), (1e-3, [2, 1]), (4e-3, [2, 1, 0])):
        epsilon = (forfeit + 1e-5) * left / one.gain / SHARE
        assert one.freezable(step, epsilon, LIVE) == expected
        assert not one.rests(step, epsilon, LIVE)
    assert one.rests(step, 1.001e-2 * left / one.gain, LIVE)


def test_at_the_end_of_the_run_nothing_is_left():
    one = forecast([[3e-3, 1e-3, 0.0, 6e-3]] * 100)
    assert one.forfeits(1000) == pytest.approx([0.0] * 4)


def test_a_set_is_judged_by_the_interval_of_its_own_sum():
    rows = noisy([1e-3, 1e-3, 1e-3, 0.0], 60, 1e-3)
    rows[:, 1] = 2e-3 - rows[:, 0]  # what one gains the other loses
    one, half = forecast(rows), rows[30:]
    left = 300 * math.log(1000 / 600) / math.log(2)
    error = half[:, 0].std(ddof=1) / np.sqrt(30)
    assert one.forfeits(600)[0] == pytest.approx((half[:, 0].mean() + UPPER * error) * left)
    assert one._upper(600, [0, 1])[1] == pytest.approx(2e-3 * left)
    together = half[:, [0, 2]].sum(axis=1)
    expected = (together.mean() + UPPER * together.std(ddof=1) / np.sqrt(30)) * left
    assert one._upper(600, [0, 2])[1] == pytest.approx(expected)


def test_noise_alone_freezes_nothing_until_it_is_averaged_away():
    """The point says that nothing is left, the interval does not."""
    early = noisy([0.0, 0.0, 0.0, 1e-3], 22, 1e-3)
    assert forecast(early).freezable(220, 0.02, LIVE) == []
    late = forecast(noisy([0.0, 0.0, 0.0, 1e-3], 99, 1e-4))
    assert sorted(late.freezable(990, 0.02, LIVE)) == LIVE


def test_the_interval_covers_what_is_forfeited():
    """Of 400 runs the upper end lies below the truth in about one of twenty."""
    missed = 0
    for seed in range(400):
        one = forecast(noisy([1e-3] * 4, 60, 2e-3, seed))
        missed += one.forfeits(600)[0] < 1e-3 * one._left(600)
    assert 0.02 < missed / 400 < 0.10


def test_harm_in_one_matrix_is_no_credit_for_another_but_counts_for_all():
    one = forecast([[-5e-3, 4e-3, 1e-3, 1e-2]] * 40)
    assert one.freezable(400, 0.02, LIVE) == [0]
    harmful = [*[[1e-2] * 4] * 10, *[[-5e-3, 2e-3, 1e-3, 1e-3]] * 50]
    assert forecast(harmful).rests(600, 0.02, LIVE)
    assert forecast(harmful).freezable(600, 0.02, LIVE) == LIVE
    assert forecast(harmful).gain == pytest.approx(4.0)  # what was gained at best, though much of it is lost again


def test_nothing_freezes_without_readings_or_gain():
    few = forecast([[0.0, 0.0, 0.0, 1.0]] * (LEAST - 1))
    assert few.freezable(190, 0.5, LIVE) == []
    assert np.isinf(few.forfeits(190)).all()
    young = forecast([[0.0, 0.0, 0.0, 1.0]] * 30, warmup=250)
    assert young.freezable(300, 0.5, LIVE) == []
    assert young.gained == pytest.approx(300.0)  # counts as gain all the same
    assert forecast([[1e-9, 0.0, 0.0, -1.0]] * 30).freezable(300, 0.5, [0]) == [0]  # all it does is harm


def test_what_is_frozen_uses_up_the_budget():
    one = forecast([[1e-3, 1e-3, 1e-3, 1.0]] * 50)
    left = one._left(500)
    epsilon = 2.5e-3 * left / one.gain / SHARE
    assert one.freezable(500, epsilon, LIVE) == [0, 1]
    one.freeze(500, [0, 1])
    assert one.forfeited == pytest.approx(2e-3 * left)
    one.add(510, np.array([np.nan, np.nan, 1e-3, 1.0]))
    assert one.freezable(510, epsilon, [2]) == []
    assert one.freezable(510, 2 * epsilon, [2]) == [2]


def test_a_state_continues_exactly():
    rows = noisy([1e-3, 0.0, 2e-3, 1e-3], 60, 1e-3)
    whole, first = forecast(rows), forecast(rows[:25])
    first.freeze(250, [1])
    second = forecast([])
    second.load_state_dict(first.state_dict())
    assert second.forfeited == first.forfeited > 0.0
    for i, row in enumerate(rows[25:], 26):
        second.add(10 * i, row)
    assert second.forfeits(600).tolist() == whole.forfeits(600).tolist()
    assert second.gain == whole.gain
