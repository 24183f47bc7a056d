"""Optuna's own search on a real small regression: pruned and proposed by what trials read."""

from __future__ import annotations

import multiprocessing
import warnings

import optuna
import pytest
import torch
from torch import nn

from grgauge import AdamW, Gauge
from grgauge.integrations.optuna import PARENT, PRUNED, GaugePruner, GaugeSampler, progress, report

pytestmark = pytest.mark.engines
STEPS = 80


def objective(trial):
    lr = trial.suggest_float("lr", 1e-6, 1e3, log=True)
    batch_size = trial.suggest_int("batch_size", 8, 64, log=True)
    width = trial.suggest_categorical("width", [8, 16])
    torch.manual_seed(0)
    teacher = nn.Linear(16, 1)
    net = nn.Sequential(nn.Linear(16, width), nn.Tanh(), nn.Linear(width, 1))
    optimizer = AdamW(net.parameters(), lr=lr)
    gauge = Gauge(optimizer, batch_size)
    for _ in range(STEPS):
        x = torch.randn(batch_size, 16)
        y = teacher(x).detach() + 0.1 * torch.randn(batch_size, 1)
        optimizer.zero_grad()
        loss = gauge.split_backward(lambda b: (net(b[0]) - b[1]).square().mean(), (x, y))
        optimizer.step()
        reading = gauge.reading()
        if reading is not None and report(trial, reading, float(loss)) and trial.should_prune():
            raise optuna.TrialPruned
    return float(loss)


def study_of(storage=None):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = GaugeSampler(optuna.samplers.RandomSampler(seed=0), seed=0)
    return optuna.create_study(
        sampler=sampler, pruner=GaugePruner(), storage=storage, study_name="s", load_if_exists=True
    )


def test_a_search_from_far_below_climbs():
    study = study_of()
    study.enqueue_trial({"lr": 1e-6, "batch_size": 32})
    study.optimize(objective, n_trials=6)
    rates = [trial.params["lr"] for trial in study.trials]
    assert rates[1] == pytest.approx(1e-5, rel=0.5)  # the whole factor of ten, and what follows from the batch
    # Not 10^5: from the third trial on GR_T is just above 2 (2.05, 2.84, 2.35), where the power law raises by about 2.
    assert max(rates) > 100 * rates[0]
    assert "far out: GR_T" in study.trials[0].user_attrs[PRUNED]
    assert study.trials[1].user_attrs[PARENT] == 0
    assert {trial.params["width"] for trial in study.trials} <= {8, 16}


def test_what_diverges_is_pruned():
    study = study_of()
    study.enqueue_trial({"lr": 1e3, "batch_size": 8})
    study.optimize(objective, n_trials=1)
    assert study.trials[0].state == optuna.trial.TrialState.PRUNED
    assert study.trials[0].user_attrs[PRUNED].startswith("diverged")


def test_ask_and_tell():
    study = study_of()
    for _ in range(2):
        trial = study.ask()
        try:
            study.tell(trial, objective(trial))
        except optuna.TrialPruned:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    assert progress(study.trials[0])[0].reading.step == 5
    assert study.trials[1].user_attrs[PARENT] == 0


def work(storage):
    warnings.simplefilter("ignore")
    study_of(storage).optimize(objective, n_trials=3)


def test_workers_share_one_storage(tmp_path):
    storage = f"sqlite:///{tmp_path}/study.db"
    study = study_of(storage)
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=work, args=(storage,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert len(study.trials) == 6
    assert all(trial.state.is_finished() and progress(trial) for trial in study.trials)
    assert any(PARENT in trial.user_attrs for trial in study.trials)
