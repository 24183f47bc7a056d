"""`tune` on real models: what it finds, what changes in optimizer and batches, and what is stored."""

from __future__ import annotations

import json
import math

import optuna
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, WeightedRandomSampler
from tuning.scripted import SPACE, Scripted, linear, retune

from grgauge import AdamW, Config, Policy, Stop, TrainingError, tune
from grgauge.cli.char_transformer import CONTEXT, CharTransformer, Text
from grgauge.policy import Evidence


def mlp(trial, digits, optimizer=torch.optim.AdamW):
    data, (x, y) = digits
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    trial.watch(model, optimizer(model.parameters(), lr=trial.lr))
    for bx, by in trial.batches(data):
        trial.step(F.cross_entropy(model(bx), by))
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


# --- what it finds ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [Config(1e-5, 512), Config(0.5, 64), Config(1e-4, 8)])
def test_digits_are_learned_from_a_bad_start(start, digits, go):
    budget = 10_000 + 2 * 4 * 32  # to train on, and to compare the newest weights with their average
    result = go(lambda trial: mlp(trial, digits), budget=budget, start=start)
    assert result.output > 0.85  # a static grid's best is 0.92
    assert 1e-3 < result.config.lr < 0.1
    assert result.used <= budget + 512
    assert result.trials[-1].config == result.config


def test_the_verdict_of_a_long_run_rests_on_the_readings_around_step_50(digits, go):
    result = go(lambda trial: mlp(trial, digits), space={"lr": 1e-3, "batch_size": 16}, start=None, budget=16 * 500)
    assert "at steps 40 to 60" in result.verdict


def test_a_convolutional_network_and_our_own_optimizer(digits, go):
    data, (x, y) = digits

    def train(trial):
        conv = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)]
        model = nn.Sequential(*conv)
        trial.watch(model, AdamW(model.parameters(), lr=trial.lr, flat=True))
        for bx, by in trial.batches(data):
            trial.step(F.cross_entropy(model(bx), by))
        return float((model(x).argmax(1) == y).float().mean())

    assert go(train, budget=8000, start=Config(1e-4, 128)).output > 0.85


def test_a_character_transformer_gets_a_higher_learning_rate(go):
    text = Text.manual()
    data = torch.utils.data.TensorDataset(text.data.unfold(0, CONTEXT + 1, 16))

    def train(trial):
        model = CharTransformer(text.characters, width=32, layers=1, heads=2)
        trial.watch(model, AdamW(model.parameters(), lr=trial.lr))
        for (piece,) in trial.batches(data):
            trial.step(F.cross_entropy(model(piece[:, :-1]).flatten(0, 1), piece[:, 1:].flatten()))

    result = go(train, budget=2500, start=Config(1e-4, 16))
    assert result.config.lr > 5e-4
    assert result.loss < 3.3


def test_the_published_rules_can_be_had(digits, go):
    result = go(lambda trial: mlp(trial, digits), budget=4000, policy=Policy.paper)
    assert len(result.trials) > 1


# --- what changes ----------------------------------------------------------------------------------------------------


def test_a_reused_trial_runs_at_the_new_learning_rate_and_batch(regression, go):
    seen, scripted = [], Scripted({320: retune(Config(0.05, 64))})
    go(lambda trial: linear(trial, regression, seen=seen), scripted=scripted, start=Config(0.01, 32))
    sizes, rates = [], []
    size = 0
    for part, lr, stepped in seen:
        size += part
        if stepped:
            sizes.append(size)
            rates.append(lr)
            size = 0
    assert sizes == [32] * 10 + [64] * 11
    assert rates == [0.01] * 10 + [pytest.approx(0.05)] * 11
    # weights and moments went on: the loss does not start again
    losses = [loss for _, _, _, loss in scripted.seen]
    assert losses[10] < 1.3 * losses[9]


