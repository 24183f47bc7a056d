"""The gauge against the definitions, on real models and on gradients whose answer is known."""

from __future__ import annotations

import copy
import io
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from grgauge import AdamW, Gauge, theory
from grgauge.smoothing import Spatial

OPTIMIZERS = {
    "ours, fused": lambda p: AdamW(p, lr=1e-3),
    "ours, flat": lambda p: AdamW(p, lr=1e-3, flat=True),
    "ours, clipping": lambda p: AdamW(p, lr=1e-3, max_grad_norm=0.3),
    "ours, clipping, flat": lambda p: AdamW(p, lr=1e-3, max_grad_norm=0.3, flat=True),
    "ours, other beta1": lambda p: AdamW(p, lr=1e-3, betas=(0.8, 0.99)),
    "torch AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-3),
}
EVERY_OPTIMIZER = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 3))


DATA = torch.Generator().manual_seed(11)
X = torch.randn(2000, 10, generator=DATA)
Y = torch.randn(2000, 3, generator=DATA) + X[:, :3]


def loss_of(net, rows, reduction="mean"):
    return nn.functional.mse_loss(net(X[rows]), Y[rows], reduction=reduction)


def drive(optimizer, params, make_gradient, steps, gauge):
    """Steps on given gradients; the last reading."""
    for t in range(steps):
        for p, g in zip(params, make_gradient(t), strict=True):
            p.grad = g if p.grad is None else p.grad.copy_(g)
        optimizer.step()
    return gauge.reading()


@EVERY_OPTIMIZER
def test_gr_t_equals_its_definition(make):
    """V^/|m^|^2 from the very gradients of a real run, in float64."""
    net = network()
    optimizer = make(net.parameters())
    gauge = Gauge(optimizer, 16)
    m, v = 0.0, 0.0
    for t in range(1, 41):
        optimizer.zero_grad()
        loss_of(net, slice(t * 16, t * 16 + 16)).backward()
        g = torch.cat([p.grad.flatten() for p in net.parameters()]).double()
        m, v = 0.9 * m + 0.1 * g, 0.9 * v + 0.1 * float(g.square().sum())
        optimizer.step()
        if t % 5 == 0:
            reading = gauge.reading()
            expected = (v / (1 - 0.9**t)) / float((m / (1 - 0.9**t)).square().sum())
            assert reading.step == t
            assert reading.gr_t == pytest.approx(expected, rel=1e-5)
            assert reading.grad_norm == pytest.approx(float(g.norm()), rel=1e-6)
    assert reading.ready
    assert reading.gr_t_error > 0


@EVERY_OPTIMIZER
def test_landmarks(make):
    """A constant gradient reads 1, one that flips its sign 361, white noise 19 (1-b^t)/(1+b^t)."""
    shapes = [(40, 30), (50,)]
    constant = [torch.randn(s) for s in shapes]
    generator = torch.Generator().manual_seed(3)
    makers = {
        "constant": lambda t: [g.clone() for g in constant],
        "flipping": lambda t: [g * (-1) ** t for g in constant],
        "noise": lambda t: [torch.randn(s, generator=generator) for s in shapes],
    }
    readings = {}
    for name, maker in makers.items():
        params = [nn.Parameter(torch.zeros(s)) for s in shapes]
        optimizer = make(params)
        readings[name] = drive(optimizer, params, maker, 200, Gauge(optimizer, 8))
    assert readings["constant"].gr_t == pytest.approx(theory.aligned(), rel=1e-5)
    assert readings["flipping"].gr_t == pytest.approx(theory.period2(), rel=1e-5)
    # |m|^2 of d white coordinates has relative standard deviation sqrt(2/d); V is averaged besides.
    assert readings["noise"].gr_t == pytest.approx(theory.uncorrelated(), rel=4 * math.sqrt(2 / 1250))


