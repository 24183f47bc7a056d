"""`tune` over learning rate and weight decay: one dimension is searched, and what is left out is said."""

from __future__ import annotations

import logging

import optuna
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from tuning.scripted import linear, retune

from grgauge import Config, TrainingError, report
from grgauge.cli import main
from grgauge.invariance import Space, decay_within

SPACE = Space(lr=(1e-5, 1.0), weight_decay=(0.01, 1.0), batch_size=(8, 512))


def decays(trial, data, optimizer=None):
    """Of both groups in every step; the bias decays half as much."""
    model, seen = nn.Linear(6, 1), []
    groups = [{"params": [model.weight]}, {"params": [model.bias], "weight_decay": 0.005}]
    own = optimizer(model.parameters()) if optimizer else torch.optim.AdamW(groups, lr=trial.lr, weight_decay=0.01)
    trial.watch(model, own)
    for x, y in trial.batches(data):
        seen.append(tuple(group["weight_decay"] for group in own.param_groups))
        trial.step(F.mse_loss(model(x)[:, 0], y))
    return seen


def test_weight_decay_is_held_in_the_middle_while_the_learning_rate_moves(regression, go):
    orders = {320: retune(Config(0.02, 32, 0.1))}
    result = go(lambda trial: decays(trial, regression), space=SPACE, orders=orders, start=Config(0.01, 32))
    assert result.output == [pytest.approx((0.1, 0.05))] * len(result.output)
    assert (result.config.lr, result.config.weight_decay) == (0.02, pytest.approx(0.1))


def test_a_start_of_ones_own_brings_its_weight_decay(regression, go):
    result = go(lambda trial: decays(trial, regression), space=SPACE, orders={}, start=Config(0.01, 32, 0.4))
    assert result.output == [pytest.approx((0.4, 0.2))] * len(result.output)
    assert decay_within(0.01, 32) > 0.4
    assert result.config.weight_decay == 0.4


def test_it_is_lower_where_the_run_would_outlast_the_weights_and_comes_back(regression, go):
    """8192 samples in batches of 16 are 512 steps: gamma stays below half of 1/512, or weight decay at its lowest."""
    rates = (0.005, 0.05, 0.5, 0.001)
    orders = {2048 * i: retune(Config(lr, 16, 0.1)) for i, lr in enumerate(rates[1:], start=1)}
    settings = {"space": SPACE, "orders": orders, "start": Config(rates[0], 16), "budget": 8192}
    result = go(lambda trial: linear(trial, regression), **settings)
    assert [trial.weight_decay for trial in result.trials] == pytest.approx([0.1, 0.5 / 512 / 0.05, 0.01, 0.1])
    assert decay_within(0.05, 512) == pytest.approx(result.trials[1].weight_decay)


@pytest.mark.parametrize(("lr", "expected"), [(0.02, 0.05), (0.9, 0.01), (1e-5, 1.0)])
def test_a_weight_decay_that_follows_stays_in_its_range(lr, expected, regression, go, caplog):
    orders = {320: retune(Config(lr, 32, 0.1))}
    with caplog.at_level(logging.INFO, "grgauge.tuning.trial"):
        result = go(
            lambda trial: linear(trial, regression), space=SPACE, orders=orders, start=Config(0.01, 32), decay="gamma"
        )
    assert result.config.weight_decay == pytest.approx(expected)
    assert ("in its range and for a run of this length" in caplog.text) == (expected in (0.01, 1.0))


@pytest.mark.parametrize(
    ("start", "budget", "words"),
    [
        (Config(1e-5, 32), 1024, ", weight decay 0.1 does not count in 32 iterations."),
        (Config(0.01, 8, 0.3), 1024, ", weight decay 0.3 does not count in 128 iterations."),
        (Config(0.01, 8, 0.05), 4096, ", weight decay 0.05 was not searched, and may count."),
        (Config(0.5, 8, 0.9), 4096, ", weight decay 0.01 was not searched, and counts."),
    ],
)
def test_the_verdict_says_whether_what_was_left_out_matters(start, budget, words, regression, go):
    result = go(lambda trial: linear(trial, regression), space=SPACE, orders={}, start=start, budget=budget)
    assert words in result.verdict
    again = go(lambda trial: linear(trial, regression), space=SPACE, orders={}, start=start, budget=budget)
    assert again.verdict.startswith(f"{result.verdict} Nothing was trained")