def test_a_rollback_brings_back_weights_and_optimizer_state(regression, go):
    states = []

    def train(trial):
        model = nn.Linear(6, 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=trial.lr)
        trial.watch(model, optimizer)
        for x, y in trial.batches(regression):
            moment = optimizer.state[model.weight].get("exp_avg") if optimizer.state else None
            states.append((model.weight.detach().clone(), None if moment is None else moment.clone(), trial.steps))
            trial.step(F.mse_loss(model(x)[:, 0], y))

    orders = {320: retune(Config(0.5, 32)), 640: retune(Config(0.02, 32), rollback=True)}
    result = go(train, orders=orders, start=Config(0.01, 32), every=1000)
    before, after = states[10], states[20]
    assert before[2] == after[2] == 10
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert [(trial.parent, trial.state) for trial in result.trials] == [
        (None, "COMPLETE"),
        (0, "PRUNED"),
        (0, "COMPLETE"),
    ]
    assert result.config == Config(0.02, 32, 0.01)


def test_from_scratch_means_untrained_weights_and_a_new_call(regression, go):
    first = []

    def train(trial):
        model = nn.Linear(6, 1)
        first.append(model.weight.detach().clone())
        trial.watch(model, torch.optim.SGD(model.parameters(), lr=trial.lr))
        for x, y in trial.batches(regression):
            trial.step(F.mse_loss(model(x)[:, 0], y))
        return trial.samples

    result = go(train, orders={320: retune(Config(0.02, 64), reuse=False)}, start=Config(0.01, 32))
    assert len(first) == 2
    assert torch.equal(*first)
    assert result.output == 704
    assert result.used == 1024
    assert [trial.parent for trial in result.trials] == [None, None]


def lambda_lr(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1.0 + 0.1 * step))


def cosine(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40, eta_min=1e-3)


def one_cycle(optimizer):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, optimizer.param_groups[0]["lr"], total_steps=40)


def sequential(optimizer):
    schedulers = torch.optim.lr_scheduler
    parts = [schedulers.LinearLR(optimizer, 0.1, total_iters=6), schedulers.CosineAnnealingLR(optimizer, 40)]
    return schedulers.SequentialLR(optimizer, parts, [6])


@pytest.mark.parametrize("schedule", [lambda_lr, cosine, one_cycle, sequential])
def test_a_learning_rate_survives_the_users_scheduler(schedule, regression, go):
    plain, changed, scripted = [], [], Scripted({320: retune(Config(0.03, 32))})
    go(lambda t: linear(t, regression, schedule=schedule, seen=plain), orders={}, start=Config(0.01, 32), every=1000)
    go(
        lambda t: linear(t, regression, schedule=schedule, seen=changed),
        scripted=scripted,
        start=Config(0.01, 32),
        every=1000,
        study_name="changed",
    )
    ratios = [new / old for (_, new, _), (_, old, _) in zip(changed, plain, strict=True)]
    assert ratios == pytest.approx([1.0] * 10 + [3.0] * 22)
    assert len({round(lr, 6) for _, lr, _ in plain}) > 15  # the schedule was at work
    factors = [factor for _, _, factor, _ in scripted.seen]
    assert factors == pytest.approx([lr / 0.01 for _, lr, _ in plain])


def test_a_scheduler_that_undoes_a_change_is_found_out(regression, go):
    def train(trial):
        model = nn.Linear(6, 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=trial.lr)
        scheduler = lambda_lr(optimizer)
        trial.watch(model, optimizer)  # without the scheduler
        for x, y in trial.batches(regression):
            trial.step(F.mse_loss(model(x)[:, 0], y))
            scheduler.step()

    with pytest.raises(TrainingError, match=r"give your LR scheduler to trial\.watch"):
        go(train, orders={320: retune(Config(0.1, 32))}, start=Config(0.01, 32), every=1000)


def test_an_optimizer_built_at_another_learning_rate_is_scaled_to_the_trials(regression, go):
    def train(trial):
        model = nn.Linear(6, 1)
        groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 1e-4}]
        optimizer = torch.optim.AdamW(groups, lr=1e-3)
        trial.watch(model, optimizer)
        for x, y in trial.batches(regression):
            trial.step(F.mse_loss(model(x)[:, 0], y))
        return [group["lr"] for group in optimizer.param_groups]

    assert go(train, orders={}, start=Config(0.02, 32)).output == pytest.approx([0.02, 0.002])


def test_weight_decay_goes_along_by_the_rule_asked_for(regression, go):
    for rule, decay in (("decay", 0.01), ("gamma", 0.005), ("gamma per batch", 0.02)):
        orders = {320: retune(Config(0.02, 128, 0.01))}
        result = go(
            lambda trial: linear(trial, regression), orders=orders, start=Config(0.01, 32), decay=rule, study_name=rule
        )
        assert result.config.weight_decay == pytest.approx(decay)


