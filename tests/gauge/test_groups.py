"""Groups of one process: halves of a batch, unequal and weighted micro-batches, GradScaler; against float64."""

import math

import pytest
import torch
from network import BATCH, Net, batch, network
from one_process import weighted_truth
from torch import nn

from grgauge import AdamW, Gauge, theory

OPTIMIZERS = {
    "ours": lambda p: AdamW(p, lr=0.0, weight_decay=0.0),
    "ours, flat": lambda p: AdamW(p, lr=0.0, weight_decay=0.0, flat=True),
    "torch AdamW": lambda p: torch.optim.AdamW(p, lr=0.0, weight_decay=0.0),
    "torch AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.0, weight_decay=0.0, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.0),
}
EVERY_OPTIMIZER = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
STEPS = 25
BATCHES = [batch(t) for t in range(STEPS)]


def mse(net, rows, reduction="mean"):
    return nn.functional.mse_loss(net(rows[0]), rows[1], reduction=reduction)


def read(make, step, steps=STEPS, net=None, **options):
    """The last reading of a run; `step(net, optimizer, gauge, t)` makes the gradients and calls the optimizer."""
    net = net or network()
    optimizer = make(net.parameters())
    gauge = Gauge(optimizer, BATCH, every=1, **options)
    for t in range(steps):
        step(net, optimizer, gauge, t)
    return gauge.reading()


def micro_batches(sizes, weights=None, reduction="mean", tell=True):
    def step(net, optimizer, gauge, t):
        optimizer.zero_grad()
        shares = weights or sizes
        for rows, size, share in zip(
            zip(*(part.split(sizes) for part in batch(t)), strict=True), sizes, shares, strict=True
        ):
            factor = share / sum(shares) if reduction == "mean" else 1.0
            (mse(net, rows, reduction) * factor).backward()
            gauge.micro_step(samples=size, weight=share) if tell else gauge.micro_step()
        optimizer.step()

    return step


# split_backward


@EVERY_OPTIMIZER
def test_split_backward_is_two_groups(make):
    losses = []

    def step(net, optimizer, gauge, t):
        optimizer.zero_grad()
        losses.append((gauge.split_backward(lambda rows: mse(net, rows), batch(t)), mse(net, batch(t)).detach()))
        optimizer.step()

    reading = read(make, step)
    gr_t, gr_s = weighted_truth([32, 32], [1, 1], BATCHES)
    assert reading.gr_t == pytest.approx(gr_t, rel=2e-6)
    assert reading.gr_s == pytest.approx(gr_s, rel=2e-6)
    for split, whole in losses:
        assert not split.requires_grad
        torch.testing.assert_close(split, whole)


