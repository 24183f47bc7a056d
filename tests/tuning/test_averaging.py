"""Averaged weights: on the way, as the result where their loss is lower, and through rollbacks, errors and restarts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset
from tuning.scripted import Scripted, retune

from grgauge import Autopilot, Config, TrainingError
from grgauge.tuning.averaging import tried

LONG = {"budget": 16_000, "start": Config(1.0, 16), "orders": {}}
"""Half a percent is 5 batches: long enough for a comparison, at a learning rate that only averages can bear."""


@pytest.fixture
def noisy():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 6, generator=generator)
    return TensorDataset(x, x @ torch.arange(1.0, 7.0) + torch.randn(512, generator=generator))


def test_the_average_is_that_of_polynomial_decay(regression):
    """The first update, then every fifth; number t of them counts 10 / (t + 9)."""
    model = nn.Linear(6, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    pilot = Autopilot(model, optimizer, batch_size=16, budget=16 * 101, policy=Scripted({}))
    assert pilot.averaged is None
    wanted, t = torch.zeros(1, 6, dtype=torch.float64), 0
    for x, y in pilot.batches(regression):
        stepped = pilot.step(F.mse_loss(model(x)[:, 0], y))
        if stepped and (pilot.steps == 1 or pilot.steps % 5 == 0):
            t += 1
            wanted += 10 / (t + 9) * (model.weight.detach().double() - wanted)
    assert t == 21
    torch.testing.assert_close(pilot.averaged.weight.double(), wanted, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(pilot.averaged.weight, model.weight)


def test_the_average_follows_the_weights_back(regression):
    """After a rollback it is what it was, and goes on from there."""
    model = nn.Linear(6, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    orders = {320: retune(Config(0.05, 16)), 480: retune(Config(0.01, 16), rollback=True)}
    pilot = Autopilot(model, optimizer, batch_size=16, budget=480, policy=Scripted(orders), print=lambda line: None)
    seen = {}
    for x, y in pilot.batches(regression):
        pilot.step(F.mse_loss(model(x)[:, 0], y))
        seen[pilot.used] = pilot.averaged.weight.clone()
    assert pilot.steps == 20
    assert torch.equal(pilot.averaged.weight, seen[320])
    assert not torch.equal(seen[320], seen[480])


def test_the_result_is_the_average_where_its_training_loss_is_lower(go, noisy):
    counted, raw = [], []

    def train(trial):
        model = nn.Linear(6, 1)
        trial.watch(model, torch.optim.AdamW(model.parameters(), lr=trial.lr))
        for x, y in trial.batches(noisy):
            stepped = trial.step(F.mse_loss(model(x)[:, 0], y))
            counted.append(len(x))
            if stepped:
                raw[:] = [p.detach().clone() for p in model.parameters()]

    result = go(train, **LONG)
    x, y = noisy.tensors
    with torch.no_grad():
        pairs = raw, result.model.parameters()
        losses = [float(F.mse_loss((x @ weight.T + bias)[:, 0], y)) for weight, bias in pairs]
    assert losses[1] < losses[0]
    assert result.used == sum(counted) == 16_000, "what the comparison takes is counted"
    assert sum(record.samples for record in result.trials) == result.used
    assert result.loss == pytest.approx(losses[1], rel=0.5)
    assert "of averaged weights" in result.verdict
    assert any(note.startswith("training loss of the averaged weights") for note in result.trials[-1].notes)


def test_the_result_is_the_newest_weights_where_the_average_is_behind(go, regression):
    """At a learning rate that is far too low an average is only late."""
    last = []

    def train(trial):
        model = nn.Linear(6, 1)
        trial.watch(model, torch.optim.SGD(model.parameters(), lr=trial.lr))
        for x, y in trial.batches(regression):
            if trial.step(F.mse_loss(model(x)[:, 0], y)):
                last[:] = [model.weight.detach().clone()]

    result = go(train, **{**LONG, "start": Config(1e-5, 16)})
    assert torch.equal(result.model.weight, last[0])
    assert "averaged" not in result.verdict


def test_batchnorm_has_the_statistics_of_the_averaged_weights(go, noisy):
    """Those of the batches of the comparison, each counting the same; and its momentum is as before."""
    seen = []

    def train(trial):
        model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        trial.watch(model, torch.optim.AdamW(model.parameters(), lr=trial.lr))
        for x, y in trial.batches(noisy):
            seen.append(model[0](x).detach().mean(0))
            trial.step(F.mse_loss(model(x)[:, 0], y))
        return model

    result = go(train, **LONG)
    assert "of averaged weights" in result.verdict
    torch.testing.assert_close(result.model[1].running_mean, torch.stack(seen[-5:]).mean(0), rtol=1e-4, atol=1e-5)
    assert result.model[1].momentum == 0.1
    assert result.model[1].num_batches_tracked == 5


def test_a_finished_study_gives_its_averaged_weights_again_and_goes_on_from_the_newest(go, noisy):
    before, first_of_run = [], []

    def train(trial):
        model, began = nn.Linear(6, 1), len(before)
        trial.watch(model, torch.optim.AdamW(model.parameters(), lr=trial.lr))
        for x, y in trial.batches(noisy):
            if len(before) == began:
                first_of_run.append(model.weight.detach().clone())
            if trial.step(F.mse_loss(model(x)[:, 0], y)):
                before.append(model.weight.detach().clone())

    first = go(train, **LONG)
    newest = before[-1]
    again = go(train, **LONG)
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))
    assert (again.loss, again.used) == (first.loss, first.used)
    assert not torch.equal(again.model.weight, newest)
    longer = go(train, **{**LONG, "budget": 32_000})
    assert torch.equal(first_of_run[1], newest)
    assert longer.used == 32_000


def test_an_error_in_the_comparison_loses_nothing(go, noisy):
    """The same call makes it again, from the weights at the end of training."""

    def train(trial, fail_at):
        model = nn.Linear(6, 1)
        trial.watch(model, torch.optim.AdamW(model.parameters(), lr=trial.lr))
        for x, y in trial.batches(noisy):
            loss = F.mse_loss(model(x)[:, 0], y)
            if not trial.step(loss) and trial.steps == 990:
                fail_at[0] -= 1
                if fail_at[0] == 0:
                    raise RuntimeError("power cut")

    whole = go(lambda trial: train(trial, [0]), **{**LONG, "study_name": "whole"})
    fails = [8]  # in the pass of the averaged weights
    body = lambda trial: train(trial, fails)  # noqa: E731
    with pytest.raises(TrainingError, match="power cut"):
        go(body, **LONG)
    result = go(body, **LONG)
    assert all(torch.equal(a, b) for a, b in zip(result.model.parameters(), whole.model.parameters(), strict=True))
    assert result.loss == whole.loss


@pytest.mark.parametrize("averaged", [False, True])
def test_a_pass_that_is_tried_leaves_no_trace_even_where_it_fails(averaged):
    model, average = (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)) for _ in range(2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def half_way():
        with tried(model, average if averaged else None):
            model(torch.randn(8, 3))
            assert not torch.equal(model[1].running_mean, before["1.running_mean"])
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        half_way()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model[1].momentum == 0.1