# --- batches ---------------------------------------------------------------------------------------------------------


def test_a_batch_is_accumulated_from_micro_batches_to_the_same_update(regression, go):
    whole, parts = [], []

    def trained(limit, seen):
        return go(
            lambda trial: linear(trial, regression, torch.optim.SGD, seen=seen),
            orders={},
            start=Config(1e-3, 50),
            micro_batch=limit,
            study_name=f"{limit}",
        ).model

    models = trained(None, whole), trained(8, parts)
    assert max(size for size, _, _ in whole) == 50
    assert max(size for size, _, _ in parts) == 8
    assert sum(size for size, _, _ in parts) == sum(size for size, _, _ in whole) == 1050
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other)


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_batch(regression, go):
    sizes = []

    def train(trial):
        model = nn.Linear(6, 1)
        trial.watch(model, torch.optim.SGD(model.parameters(), lr=trial.lr))
        for x, y in trial.batches(regression):
            if len(x) > 20 and trial.steps >= 3:
                raise torch.OutOfMemoryError("CUDA out of memory (a test's)")
            sizes.append(len(x))
            trial.step(F.mse_loss(model(x)[:, 0], y))
        return trial.micro_batch, trial.steps

    result = go(train, orders={}, start=Config(0.01, 64))
    assert result.output == (16, 16)
    assert result.used == sum(sizes) == 1024  # nothing was lost and nothing done twice
    assert len(result.trials) == 1


def test_out_of_memory_with_one_sample_is_an_error(regression, go):
    def train(trial):
        model = nn.Linear(6, 1)
        trial.watch(model, torch.optim.SGD(model.parameters(), lr=trial.lr))
        for _ in trial.batches(regression):
            raise torch.OutOfMemoryError("CUDA out of memory (a test's)")

    with pytest.raises(TrainingError, match="with one sample at a time"):
        go(train, orders={}, start=Config(0.01, 8))


class Squares(Dataset):
    def __len__(self):
        return 100

    def __getitem__(self, i):
        return {"x": torch.full((6,), i / 100), "y": torch.tensor((i / 100) ** 2), "i": i}


@pytest.mark.parametrize("workers", [None, 0, 1])
def test_every_epoch_has_every_sample_once_across_a_change_of_batch(workers, go):
    rows = []
    data = Squares() if workers is None else DataLoader(Squares(), 16, shuffle=True, num_workers=workers)

    def train(trial):
        model = nn.Linear(6, 1)
        trial.watch(model, torch.optim.SGD(model.parameters(), lr=trial.lr))
        for batch in trial.batches(data):
            rows.extend(batch["i"].tolist())
            trial.step(F.mse_loss(model(batch["x"])[:, 0], batch["y"]))

    go(train, orders={30: retune(Config(0.01, 20))}, start=Config(0.01, 10), budget=300)
    epochs = [rows[i : i + 100] for i in range(0, 300, 100)]
    assert len(rows) == 310
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_a_function_of_the_batch_size_makes_the_loader(regression, go):
    seen = []

    def loader(batch_size):
        return DataLoader(regression, batch_size, shuffle=True)  # whose last batch of an epoch is short

    def train(trial):
        model = nn.Linear(6, 1)
        trial.watch(model, torch.optim.SGD(model.parameters(), lr=trial.lr))
        for x, y in trial.batches(loader):
            seen.append(len(x))
            trial.step(F.mse_loss(model(x)[:, 0], y))

    go(train, orders={300: retune(Config(0.01, 60))}, start=Config(0.01, 30), every=1000, budget=900)
    assert seen == [15] * 20 + [30] * 20


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


def test_data_that_cannot_be_cut_to_size_are_refused(regression, go):
    weighted = DataLoader(regression, 8, sampler=WeightedRandomSampler([1.0] * 512, 512))
    for i, data in enumerate((Stream(), weighted, 3)):
        with pytest.raises(TrainingError, match="data is a") as error:
            go(lambda trial, data=data: linear(trial, data), study_name=f"{i}")
        assert isinstance(error.value.__cause__, TypeError)


# --- what is stored --------------------------------------------------------------------------------------------------


