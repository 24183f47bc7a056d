"""GradES: the forecast behind "signal", on numbers whose future is known."""

from __future__ import annotations

import numpy as np
import pytest

from grgauge.grades.forecast import LEAST, UPPER, Forecast

LIVE = np.array([True, True, True, True])


def forecast(rows, unrest=(0.0, 0.0, 0.0, 0.0), steps=1000, every=10, warmup=0):
    """Three matrices and the rest; the reading of step 10, 20, ..."""
    one = Forecast(3, steps, every, warmup)
    for i, row in enumerate(rows, 1):
        one.add(every * i, np.array(row, dtype=float), np.array(unrest), LIVE)
    return one


def noisy(means, readings, deviation, seed=0):
    return np.array(means) + deviation * np.random.default_rng(seed).standard_normal((readings, 4))


def test_exact_readings_forecast_their_pace():
    """Half of 1000 steps are left, at 3, 1, 0 and 6 thousandths a step; what settles comes on top."""
    one = forecast([[3e-3, 1e-3, 0.0, 6e-3]] * 50, unrest=(0.1, 0.2, 0.0, 0.3))
    assert one.gained == pytest.approx(5.0)
    assert one.forfeits(500) == pytest.approx([1.6, 0.7, 0.0, 3.3])
    assert one.gain(500) == pytest.approx(5.0 + 5.6)
    assert one.freezable(500, 0.02) == [2]
    assert one.freezable(500, 0.07) == [2, 1]
    assert one.freezable(500, 0.25) == [2, 1, 0]


def test_a_set_is_judged_by_the_interval_of_its_own_sum():
    rows = noisy([1e-3, 1e-3, 1e-3, 0.0], 40, 1e-3)
    rows[:, 1] = 2e-3 - rows[:, 0]  # what one gains the other loses
    one, half = forecast(rows), rows[20:]
    left = 1000 - 400
    error = half[:, 0].std(ddof=1) / np.sqrt(20)
    assert one.forfeits(400)[0] == pytest.approx((half[:, 0].mean() + UPPER * error) * left)
    assert one._upper(400, [0, 1])[1] == pytest.approx(2e-3 * left)
    together = half[:, [0, 2]].sum(axis=1)
    expected = (together.mean() + UPPER * together.std(ddof=1) / np.sqrt(20)) * left
    assert one._upper(400, [0, 2])[1] == pytest.approx(expected)


def test_noise_alone_freezes_nothing_until_it_is_averaged_away():
    """The point says that nothing is left, the interval does not."""
    early = noisy([0.0, 0.0, 0.0, 1e-3], 12, 1e-3)
    assert forecast(early).freezable(120, 0.02) == []
    late = forecast(noisy([0.0, 0.0, 0.0, 1e-3], 99, 1e-4))
    assert sorted(late.freezable(990, 0.02)) == [0, 1, 2]


def test_the_interval_covers_what_is_forfeited():
    """Of 400 runs the upper end lies below the truth in about one of twenty."""
    missed = 0
    for seed in range(400):
        one = forecast(noisy([1e-3] * 4, 60, 2e-3, seed))
        missed += one.forfeits(600)[0] < 1e-3 * 400
    assert 0.02 < missed / 400 < 0.10


def test_a_loss_of_one_matrix_is_no_credit_for_another():
    one = forecast([[-5e-3, 5e-3, 1e-3, 1e-2]] * 30)
    assert one._upper(300, [0, 1])[1] == pytest.approx(5e-3 * 700)


def test_nothing_freezes_without_readings_or_gain():
    few = forecast([[0.0, 0.0, 0.0, 1.0]] * (LEAST - 1))
    assert few.freezable(90, 0.5) == []
    assert np.isinf(few.forfeits(90)).all()
    young = forecast([[0.0, 0.0, 0.0, 1.0]] * 30, warmup=250)
    assert young.freezable(300, 0.5) == []
    assert young.gained == pytest.approx(300.0)  # counts as gain all the same
    falling = forecast([[-1.0, 0.0, 0.0, -1.0]] * 30)
    assert falling.freezable(300, 0.5) == []


def test_what_is_frozen_uses_up_the_budget():
    one = forecast([[1e-3, 1e-3, 1e-3, 1.0]] * 50)
    gain = one.gain(500)
    epsilon = 1.2 / gain
    assert len(one.freezable(500, epsilon)) == 2
    one.freeze(0, float(one.forfeits(500)[0]))
    one.add(510, np.array([np.nan, 1e-3, 1e-3, 1.0]), np.array([np.nan, 0.0, 0.0, 0.0]), np.array([False, *LIVE[1:]]))
    assert len(one.freezable(510, epsilon * gain / one.gain(510))) == 1


def test_a_frozen_matrix_that_would_gain_is_found_by_its_lower_end():
    for drift, found in ((1e-2, [0]), (0.0, [])):
        one = forecast([[0.0, 1.0, 1.0, 1.0]] * 20)
        one.freeze(0, 0.5)
        for step in range(210, 300, 40):
            row = np.array([drift, 1.0, 1.0, 1.0]) + 1e-4 * (step % 3)
            one.add(step, row, np.zeros(4), np.array([False, *LIVE[1:]]))
        assert one.wrong(290, [200, None, None]) == found
    one.thaw(0)
    assert one.forfeited[0] == 0.0
    assert np.isinf(one.forfeits(290)[0])  # begins anew
    assert 0 not in one.freezable(290, 0.5)


def test_a_state_continues_exactly():
    rows = noisy([1e-3, 0.0, 2e-3, 1e-3], 60, 1e-3)
    whole, first = forecast(rows), forecast(rows[:25])
    first.freeze(1, 0.25)
    second = forecast([])
    second.load_state_dict(first.state_dict())
    assert second.forfeited[1] == 0.25
    for i, row in enumerate(rows[25:], 26):
        second.add(10 * i, row, np.zeros(4), LIVE)
    assert second.forfeits(600).tolist() == whole.forfeits(600).tolist()
    assert second.gain(600) == whole.gain(600)
