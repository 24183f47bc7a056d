"""GradES: the fall of the loss, against its definition, and on losses whose fall is known."""

from __future__ import annotations

import math

import pytest
import torch

from grgauge import AdamW
from grgauge.grades.progress import Progress

ADAMS = {
    "ours": lambda p: AdamW(p, lr=1e-2, weight_decay=0.0, betas=(0.8, 0.95)),
    "torch AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0, betas=(0.8, 0.95)),
    "torch AdamW, fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0, betas=(0.8, 0.95), fused=True),
}


def gradients(steps, size=(6, 5), mean=0.0, seed=0):
    """Of bfloat16, as those of the step before are kept."""
    drawn = mean + torch.randn(steps, *size, generator=torch.Generator().manual_seed(seed))
    return drawn.bfloat16().float()


def reading(optimizer, p, g, h, stride=1, scale=None, found_inf=None):
    """(fall, elements) of gradient g, after h."""
    progress = Progress(optimizer, [p], stride)
    p.grad = h.clone()
    before = progress.gradients(scale, None)
    p.grad = g.clone()
    [row] = progress.read(scale, found_inf, before).tolist()
    return row


@pytest.mark.parametrize("make", ADAMS.values(), ids=ADAMS.keys())
def test_adam_equals_the_definition_in_float64(make):
    p = torch.nn.Parameter(torch.zeros(6, 5))
    optimizer = make([p])
    m = v = h = torch.zeros(6, 5, dtype=torch.float64)
    for t, g in enumerate(gradients(12), 1):
        fall, elements = reading(optimizer, p, g, h.float())
        if t > 1:
            step = 1e-2 / ((v / (1 - 0.95 ** (t - 1))).sqrt() + 1e-8)
            moves = 1.8 * 0.6 * step * m / (1 - 0.8 ** (t - 1)) + 0.2 * step * h
            assert fall == pytest.approx(float((moves * g.double()).sum()) / 1.28, rel=1e-5, abs=1e-7)
            assert elements == 30
        optimizer.step()
        h = g.double()
        m, v = 0.8 * m + 0.2 * h, 0.95 * v + 0.05 * h**2


@pytest.mark.parametrize("name", [*ADAMS, "SGD"])
def test_its_update_is_the_one_that_the_optimizer_made(name):
    """Times (1 + b) (2 b - 1) / (2 b^2), and without the second term."""
    p = torch.nn.Parameter(torch.zeros(6, 5, dtype=torch.float32))
    optimizer = ADAMS[name]([p]) if name in ADAMS else torch.optim.SGD([p], lr=1e-2, momentum=0.8)
    for g in gradients(9):
        p.grad = g.clone()
        before = p.detach().clone()
        optimizer.step()
    g = gradients(1, seed=1)[0]
    made = -float((g * (p.detach() - before)).sum())
    assert reading(optimizer, p, g, torch.zeros(6, 5))[0] == pytest.approx(1.08 / 1.28 * made, rel=1e-4, abs=1e-7)


def bounced(optimizer, p, h, noise, steps):
    """(mean fall, its standard error, mean fall in truth) of half h w^2, with noise in its gradient."""
    generator = torch.Generator().manual_seed(0)
    loss, falls, before = [], [], None
    progress = Progress(optimizer, [p], 1)
    for _ in range(steps):
        loss.append(float(0.5 * h * p.detach().square().sum()))
        p.grad = h * p.detach() + noise * torch.randn(p.shape, generator=generator)
        if before is not None:
            falls.append(float(progress.read(None, None, before)[0, 0]))
        before = progress.gradients(None, None)
        optimizer.step()
    fall = torch.tensor(falls[steps // 2 :])
    return float(fall.mean()), float(fall.std() / len(fall) ** 0.5), (loss[steps // 2] - loss[-1]) / len(fall)


@pytest.mark.parametrize("h", [0.02, 0.5])
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_it_is_the_fall_of_a_loss(h, noise):
    """On the way down, and where noise keeps it up: there sum u g alone says that it rises."""
    for lr, momentum in ((2e-3, 0.9), (2e-2, 0.5)):
        p = torch.nn.Parameter(torch.full((100, 100), 2.0))
        optimizer = torch.optim.SGD([p], lr=lr, momentum=momentum)
        mean, error, true = bounced(optimizer, p, h, noise, 800)
        assert abs(mean - true) < 4 * error + 0.05 * abs(true)
        assert error < 0.25


def test_maximize_counts_what_rises():
    falls = []
    for maximize in (False, True):
        p = torch.nn.Parameter(torch.zeros(6, 5))
        optimizer = torch.optim.AdamW([p], lr=1e-2, maximize=maximize)
        for g in gradients(5, mean=1.0):
            p.grad = g.clone()
            optimizer.step()
        falls.append(reading(optimizer, p, *gradients(2, mean=1.0, seed=1))[0])
    assert falls[0] == pytest.approx(falls[1])
    assert falls[0] > 0.0


def trained():
    """A parameter after five steps, and its optimizer."""
    p = torch.nn.Parameter(torch.zeros(6, 5))
    optimizer = torch.optim.AdamW([p], lr=1e-2)
    for g in gradients(5):
        p.grad = g.clone()
        optimizer.step()
    return p, optimizer


def test_a_scaled_gradient_reads_what_the_unscaled_one_does():
    p, optimizer = trained()
    g, h = gradients(2, seed=1)
    plain = reading(optimizer, p, g, h)
    assert reading(optimizer, p, 1024.0 * g, 1024.0 * h, scale=torch.tensor(1 / 1024.0)) == pytest.approx(plain)
    assert math.isnan(reading(optimizer, p, g, h, found_inf=torch.tensor(1.0))[0])


def test_nothing_is_known_without_the_step_before():
    p, optimizer = trained()
    assert Progress(optimizer, [p], 1).read(None, None, [None]).isnan().all()


def test_states_in_eight_bits_are_read():
    adamw8bit = pytest.importorskip("torchao.optim").AdamW8bit
    falls = []
    for make in (adamw8bit, torch.optim.AdamW):
        p = torch.nn.Parameter(torch.zeros(64, 64))  # the smallest that torchao keeps in 8 bits
        optimizer = make([p], lr=1e-2)
        for g in gradients(5, size=(64, 64), mean=1.0):
            p.grad = g.clone()
            with torch.compiler.set_stance("force_eager"):  # torchao would compile its update for half a minute
                optimizer.step()
        g, h = gradients(2, size=(64, 64), mean=1.0, seed=1)
        falls.append(reading(optimizer, p, g, h, stride=3)[0])
    assert falls[0] == pytest.approx(falls[1], rel=0.02)
    assert falls[0] != falls[1]


def test_rows_of_a_sample_are_the_same_rows_of_everything():
    p = torch.nn.Parameter(torch.zeros(6, 5))
    optimizer = torch.optim.AdamW([p], lr=1e-2)
    part = torch.nn.Parameter(torch.zeros(2, 5))
    other = torch.optim.AdamW([part], lr=1e-2)
    for g in gradients(5):
        p.grad, part.grad = g.clone(), g[::3].clone()
        optimizer.step()
        other.step()
    g, h = gradients(2, seed=1)
    assert reading(optimizer, p, g, h, stride=3) == reading(other, part, g[::3], h[::3])