def test_white_noise_warms_up_as_it_must():
    params = [nn.Parameter(torch.zeros(40_000))]
    optimizer = AdamW(params)
    gauge = Gauge(optimizer, 8, every=1)
    for t in range(1, 31):
        params[0].grad = torch.randn(40_000, generator=torch.Generator().manual_seed(t))
        optimizer.step()
        reading = gauge.reading()
        assert reading.finite_time_factor == pytest.approx((1 - 0.9**t) / (1 + 0.9**t))
        assert reading.gr_t == pytest.approx(19 * reading.finite_time_factor, rel=0.05)
        assert reading.ready == (t >= 20)
        assert any("not ready: needs" in note for note in reading.notes) == (t < 20)


@EVERY_OPTIMIZER
@pytest.mark.parametrize("n", [2, 4])
def test_gr_s_equals_the_two_batch_estimator(make, n):
    net = network()
    optimizer = make(net.parameters())
    gauge = Gauge(optimizer, 32, every=1)
    b = 32 // n
    spatial = Spatial()
    for t in range(8):
        optimizer.zero_grad()
        parts, so_far = [], 0.0
        for k in range(n):
            loss_of(net, slice(t * 32 + k * b, t * 32 + (k + 1) * b)).backward()
            gauge.micro_step()
            now = torch.cat([p.grad.flatten() for p in net.parameters()]).double()
            parts.append(now - so_far)
            so_far = now
        mean = so_far / n
        groups = float(sum(part.square().sum() for part in parts)) / n
        big = float(mean.square().sum())
        g2 = (32 * big - b * groups) / (32 - b)
        s = (groups - big) / (1 / b - 1 / 32)
        spatial.update(s, g2)
        optimizer.step()
        reading = gauge.reading()
        assert reading.gr_s == pytest.approx(spatial.gr_s(32), rel=1e-4)
    assert reading.noise_scale == pytest.approx(spatial.noise_scale, rel=1e-3)