def test_the_study_has_the_range(regression, go, tmp_path):
    go(lambda trial: linear(trial, regression), space=SPACE, orders={}, start=Config(0.01, 32))
    study = optuna.load_study(study_name="grgauge", storage=f"sqlite:///{tmp_path / 'run.db'}")
    assert study.user_attrs["space"] == {"lr": [1e-5, 1.0], "batch_size": [8, 512], "weight_decay": [0.01, 1.0]}
    assert study.trials[0].distributions["weight_decay"] == optuna.distributions.FloatDistribution(0.01, 1.0, log=True)


def test_fixed_numbers_leave_nothing_to_say(regression, go):
    space = Space(lr=(1e-5, 1.0), weight_decay=0.0, batch_size=32)
    result = go(lambda trial: linear(trial, regression), space=space, orders={}, start=Config(0.01, 32))
    assert result.config == Config(0.01, 32, 0.0)
    assert "weight decay" not in result.verdict


def test_a_start_outside_is_named(regression, go):
    with pytest.raises(ValueError, match=r"start must be inside .*'weight_decay': 2\.0"):
        go(lambda trial: linear(trial, regression), space=SPACE, start=Config(0.01, 32, 2.0))


def test_an_optimizer_without_weight_decay_is_named(regression, go):
    with pytest.raises(TrainingError, match=r"weight_decay is to be 0\.1, and the Adam has none to scale"):
        go(lambda trial: decays(trial, regression, torch.optim.Adam), space=SPACE, orders={})


def test_a_trial_equivalent_to_one_before_is_not_run_again(digits, go, tmp_path, caplog):
    """Far too high, and nowhere lower to go: the same trial from the same weights would end the same way."""
    data, _ = digits

    def train(trial):
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        trial.watch(model, torch.optim.AdamW(model.parameters(), lr=trial.lr))
        for bx, by in trial.batches(data):
            trial.step(F.cross_entropy(model(bx), by))

    space = Space(lr=0.1, weight_decay=(0.01, 1.0), batch_size=64)
    with caplog.at_level(logging.INFO, "grgauge.tuning.trial"):
        result = go(train, space=space, budget=6400)
    assert [(trial.parent, trial.samples) for trial in result.trials] == [(None, 6400)]
    words = "lr 1.00e-01, batch 64 is equivalent to a trial that was run, and not run again"
    assert [words in note for note in result.trials[0].notes] == [True]
    assert caplog.text.count(words) == 1
    assert words.partition(", ")[2] in report.page(report.load(tmp_path / "run.db"))


def test_the_command_takes_a_range_or_a_number(tmp_path, capsys, monkeypatch):
    (tmp_path / "fit.py").write_text(
        "import torch\nimport torch.nn.functional as F\nfrom torch.utils.data import TensorDataset\n"
        "x = torch.randn(64, 6)\ndata = TensorDataset(x, x.sum(1))\n"
        "def train(trial):\n"
        "    model = torch.nn.Linear(6, 1)\n"
        "    trial.watch(model, torch.optim.AdamW(model.parameters(), lr=trial.lr))\n"
        "    for x, y in trial.batches(data):\n"
        "        trial.step(F.mse_loss(model(x)[:, 0], y))\n"
    )
    monkeypatch.chdir(tmp_path)
    common = ["tune", "fit.py:train", "--budget", "500"]
    assert main([*common, "--storage", "a.db", "--weight-decay", "0.04:0.25"]) == 0
    assert ", weight decay 0.1 does not count in" in capsys.readouterr().out
    assert main([*common, "--storage", "b.db", "--weight-decay", "0.3"]) == 0
    assert "weight decay" not in capsys.readouterr().out
    assert report.load("b.db").decay == 0.3
    with pytest.raises(SystemExit):
        main([*common, "--weight-decay", "1:0.1"])
    assert "1:0.1 is no range" in capsys.readouterr().err
