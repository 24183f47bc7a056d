"""Steps out of the ordinary: overflow, scaling, closures, missing gradients, CUDA graphs, and what cannot be read."""

from __future__ import annotations

import pytest
import torch
from gauge.training import EVERY_OPTIMIZER, OPTIMIZERS, drive, loss_of, network, run
from torch import nn

from grgauge import AdamW, Gauge


@EVERY_OPTIMIZER
def test_nonfinite_gradients_are_counted_and_leave_the_gauge_unharmed(make):
    params = [nn.Parameter(torch.zeros(1000))]
    optimizer = make(params)
    gauge = Gauge(optimizer, 8)
    constant = torch.randn(1000)

    def poisoned(t):
        g = constant.clone()
        if t == 7:
            g[[5, 6]] = torch.tensor([float("nan"), float("inf")])
        return [g]

    drive(optimizer, params, poisoned, 10, gauge)
    assert gauge.reading().nonfinite == 2
    assert gauge.reading().segments[0].nonfinite == 0
    reading = drive(optimizer, params, lambda t: [constant], 60, gauge)
    assert reading.nonfinite == 0
    assert reading.gr_t == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize("make", [OPTIMIZERS[k] for k in ("ours, flat", "ours, other beta1", "SGD")])
@pytest.mark.parametrize("fused_torch", [False, True])
def test_grad_scaler_leaves_the_gauge_continuous(make, fused_torch):
    """A scale that grows and a step that is skipped read as if neither had happened."""
    if fused_torch:
        make = lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True)  # noqa: E731

    def train(scaled):
        net = network()
        optimizer = make(net.parameters())
        gauge = Gauge(optimizer, 16, every=1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=4, enabled=scaled)
        for t in range(30):
            overflow = t in (9, 22)
            if overflow and not scaled:
                continue
            optimizer.zero_grad()
            scaler.scale(loss_of(net, slice(t * 16, t * 16 + 16))).backward()
            if overflow:
                net[0].weight.grad[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
        return gauge.reading()

    scaled, plain = train(True), train(False)
    assert scaled.gr_t == pytest.approx(plain.gr_t, rel=1e-4)
    assert scaled.grad_norm == pytest.approx(plain.grad_norm, rel=1e-4)


def test_closures_are_read_as_well():
    def train(make, with_closure):
        net = network()
        optimizer = make(net.parameters())
        gauge = Gauge(optimizer, 16)
        for t in range(25):

            def closure(t=t):
                optimizer.zero_grad()
                loss = loss_of(net, slice(t * 16, t * 16 + 16))
                loss.backward()
                return loss

            if with_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        return gauge.reading()

    for make in (OPTIMIZERS["ours, flat"], OPTIMIZERS["SGD"]):
        assert train(make, True) == train(make, False)


def test_a_beta_changed_under_way_is_noticed():
    net = network()
    optimizer = AdamW(net.parameters())
    _, _, gauge = run(None, 5, net=net, optimizer=optimizer, gauge=Gauge(optimizer, 32))
    optimizer.param_groups[0]["betas"] = (0.85, 0.999)
    run(None, 5, net=net, optimizer=optimizer, gauge=gauge, start=5)
    assert gauge.reading().gr_t is None
    assert any("betas[0] is now [0.85]" in note for note in gauge.reading().notes)


def test_clipping_that_begins_under_way_is_noticed():
    net = network()
    optimizer = AdamW(net.parameters())
    _, _, gauge = run(None, 5, net=net, optimizer=optimizer, gauge=Gauge(optimizer, 32))
    optimizer.max_grad_norm = 1.0
    run(None, 5, net=net, optimizer=optimizer, gauge=gauge, start=5)
    assert gauge.reading().gr_t is None
    assert any("gradients are now clipped" in note for note in gauge.reading().notes)


def test_parameters_that_only_torch_updates_are_noticed_when_they_come():
    params = [nn.Parameter(torch.zeros(10)), nn.Parameter(torch.zeros(10, dtype=torch.float64))]
    optimizer = AdamW(params[:1])
    gauge = Gauge(optimizer, 32, every=1)

    def gr_t():
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        return gauge.reading().gr_t

    assert gr_t() == pytest.approx(1.0)
    optimizer.add_param_group({"params": params[1:]})
    assert gr_t() is None
    assert any("torch's own code now updates some parameters" in note for note in gauge.reading().notes)


@EVERY_OPTIMIZER
def test_some_gradients_missing(make):
    """A parameter that takes no part neither breaks the gauge nor tilts a constant gradient's reading."""
    params = [nn.Parameter(torch.zeros(100)), nn.Parameter(torch.zeros(50))]
    optimizer = make(params)
    gauge = Gauge(optimizer, 8, every=1)
    for _ in range(12):
        params[0].grad = params[0].grad if params[0].grad is not None else torch.ones(100)
        optimizer.step()
        assert gauge.reading().gr_t == pytest.approx(1.0, rel=1e-5)
    assert [s.gr_t for s in gauge.reading().segments][1] is None


@pytest.mark.parametrize("name", ["ours, fused", "ours, flat", "ours, clipping"])
def test_gradients_at_different_steps_make_the_ratio_of_each_ones_own_sums(name):
    params, generator = [nn.Parameter(torch.zeros(n)) for n in (100, 50)], torch.Generator().manual_seed(0)
    optimizer = OPTIMIZERS[name](params)
    gauge = Gauge(optimizer, 8, every=1)
    steps, v = [0, 0], [0.0, 0.0]
    m = [torch.zeros(p.numel(), dtype=torch.float64) for p in params]
    for t in range(31):
        for i, p in enumerate(params):
            p.grad = None
            if i == 0 or t % 3 == 0:
                p.grad = (1 + t) * torch.randn(p.numel(), generator=generator)
                g = p.grad.double()
                steps[i] += 1
                v[i] = 0.9 * v[i] + 0.1 * float(g.square().sum())
                m[i] = 0.9 * m[i] + 0.1 * g
        optimizer.step()
    corrections = [1 - 0.9**n for n in steps]
    signal = sum(float((own / c).square().sum()) for own, c in zip(m, corrections, strict=True))
    assert gauge.reading().gr_t == pytest.approx(
        sum(own / c for own, c in zip(v, corrections, strict=True)) / signal, rel=1e-5
    )


def test_parameters_that_join_start_the_gauge_anew():
    net = network()
    optimizer = AdamW(net.parameters())
    _, _, gauge = run(None, 10, net=net, optimizer=optimizer, gauge=Gauge(optimizer, 32))
    assert len(gauge.reading().segments) == 4
    extra = nn.Parameter(torch.zeros(7))
    optimizer.add_param_group({"params": [extra]})
    extra.grad = torch.ones(7)
    run(None, 5, net=net, optimizer=optimizer, gauge=gauge, start=10)
    assert len(gauge.reading().segments) == 5


def test_each_moment_is_corrected_by_its_own_age():
    """Where all gradients agree, m is the gradient itself, however young: GR_T is 1."""
    old, young = (nn.Parameter(torch.zeros(7)) for _ in range(2))
    optimizer = AdamW([old], lr=0.0)
    gauge = Gauge(optimizer, 8, every=1)
    drive(optimizer, [old], lambda t: [torch.ones(7)], 5, gauge)
    optimizer.add_param_group({"params": [young]})
    reading = drive(optimizer, [old, young], lambda t: [torch.ones(7)] * 2, 2, gauge)
    assert len(reading.segments) == 2
    assert reading.gr_t == pytest.approx(1.0, rel=1e-5)


def test_sparse_gradients_end_the_step_before_it_starts():
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = torch.optim.SparseAdam(table.parameters())
    Gauge(optimizer, 8)
    table(torch.tensor([1])).sum().backward()
    before = table.weight.detach().clone()
    with pytest.raises(ValueError, match="must be dense"):
        optimizer.step()
    assert torch.equal(table.weight, before)


def test_replayed_steps_count_as_steps(monkeypatch):
    """A captured step does not count, and each replay writes its sums to the same memory; see tests/device."""
    readings = []
    for replayed in (False, True):
        params = [nn.Parameter(torch.zeros(100)), nn.Parameter(torch.zeros(30, dtype=torch.bfloat16))]
        optimizer = AdamW(params)
        graph: list = []
        if replayed:
            optimizer.observe(graph.append)
        gauge = Gauge(optimizer, 8, every=3)
        generator = torch.Generator().manual_seed(0)
        memory: list = []
        for t in range(10):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            if replayed and t >= 2:
                with monkeypatch.context() as capturing:
                    capturing.setattr("grgauge.gauge.gauge._capturing", lambda: True)
                    optimizer.step()  # a graph would have run it without Python
                if t == 2:
                    memory = gauge._captured
                    assert gauge.reading() is None
                for there, now in zip(memory, graph[-1], strict=True):
                    there.stats.copy_(now.stats)
                gauge._captured = memory
                gauge.replayed()
            else:
                optimizer.step()
        readings.append(gauge.reading())
    assert readings[0] == readings[1]
    assert readings[1].step == 9


def test_what_cannot_be_captured_says_so(monkeypatch):
    gauge = run(OPTIMIZERS["ours, fused"], 3)[-1]
    with pytest.raises(RuntimeError, match=r"replayed\(\) is for steps in a CUDA graph"):
        gauge.replayed()
    monkeypatch.setattr("grgauge.gauge.gauge._capturing", lambda: True)
    with pytest.raises(RuntimeError, match="call micro_step\\(\\) after each replay"):
        gauge.micro_step()


def test_what_is_not_available_says_so():
    net = network()
    optimizer = AdamW(net.parameters())
    gauge = Gauge(optimizer, 32)
    assert gauge.reading() is None
    _, _, gauge = run(None, 5, n=1, gauge=gauge, net=net, optimizer=optimizer)
    assert gauge.reading().gr_s is None
    assert any("micro_step() was called 1 times in the step, not at least 2" in n for n in gauge.reading().notes)

    for groups, n, text in ((1, 1, "groups is 1; it needs at least two"), (4, 3, "called 3 times in the step, not 4")):
        net = network()
        optimizer = AdamW(net.parameters())
        _, _, gauge = run(None, 5, n=n, gauge=Gauge(optimizer, 32, groups=groups), net=net, optimizer=optimizer)
        reading = gauge.reading()
        assert (reading.gr_s, reading.noise_scale) == (None, None)
        assert any(text in note for note in reading.notes)

    params = [nn.Parameter(torch.ones(5))]
    optimizer = AdamW(params)
    gauge = Gauge(optimizer, 8, every=1)
    reading = drive(optimizer, params, lambda t: [torch.zeros(5)], 3, gauge)
    assert reading.gr_t is None
    assert not reading.ready
    assert any("call micro_step()" in note for note in reading.notes)
    assert any("all gradients are zero" in note for note in reading.notes)
