"""Optuna by gauges: the next learning rate and batch size come from what trials before have read."""

import optuna
import torch
from torch import nn

import grgauge
from grgauge.integrations.optuna import PRUNED, GaugePruner, GaugeSampler, report


def objective(trial: optuna.Trial) -> float:
    batch_size = trial.suggest_int("batch_size", 8, 256, log=True)
    net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = grgauge.AdamW(net.parameters(), lr=trial.suggest_float("lr", 1e-6, 1.0, log=True))
    gauge = grgauge.Gauge(optimizer, batch_size)
    losses = []  # since the last reading: a single step's loss is too noisy to tell whether a trial still climbs
    for _ in range(100):
        x = torch.randn(batch_size, 16)
        y = x.sum(1, keepdim=True) + torch.randn(batch_size, 1)
        optimizer.zero_grad()
        loss = gauge.split_backward(lambda b: nn.functional.mse_loss(net(b[0]), b[1]), (x, y))
        optimizer.step()
        losses.append(float(loss))
        reading = gauge.reading()
        if reading is not None and report(trial, reading, sum(losses) / len(losses)):
            losses.clear()
            if trial.should_prune():
                raise optuna.TrialPruned
    return float(loss)


study = optuna.create_study(sampler=GaugeSampler(), pruner=GaugePruner())
study.enqueue_trial({"lr": 1e-6, "batch_size": 32})
study.optimize(objective, n_trials=8)
for trial in study.trials:
    print(trial.number, trial.state.name, trial.params, trial.user_attrs.get(PRUNED, ""))
