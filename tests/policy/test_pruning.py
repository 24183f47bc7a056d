"""Pruning, rule by rule: what each needs, and what stays its hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from grgauge import Reading
from grgauge.policy import Progress, Pruning

READING = Reading(50, 32, 20.0, 2.0, 1.0, 0.5, 0.05, 30.0, 1.0, 1.0, 0, True)
LEVEL = [2.0, 2.2] * 10


def trial(gr_t, losses, *, every=10, **changes):
    """Readings at steps 10, 20, ...; `gr_t` of all, or of each."""
    each = [gr_t] * len(losses) if isinstance(gr_t, float) else gr_t
    return [
        Progress(replace(READING, step=every * (i + 1), gr_t=g, **changes), loss)
        for i, (g, loss) in enumerate(zip(each, losses, strict=True))
    ]


def rule(own, *others, **settings):
    evidence = Pruning(**settings).judge(own, others)
    return None if evidence is None else evidence.rule


def test_far_out_needs_patience_readings_after_warm_up_all_on_one_side():
    assert rule(trial(1.5, LEVEL[:7])) is None  # three at step 50 or later
    assert rule(trial(1.5, LEVEL[:8])) == "far out"
    assert rule(trial(1.5, LEVEL[:8]), warm_up=60) is None
    assert rule(trial([1.5] * 7 + [2.5], LEVEL[:8])) is None
    assert rule(trial([1.5, 1.5, 1.5, 1.5, 1.5, 150.0, 1.5, 1.5], LEVEL[:8])) is None
    assert rule(trial([1.5] * 7 + [None], LEVEL[:8])) is None
    assert rule(trial(1.5, LEVEL[:8], gr_s=0.96)) is None  # noise hides the rate
    assert rule(trial(1.5, LEVEL[:8], gr_s=None)) == "far out"


def test_gr_t_is_judged_by_what_it_will_come_to():
    assert rule(trial(1.5, LEVEL[:8], finite_time_factor=0.5)) is None
    assert rule(trial(60.0, LEVEL[:8], finite_time_factor=0.5)) == "far out"


def test_diverged_needs_losses_in_a_row_above_all_of_the_first():
    assert rule(trial(20.0, [2.0, 2.0, 2.0, 2.5] + [2.6] * 4)) == "diverged"
    assert rule(trial(20.0, [2.0, 2.0, 2.0, 2.5] + [2.6] * 3 + [2.4])) is None
    assert rule(trial(20.0, [2.0, 2.0, 2.0] + [2.6] * 4, every=20)) is None  # the first and the newest overlap
    evidence = Pruning().judge(trial(20.0, [2.0, math.inf]))
    assert (evidence.rule, evidence.step, evidence.value) == ("diverged", 20, math.inf)


def test_a_loss_falls_that_falls_by_more_than_chance_in_the_whole_or_lately():
    assert rule(trial(1.5, [2.0, 2.2, 1.9, 2.1, 1.9, 2.1, 1.8, 2.0])) == "far out"  # by one standard error
    assert rule(trial(1.5, [2.0, 2.2, 2.0, 2.2, 1.7, 1.9, 1.7, 1.9])) is None
    assert rule(trial(1.5, [2.0] * 8 + [3.0] * 8 + [2.5, 2.6, 2.5, 2.6, 2.1, 2.2, 2.1, 2.2])) is None  # lately
    assert rule(trial(1.5, [3.0, 3.2, 2.8, 3.1, 3.0, 2.9] + [2.0, 2.2] * 5)) is None  # in the whole


def test_behind_is_above_the_median_of_the_others_at_equal_samples():
    own = trial(5.0, LEVEL)
    better, worse = trial(20.0, [1.5] * 20), trial(20.0, [2.5] * 20)
    assert rule(own, better) == "behind"
    assert rule(own, worse) is None
    assert rule(own, better, better, worse) == "behind"
    assert rule(own, better, worse, worse) is None
    assert rule(own) is None
    assert rule(trial(10.0, LEVEL), better) is None  # inside the zone
    assert rule(own, better[:18]) is None  # has not come that far
    assert rule(own, trial(20.0, [1.5] * 20, batch_size=16)) is None  # nor has this one, in samples
    assert rule(trial(5.0, LEVEL, batch_size=16), better) == "behind"


def test_losses_of_others_are_taken_between_their_readings():
    """The newest four are at 170 to 200 steps, where the other trial's loss goes from 4.0 at 160 to 0.0 at 200."""
    mean = (3.0 + 2.0 + 1.0 + 0.0) / 4
    for points in (((160, 4.0), (200, 0.0)), ((170, 3.0), (170, 3.0), (200, 0.0))):  # one told twice
        rivals = [Progress(replace(READING, step=step), loss) for step, loss in points]
        assert rule(trial(5.0, [mean + 0.01] * 20), rivals) == "behind"
        assert rule(trial(5.0, [mean - 0.01] * 20), rivals) is None


def test_samples_are_those_of_the_weights():
    assert Progress(READING, 1.0).samples == 50 * 32
    assert Progress(READING, 1.0, trained=999.0).samples == 999.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warm_up": -1}, "warm_up"),
        ({"patience": 0}, "patience"),
        ({"zone": (1.0, 40.0)}, r"zone must be \(low, high\), inside far = \(2.0, 100.0\), got \(1.0, 40.0\)"),
        ({"zone": (40.0, 40.0)}, "zone"),
        ({"far": (0.0, 100.0)}, "zone"),
        ({"blind": 0.0}, r"blind must be in \(0, 1\], got 0.0"),
    ],
)
def test_bad_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        Pruning(**options)


def test_without_readings_there_is_nothing_to_end():
    assert Pruning().judge([]) is None
