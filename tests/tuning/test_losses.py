"""Losses on a device are read at readings, and the policy hears the same of them."""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from torch import nn

from grgauge import AdamW, Config
from grgauge.tuning.loop import Loop


def trained(go, data, **changes):
    """The study, and how many losses were read after each step."""
    counts = []

    def train(trial):
        model = nn.Linear(6, 1)
        trial.watch(model, AdamW(model.parameters(), lr=trial.lr))
        for x, y in trial.batches(data):
            trial.step(F.mse_loss(model(x)[:, 0], y))

    def on_step(trial):
        if not trial.probing:
            counts.append(len(trial._loop.observed))

    return go(train, on_step=on_step, fresh=True, **changes), counts


@pytest.mark.parametrize("start", [Config(1e-4, 128), Config(0.3, 16)])
def test_the_same_is_decided_and_stored(go, regression, monkeypatch, start):
    at_once, each = trained(go, regression, start=start, budget=6000)
    assert set(each) == {1}
    monkeypatch.setattr(Loop, "_deferred", property(lambda self: True))  # as if the host's losses were a device's
    later, counts = trained(go, regression, start=start, budget=6000)
    assert len(counts) == len(each)
    assert counts.count(0) >= 0.7 * len(counts)
    assert sum(counts) == len(counts)
    assert len(later.trials) > 1
    for one, other in zip(at_once.trials, later.trials, strict=True):
        assert (one.config, one.samples, one.losses, one.reason) == (
            other.config,
            other.samples,
            other.losses,
            other.reason,
        )
