"""GradES: what a reading is."""

from __future__ import annotations

import pytest
import torch
from blocks import EVERY_OPTIMIZER, MATRICES, OPTIMIZERS, grades_of, loss_of, network, train, values_of
from llamas import PEFT, lora

import grgauge_kernels as gk
from grgauge import GradES
from grgauge.grades.progress import Progress


def mean_abs(tensors):
    return float(sum(t.double().abs().sum() for t in tensors) / sum(t.numel() for t in tensors))


@EVERY_OPTIMIZER
@pytest.mark.parametrize("metric", ["delta", "norm"])
def test_readings_equal_their_definition(make, metric):
    net = network()
    grades, optimizer = grades_of(net, make, metric=metric, every=3, alpha=1.0, total_steps=99)
    weights = dict(net.named_parameters())
    before, expected = {}, {}
    for t in range(1, 14):
        optimizer.zero_grad()
        loss_of(net, t).backward()
        now = {name: weights[f"{name}.weight"].grad.clone() for name in MATRICES}
        if t % 3 == 0:
            differences = {name: now[name] - before[name] if metric == "delta" else now[name] for name in MATRICES}
            expected[t] = {name: mean_abs([d]) for name, d in differences.items()}
        before = now
        optimizer.step()
    values = values_of(grades)
    assert list(values) == [3, 6, 9, 12]
    for t, at_step in values.items():
        assert at_step == pytest.approx(expected[t], rel=1e-5)


@PEFT
@pytest.mark.parametrize("metric", ["delta", "norm"])
def test_a_pair_reads_the_sum_of_both(metric):
    model = lora()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    grades = GradES(model, optimizer, tau=0.5, total_steps=9, metric=metric, every=2, alpha=1.0)
    pairs = {
        name: [p for n, p in model.named_parameters() if n.startswith(name.removesuffix("lora.default") + "lora_")]
        for name in grades.matrices
    }
    tokens = torch.randint(32, (2, 8))
    before, expected = {}, {}
    for t in range(1, 6):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        now = {name: [p.grad.clone() for p in pair] for name, pair in pairs.items()}
        for name in pairs:
            assert len(pairs[name]) == 2
            against = before.get(name) if metric == "delta" else [torch.zeros_like(g) for g in now[name]]
            if t % 2 == 0:
                expected.setdefault(t, {})[name] = mean_abs([a - b for a, b in zip(now[name], against, strict=True)])
        before = now
        optimizer.step()
    values = values_of(grades)
    assert list(values) == [2, 4]
    for t, at_step in values.items():
        assert at_step == pytest.approx(expected[t], rel=1e-5)


def test_nothing_is_measured_between_readings(monkeypatch):
    net = network()
    grades, optimizer = grades_of(net, OPTIMIZERS["torch AdamW"], metric="delta", every=5)
    steps = []
    measure = gk.measure_
    monkeypatch.setattr(gk, "measure_", lambda *args, **kwargs: steps.append(t) or measure(*args, **kwargs))
    for t in range(1, 15):
        train(net, optimizer, 1, start=t)
    assert steps == [4, 5, 9, 10, 14]
    assert [reading.step for reading in grades.history] == [5, 10]


def test_the_state_of_delta_is_one_per_cent_of_the_matrices():
    net = network(width=512, depth=4)
    grades, optimizer = grades_of(net, metric="delta", every=2, total_steps=100)
    train(net, optimizer, 1)
    state = sum(previous.numel() for previous, _ in grades.state_dict()["filled"])
    total = sum(m.weight.numel() for block in net.blocks for m in (block.up, block.down))
    assert state <= total / 200
    small = network(width=128, depth=4)  # a block of each
    grades, optimizer = grades_of(small, metric="delta", every=2, total_steps=100)
    train(small, optimizer, 1)
    total = sum(p.numel() for p in small.parameters())
    assert sum(previous.numel() for previous, _ in grades.state_dict()["filled"]) <= total / 60


@pytest.mark.parametrize("metric", ["delta", "norm"])
def test_a_sample_reads_what_the_whole_reads(metric):
    readings = []
    for sample in (None, 10**9):
        net = network(width=512, depth=2)
        grades, optimizer = grades_of(net, metric=metric, every=2, total_steps=100, sample=sample)
        train(net, optimizer, 3)
        readings.append(values_of(grades)[2])
    # 5 blocks of 256 neighbours out of 1024 in a matrix; neighbours are alike
    assert readings[0] == pytest.approx(readings[1], rel=0.25)


def test_the_model_trains_as_without():
    plain, gauged = network(), network()
    train(plain, OPTIMIZERS["ours"](plain.parameters()), 12)
    _, optimizer = grades_of(gauged, metric="delta", every=2, tau=1e-9)
    train(gauged, optimizer, 12)
    for p, q in zip(plain.parameters(), gauged.parameters(), strict=True):
        assert torch.equal(p, q)


@PEFT
def test_the_progress_of_a_pair_is_that_of_both():
    model = lora()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    grades = GradES(model, optimizer, metric="signal", total_steps=40, every=2, warmup=0, alpha=1.0)
    tokens = torch.randint(32, (2, 8))
    stem = grades.matrices[0].removesuffix("lora.default") + "lora_"
    pair = [p for n, p in model.named_parameters() if n.startswith(stem)]
    progress, expected, before = Progress(optimizer, pair, 1), [], [None, None]
    for _ in range(9):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        expected.append(float(progress.read(None, None, before)[:, 0].sum()))
        before = progress.gradients(None, None)
        optimizer.step()
    assert len(pair) == 2
    found = [row[0] for row in grades._signal.forecast._falls]
    assert found == pytest.approx(expected[1::2], rel=1e-5)