@pytest.mark.parametrize("size", [2, 3, 7, 64])
def test_halves_need_not_be_equal(size):
    """An odd batch is two groups of unequal size and weight; the gradient is that of the whole batch."""

    def step(net, optimizer, gauge, t):
        optimizer.zero_grad()
        rows = [part[:size] for part in batch(t)]
        gauge.split_backward(lambda rows: mse(net, rows), rows)
        split = [p.grad.clone() for p in net.parameters()]
        for got, expected in zip(split, torch.autograd.grad(mse(net, rows), list(net.parameters())), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
        optimizer.step()

    reading = read(OPTIMIZERS["ours"], step, steps=8)
    sizes = [size // 2, size - size // 2]
    gr_t, gr_s = weighted_truth(sizes, sizes, [[part[:size] for part in rows] for rows in BATCHES[:8]])
    assert reading.gr_t == pytest.approx(gr_t, rel=1e-5)
    noise_scale = None if gr_s == 1.0 else theory.noise_scale_from_gr_s(gr_s, size)  # a few samples show no signal
    assert reading.noise_scale == (noise_scale and pytest.approx(noise_scale, rel=1e-3))


def test_batches_of_any_shape():
    """Tensors, tuples, lists, dicts and nested ones are split alike; on other steps nothing is."""
    calls, readings = [], []
    shapes = {
        "tuple": lambda x, y: (x, y),
        "dict": lambda x, y: {"x": x, "y": y},
        "nested": lambda x, y: [{"x": x}, (y,)],
    }

    def leaves(rows):
        if isinstance(rows, torch.Tensor):
            return [rows]
        values = rows.values() if isinstance(rows, dict) else rows
        return [leaf for value in values for leaf in leaves(value)]

    for shape in shapes.values():
        net = network()
        optimizer = OPTIMIZERS["ours"](net.parameters())
        gauge = Gauge(optimizer, BATCH, every=5)

        def loss_of(rows, net=net):
            calls.append(len(leaves(rows)[0]))
            return mse(net, leaves(rows))

        for t in range(10):
            optimizer.zero_grad()
            gauge.split_backward(loss_of, shape(*batch(t)))
            optimizer.step()
        readings.append(gauge.reading())
        assert calls == [64] * 4 + [32] * 2 + [64] * 4 + [32] * 2
        calls.clear()
    assert readings[0] == readings[1] == readings[2]


def test_what_cannot_be_split():
    net = network()
    optimizer = OPTIMIZERS["ours"](net.parameters())
    gauge = Gauge(optimizer, 1, every=1)
    x, y = batch(0)
    for bad in ((x, y[:5]), (), {"x": 3}):
        with pytest.raises(ValueError, match="all of one length"):
            gauge.split_backward(lambda rows: mse(net, rows), bad)
    gauge.split_backward(lambda rows: mse(net, rows), (x[:1], y[:1]))
    optimizer.step()
    assert gauge.reading().gr_s is None
    assert any("call micro_step()" in note for note in gauge.reading().notes)


# Sizes and weights


@EVERY_OPTIMIZER
@pytest.mark.parametrize(
    ("sizes", "weights"),
    [([32, 32], None), ([8, 24, 32], None), ([8, 24, 32], [1, 1, 1]), ([16, 16, 32], [5.0, 0.5, 2.0])],
    ids=str,
)
def test_unequal_micro_batches(make, sizes, weights):
    reading = read(make, micro_batches(sizes, weights))
    gr_t, gr_s = weighted_truth(sizes, weights or sizes, BATCHES)
    assert reading.gr_t == pytest.approx(gr_t, rel=1e-5)
    assert reading.gr_s == pytest.approx(gr_s, rel=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 3, 5])
def test_another_number_of_micro_batches_than_groups_is_said(groups):
    reading = read(OPTIMIZERS["ours"], micro_batches([16] * 4), steps=2, groups=groups)
    assert reading.gr_s is None
    said = f"micro_step() was called 4 times in the step, not {groups}"
    if groups == 1:
        said = "groups is 1; it needs at least two micro-batches or ranks"
    assert f"GR_S not available: {said}" in reading.notes
    assert read(OPTIMIZERS["ours"], micro_batches([16] * 4), steps=2, groups=4).gr_s is not None


def test_unequal_micro_batches_taken_for_equal_would_read_something_else():
    sizes = [8, 24, 32]
    _, gr_s = weighted_truth(sizes, sizes, BATCHES)
    assert read(OPTIMIZERS["ours"], micro_batches(sizes, tell=False)).gr_s != pytest.approx(gr_s, rel=0.1)


@pytest.mark.parametrize("name", ["samples", "weight"])
def test_sizes_for_some_micro_batches_only(name):
    def step(net, optimizer, gauge, t):
        optimizer.zero_grad()
        for k in range(2):
            (mse(net, batch(t, k, 2)) / 2).backward()
            gauge.micro_step(**({name: 32} if k == 0 else {}))
        optimizer.step()

    reading = read(OPTIMIZERS["ours"], step, steps=3)
    assert reading.gr_s is None
    assert any("samples or weight for some micro-batches only" in note for note in reading.notes)


@pytest.mark.parametrize("name", ["samples", "weight"])
@pytest.mark.parametrize("value", [0, 0.0, -1, math.nan, math.inf])
def test_a_micro_batch_of_zero_weight_is_refused(name, value):
    gauge = Gauge(OPTIMIZERS["ours"](network().parameters()), BATCH)
    with pytest.raises(ValueError, match=f"{name} is {value}; it must be above 0"):
        gauge.micro_step(**{name: value})  # on every step, not only on those that are read


@EVERY_OPTIMIZER
def test_sum_and_mean_read_the_same(make):
    sizes = [16, 16, 32]
    mean, total = (read(make, micro_batches(sizes, reduction=reduction)) for reduction in ("mean", "sum"))
    assert total.grad_norm == pytest.approx(3 * BATCH * mean.grad_norm, rel=1e-5)
    assert total.gr_s == pytest.approx(mean.gr_s, rel=1e-5)
    assert total.gr_t == pytest.approx(mean.gr_t, rel=1e-5)
    assert total.noise_scale == pytest.approx(mean.noise_scale, rel=1e-4)


# GradScaler and clipping


def scaled_step(scaler, overflow=(), unscale=False, clip=None):
    def step(net, optimizer, gauge, t):
        optimizer.zero_grad()
        for k in range(4):
            (scaler.scale(mse(net, batch(t, k, 4)) / 4) * (1e38 if t in overflow and k == 2 else 1.0)).backward()
            gauge.micro_step()
        if unscale:
            scaler.unscale_(optimizer)
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()

    return step


def grad_scaler(**options):
    return torch.amp.GradScaler("cpu", **{"init_scale": 2.0**8, "growth_interval": 7, **options})


def truth_without(skipped):
    return weighted_truth([16] * 4, [1] * 4, [rows for t, rows in enumerate(BATCHES) if t not in skipped])


@EVERY_OPTIMIZER
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("overflow", [(), (9, 10, 19)])
def test_scales_that_change_and_steps_that_are_skipped(make, unscale, overflow):
    scaler = grad_scaler()
    reading = read(make, scaled_step(scaler, overflow, unscale), scaler=scaler)
    gr_t, gr_s = truth_without(overflow)
    assert scaler.get_scale() != 2.0**8
    assert reading.gr_t == pytest.approx(gr_t, rel=2e-6)
    assert reading.gr_s == pytest.approx(gr_s, rel=2e-6)
    assert reading.notes == ()


def test_without_the_scaler_a_change_of_scale_is_read_as_noise():
    """What `scaler=` is for: S and G2 of different scales would be averaged."""
    scaler = grad_scaler()
    reading = read(OPTIMIZERS["ours"], scaled_step(scaler))
    _, gr_s = truth_without(())
    assert reading.gr_s != pytest.approx(gr_s, rel=1e-3)


def test_a_scaler_that_is_disabled():
    scaler = grad_scaler(enabled=False)
    plain = read(OPTIMIZERS["SGD"], micro_batches([16] * 4))
    reading = read(OPTIMIZERS["SGD"], scaled_step(scaler), scaler=scaler)
    assert reading.gr_s == pytest.approx(plain.gr_s, rel=1e-5)
    assert reading.gr_t == pytest.approx(plain.gr_t, rel=1e-5)


@pytest.mark.parametrize("overflow", [4, 9])
@EVERY_OPTIMIZER
def test_a_step_that_is_read_overflows(make, overflow):
    """Every fifth step is read, and that one is skipped: nothing of it gets into the next reading."""
    net, scaler = network(), grad_scaler()
    optimizer = make(net.parameters())
    gauge = Gauge(optimizer, BATCH, every=5, scaler=scaler)
    step = scaled_step(scaler, (overflow,))
    for t in range(20):
        step(net, optimizer, gauge, t)
    reading = gauge.reading()
    assert reading.nonfinite == 0
    assert reading.gr_s is not None
    assert not any("micro_step() was called" in note for note in reading.notes)
    assert reading.gr_t == pytest.approx(2, rel=0.3)


def test_the_noise_scale_does_not_notice_a_change_of_scale():
    scaler = grad_scaler(growth_interval=3)
    net = network()
    optimizer = OPTIMIZERS["ours"](net.parameters())
    gauge = Gauge(optimizer, BATCH, every=1, scaler=scaler)
    other = network()
    plain = OPTIMIZERS["ours"](other.parameters())
    reference = Gauge(plain, BATCH, every=1)
    steps = scaled_step(scaler), micro_batches([16] * 4)
    for t in range(STEPS):
        steps[0](net, optimizer, gauge, t)
        steps[1](other, plain, reference, t)
        ours, theirs = gauge.reading(), reference.reading()
        assert ours.noise_scale == pytest.approx(theirs.noise_scale, rel=1e-4) or theirs.noise_scale is None
        assert ours.gr_s == pytest.approx(theirs.gr_s, rel=1e-5)
    assert scaler.get_scale() == 2.0 ** (8 + STEPS // 3)


@pytest.mark.parametrize("make", [OPTIMIZERS["ours"], OPTIMIZERS["SGD"]], ids=["ours", "SGD"])
def test_clipping_by_torch_leaves_gr_s_alone_and_is_seen_by_gr_t(make):
    """Groups are measured before the gradients are clipped; GR_T is of the gradients that the optimizer gets."""
    scaler = grad_scaler()
    reading = read(make, scaled_step(scaler, unscale=True, clip=0.1), scaler=scaler)
    _, gr_s = truth_without(())
    assert reading.gr_s == pytest.approx(gr_s, rel=2e-6)
    assert reading.grad_norm == pytest.approx(0.1, rel=1e-4)
    (note,) = (note for note in reading.notes if "changed" in note)
    assert note.endswith("0.1 after")


# Gradients whose reading is known


@EVERY_OPTIMIZER
def test_landmarks_of_groups(make):
    """White noise reads 19 (1-b^t)/(1+b^t) and GR_S 1; a constant gradient 1 and 1/B; one that flips its sign 361."""
    constant, steps, d = torch.randn(20_000), 120, 20_000
    generator = torch.Generator().manual_seed(5)
    gradients = {
        "constant": lambda t: constant,
        "flipping": lambda t: constant * (-1) ** t,
        "noise": lambda t: torch.randn(d, generator=generator),
    }
    readings = {}
    for name, gradient in gradients.items():
        p = nn.Parameter(torch.zeros(d))
        optimizer = make([p])
        gauge = Gauge(optimizer, BATCH, every=1)
        for t in range(steps):
            optimizer.zero_grad()
            for _ in range(4):
                (p * gradient(t) / 4).sum().backward()
                gauge.micro_step()
            optimizer.step()
            reading = gauge.reading()
            if name == "noise" and reading.gr_t_error is not None:
                expected = 19 * (1 - 0.9 ** (t + 1)) / (1 + 0.9 ** (t + 1))
                assert reading.gr_t == pytest.approx(expected, abs=max(3 * reading.gr_t_error, 0.05 * expected))
        readings[name] = reading
    assert readings["constant"].gr_t == pytest.approx(theory.aligned(), rel=1e-5)
    assert readings["flipping"].gr_t == pytest.approx(theory.period2(), rel=1e-4)
    assert readings["noise"].gr_t == pytest.approx(theory.uncorrelated(), rel=4 * math.sqrt(2 / d) + 0.01)
    assert readings["constant"].gr_s == pytest.approx(1 / BATCH, rel=1e-4)
    assert readings["flipping"].gr_s == pytest.approx(1 / BATCH, rel=1e-4)
    assert readings["noise"].gr_s > 0.5


def test_the_network_here_has_signal_and_noise():
    reading = read(OPTIMIZERS["ours"], micro_batches([16] * 4))
    assert reading.ready
    assert 0.3 < reading.gr_s < 0.7
    assert sum(p.numel() for p in Net().parameters()) == 3444
