"""A gauge that is saved, loaded, copied, restarted and removed."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from gauge.training import EVERY_OPTIMIZER, OPTIMIZERS, network, run
from torch import nn

from grgauge import AdamW, Gauge, theory


@EVERY_OPTIMIZER
@pytest.mark.parametrize("at", [10, 13])
def test_a_resumed_run_reads_the_same_bits(make, at):
    _, _, straight = run(make, 30)
    net, optimizer, gauge = run(make, at)
    file = io.BytesIO()
    torch.save([net.state_dict(), optimizer.state_dict(), gauge.state_dict()], file)
    file.seek(0)
    weights, moments, gauged = torch.load(file)
    net, optimizer, gauge = run(make, 0)
    net.load_state_dict(weights)
    optimizer.load_state_dict(moments)
    gauge.load_state_dict(gauged)
    assert gauge.reading() is None
    run(make, 30 - at, gauge=gauge, net=net, optimizer=optimizer, start=at)
    assert gauge.reading() == straight.reading()
    assert gauge.reading().segments == straight.reading().segments


def test_tensors_of_odd_length_leave_no_gap_in_a_checkpoint():
    """The gauge's own EMAs lie aligned in memory, and packed in its state."""

    def made():
        params = [nn.Parameter(torch.zeros(n)) for n in (1, 5003, 3, 70_001)]
        optimizer = torch.optim.SGD(params, lr=0.1)
        return params, optimizer, Gauge(optimizer, 8, every=2, sample=40_000)

    def steps(params, optimizer, times):
        for t in times:
            for p in params:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t))
            optimizer.step()

    params, optimizer, straight = made()
    steps(params, optimizer, range(5))
    state = copy.deepcopy(straight.state_dict())
    (bucket,) = straight._sample.buckets()
    (ema,) = state["source"]["emas"]
    assert bucket.plan.states > bucket.plan.numel == len(ema)
    assert float(ema[0]) == float(straight._source._emas[0][0])
    assert (ema != 0).all()
    steps(params, optimizer, range(5, 10))
    params, optimizer, resumed = made()
    resumed.load_state_dict(state)
    steps(params, optimizer, range(5, 10))
    assert resumed.reading() == straight.reading()


def test_taking_a_state_dict_does_not_disturb():
    _, _, straight = run(OPTIMIZERS["ours, flat"], 15)
    net, optimizer, gauge = run(OPTIMIZERS["ours, flat"], 12)
    gauge.state_dict()
    run(None, 3, gauge=gauge, net=net, optimizer=optimizer, start=12)
    assert gauge.reading() == straight.reading()


def test_elements_that_were_not_finite_before_the_state_was_taken_count():
    def step(p, optimizer, value):
        p.grad = torch.tensor([1.0, value])
        optimizer.step()

    p = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([p], lr=0.0)
    gauge = Gauge(optimizer, 8, every=3)
    step(p, optimizer, float("nan"))
    step(p, optimizer, 1.0)
    state = gauge.state_dict()
    gauge.remove()
    gauge = Gauge(optimizer, 8, every=3)
    gauge.load_state_dict(state)
    step(p, optimizer, float("inf"))
    assert gauge.reading().nonfinite == 2


def test_a_state_of_another_kind_or_model_is_refused():
    _, _, fused = run(OPTIMIZERS["ours, flat"], 6)
    _, _, own = run(OPTIMIZERS["SGD"], 6)
    with pytest.raises(ValueError, match="kind 'fused'"):
        own.load_state_dict(fused.state_dict())
    other = Gauge(torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1), 32)
    with pytest.raises(ValueError, match="other parameters"):
        other.load_state_dict(own.state_dict())
    before = own.reading()
    assert own.reading() is before


def test_two_gauges_and_a_copy_of_the_optimizer_stay_apart():
    net = network()
    optimizer = AdamW(net.parameters())
    first, second = Gauge(optimizer, 32), Gauge(optimizer, 32, every=2)
    run(None, 10, net=net, optimizer=optimizer, gauge=first)
    assert first.reading().gr_t == pytest.approx(second.reading().gr_t)
    twin = copy.deepcopy(optimizer)
    twin.step()
    assert first.reading().step == 10


def test_restart_and_remove():
    net, optimizer, gauge = run(OPTIMIZERS["SGD"], 30)
    gauge.restart()
    run(None, 5, net=net, optimizer=optimizer, gauge=gauge, start=30)
    assert not gauge.reading().ready
    assert gauge.reading().finite_time_factor == pytest.approx(theory.finite_time_factor(5))
    last = gauge.reading()
    gauge.remove()
    run(None, 10, net=net, optimizer=optimizer, gauge=gauge, start=35)
    assert gauge.reading() is last
