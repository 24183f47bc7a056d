"""`trial.batches`: any kind of sample in micro-batches, and loops that clear gradients or leave early."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate
from transformers import BatchEncoding
from tuning.scripted import linear, retune

from grgauge import Config, TrainingError
from grgauge.tuning.data import Cuts


class Row(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


@dataclasses.dataclass
class Batch:
    x: torch.Tensor
    y: torch.Tensor
    temperature: torch.Tensor


class Of(Dataset):
    """Samples (x [6], y []) as a function of them makes them."""

    def __init__(self, rows, make):
        self.rows, self.make = rows, make

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.make(i, *self.rows[i])


def columns(samples):
    return torch.stack([x for x, _ in samples]), torch.stack([y for _, y in samples])


def time_first(samples):
    x, y = columns(samples)
    return x.t().contiguous(), y


def dataclass(samples):
    return Batch(*columns(samples), torch.tensor(1.0))


def encoding(samples):
    x, y = columns(samples)
    return BatchEncoding({"x": x, "y": y})


def with_a_mask(samples):
    x, y = columns(samples)
    return {"x": x, "y": y, "causal": torch.ones(6, 6).tril(), "names": [f"{float(value):.3f}" for value in y]}


KINDS = {
    "strings": (lambda i, x, y: (x, y, f"sample {i}"), default_collate, lambda b: (b[0], b[1])),
    "lists of tensors": (lambda i, x, y: (x, y), list, columns),
    "named tuples": (lambda i, x, y: Row(x, y), default_collate, lambda b: (b.x, b.y)),
    "time first": (lambda i, x, y: (x, y), time_first, lambda b: (b[0].t(), b[1])),
    "data classes": (lambda i, x, y: (x, y), dataclass, lambda b: (b.x / b.temperature, b.y)),
    "encodings": (lambda i, x, y: (x, y), encoding, lambda b: (b["x"], b["y"])),
    "masks": (
        lambda i, x, y: (x, y),
        with_a_mask,
        lambda b: (b["x"] @ b["causal"].fill_diagonal_(1).diag().diag(), b["y"]),
    ),
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_batch_trains_as_tensors_do(kind, workers, regression, go):
    make, collate, unpack = KINDS[kind]
    if workers and kind != "strings":
        pytest.skip("one kind shows that workers collate the same")
    loader = DataLoader(Of(regression, make), 8, shuffle=True, collate_fn=collate, num_workers=workers)
    sizes, readings = [], []

    def train(trial):
        model = nn.Linear(6, 1)
        trial.watch(model, torch.optim.SGD(model.parameters(), lr=trial.lr))
        for batch in trial.batches(loader):
            x, y = unpack(batch)
            sizes.append(len(y))
            trial.step(F.mse_loss(model(x)[:, 0], y))
            readings.append(trial.reading)

    settings = {"orders": {}, "start": Config(0.01, 33), "budget": 660, "micro_batch": 20}
    result = go(train, **settings)
    assert set(sizes) == {16, 17}
    assert readings[-1].gr_s is not None
    plain = go(lambda trial: linear(trial, regression, torch.optim.SGD), study_name="plain", **settings)
    torch.testing.assert_close(result.model.weight, plain.model.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", range(1, 70))
@pytest.mark.parametrize("limit", [None, 1, 2, 3, 8, 100])
def test_no_micro_batch_is_larger_than_asked_or_a_single_sample(size, limit):
    cuts = Cuts(size, limit, every=5, groups=2)
    for step in range(1, 11):
        parts = cuts.sizes(step)
        assert sum(parts) == size
        assert max(parts) <= (limit or size)
        assert max(parts) - min(parts) <= 1
        assert min(parts) > 1 or size == 1 or limit in (1, 2)
        assert len(parts) == -(-size // (limit or size)) or (step % 5 == 0 and len(parts) == 2)
        if step % 5 == 0 and size > 3:
            assert len(parts) >= 2


@pytest.mark.parametrize("batch", [2, 3, 4, 5, 9, 33])
def test_batch_norm_meets_no_single_sample(batch, regression, go):
    seen = []

    def train(trial):
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        trial.watch(model, torch.optim.SGD(model.parameters(), lr=trial.lr))
        for x, y in trial.batches(regression):
            seen.append(len(x))
            trial.step(F.mse_loss(model(x)[:, 0], y))

    go(train, orders={}, start=Config(1e-3, batch), budget=12 * batch, every=1, space={"lr": 1e-3, "batch_size": batch})
    assert min(seen) >= 2


def test_gr_s_rests_on_two_groups(regression, go):
    seen = []
    go(lambda t: linear(t, regression, seen=seen), orders={}, start=Config(1e-3, 64), budget=640)
    assert [size for size, *_ in seen] == [64, 64, 64, 64, 32, 32] * 2


# --- functions that make batches -------------------------------------------------------------------------------------


def made(trial, function, notes):
    model = nn.Linear(6, 1)
    trial.watch(model, torch.optim.SGD(model.parameters(), lr=trial.lr))
    sizes = []
    for batch in trial.batches(function):
        x, y = columns(batch) if isinstance(batch, list) else batch
        sizes.append(len(y))
        trial.step(F.mse_loss(model(x)[:, 0], y))
        notes[:] = [] if trial.reading is None else trial.reading.notes
    return sizes


@pytest.mark.parametrize(
    ("batch", "limit", "asked"), [(64, None, 32), (33, None, 11), (37, None, 37), (64, 20, 16), (64, 64, 32)]
)
def test_a_function_is_asked_for_equal_micro_batches(batch, limit, asked, regression, go):
    notes, called = [], []

    def function(size):
        called.append(size)
        return DataLoader(regression, size, shuffle=True, drop_last=True, collate_fn=list)

    space = {"lr": (1e-5, 1.0), "batch_size": (8, 512)}
    settings = {"orders": {}, "start": Config(1e-3, batch), "budget": 6 * batch, "micro_batch": limit, "space": space}
    result = go(lambda trial: made(trial, function, notes), **settings)
    assert set(called) == set(result.output) == {asked}
    assert sum(result.output) == result.used == 6 * batch
    if asked == batch:
        assert any("GR_S not available" in note for note in notes)
    else:
        assert not any("GR_S not available" in note for note in notes)


def test_a_function_that_gives_whole_batches_is_left_uncut(regression, go):
    notes = []
    result = go(
        lambda trial: made(trial, lambda size: DataLoader(regression, 32, drop_last=True, collate_fn=list), notes),
        orders={},
        start=Config(1e-3, 32),
        budget=320,
    )
    assert result.output == [32] * 10
    assert any("GR_S not available" in note for note in notes)


def test_a_function_may_put_time_first(regression, go):
    def function(size):
        return DataLoader(regression, size, drop_last=True, collate_fn=lambda samples: columns(samples)[0].t().clone())

    def train(trial):
        model = nn.Linear(6, 1)
        trial.watch(model, torch.optim.SGD(model.parameters(), lr=trial.lr))
        for x in trial.batches(function):
            assert x.shape == (6, 16)
            trial.step(model(x.t()).square().mean())

    go(train, orders={}, start=Config(1e-3, 32), budget=320)


# --- loops -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad_at_the_top_of_the_loop_changes_nothing(to_none, regression, go):
    def train(trial, clears):
        model = nn.Linear(6, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=trial.lr)
        trial.watch(model, optimizer)
        for x, y in trial.batches(regression):
            if clears:
                optimizer.zero_grad(to_none)
            trial.step(F.mse_loss(model(x)[:, 0], y))
        F.mse_loss(model(x)[:, 0], y).backward()
        optimizer.zero_grad()
        assert model.weight.grad is None  # it is itself again between steps

    settings = {"orders": {}, "start": Config(0.01, 48), "micro_batch": 16, "budget": 480}
    plain, cleared = (
        go(lambda trial, clears=clears: train(trial, clears), study_name=f"{clears}", **settings)
        for clears in (False, True)
    )
    assert torch.equal(plain.model.weight, cleared.model.weight)


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_cleared_on_the_model_between_micro_batches_are_an_error(to_none, regression, go):
    def train(trial):
        model = nn.Linear(6, 1)
        trial.watch(model, torch.optim.SGD(model.parameters(), lr=trial.lr))
        for x, y in trial.batches(regression):
            model.zero_grad(to_none)
            trial.step(F.mse_loss(model(x)[:, 0], y))

    with pytest.raises(TrainingError, match=r"cleared or changed between two micro-batches.*model\.zero_grad\(\)"):
        go(train, orders={}, start=Config(0.01, 48), micro_batch=16)


def test_samples_are_counted_after_a_break_and_the_loop_goes_on(regression, go):
    rows, counted = [], []
    x, y = regression.tensors
    numbered = TensorDataset(torch.arange(512), x, y)

    def train(trial, leaves):
        model = nn.Linear(6, 1)
        trial.watch(model, torch.optim.SGD(model.parameters(), lr=trial.lr))
        rows.clear()
        while trial.used < trial.budget:
            for numbers, x, y in trial.batches(numbered):
                if leaves == "before" and len(rows) % 7 == 3 and trial.steps:
                    rows.append([])
                    break  # with a micro-batch of a step that is left unfinished
                stepped = trial.step(F.mse_loss(model(x)[:, 0], y))
                rows.append(numbers.tolist())
                if leaves == "after" and stepped and trial.steps % 3 == 0:
                    counted.append((trial.steps, trial.used))
                    break

    settings = {"orders": {}, "start": Config(0.01, 32), "budget": 640, "micro_batch": 16}
    whole = go(lambda trial: train(trial, "never"), study_name="whole", **settings)
    seen = [list(row) for row in rows]
    left = go(lambda trial: train(trial, "after"), study_name="after", **settings)
    assert rows == seen
    assert counted == [(steps, 32 * steps) for steps in (3, 6, 9, 12, 15, 18)]
    torn = go(lambda trial: train(trial, "before"), study_name="before", **settings)
    for result in (left, torn):
        assert result.used == whole.used == 640
        assert [trial.samples for trial in result.trials] == [640]
        assert torch.equal(result.model.weight, whole.model.weight)
        assert result.trials[0].readings == whole.trials[0].readings


def test_a_decision_after_a_break_is_carried_out(regression, go):
    def train(trial):
        model = nn.Linear(6, 1)
        trial.watch(model, torch.optim.SGD(model.parameters(), lr=trial.lr))
        rates = []
        while trial.used < trial.budget:
            for x, y in trial.batches(regression):
                rates.append(trial.lr)
                trial.step(F.mse_loss(model(x)[:, 0], y))
                break
        return rates

    result = go(train, orders={128: retune(Config(0.02, 32))}, start=Config(0.01, 32), budget=320, every=1000)
    assert result.output == [0.01] * 4 + [0.02] * 6


def test_an_optimizer_without_trainable_parameters_is_refused(go):
    def train(trial):
        model = nn.Linear(6, 1).requires_grad_(False)
        trial.watch(model, torch.optim.SGD(model.parameters(), lr=trial.lr))

    with pytest.raises(TrainingError, match="the SGD has no parameter that requires a gradient"):
        go(train)