def test_the_study_holds_what_a_report_needs(digits, go, tmp_path):
    result = go(lambda trial: mlp(trial, digits), budget=3000, start=Config(1e-4, 32))
    study = optuna.load_study(study_name="grgauge", storage=f"sqlite:///{tmp_path / 'run.db'}")
    assert set(study.user_attrs) >= {"target", "space", "budget", "used", "verdict", "recommendation"}
    assert study.user_attrs["target"] == {
        "gr_t": 20.0,
        "gr_s": 0.58,
        "gr_t_zone": [18.0, 22.0],
        "gr_s_zone": [0.5, 0.65],
    }
    assert study.user_attrs["space"] == {"lr": [1e-5, 1.0], "batch_size": [8, 512]}
    assert study.user_attrs["recommendation"]["lr"] == result.config.lr
    assert study.user_attrs["verdict"] == result.verdict
    total = 0
    for trial in study.trials:
        attributes = trial.user_attrs
        assert set(trial.params) == {"lr", "batch_size", "weight_decay"}
        assert attributes["start_samples"] == total
        total += attributes["samples"]
        assert attributes["decision"]["kind"] in ("continue", "retune", "stop")
        assert set(attributes["decision"]) == {"kind", "rule", "evidence"}
        assert attributes["reason"]
        assert attributes["seconds"] > 0
        assert 0 < len(attributes["losses"]) <= 300
        assert all(attributes["start_samples"] < samples <= total for samples, _ in attributes["losses"])
        assert len(attributes["readings"]) <= 300
        json.dumps(attributes, allow_nan=False)
    assert total == study.user_attrs["used"] == result.used
    assert study.best_value <= result.loss
    assert set(attributes["readings"][-1]) == {
        *(
            "samples",
            "step",
            "gr_t",
            "gr_t_error",
            "finite_time_factor",
            "gr_s",
            "gr_s_error",
            "noise_scale",
            "grad_norm",
            "ready",
        )
    }
    assert any(reading["gr_s"] is not None for reading in attributes["readings"])


def test_long_curves_are_thinned(regression, go):
    result = go(lambda trial: linear(trial, regression), orders={}, start=Config(1e-3, 8), budget=4000, every=1)
    (trial,) = result.trials
    assert 150 < len(trial.losses) <= 300
    assert trial.losses[-1][0] == 4000 - 2 * 4 * 8  # the rest compares the newest weights with their average
    assert trial.losses[0][0] < 100


def test_a_stop_without_weights_worth_keeping_is_an_error(regression, go):
    orders = {320: Stop("nothing is left to try", Evidence("diverged"))}
    with pytest.raises(TrainingError, match="nothing is left to try"):
        go(lambda trial: linear(trial, regression), orders=orders, start=Config(0.01, 32))


def test_a_stop_ends_with_the_weights_saved_before(regression, go):
    orders = {320: retune(Config(0.5, 32)), 640: Stop("nothing is left to try", Evidence("diverged"))}
    result = go(lambda trial: linear(trial, regression), orders=orders, start=Config(0.01, 32))
    assert result.config.lr == 0.01
    assert result.used == 640
    assert "Stopped early: nothing is left to try" in result.verdict
    assert [trial.state for trial in result.trials] == ["COMPLETE", "PRUNED"]
    assert math.isfinite(result.loss)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"space": {"lr": (1e-5, 1.0)}}, "space must be keyed"),
        ({"space": {**SPACE, "lr": (0.0, 1.0)}}, r"space\['lr'\] must be"),
        ({"space": {**SPACE, "batch_size": (8, 20.5)}}, r"space\['batch_size'\] must be"),
        ({"budget": 0}, "budget must be"),
        ({"start": Config(2.0, 32)}, "start must be"),
        ({"micro_batch": 0}, "micro_batch must be"),
        ({"every": 0}, "every must be"),
        ({"seed": -1}, "seed must be"),
        ({"decay": "linear"}, "rule must be"),
        ({"checkpoint_every": -1.0}, "checkpoint_every must be"),
    ],
)
def test_a_bad_argument_is_named_before_anything_is_stored(changes, complaint, tmp_path):
    settings = {"space": SPACE, "budget": 100, "storage": tmp_path / "run.db", **changes}
    with pytest.raises(ValueError, match=complaint):
        tune(lambda trial: None, **settings)
    assert list(tmp_path.iterdir()) == []
