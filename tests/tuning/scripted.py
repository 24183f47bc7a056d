"""What the tuner's tests share: a rule set that follows a script, and a training function's body."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from grgauge import Config, Continue, Retune, Target
from grgauge.policy import Evidence, Probe

SPACE = {"lr": (1e-5, 1.0), "batch_size": (8, 512)}


class Scripted:
    """A `RuleSet` that decides as `orders` say: {study samples at which, counted here: Retune or Stop}.

    With what the tuner asks of a policy beside: its target, and batches that are allowed.
    """

    target, min_batch, max_batch, batch_multiple = Target(), 1, 1 << 20, 1

    def __init__(self, orders):
        self.orders, self.total, self.seen = dict(orders), 0, []

    def observe(self, reading, config, *, loss=None, samples=None, lr_factor=1.0):
        self.total += config.batch_size
        self.seen.append((config, samples, lr_factor, loss))
        due = [at for at in self.orders if at <= self.total]
        if due:
            return self.orders.pop(due[0])
        return Continue("as the script says", Evidence("script"))

    def state_dict(self):
        return {"orders": self.orders, "total": self.total}

    def load_state_dict(self, state):
        self.orders, self.total = dict(state["orders"]), state["total"]


def retune(config, reuse=True, rollback=False):
    return Retune(config, reuse, "as the script says", Evidence("script", None, "GR_T", float("inf")), rollback)


HERE, THERE = Config(1e-3, 16, 0.01), Config(3e-3, 16, 0.01)


class Probing(Scripted):
    """Asks for one probe of 6 steps after 10, or of 10 from untrained weights, and takes the higher learning rate if
    told to."""

    def __init__(self, take, at=160, samples=96, untrained=False):
        probe = Probe((HERE, THERE), samples, "as the script says", Evidence("script"), untrained)
        super().__init__({at: probe})
        self.take, self.losses = take, None

    def judge(self, losses):
        self.losses = losses
        return retune(THERE) if self.take else Continue("as the script says", Evidence("script"), notable=True)


def linear(trial, data, optimizer=torch.optim.AdamW, schedule=None, seen=None):
    """A training function's body: linear regression."""
    model = nn.Linear(6, 1)
    own = optimizer(model.parameters(), lr=trial.lr)
    scheduler = [] if schedule is None else [schedule(own)]
    trial.watch(model, own, *scheduler)
    for x, y in trial.batches(data):
        stepped = trial.step(F.mse_loss(model(x)[:, 0], y))
        if seen is not None:
            seen.append((len(x), own.param_groups[0]["lr"], stepped))
        if stepped and scheduler:
            scheduler[0].step()
    return model
