"""From quantiles to words: what a calibration made by hand makes of a reading."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from grgauge import Reading
from grgauge.policy import Correction
from grgauge.policy.advice import advice_of
from grgauge.policy.calibration import Calibration, Curve, spread
from grgauge.policy.watch import SPANS, Watch

READING = Reading(50, 32, 20.0, 4.0, 1.0, 0.58, 0.05, 30.0, 1.0, 1.0, 0, True)
ANY = (-9.0, 9.0)
RAISE = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.9)
KEEP = (-0.9, -0.4, -0.05, 0.0, 0.05, 0.4, 0.9)
UNKNOWN = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)


def level(quantiles, band=ANY):
    """The same quantiles whatever the gauge reads."""
    return Curve(band, ANY, (quantiles, quantiles), (0.0, 0.0))


def advised(steps, curves, **changes):
    """Advice on like readings at `steps`; `curves` are those of the learning rate for each span, or for all."""
    if not isinstance(curves, dict):
        curves = dict.fromkeys(SPANS, curves)
    watch = Watch()
    for step in steps:
        watch.observe(replace(READING, step=step, **changes))
    return advice_of(watch, known=Calibration(curves, dict.fromkeys(SPANS, (level(KEEP),)), UNKNOWN, {})).lr


@pytest.mark.parametrize(
    ("quantiles", "direction"),
    [
        ((-0.2, 0.0, 0.11, 0.3, 0.4, 0.6, 0.7), "raise"),  # two of three runs needed 1.25 times or more
        ((-0.2, 0.0, 0.08, 0.3, 0.4, 0.6, 0.7), "unknown"),
        ((-0.7, -0.6, -0.4, -0.3, -0.11, 0.0, 0.2), "lower"),
        ((-0.7, -0.6, -0.4, -0.3, -0.08, 0.0, 0.2), "unknown"),
        (KEEP, "keep"),  # half of the runs were within 3 times of the best, nine of ten within 10 times
        ((-0.9, -0.5, -0.05, 0.0, 0.05, 0.4, 0.9), "unknown"),
        ((-0.9, -0.4, -0.05, 0.0, 0.05, 0.5, 0.9), "unknown"),
        ((-1.1, -0.4, -0.05, 0.0, 0.05, 0.4, 0.9), "unknown"),
        ((-0.9, -0.4, -0.05, 0.0, 0.05, 0.4, 1.1), "unknown"),
    ],
)
def test_direction_factor_and_interval(quantiles, direction):
    found = advised([50], [level(quantiles)])
    assert found.direction == direction
    assert found.factor == pytest.approx(10.0 ** quantiles[3] if direction in ("raise", "lower") else 1.0)
    assert found.interval == pytest.approx((10.0 ** quantiles[0], 10.0 ** quantiles[-1]))


@pytest.mark.parametrize(("gr_t", "lowest", "open_end"), [(1.9, 0.1, True), (2.1, 0.1, False), (1.9, -0.1, False)])
def test_only_where_gradients_agree_wholly_has_the_factor_no_upper_end(gr_t, lowest, open_end):
    low, high = advised([50], [level((lowest, *RAISE[1:]))], gr_t=gr_t).interval
    assert low == pytest.approx(10.0**lowest)
    assert high == (math.inf if open_end else pytest.approx(10.0 ** RAISE[-1]))


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


def test_a_late_reading_counts_only_where_the_window_knows_no_direction():
    spans = {"early": [level(UNKNOWN)], "window": [level(UNKNOWN)], "late": [level(RAISE)]}
    assert advised([50], spans).direction == "unknown"
    assert advised([50, 200], spans).direction == "raise"
    lower = tuple(-q for q in reversed(RAISE))
    assert advised([50, 200], {**spans, "window": [level(lower)]}).direction == "lower"
    kept = advised([50, 200], {**spans, "window": [level(KEEP)]})
    assert (kept.direction, kept.why) == ("keep", "GR_T 20 ± 4 at step 50; step 200 is past the window")
    never = advised([200], {**spans, "late": [level(KEEP)]})
    assert (never.direction, never.why) == ("unknown", "GR_T 20 ± 4 at step 200, past the window around step 50")


RISING = Curve(ANY, ANY, ((-9.0,) * 7, (9.0,) * 7), (0.1, 0.1))
"""All quantiles are what the gauge reads."""


@pytest.mark.parametrize(("error", "width"), [(0.05, 0.0), (0.1, 0.0), (0.3, 0.2)])
def test_an_error_beyond_the_usual_one_widens_and_leaves_the_middle(error, width):
    found = spread([RISING], 1.0, error, None)
    assert found == pytest.approx((1.0 - width,) * 3 + (1.0,) + (1.0 + width,) * 3)


def test_the_bands_that_the_other_gauge_may_be_in_count_together():
    curves = [level((5.0,) * 7), level((1.0,) * 7, (0.0, 0.5)), level((2.0,) * 7, (0.5, 0.8))]
    assert spread(curves, 0.0, 0.0, None) == (5.0,) * 7
    assert spread(curves, 0.0, 0.0, (0.2, 0.2)) == (1.0,) * 7
    assert spread(curves, 0.0, 0.0, (0.5, 0.5)) == (1.0,) * 7  # a band has its upper end
    assert spread(curves, 0.0, 0.0, (0.6, 0.7)) == (2.0,) * 7
    assert spread(curves, 0.0, 0.0, (0.4, 0.6)) == (1.0, 1.0, 1.0, 1.5, 2.0, 2.0, 2.0)
    assert spread(curves, 0.0, 0.0, (0.9, 0.9)) == (5.0,) * 7  # in none


@pytest.mark.parametrize(("error", "interval"), [(0.1, (1.0, 1.0)), (0.25, (0.1, 10.0))])
def test_an_uncertain_gr_s_takes_the_bands_beside_it_in(error, interval):
    at = {-1.0: (0.0, 0.5), 0.0: (0.5, 0.7), 1.0: (0.7, 1.0)}
    curves = [level(UNKNOWN), *(level((q,) * 7, band) for q, band in at.items())]
    assert advised([50], curves, gr_s=0.6, gr_s_error=error).interval == pytest.approx(interval)
