"""The next configuration of an independent trial, in plain numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from grgauge import Config, Reading, suggest
from grgauge.policy import Progress, Pruning

READING = Reading(50, 32, 20.0, 1.0, 1.0, 0.58, 0.01, 30.0, 1.0, 1.0, 0, True, True)
CONFIG = Config(1e-3, 32, 0.1)


def reading(**changes):
    return replace(READING, **changes)


def test_in_the_zone_nothing_changes():
    assert suggest([READING], CONFIG) == CONFIG


@pytest.mark.parametrize(("gr_t", "factor"), [(1.2, 10.0), (5.0, 4.0 ** (1 / 3)), (160.0, 0.5)])
def test_the_power_law_and_its_ceiling(gr_t, factor):
    assert suggest([reading(gr_t=gr_t)], CONFIG).lr == pytest.approx(1e-3 * factor)


def test_the_batch_takes_the_learning_rate_along():
    chosen = suggest([reading(gr_s=0.29)], CONFIG)
    assert (chosen.batch_size, chosen.weight_decay) == (16, 0.1)
    assert chosen.lr == pytest.approx(1e-3 * math.sqrt(0.5))


def test_blind_only_the_batch_moves():
    chosen = suggest([reading(gr_t=1.2, gr_s=0.98)], CONFIG)
    assert chosen.batch_size == round(32 * 0.98 / 0.58)
    assert chosen.lr == pytest.approx(1e-3 * math.sqrt(chosen.batch_size / 32))


def test_the_reading_nearest_to_step_50_counts():
    others = [reading(step=10, gr_t=1.0), reading(step=200, gr_t=100.0)]
    assert suggest([others[0], READING, others[1]], CONFIG) == CONFIG


@pytest.mark.parametrize(
    ("readings", "options", "message"),
    [
        ([], {}, "readings must be at least one reading"),
        ([READING], {"max_lr_factor": 0.5}, "max_lr_factor must be at least 1, got 0.5"),
        ([READING], {"coupling": -1.0}, "coupling must be finite and at least 0, got -1.0"),
    ],
)
def test_bad_arguments(readings, options, message):
    with pytest.raises(ValueError, match=message):
        suggest(readings, CONFIG, **options)


def trial(gr_t, losses):
    return [Progress(reading(step=5 * i + 5, gr_t=gr_t), loss) for i, loss in enumerate(losses)]


FALLING = [2.0 - 0.05 * i for i in range(20)]
LEVEL = [2.0 + 0.1 * (-1) ** i for i in range(20)]


@pytest.mark.parametrize(
    ("gr_t", "losses", "rule"),
    [
        (20.0, FALLING, None),
        (20.0, [2.0, math.nan], "diverged"),
        (20.0, [2.0 + 0.05 * i for i in range(20)], "diverged"),
        (1.5, FALLING, None),
        (1.5, LEVEL, "far out"),
        (150.0, LEVEL, "far out"),
        (20.0, LEVEL, None),
        (20.0, [2.0] * 4 + [loss + 2.0 for loss in FALLING], None),
        (5.0, FALLING, None),
        (5.0, [loss + 0.5 for loss in FALLING], None),
        (5.0, [loss + 0.5 for loss in LEVEL], "behind"),
        (20.0, [loss + 0.5 for loss in FALLING], None),
    ],
)
def test_what_ends_a_trial(gr_t, losses, rule):
    evidence = Pruning().judge(trial(gr_t, losses), [trial(20.0, FALLING)])
    assert (None if evidence is None else evidence.rule) == rule
