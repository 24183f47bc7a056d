"""GradES with metric "signal": what it reads in a training, and what follows."""

from __future__ import annotations

import io
import math

import pytest
import torch
from blocks import MATRICES, OPTIMIZERS, history_of, loss_of, network, train

from grgauge import AdamW, GradES

MOVING = {
    "ours": lambda p: AdamW(p, lr=1e-3, weight_decay=0.0),
    "ours, flat": lambda p: AdamW(p, lr=1e-3, weight_decay=0.0, flat=True),
    "torch AdamW, fused": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.0, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
}


def signal_of(net, make=MOVING["ours"], **kwargs):
    options = {"total_steps": 100, "warmup": 0, "every": 2, "patience": 1} | kwargs
    optimizer = make(net.parameters())
    return GradES(net, optimizer, metric="signal", **options), optimizer


def drive(net, optimizer, steps, means, noise=0.0, start=1):
    """One step for each: gradients with the given mean by name, else that of "rest", and noise of that deviation."""
    for t in range(start, start + steps):
        generator = torch.Generator().manual_seed(t)
        for name, p in net.named_parameters():
            mean = means.get(name.removesuffix(".weight"), means["rest"])
            g = mean + noise * torch.randn(p.shape, generator=generator)
            p.grad = g if p.requires_grad else None
        optimizer.step()


STEADY = dict.fromkeys((*MATRICES, "rest"), 1e-2)
AT_REST = dict.fromkeys((*MATRICES, "rest"), 0.0)


@pytest.mark.parametrize("make", MOVING.values(), ids=MOVING.keys())
def test_progress_is_the_fall_of_the_loss_in_a_training(make):
    """All parameters are matrices, batches are drawn anew: what the readings add up to is what the loss lost."""
    net = network()
    grades, optimizer = signal_of(net, make, total_steps=400, alpha=1.0, modules=".")

    def loss():
        with torch.no_grad():
            return sum(float(loss_of(net, 10_000 + t)) for t in range(200)) / 200

    before = loss()
    train(net, optimizer, 300)
    forecast = grades._signal.forecast
    falls = torch.tensor([sum(row) for row in forecast._falls])
    error = float(falls.std() * len(falls) ** 0.5 * 2)
    assert before - loss() > 3 * error  # or the next line would say nothing
    assert abs(forecast.gained - (before - loss())) < 3 * error + 0.1 * (before - loss())


def test_nothing_freezes_as_long_as_every_step_helps():
    """All gain alike, and a quarter of the run is left."""
    net = network()
    grades, optimizer = signal_of(net, total_steps=60)
    drive(net, optimizer, 45, STEADY)
    assert grades.frozen == {}
    assert not grades.done
    shares = grades.history[-1].values
    assert sum(shares) < 1.0
    assert min(shares) > 0.0


def test_what_gains_nothing_freezes_and_what_gains_does_not():
    net = network()
    grades, optimizer = signal_of(net, total_steps=60)
    drive(net, optimizer, 45, STEADY | {"blocks.0.up": 0.0}, noise=1e-5)
    assert set(grades.frozen) == {"blocks.0.up"}
    assert grades.history[-1].values[1] > 0.02
    assert not grades.done


def test_all_that_is_monitored_may_rest_and_training_still_not_be_done():
    """A new head on a trained body: the end would forfeit what the head gains."""
    for rest, done in ((1e-2, False), (0.0, True)):
        net = network()
        grades, optimizer = signal_of(net, MOVING["SGD"], total_steps=400)
        drive(net, optimizer, 20, STEADY | {"rest": 1e-2})  # the gain that the budget is a share of
        quiet = AT_REST | {"rest": rest}
        drive(net, optimizer, 300, quiet, start=21)
        assert set(grades.frozen) == set(MATRICES)
        assert grades.done == done


def test_noise_without_signal_does_not_freeze_by_its_point():
    net = network()
    grades, optimizer = signal_of(net, total_steps=400)
    drive(net, optimizer, 100, AT_REST, noise=1.0)
    assert grades.frozen == {}
    assert all(abs(gain) < 3 * error for gain, error in grades.progress.values())


def test_the_model_trains_as_without():
    plain, watched = network(), network()
    train(plain, OPTIMIZERS["ours"](plain.parameters()), 30)
    grades, optimizer = signal_of(watched, OPTIMIZERS["ours"], alpha=1.0)
    train(watched, optimizer, 30)
    assert grades.frozen == {}
    for p, q in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_non_finite_gradient_leaves_the_forecast_as_it_was():
    net = network()
    grades, optimizer = signal_of(net, total_steps=60)
    drive(net, optimizer, 41, STEADY)
    known = [row[1] for row in grades._signal.forecast._falls]
    drive(net, optimizer, 1, STEADY | {"blocks.0.up": float("nan")}, start=42)
    drive(net, optimizer, 1, STEADY, start=43)
    rows = grades._signal.forecast._falls
    assert [row[1] for row in rows[:-1]] == known
    assert math.isnan(rows[-1][0])
    assert math.isfinite(rows[-1][1])
    assert grades.frozen == {}


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adagrad])
def test_an_optimizer_without_momentum_is_refused(make):
    net = network()
    with pytest.raises(ValueError, match=f"optimizer is {make.__name__} with momentum 0; with metric 'signal'"):
        signal_of(net, lambda p: make(p, lr=0.1))


@pytest.mark.parametrize("cut", [9, 30, 60, 61])
def test_a_resumed_run_continues_exactly(cut):
    """Cut before a forecast, with a reading under way, and between the two steps of one; before and after freezing."""

    def gradients(net, optimizer, first, last):
        for t in range(first, last + 1):
            drive(net, optimizer, 1, STEADY | {"blocks.0.up": 0.0}, start=t)

    whole, parts = network(), network()
    grades, optimizer = signal_of(whole, MOVING["SGD"], total_steps=300)
    gradients(whole, optimizer, 1, 110)
    assert grades.frozen.keys() == {"blocks.0.up"}

    before, optimizer = signal_of(parts, MOVING["SGD"], total_steps=300)
    gradients(parts, optimizer, 1, cut)
    file = io.BytesIO()
    torch.save((parts.state_dict(), optimizer.state_dict(), before.state_dict()), file)
    file.seek(0)
    model_state, optimizer_state, state = torch.load(file, weights_only=True)
    resumed = network(seed=1)
    resumed.load_state_dict(model_state)
    after, optimizer = signal_of(resumed, MOVING["SGD"], total_steps=300)
    optimizer.load_state_dict(optimizer_state)
    after.load_state_dict(state)
    assert after.frozen == before.frozen
    gradients(resumed, optimizer, cut + 1, 110)
    assert history_of(after) == history_of(grades)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_it_says_what_it_does():
    assert repr(signal_of(network(), epsilon=0.05, warmup=20)[0]) == (
        "GradES(0 of 4 matrices frozen; freezing forfeits at most 5 % of the run's gain, from step 20 on)"
    )
