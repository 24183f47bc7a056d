"""When a reading may be acted on, how far it may be off for its sample, and when its gradient was not the groups'."""

import math
import re

import pytest
from network import BATCH, batch, network
from torch import nn

from grgauge import AdamW, Gauge
from grgauge.estimators import Groups
from grgauge.gauge.statistics import _spread


class Run:
    def __init__(self, every=5, batch_size=BATCH):
        self.net = network()
        self.optimizer = AdamW(self.net.parameters(), lr=0.0, weight_decay=0.0)
        self.gauge = Gauge(self.optimizer, batch_size, every=every)
        self.t = 0

    def steps(self, n, grouped=True, scale=1.0):
        for _ in range(n):
            self.optimizer.zero_grad()
            for k in range(2):
                (nn.functional.mse_loss(self.net(batch(self.t, k, 2)[0]), batch(self.t, k, 2)[1]) / 2).backward()
                if grouped:
                    self.gauge.micro_step()
            for p in self.net.parameters():
                p.grad.mul_(scale)
            self.optimizer.step()
            self.t += 1
        return self.gauge.reading()


def note(reading, about):
    return next((line for line in reading.notes if line.startswith(about)), None)


def test_a_restart_waits_for_v_though_m_goes_on():
    run = Run()
    assert note(run.steps(15), "GR_T") == "GR_T not ready: needs 5 more steps"
    assert note(run.steps(5), "GR_T") is None
    run.gauge.restart()
    assert note(run.steps(5), "GR_T") == "GR_T not ready: needs 15 more steps"
    assert note(run.steps(15), "GR_T") is None


def test_a_reading_is_ready_when_gr_s_is_too_and_says_how_long_that_takes():
    run = Run()
    assert run.steps(25, grouped=False).ready  # without groups GR_T is all there is
    waits = []
    while not (reading := run.steps(5)).ready:
        assert note(reading, "GR_T") is None
        waits.append(re.fullmatch(r"GR_S not ready: needs (?:~(\d+) more steps|more signal)", note(reading, "GR_S"))[1])
        assert len(waits) < 20
    assert waits[0] is None  # "needs more signal"
    assert waits[-2:] == ["10", "5"]  # it is read every fifth step


@pytest.mark.parametrize(("scale", "seen"), [(1.0, False), (1.0003, False), (1.003, True), (0.5, True)])
def test_a_gradient_that_changes_after_the_last_micro_batch_is_seen(scale, seen):
    reading = Run().steps(5, scale=scale)
    assert any("changed after the last micro_step()" in line for line in reading.notes) == seen


def test_errors_that_follow_from_a_sample_are_half_the_distance_of_the_ends():
    """Squares 10 and 12 of halves of 32, 6 of the whole: S = (11 - 6) 32 = 160, G2 = 2 * 6 - 11 = 1."""
    groups = Groups([10.0, 12.0], 6.0, [16.0, 16.0], [0.5, 0.5])
    low, high = ((32 * (11 * e - 6), 12 - 11 * e) for e in (0.99, 1.01))
    expected = [(g2 + s) / (32 * g2 + s) for s, g2 in (low, high)]
    gr_s_error, noise_scale_error = _spread(groups, 0.01, 32)
    assert gr_s_error == pytest.approx((expected[1] - expected[0]) / 2)
    assert noise_scale_error == pytest.approx((high[0] / high[1] - low[0] / low[1]) / 2)
    assert gr_s_error == pytest.approx(0.0178, abs=1e-4)
    assert _spread(groups, 0.0, 32) == (0.0, 0.0)
    assert math.isinf(_spread(groups, 0.2, 32)[1])  # within the error there may be no signal at all
