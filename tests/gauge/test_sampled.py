"""A gauge that looks at a sample against one that looks at everything, on a model whose gradients are uneven."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from torch import nn

from grgauge import AdamW, Gauge
from grgauge.estimators import two_batch

WORDS, WIDTH, STEPS, BATCH = 3000, 32, 60, 16


class Model(nn.Module):
    """An embedding, of which a step touches the rows of frequent words, and two dense layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.hidden = nn.Linear(WIDTH, 256)
        self.out = nn.Linear(256, 64)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.hidden(self.embed(words).mean(1))))


def batches(steps: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    weights = 1.0 / torch.arange(1, WORDS + 1)  # Zipf's law
    for _ in range(steps):
        words = torch.multinomial(weights, BATCH * 12, replacement=True, generator=generator).view(BATCH, 12)
        yield words, words[:, 0] % 64


def train(model: nn.Module, gauges: list[Gauge], optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    for words, target in batches(steps, seed):
        optimizer.zero_grad()
        for part in (slice(0, BATCH // 2), slice(BATCH // 2, BATCH)):
            (nn.functional.cross_entropy(model(words[part]), target[part]) / 2).backward()
            for gauge in gauges:
                gauge.micro_step()
        optimizer.step()


@pytest.fixture(scope="module")
def sampled():
    """GR_T and gradient norm of everything, and of quarters with different seeds with the error they claim to have."""
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    numel = sum(p.numel() for p in model.parameters())
    gauges = [Gauge(optimizer, BATCH)] + [Gauge(optimizer, BATCH, sample=numel // 4, seed=s) for s in range(40)]
    errors: dict[int, float] = {}
    for i, gauge in enumerate(gauges):

        def heard(*args, i=i, of_gr_t=gauge._windows.statistics.sample_error.of_gr_t):
            errors[i] = of_gr_t(*args)
            return errors[i]

        gauge._windows.statistics.sample_error.of_gr_t = heard  # the sample's share
    train(model, gauges, optimizer, STEPS)
    readings = [gauge.reading() for gauge in gauges]
    assert errors[0] == 0.0
    return readings, [errors[i] for i in range(1, len(gauges))]


def test_the_standard_error_is_how_far_samples_are_off(sampled):
    (whole, *quarters), errors = sampled
    off = [reading.gr_t - whole.gr_t for reading in quarters]
    rms, claimed = (math.sqrt(sum(x * x for x in xs) / len(xs)) for xs in (off, errors))
    assert 0.01 * whole.gr_t < claimed < 0.2 * whole.gr_t
    assert 0.6 < rms / claimed < 1.6
    assert sum(abs(x) < 1.645 * e for x, e in zip(off, errors, strict=True)) >= 0.75 * len(off)
    assert all(reading.gr_t_error > error for reading, error in zip(quarters, errors, strict=True))


def test_samples_are_off_to_both_sides(sampled):
    (whole, *quarters), _ = sampled
    squares = [(reading.grad_norm / whole.grad_norm) ** 2 for reading in quarters]
    spread = math.sqrt(sum((x - 1) ** 2 for x in squares) / len(squares))
    assert abs(sum(squares) / len(squares) - 1) < 3 * spread / math.sqrt(len(squares))


def test_the_error_of_the_groups_squares_is_how_far_samples_are_off(monkeypatch):
    """Four groups of nothing but noise: their squares are four times that of the mean, and the error is relative."""
    p = nn.Parameter(torch.zeros(40_000))
    optimizer = torch.optim.SGD([p], lr=0.0)
    gauges = [Gauge(optimizer, 8, every=1)] + [Gauge(optimizer, 8, every=1, sample=10_000, seed=s) for s in range(40)]
    torch.manual_seed(0)
    spread = torch.randn(10, 1).exp().repeat_interleave(4000, 0).flatten()  # some stretches weigh more
    for _ in range(4):
        (p * spread * torch.randn(40_000)).sum().backward()
        for gauge in gauges:
            gauge.micro_step()
    optimizer.step()
    ratios, errors = [], []

    def heard(squares, whole, sizes, weights):
        seen.append(sum(w * sq for w, sq in zip(weights, squares, strict=True)) / whole)
        return two_batch(squares, whole, sizes, weights)

    monkeypatch.setattr("grgauge.gauge.statistics.two_batch", heard)
    for gauge in gauges:
        seen: list[float] = []  # what is read comes first, then what it might be with the error
        error = gauge._windows.statistics.sample_error
        error.of_groups = lambda *args, own=error.of_groups: errors.append(own(*args)) or errors[-1]
        gauge.reading()
        ratios.append(seen[0])
    assert ratios[0] == pytest.approx(4.0, rel=0.1)
    assert errors[0] == 0.0
    off = [ratio / ratios[0] - 1 for ratio in ratios[1:]]
    rms, claimed = (math.sqrt(sum(x * x for x in xs) / len(xs)) for xs in (off, errors[1:]))
    assert 0.6 < rms / claimed < 1.6


def test_a_sampled_gauge_resumes_bit_for_bit():
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gauge = Gauge(optimizer, BATCH, sample=20_000)
    train(model, [gauge], optimizer, 7)
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict(), gauge.state_dict()))
    train(model, [gauge], optimizer, 13, seed=1)
    other = Model()
    other.load_state_dict(state[0])
    its = torch.optim.SGD(other.parameters(), lr=0.1)
    its.load_state_dict(state[1])
    resumed = Gauge(its, BATCH, sample=20_000)
    resumed.load_state_dict(state[2])
    train(other, [resumed], its, 13, seed=1)
    assert resumed.reading() == gauge.reading()
    assert resumed.reading().segments == gauge.reading().segments


def test_state_of_other_parameters_leaves_a_sampled_gauge_as_it_was():
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gauge, twin = (Gauge(optimizer, BATCH, sample=20_000) for _ in range(2))
    train(model, [gauge, twin], optimizer, 10)
    small = nn.Linear(8, 8)
    its = torch.optim.SGD(small.parameters(), lr=0.1)
    stranger = Gauge(its, BATCH)
    small(torch.randn(4, 8)).sum().backward()
    its.step()
    with pytest.raises(ValueError, match="other parameters or of another sample"):
        gauge.load_state_dict(stranger.state_dict())
    train(model, [gauge, twin], optimizer, 10, seed=1)
    assert gauge.reading() == twin.reading()


@pytest.mark.parametrize("make", [torch.optim.SGD, functools.partial(AdamW, max_grad_norm=1.0)], ids=["SGD", "ours"])
def test_the_sample_costs_its_own_size_in_memory(make):
    model = Model()
    optimizer = make(model.parameters(), lr=0.1)
    gauge = Gauge(optimizer, BATCH, sample=10_000)
    train(model, [gauge], optimizer, 1)
    assert gauge.state_dict()["source"]["emas"][0].numel() < 12_000
