"""Training functions that do not do what they should: a clear error, and a stored trial that failed."""

from __future__ import annotations

import math

import optuna
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from tuning.scripted import linear

from grgauge import Config, TrainingError


@pytest.fixture
def fails(go, tmp_path):
    """The message, after checking that the last trial is stored as failed with it."""

    def fails(train, match, **changes):
        with pytest.raises(TrainingError, match=match) as error:
            go(train, **changes)
        study = optuna.load_study(study_name="grgauge", storage=f"sqlite:///{tmp_path / 'run.db'}")
        trial = study.trials[-1]
        assert trial.state == optuna.trial.TrialState.FAIL
        cause = error.value.__cause__ or error.value
        assert trial.user_attrs["error"] == f"{type(cause).__name__}: {cause}"
        assert trial.user_attrs["decision"]["kind"] in ("fail", "stop")
        return trial

    return fails


def watched(trial):
    model = nn.Linear(6, 1)
    trial.watch(model, torch.optim.AdamW(model.parameters(), lr=trial.lr))
    return model


def test_raises(fails, regression):
    def train(trial):
        model = watched(trial)
        for x, y in trial.batches(regression):
            if trial.steps == 3:
                raise KeyError("label")
            trial.step(F.mse_loss(model(x)[:, 0], y))

    trial = fails(train, r"raised KeyError in trial 0 \(lr 1.67e-03, batch 16\): 'label'")
    assert trial.user_attrs["samples"] == 48
    assert trial.user_attrs["losses"]


def test_raises_before_it_watches_anything(fails):
    def train(trial):
        raise FileNotFoundError("data.bin")

    fails(train, "raised FileNotFoundError in trial 0")


def test_fails_twice_and_both_are_stored(fails):
    def train(trial):
        raise FileNotFoundError("data.bin")

    fails(train, "in trial 0")
    fails(train, "in trial 1")


def test_returns_early(fails, regression):
    def train(trial):
        model = watched(trial)
        for x, y in trial.batches(regression):
            trial.step(F.mse_loss(model(x)[:, 0], y))
            if trial.steps == 4:
                break

    trial = fails(
        train, "returned early, after 64 of 1024 samples: let the loop over trial.batches.. run until it ends"
    )
    assert trial.user_attrs["samples"] == 64


def test_returns_without_watching(fails):
    fails(lambda trial: None, r"returned early, after 0 of 1024 samples: without calling trial\.watch")


def test_asks_for_batches_before_it_watches(fails, regression):
    fails(lambda trial: next(trial.batches(regression)), "call trial.watch")


def test_watches_twice(fails):
    fails(lambda trial: (watched(trial), watched(trial)), "called twice")


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_yields_nan_from_untrained_weights(loss, fails, regression):
    def train(trial):
        model = watched(trial)
        for x, y in trial.batches(regression):
            trial.step(F.mse_loss(model(x)[:, 0], y) * loss)

    fails(train, f"the loss of untrained weights is {loss}")


def test_yields_nan_at_every_learning_rate(fails, regression):
    def train(trial):
        model = watched(trial)
        for x, y in trial.batches(regression):
            trial.step(F.mse_loss(model(x)[:, 0], y) * (math.nan if trial.steps >= 3 else 1.0))

    fails(train, "no configuration of the space trains|no weights to go back to", budget=20_000, start=Config(1e-3, 32))


def test_ignores_the_batch_size_with_a_loader_of_its_own(fails, regression):
    def train(trial):
        model = watched(trial)
        for x, y in DataLoader(regression, 32):
            trial.step(F.mse_loss(model(x)[:, 0], y))

    fails(train, "ignores the trial's batch size")


def test_ignores_the_batch_size_in_its_loader_function(fails, regression):
    def train(trial):
        model = watched(trial)
        for x, y in trial.batches(lambda batch_size: DataLoader(regression, 24)):
            trial.step(F.mse_loss(model(x)[:, 0], y))

    fails(train, "asked for 8 samples, they gave 24")


def test_never_steps(fails, regression):
    def train(trial):
        model = watched(trial)
        for x, y in trial.batches(regression):
            F.mse_loss(model(x)[:, 0], y).backward()

    fails(train, r"trial\.step\(loss\) was not called")


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda loss: loss.item(), "a float"),
        (lambda loss: loss.detach(), "a tensor"),
        (lambda loss: loss.expand(3), "3"),
    ],
)
def test_steps_with_something_else_than_a_loss(spoil, what, fails, regression):
    def train(trial):
        model = watched(trial)
        for x, y in trial.batches(regression):
            trial.step(spoil(F.mse_loss(model(x)[:, 0], y)))

    fails(train, f"got .*{what}.*; it must be the mean loss")


def test_has_an_optimizer_at_learning_rate_zero(fails, regression):
    def train(trial):
        model = nn.Linear(6, 1)
        trial.watch(model, torch.optim.SGD(model.parameters(), lr=0.0))

    fails(train, "lr is 0.0; it must be above 0")


def test_watches_what_has_no_state(fails):
    def train(trial):
        model = nn.Linear(6, 1)
        trial.watch(model, torch.optim.SGD(model.parameters(), lr=trial.lr), "scheduler")

    fails(train, "got a str; it must have a state_dict")


def test_an_interrupt_is_nobodys_failure_and_goes_on(go, regression, tmp_path):
    seen, interrupted = [], True

    def train(trial):
        if not interrupted:
            return linear(trial, regression, seen=seen)
        model = watched(trial)
        for x, y in trial.batches(regression):
            if trial.used == 512:
                raise KeyboardInterrupt
            trial.step(F.mse_loss(model(x)[:, 0], y))

    with pytest.raises(KeyboardInterrupt):
        go(train, orders={}, start=Config(0.01, 32), checkpoint_every=0.0)
    interrupted = False
    result = go(train, orders={}, start=Config(0.01, 32))
    assert [trial.state for trial in result.trials] == ["COMPLETE"]
    assert sum(size for size, _, _ in seen) == 512
