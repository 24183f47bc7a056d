"""The next configuration of an independent trial, in plain numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from grgauge import Config, Reading, suggest
from grgauge.policy import Progress, Pruning, advise
from grgauge.policy.calibration import Curve, calibration
from grgauge.policy.watch import SPANS

READING = Reading(50, 32, 20.0, 4.0, 1.0, 0.58, 0.05, 30.0, 1.0, 1.0, 0, True)
CONFIG = Config(1e-3, 32, 0.1)


def reading(**changes):
    return replace(READING, **changes)


LOW = {"gr_t": 2.0, "gr_t_error": 0.1, "gr_s": 0.4, "gr_s_error": 0.02}
FAR = {"gr_t": 1.05, "gr_t_error": 0.02}


def test_what_gauges_cannot_tell_stays():
    advice = advise([READING])
    assert (advice.lr.direction, advice.batch.direction) == ("unknown", "unknown")
    assert suggest([READING], CONFIG) == CONFIG


def test_the_step_is_the_advice_within_its_bound():
    factor = advise([reading(**LOW)]).lr.factor
    assert 3.0 < factor < 30.0
    assert suggest([reading(**LOW)], CONFIG, max_lr_factor=30.0) == Config(1e-3 * factor, 32, 0.1)
    assert suggest([reading(**LOW)], CONFIG, max_lr_factor=2.0).lr == pytest.approx(2e-3)


def test_without_an_end_the_whole_bound_is_the_step():
    assert math.isinf(advise([reading(**FAR)]).lr.interval[1])
    assert suggest([reading(**FAR)], CONFIG, max_lr_factor=50.0).lr == pytest.approx(0.05)
    high = reading(gr_t=200.0, gr_t_error=80.0)
    assert advise([high]).lr.interval[0] == 0.0
    assert suggest([high], CONFIG, max_lr_factor=50.0).lr == pytest.approx(2e-5)


def test_the_batch_takes_the_learning_rate_along(monkeypatch):
    """By a calibration that knows batches; on the families recorded so far GR_S tells no direction."""
    curve = Curve((-1.0, 0.0, 1.0, 2.0), (0.0, 0.5, 0.9, 1.0), (0.05,) * 4, 0.1)
    known = replace(calibration(), batch=dict.fromkeys(SPANS, curve))
    monkeypatch.setattr("grgauge.policy.advice.calibration", lambda: known)
    high = reading(gr_t=27.0, gr_s=0.98)
    advice = advise([high])
    assert (advice.lr.direction, advice.batch.direction) == ("unknown", "raise")
    chosen = suggest([high], CONFIG, max_batch_factor=2.0)
    assert (chosen.batch_size, chosen.weight_decay) == (64, 0.1)
    assert chosen.lr == pytest.approx(1e-3 * math.sqrt(2.0))
    assert suggest([high], CONFIG, max_batch_factor=2.0, coupling=0.0).lr == 1e-3


def test_the_readings_around_step_50_count_in_any_order():
    others = [reading(step=10, gr_t=100.0), reading(step=200, gr_t=100.0)]
    one = suggest([others[1], reading(**LOW), others[0]], CONFIG)
    assert one == suggest([reading(**LOW)], CONFIG)


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
