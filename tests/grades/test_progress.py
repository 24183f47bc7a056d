"""GradES: drift and unrest, against their definition, in float64 and with the optimizers' own updates."""

from __future__ import annotations

import pytest
import torch

from grgauge import AdamW
from grgauge.grades.progress import Progress
from grgauge.theory import uncorrelated

ADAMS = {
    "ours": lambda p: AdamW(p, lr=1e-2, weight_decay=0.0, betas=(0.8, 0.95)),
    "torch AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0, betas=(0.8, 0.95)),
    "torch AdamW, fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0, betas=(0.8, 0.95), fused=True),
}


def gradients(steps, size=(6, 5), mean=0.0, seed=0):
    return mean + torch.randn(steps, *size, generator=torch.Generator().manual_seed(seed))


def reading(optimizer, p, g, stride=1, **scaling):
    p.grad = g.clone()
    [row] = Progress(optimizer, [p], stride).read(scaling.get("scale"), scaling.get("found_inf"), [None]).tolist()
    return row


@pytest.mark.parametrize("make", ADAMS.values(), ids=ADAMS.keys())
def test_adam_equals_the_definition_in_float64(make):
    p = torch.nn.Parameter(torch.zeros(6, 5))
    optimizer = make([p])
    m = v = torch.zeros(6, 5, dtype=torch.float64)
    for t, g in enumerate(gradients(12), 1):
        drift, unrest, elements = reading(optimizer, p, g)
        if t > 1:
            step = 1e-2 / ((v / (1 - 0.95 ** (t - 1))).sqrt() + 1e-8)
            expected = (step * m / (1 - 0.8 ** (t - 1)) * g.double()).sum()
            assert drift == pytest.approx(float(expected), rel=1e-5, abs=1e-7)
            assert unrest == pytest.approx(float((step * g.double() ** 2).sum()) / 4, rel=1e-5)
            assert elements == 30
        optimizer.step()
        m, v = 0.8 * m + 0.2 * g.double(), 0.95 * v + 0.05 * g.double() ** 2


@pytest.mark.parametrize("name", [*ADAMS, "SGD"])
def test_the_update_of_the_drift_is_the_one_that_the_optimizer_made(name):
    """Times the gradient, it is what the last step did to a loss that this is the gradient of."""
    p = torch.nn.Parameter(torch.zeros(6, 5, dtype=torch.float32))
    optimizer = ADAMS[name]([p]) if name in ADAMS else torch.optim.SGD([p], lr=1e-2, momentum=0.8)
    for g in gradients(9):
        p.grad = g.clone()
        before = p.detach().clone()
        optimizer.step()
    g = gradients(1, seed=1)[0]
    made = -float((g * (p.detach() - before)).sum())
    assert reading(optimizer, p, g)[0] == pytest.approx(made, rel=1e-4, abs=1e-7)


def test_maximize_counts_what_rises():
    drifts = []
    for maximize in (False, True):
        p = torch.nn.Parameter(torch.zeros(6, 5))
        optimizer = torch.optim.AdamW([p], lr=1e-2, maximize=maximize)
        for g in gradients(5, mean=1.0):
            p.grad = g.clone()
            optimizer.step()
        drifts.append(reading(optimizer, p, gradients(1, mean=1.0, seed=1)[0])[0])
    assert drifts[0] == pytest.approx(drifts[1])
    assert drifts[0] > 0.0


@pytest.mark.parametrize("beta", [0.5, 0.9])
def test_the_drift_is_the_squared_ema_without_the_noise_floor(beta):
    """The identity of the module's docstring, summed over a run."""
    g = gradients(40).double()
    m = torch.zeros(6, 5, dtype=torch.float64)
    without = torch.zeros((), dtype=torch.float64)
    floor = torch.zeros((), dtype=torch.float64)
    for gradient in g:
        without = beta**2 * without + 2 * beta * (1 - beta) * (m * gradient).sum()
        floor = beta**2 * floor + (1 - beta) ** 2 * gradient.square().sum()
        m = beta * m + (1 - beta) * gradient
    assert float(without) == pytest.approx(float(m.square().sum() - floor), rel=1e-12)


def test_noise_has_no_drift_and_a_steady_gradient_has_all_of_it():
    """Where |m_hat|^2 of pure noise reads a nineteenth of |g|^2."""
    for mean in (0.0, 0.3):
        p = torch.nn.Parameter(torch.zeros(40, 50))
        optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.9)
        drifts, squares = [], []
        for t, g in enumerate(gradients(400, size=(40, 50), mean=mean)):
            if t > 60:
                drifts.append(reading(optimizer, p, g)[0])
                squares.append(float((0.1 * optimizer.state[p]["momentum_buffer"]).square().sum()))
            p.grad = g.clone()
            optimizer.step()
        drift, error = torch.tensor(drifts).mean(), torch.tensor(drifts).std() / len(drifts) ** 0.5
        signal = 0.1 / 0.1 * 2000 * mean**2  # lr / (1 - momentum) |mean gradient|^2
        assert abs(drift - signal) < 4 * error
        assert error < 0.05 * 2000 / uncorrelated(0.9)  # or noise would hide the floor
        if mean == 0.0:
            assert sum(squares) / len(squares) == pytest.approx(2000 / uncorrelated(0.9), rel=0.05)


def test_unrest_is_the_excess_loss_that_noise_keeps_up():
    """A quadratic that SGD bounces on, simulated: half h w^2, whatever h is."""
    generator = torch.Generator().manual_seed(0)
    for h in (0.5, 2.0):
        p = torch.nn.Parameter(torch.zeros(200, 100))
        optimizer = torch.optim.SGD([p], lr=2e-3, momentum=0.9)
        excess, unrest = [], []
        for t in range(1500):
            g = h * p.detach() + torch.randn(200, 100, generator=generator)
            if t >= 1000 and t % 10 == 0:
                excess.append(float(0.5 * h * p.detach().square().sum()))
                unrest.append(reading(optimizer, p, g)[1])
            p.grad = g
            optimizer.step()
        assert sum(unrest) == pytest.approx(sum(excess), rel=0.05)


def test_a_scaled_gradient_reads_what_the_unscaled_one_does():
    p = torch.nn.Parameter(torch.zeros(6, 5))
    optimizer = torch.optim.AdamW([p], lr=1e-2)
    for g in gradients(5):
        p.grad = g.clone()
        optimizer.step()
    g = gradients(1, seed=1)[0]
    plain = reading(optimizer, p, g)
    assert reading(optimizer, p, 1024.0 * g, scale=torch.tensor(1 / 1024.0)) == pytest.approx(plain)
    skipped = reading(optimizer, p, g, found_inf=torch.tensor(1.0))
    assert all(value != value for value in skipped[:2])


def test_rows_of_a_sample_are_the_same_rows_of_everything():
    p = torch.nn.Parameter(torch.zeros(6, 5))
    optimizer = torch.optim.AdamW([p], lr=1e-2)
    part = torch.nn.Parameter(torch.zeros(2, 5))
    other = torch.optim.AdamW([part], lr=1e-2)
    for g in gradients(5):
        p.grad, part.grad = g.clone(), g[::3].clone()
        optimizer.step()
        other.step()
    g = gradients(1, seed=1)[0]
    assert reading(optimizer, p, g, stride=3) == reading(other, part, g[::3])
