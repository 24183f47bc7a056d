"""The advisor, which only speaks, and the autopilot, which acts within one run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from tuning.scripted import Scripted, retune

from grgauge import Advisor, Autopilot, Config, Gauge, Stop
from grgauge.policy import Evidence


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def test_the_advisor_says_what_is_wrong_and_changes_nothing(digits):
    data, _ = digits
    lines, weights = [], []
    for advised in (False, True):
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        gauge = Gauge(optimizer, 64)
        advisor = Advisor(gauge, optimizer, every=20, print=lines.append)
        generator = torch.Generator().manual_seed(0)
        for _ in range(60):
            x, y = data[torch.randint(1400, (64,), generator=generator)]
            optimizer.zero_grad()
            loss = gauge.split_backward(lambda rows, model=model: F.cross_entropy(model(rows[0]), rows[1]), (x, y))
            optimizer.step()
            if advised:
                advisor.step(loss)
        assert optimizer.param_groups[0]["lr"] == 1e-5
        weights.append([p.detach().clone() for p in model.parameters()])
    assert len(lines) == 3
    assert lines[-1].startswith("step 60, GR_T ")
    assert "too low" in lines[-1]
    assert "the learning rate is too low" in lines[-1]
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


@pytest.mark.parametrize("every", [0, 2.5])
def test_a_bad_period_is_named(every):
    optimizer = torch.optim.SGD(net().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="every must be"):
        Advisor(Gauge(optimizer, 8), optimizer, every=every)


def fly(pilot, data):
    sizes = []
    for x, y in pilot.batches(data):
        pilot.step(F.cross_entropy(pilot.model(x), y))
        sizes.append(len(x))
    return sizes


def test_the_autopilot_changes_learning_rate_and_batch_live_and_logs_each_change(digits):
    data, (x, y) = digits
    lines, model = [], net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    pilot = Autopilot(model, optimizer, batch_size=256, budget=12_000, print=lines.append)
    fly(pilot, data)
    assert pilot.lr == pytest.approx(optimizer.param_groups[0]["lr"])
    assert pilot.lr > 1e-4
    assert pilot.batch_size != 256
    moves = [line for line in lines if "nothing was compared" not in line]
    assert len(moves) == len(pilot.decisions) > 1
    assert all("GR_T" in line and "samples" in line for line in lines)
    assert "the learning rate is too low" in "".join(lines)
    assert float((model(x).argmax(1) == y).float().mean()) > 0.8


def test_the_autopilot_goes_back_to_saved_and_to_untrained_weights(digits):
    data, _ = digits
    model = net()
    untrained = model[0].weight.detach().clone()
    scripted = Scripted(
        {
            320: retune(Config(0.01, 32)),
            640: retune(Config(0.002, 32), rollback=True),
            960: retune(Config(0.003, 32), reuse=False),
            1280: Stop("enough", Evidence("script")),
        }
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    pilot = Autopilot(
        model, optimizer, batch_size=32, budget=10_000, policy=scripted, every=1000, print=lambda line: None
    )
    seen = []
    for x, y in pilot.batches(data):
        seen.append((pilot.steps, model[0].weight.detach().clone(), optimizer.param_groups[0]["lr"]))
        pilot.step(F.cross_entropy(model(x), y))
    assert [steps for steps, *_ in seen] == [*range(20), *range(10, 20), *range(10)]
    assert torch.equal(seen[10][1], seen[20][1])
    assert torch.equal(seen[30][1], untrained)
    assert [seen[i][2] for i in (0, 10, 20, 30)] == pytest.approx([1e-3, 0.01, 0.002, 0.003])
    assert pilot.used == 1280
