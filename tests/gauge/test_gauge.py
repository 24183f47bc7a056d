"""The gauge against the definitions, on real models and on gradients whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gauge.training import EVERY_OPTIMIZER, X, Y, drive, loss_of, network, run
from torch import nn
from torch.func import functional_call, grad, vmap

from grgauge import AdamW, Gauge, theory
from grgauge.smoothing import Spatial


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
