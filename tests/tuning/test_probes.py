"""Two learning rates compared on the same batches: what each side sees, what is gone on with, and what it costs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from tuning.scripted import HERE, THERE, Probing, Scripted, linear, retune

from grgauge import AdamW, Autopilot, Config, TrainingError


def pilot_of(policy, budget, schedule=False, batch_norm=False):
    """A run with dropout: its weights, optimizer and pilot."""
    torch.manual_seed(0)
    norm = [nn.BatchNorm1d(8)] if batch_norm else []
    model = nn.Sequential(nn.Linear(6, 8), *norm, nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1))
    optimizer = AdamW(model.parameters(), lr=1e-3)
    scheduler = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)] if schedule else []
    lines = []
    pilot = Autopilot(model, optimizer, *scheduler, batch_size=16, budget=budget, policy=policy, print=lines.append)
    pilot.lines = lines
    return model, optimizer, scheduler, pilot


def trained(policy, budget, data, seen=None, **changes):
    model, optimizer, scheduler, pilot = pilot_of(policy, budget, **changes)
    for x, y in pilot.batches(data):
        rate = optimizer.param_groups[0]["lr"]
        probing = pilot.probing
        stepped = pilot.step(F.mse_loss(model(x)[:, 0], y))
        if stepped and scheduler:
            scheduler[0].step()
        if seen is not None:
            seen.append((x, rate, stepped, probing))
    return model, pilot


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


COMPARED = 4  # batches for each average


@pytest.mark.parametrize("changes", [{}, {"schedule": True}, {"batch_norm": True}])
def test_a_probe_that_is_refused_leaves_no_trace(regression, changes):
    """Weights, moments, schedule, random numbers and the place in the data are those of a run without it."""
    plain, _ = trained(Scripted({}), 1600, regression, **changes)
    policy = Probing(take=False)
    probed, pilot = trained(policy, 1600 + 96 + 2 * COMPARED * 16, regression, **changes)
    assert policy.losses is not None
    assert same(plain, probed)
    assert pilot.samples == 1600
    assert pilot.used == 1600 + 96 + 2 * COMPARED * 16


def test_a_probe_that_is_taken_goes_on_with_the_weights_of_its_side(regression):
    """As if the learning rate had been changed where the probe began."""
    changed, _ = trained(Scripted({160: retune(THERE)}), 1600, regression)
    policy = Probing(take=True)
    probed, pilot = trained(policy, 1696 + 2 * COMPARED * 16, regression)
    assert policy.losses is not None
    assert same(changed, probed)
    assert pilot.config == THERE
    assert pilot.samples == 1600


@pytest.mark.parametrize("changes", [{}, {"schedule": True}, {"batch_norm": True}])
@pytest.mark.parametrize("take", [False, True])
def test_untrained_weights_catch_up_with_those_at_hand(regression, take, changes):
    """Refused they leave no trace; taken they are what training at that learning rate from the start ends in."""
    orders = {16: retune(THERE, reuse=False)} if take else {}
    cost = 160 + 2 * COMPARED * 16
    plain, _ = trained(Scripted(orders), 1600 + (16 if take else 0), regression, **changes)
    policy = Probing(take=take, samples=160, untrained=True)
    seen = []
    probed, pilot = trained(policy, 1600 + cost, regression, seen, **changes)
    assert policy.losses is not None
    assert same(plain, probed)
    assert pilot.config == (THERE if take else HERE)
    assert pilot.samples == 1600
    assert pilot.used == 1600 + cost
    updates = [x for x, _, stepped, _ in seen if stepped]
    for one, other in zip(updates[:10], updates[10:20], strict=True):
        assert torch.equal(one, other)


def test_a_killed_run_has_the_same_untrained_weights_to_compare_with(regression, go):
    def scripted():
        return Probing(take=True, at=640, samples=640, untrained=True)

    again = {"budget": 8192, "start": Config(1e-3, 16)}
    plain = go(lambda trial: linear(trial, regression), scripted=scripted(), **again)
    failed = []

    def train(trial):
        model = nn.Linear(6, 1)
        trial.watch(model, torch.optim.AdamW(model.parameters(), lr=trial.lr))
        for x, y in trial.batches(regression):
            if trial.used == 320 and not failed:
                failed.append(trial.used)
                raise OSError("no route to host")
            trial.step(F.mse_loss(model(x)[:, 0], y))
        return model

    with pytest.raises(TrainingError, match="no route to host"):
        go(train, scripted=scripted(), study_name="again", **again)
    result = go(train, scripted=scripted(), study_name="again", **again)
    assert result.used == plain.used
    assert result.config.lr == pytest.approx(3e-3)
    assert torch.equal(plain.output.weight, result.output.weight)


def test_both_sides_see_the_same_batches_and_so_do_their_averages(regression):
    seen = []
    policy = Probing(take=False)
    trained(policy, 1600, regression, seen)
    probing = [row for row in seen if row[3]]
    updates = [x for x, _, stepped, _ in probing if stepped]
    assert len(updates) == 12
    for one, other in zip(updates[:6], updates[6:], strict=True):
        assert torch.equal(one, other)
    rates = [rate for _, rate, stepped, _ in probing if stepped]
    assert rates == [1e-3] * 6 + [pytest.approx(3e-3)] * 6
    first, second = policy.losses
    assert len(first) == len(second) == COMPARED
    assert first != second


def test_a_loop_left_in_the_middle_of_a_probe_goes_on_from_where_that_began(regression):
    plain, _ = trained(Scripted({}), 1600, regression)
    policy = Probing(take=False)
    model, _, _, pilot = pilot_of(policy, 1600 + 32)
    for x, y in pilot.batches(regression):
        pilot.step(F.mse_loss(model(x)[:, 0], y))
        if pilot.probing and pilot.samples == 192:
            break
    assert not same(plain, model)
    for x, y in pilot.batches(regression):
        pilot.step(F.mse_loss(model(x)[:, 0], y))
    assert pilot.samples == 1600
    assert policy.losses is None
    assert same(plain, model)


def test_one_that_would_take_more_than_a_quarter_of_what_is_left_is_not_made(regression):
    cost = 2 * (96 + (COMPARED + 1) * 16)
    for budget, made in ((160 + 4 * cost, True), (160 + 4 * cost - 16, False)):
        plain, _ = trained(Scripted({}), budget, regression)
        policy = Probing(take=True)
        probed, pilot = trained(policy, budget, regression)
        assert pilot.used == budget
        assert (policy.losses is not None) == made
        assert same(plain, probed) != made
        assert any("nothing was compared: that takes" in line for line in pilot.lines) != made


def test_the_study_knows_of_it(regression, go):
    policy = Probing(take=True)
    result = go(lambda trial: linear(trial, regression), scripted=policy, budget=4096, start=Config(1e-3, 16))
    assert [record.lr for record in result.trials] == [1e-3, pytest.approx(3e-3)]
    assert result.used == 4096
    assert sum(record.samples for record in result.trials) == 4096
    assert [record.probes for record in result.trials] == [1, 0]


def test_after_an_error_in_a_probe_the_same_call_makes_it_anew(regression, go):
    plain = go(
        lambda trial: linear(trial, regression), scripted=Probing(take=True), budget=4096, start=Config(1e-3, 16)
    )
    failed = []

    def train(trial):
        model = nn.Linear(6, 1)
        trial.watch(model, torch.optim.AdamW(model.parameters(), lr=trial.lr))
        for x, y in trial.batches(regression):
            if trial.probing and not failed:
                failed.append(trial.used)
                raise OSError("no route to host")
            trial.step(F.mse_loss(model(x)[:, 0], y))
        return model

    again = {"scripted": Probing(take=True), "budget": 4096, "start": Config(1e-3, 16), "study_name": "again"}
    with pytest.raises(TrainingError, match="no route to host"):
        go(train, **again)
    result = go(train, **{**again, "scripted": Probing(take=True)})
    assert result.used == 4096
    assert torch.equal(plain.output.weight, result.output.weight)
