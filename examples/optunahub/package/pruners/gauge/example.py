import optuna
import optunahub
import torch

import grgauge

module = optunahub.load_module("pruners/gauge")


def objective(trial: optuna.Trial) -> float:
    batch_size = trial.suggest_int("batch_size", 8, 256, log=True)
    net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    optimizer = grgauge.AdamW(net.parameters(), lr=trial.suggest_float("lr", 1e-6, 1.0, log=True))
    gauge = grgauge.Gauge(optimizer, batch_size)
    for _ in range(100):
        x = torch.randn(batch_size, 16)
        y = x.sum(1, keepdim=True) + torch.randn(batch_size, 1)
        optimizer.zero_grad()
        loss = gauge.split_backward(lambda b: torch.nn.functional.mse_loss(net(b[0]), b[1]), (x, y))
        optimizer.step()
        reading = gauge.reading()
        if reading is not None and module.report(trial, reading, float(loss)) and trial.should_prune():
            raise optuna.TrialPruned
    return float(loss)


study = optuna.create_study(pruner=module.GaugePruner())
study.optimize(objective, n_trials=8)
print(study.best_trial.params)
