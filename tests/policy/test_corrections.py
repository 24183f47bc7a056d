"""From a calibration made by hand to words: what it makes of a reading."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from grgauge import Reading
from grgauge.policy import Correction
from grgauge.policy.advice import advice_of
from grgauge.policy.calibration import Calibration, Curve, Interval
from grgauge.policy.watch import SPANS, Watch, signal_of

READING = Reading(50, 32, 20.0, 4.0, 1.0, 0.58, 0.05, 30.0, 1.0, 1.0, 0, True)
RAISE, KEEP, UNKNOWN = (
    Interval(-0.3, 0.1, 0.4, 0.7, 0.9),
    Interval(-0.4, -0.1, 0.1, 0.3, 0.4),
    Interval(-1.0, -0.4, 0.2, 0.8, 1.2),
)
LOWER = Interval(-0.9, -0.7, -0.4, -0.1, 0.3)


class Fixed(Curve):
    """The same interval whatever the gauge reads; where less has to be sure, `likely`."""

    def __init__(self, interval, likely=None):
        super().__init__((), (), (), 0.0)
        self.__dict__["interval"], self.__dict__["likely"] = interval, likely or interval

    def read(self, value, error, share=0.8):
        return self.interval if share == 0.8 else self.likely


def advised(steps, intervals, **changes):
    """Advice on like readings at `steps`; `intervals` are those of the learning rate for each span, or for all."""
    if not isinstance(intervals, dict):
        intervals = dict.fromkeys(SPANS, intervals)
    watch = Watch()
    for step in steps:
        watch.observe(replace(READING, step=step, **changes))
    curves = {span: Fixed(interval) for span, interval in intervals.items()}
    return advice_of(watch, known=Calibration(curves, dict.fromkeys(SPANS, Fixed(KEEP)), UNKNOWN, {})).lr


@pytest.mark.parametrize(
    ("interval", "direction", "factor"),
    [
        (RAISE, "raise", 10.0**0.4),
        (replace(RAISE, least=-0.01), "unknown", 1.0),  # more than one such run in five needs a lower one
        (LOWER, "lower", 10.0**-0.4),
        (replace(LOWER, most=0.01), "unknown", 1.0),
        (KEEP, "keep", 1.0),  # all of it within three times
        (replace(KEEP, low=-0.48), "unknown", 1.0),
        (replace(KEEP, high=0.48), "unknown", 1.0),
        (replace(RAISE, middle=2.0, high=math.inf), "raise", 3.0),  # nobody knows how far: one step
        (replace(RAISE, middle=0.2, high=math.inf), "raise", 10.0**0.2),
        (replace(LOWER, low=-math.inf, middle=-2.0), "lower", 1.0 / 3.0),
        (Interval(-math.inf, -math.inf, 0.0, math.inf, math.inf), "unknown", 1.0),
    ],
)
def test_direction_factor_and_interval(interval, direction, factor):
    found = advised([50], interval)
    assert found.direction == direction
    assert found.factor == pytest.approx(factor)
    assert found.interval == pytest.approx((10.0**interval.low, 10.0**interval.high))


@pytest.mark.parametrize(
    ("correction", "words"),
    [
        (Correction("raise", 2.1, (1.2, 6.0), ""), "raise LR 2.1× [1.2, 6]"),
        (Correction("raise", 3.1, (1.2, 6.0), ""), "raise LR ≥ 3×, look again"),
        (Correction("raise", 2.1, (1.2, math.inf), ""), "raise LR ≥ 2.1×, look again"),
        (Correction("lower", 0.5, (0.25, 0.8), ""), "lower LR 2× [1.2, 4]"),
        (Correction("lower", 0.01, (0.001, 0.1), ""), "lower LR ≥ 3×, look again"),
        (Correction("keep", 1.0, (0.5, 150.4), ""), "keep LR [0.5, 150]"),
        (Correction("unknown", 1.0, (0.0, math.inf), ""), "LR: cannot tell"),
    ],
)
def test_words(correction, words):
    assert correction.describe("LR") == words


def test_a_direction_of_the_batch_takes_the_whole_interval():
    """At one GR_S families are on either side of their best batch."""
    watch = Watch()
    watch.observe(READING)
    for interval, direction in ((RAISE, "unknown"), (replace(RAISE, low=0.05), "raise"), (LOWER, "unknown")):
        known = Calibration(dict.fromkeys(SPANS, Fixed(KEEP)), dict.fromkeys(SPANS, Fixed(interval)), UNKNOWN, {})
        assert advice_of(watch, known=known).batch.direction == direction


def test_a_late_reading_counts_only_where_the_window_knows_no_direction():
    spans = {"early": UNKNOWN, "window": UNKNOWN, "late": RAISE}
    assert advised([50], spans).direction == "unknown"
    assert advised([50, 200], spans).direction == "raise"
    assert advised([50, 200], {**spans, "window": LOWER}).direction == "lower"
    kept = advised([50, 200], {**spans, "window": KEEP})
    assert (kept.direction, kept.why) == ("keep", "GR_T 20 ± 4 at step 50")


@pytest.mark.parametrize(
    ("least", "most", "low", "high", "changes", "direction"),
    [
        (0.1, 0.5, -0.5, math.inf, {}, "raise"),
        (0.1, 0.5, -math.inf, 1.0, {}, "unknown"),  # nobody knows how wrong it may be
        (-0.5, -0.1, -math.inf, 0.5, {}, "lower"),
        (-0.5, -0.1, -1.0, math.inf, {}, "unknown"),
        (-0.1, 0.5, -0.5, 1.0, {}, "unknown"),
        (0.1, 0.5, -0.5, 1.0, {"gr_s": 0.96}, "unknown"),  # noise hides the learning rate
        (0.1, 0.5, -0.5, 1.0, {"gr_t": 30.0, "gr_t_error": 31.0}, "unknown"),
    ],
)
def test_three_of_five_runs_suffice_where_gr_t_can_be_read(least, most, low, high, changes, direction):
    middle = (least + most) / 2.0
    curve = Fixed(Interval(low, -1.0, middle, 1.0, high), Interval(low, least, middle, most, high))
    watch = Watch()
    watch.observe(replace(READING, step=50, **changes))
    known = Calibration(dict.fromkeys(SPANS, curve), dict.fromkeys(SPANS, Fixed(KEEP)), UNKNOWN, {})
    assert advice_of(watch, known=known).lr.direction == direction


# --- the curve, inverted ---------------------------------------------------------------------------------------------

AWAY = (-2.0, -1.0, 0.0, 1.0, 2.0)


def test_without_scatter_the_interval_is_where_the_curve_reads_within_the_error():
    falling = Curve(AWAY, (2.0, 1.0, 0.0, -1.0, -2.0), (0.01,) * 5, 0.0)
    rising = Curve(AWAY, (-2.0, -1.0, 0.0, 1.0, 2.0), (0.01,) * 5, 0.0)
    for curve, middle in ((falling, -0.5), (rising, 0.5)):
        found = curve.read(0.5, 0.3)
        assert found.middle == pytest.approx(middle)
        assert (found.low, found.high) == pytest.approx((middle - 1.645 * 0.3, middle + 1.645 * 0.3), abs=0.02)
        assert (found.least, found.most) == pytest.approx((middle - 0.842 * 0.3, middle + 0.842 * 0.3), abs=0.02)


@pytest.mark.parametrize(
    ("scatter", "between", "error", "half"),
    [(0.3, 0.0, 0.0, 0.3), (0.01, 0.3, 0.0, 0.3), (0.3, 0.3, 0.3, 0.3 * 3**0.5)],
)
def test_scatter_families_and_the_readings_error_count_together(scatter, between, error, half):
    curve = Curve(AWAY, (2.0, 1.0, 0.0, -1.0, -2.0), (scatter,) * 5, between)
    found = curve.read(0.0, error)
    assert (found.high - found.low) / 2.0 == pytest.approx(1.645 * half, rel=0.1)


def test_where_the_curve_is_level_the_distance_has_no_end():
    curve = Curve(AWAY, (2.0, 2.0, 1.0, 0.0, 0.0), (0.1,) * 5, 0.0)
    low = curve.read(0.0, 0.0)
    assert low.high == math.inf
    assert 0.8 <= low.low <= 1.0
    assert curve.read(2.0, 0.0).low == -math.inf
    assert curve.read(1.0, 3.0) == Interval(-math.inf, -math.inf, pytest.approx(0.0), math.inf, math.inf)


def test_a_reading_beyond_all_of_the_curve_rules_no_distance_out_by_itself():
    curve = Curve(AWAY, (2.0, 2.0, 1.0, 0.0, 0.0), (0.1,) * 5, 0.0)
    assert curve.read(5.0, 0.1) == curve.read(2.0 + 0.1 * 2**0.5, 0.1)
    assert curve.read(5.0, 0.1).high > -1.0


# --- GR_T without the noise ------------------------------------------------------------------------------------------


def gr_t_of(agreed, noise):
    """GR_T of a share of noise, and of true gradients with that GR_T of their own."""
    return 1.0 / ((1.0 - noise) / agreed + noise / 19.0)


@pytest.mark.parametrize("noise", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("agreed", [1.0, 3.0, 19.0])
def test_the_signal_is_what_gr_t_would_be_without_noise(agreed, noise):
    for factor in (1.0, 0.8):  # of a young reading
        white = gr_t_of(agreed, noise) if factor == 1.0 else 1.0 / ((1.0 - noise) / agreed + noise / (19.0 * factor))
        if agreed > 19.0 * factor:
            continue
        gr_s = (1.0 + noise * 31.0) / 32.0
        reading = replace(READING, gr_t=white, gr_t_error=0.0, gr_s=gr_s, gr_s_error=0.0, finite_time_factor=factor)
        assert signal_of(reading) == (pytest.approx(math.log10(agreed), abs=1e-9), 0.0)


def test_above_noise_gr_t_is_taken_as_it_is():
    for gr_s in (0.1, 0.9):
        value, _ = signal_of(replace(READING, gr_t=60.0, gr_s=gr_s))
        assert value == pytest.approx(math.log10(60.0))


def test_the_nearer_gr_s_is_to_1_the_less_is_known():
    errors = [
        signal_of(replace(READING, gr_t=gr_t_of(3.0, noise), gr_t_error=0.2, gr_s=(1.0 + noise * 31.0) / 32.0))[1]
        for noise in (0.1, 0.5, 0.8, 0.9)
    ]
    assert errors == sorted(errors)
    assert errors[-1] > 4.0 * errors[0]


@pytest.mark.parametrize("changes", [{"gr_s": None, "gr_s_error": None}, {"batch_size": 1}])
def test_without_gr_s_the_noise_may_be_anything(changes):
    value, error = signal_of(replace(READING, gr_t=4.0, gr_t_error=0.0, **changes))
    least, most = 0.0, math.log10(4.0)
    assert value - error <= least + 0.2
    assert value + error >= most