def test_gr_s_agrees_with_per_sample_gradients():
    """The definition itself, through torch.func: sum of |g_i|^2 over |sum of g_i|^2, at one point of a real model."""
    net = network()
    weights = {k: v.detach() for k, v in net.named_parameters()}

    def sample_loss(weights, x, y):
        return nn.functional.mse_loss(functional_call(net, weights, (x[None],))[0], y)

    per_sample = vmap(grad(sample_loss), in_dims=(None, 0, 0))(weights, X, Y)
    g = torch.cat([v.reshape(len(X), -1) for v in per_sample.values()], dim=1).double()
    true = g.mean(0)
    noise_scale = float((g - true).square().sum(1).mean() / true.square().sum())
    batch = 64
    expected = theory.expected_gr_s(batch, noise_scale)

    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    gauge = Gauge(optimizer, batch, every=1, beta=0.9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        optimizer.zero_grad()
        for _ in range(4):
            loss_of(net, torch.randint(len(X), (batch // 4,), generator=generator)).backward()
            gauge.micro_step()
        optimizer.step()
    reading = gauge.reading()
    assert reading.ready
    assert abs(reading.gr_s - expected) < 3 * reading.gr_s_error
    assert reading.gr_s_error < 0.3 * expected

    # And the definition, averaged over batches of independent samples, is what Lemma 2 says it is.
    sums = [g[torch.randint(len(X), (batch,), generator=generator)] for _ in range(300)]
    ratio = np.mean([float(s.square().sum()) for s in sums]) / np.mean([float(s.sum(0).square().sum()) for s in sums])
    assert ratio == pytest.approx(expected, rel=0.1)


def test_sum_and_mean_losses_read_the_same():
    readings = []
    for reduction, divide in (("mean", 1), ("mean", 4), ("sum", 1)):
        net = network()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        gauge = Gauge(optimizer, 32)
        for t in range(50):
            optimizer.zero_grad()
            for k in range(4):
                (
                    loss_of(net, slice((t * 32 + k * 8) % 1900, (t * 32 + k * 8) % 1900 + 8), reduction) / divide
                ).backward()
                gauge.micro_step()
            optimizer.step()
        readings.append(gauge.reading())
    for other in readings[1:]:
        assert other.gr_s == pytest.approx(readings[0].gr_s, rel=1e-4)
        assert other.gr_t == pytest.approx(readings[0].gr_t, rel=1e-4)
        assert other.noise_scale == pytest.approx(readings[0].noise_scale, rel=1e-3)


def run(make, steps, n=4, gauge=None, net=None, optimizer=None, start=0):
    net = net or network()
    optimizer = optimizer or make(net.parameters())
    gauge = gauge or Gauge(optimizer, 32)
    for t in range(start, start + steps):
        optimizer.zero_grad()
        for k in range(n):
            loss_of(net, slice((t * 32 + k * 8) % 1900, (t * 32 + k * 8) % 1900 + 8)).backward()
            gauge.micro_step()
        optimizer.step()
    return net, optimizer, gauge


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


def test_a_sampled_gauge_reads_what_the_whole_does():
    torch.manual_seed(0)
    readings = []
    for sample in (50_000_000, 150_000):
        net = nn.Sequential(nn.Linear(400, 600), nn.ReLU(), nn.Linear(600, 400))
        torch.manual_seed(1)
        for p in net.parameters():
            nn.init.normal_(p, std=0.05)
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
        gauge = Gauge(optimizer, 32, sample=sample)
        for _ in range(40):
            optimizer.zero_grad()
            for _ in range(2):
                net(torch.randn(16, 400)).square().mean().backward()
                gauge.micro_step()
            optimizer.step()
        readings.append(gauge.reading())
    whole, part = readings
    assert part.gr_t == pytest.approx(whole.gr_t, rel=0.15)
    assert part.gr_s == pytest.approx(whole.gr_s, rel=0.15)
    assert part.grad_norm == pytest.approx(whole.grad_norm, rel=0.15)
    assert part != whole


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


def test_a_beta_changed_under_way_is_noticed():
    net = network()
    optimizer = AdamW(net.parameters())
    _, _, gauge = run(None, 5, net=net, optimizer=optimizer, gauge=Gauge(optimizer, 32))
    optimizer.param_groups[0]["betas"] = (0.85, 0.999)
    run(None, 5, net=net, optimizer=optimizer, gauge=gauge, start=5)
    assert gauge.reading().gr_t is None
    assert any("betas[0] is now [0.85]" in note for note in gauge.reading().notes)


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


def test_the_segment_table_has_names_and_adds_up():
    net = network()
    optimizer = AdamW(net.named_parameters())
    _, _, gauge = run(None, 20, net=net, optimizer=optimizer, gauge=Gauge(optimizer, 32))
    reading = gauge.reading()
    assert [s.name for s in reading.segments] == [name for name, _ in net.named_parameters()]
    assert [s.numel for s in reading.segments] == [p.numel() for p in net.parameters()]
    assert math.hypot(*(s.grad_norm for s in reading.segments)) == pytest.approx(reading.grad_norm)
    assert min(s.gr_t for s in reading.segments) <= reading.gr_t <= max(s.gr_t for s in reading.segments)
    assert set(reading.to_dict()) >= {"step", "gr_t", "gr_s", "ready", "notes"}
    assert "table" not in reading.to_dict()


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


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"groups": 0}, "groups is 0"),
        ({"every": 0}, "every is 0"),
        ({"sample": 0}, "sample is 0"),
        ({"beta": 1.0}, "beta is 1.0"),
        ({"beta": 0.0}, "beta is 0.0"),
    ],
)
def test_bad_options_are_named(options, text):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1)
    with pytest.raises(ValueError, match=text):
        Gauge(optimizer, **{"batch_size": 8, **options})


def test_sparse_gradients_end_the_step_before_it_starts():
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = torch.optim.SparseAdam(table.parameters())
    Gauge(optimizer, 8)
    table(torch.tensor([1])).sum().backward()
    before = table.weight.detach().clone()
    with pytest.raises(ValueError, match="must be dense"):
        optimizer.step()
    assert torch.equal(table.weight, before)


def test_two_gauges_and_a_copy_of_the_optimizer_stay_apart():
    net = network()
    optimizer = AdamW(net.parameters())
    first, second = Gauge(optimizer, 32), Gauge(optimizer, 32, every=2)
    run(None, 10, net=net, optimizer=optimizer, gauge=first)
    assert first.reading().gr_t == pytest.approx(second.reading().gr_t)
    twin = copy.deepcopy(optimizer)
    twin.step()
    assert first.reading().step == 10


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
