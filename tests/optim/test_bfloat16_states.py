"""Moments in bfloat16 and bfloat16 parameters, both rounded stochastically."""

from __future__ import annotations

import copy

import pytest
import torch
from optim.stepping import FLAT, advance, assert_close, parameters
from torch import nn

from grgauge import AdamW, Gauge

BF16 = {"state_dtype": torch.bfloat16}


@FLAT
def test_moments_are_bfloat16_and_training_goes_where_float32_moments_lead(flat):
    ours, theirs = parameters(), parameters()
    begun = [p.detach().clone() for p in theirs]
    optimizer = AdamW(ours, lr=1e-2, flat=flat, **BF16)
    advance(optimizer, ours, 60)
    advance(torch.optim.AdamW(theirs, lr=1e-2), theirs, 60)
    assert {s[name].dtype for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")} == {torch.bfloat16}
    for p, q, before in zip(ours, theirs, begun, strict=True):
        moved = (q - before).norm()
        assert (p - q).norm() <= 0.02 * moved


@FLAT
def test_the_same_bits_on_every_run_and_after_a_resume(flat):
    def train(save_at):
        params = parameters()
        optimizer = AdamW(params, flat=flat, **BF16)
        advance(optimizer, params, save_at)
        other = AdamW(params, flat=flat, **BF16)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        advance(other, params, 12 - save_at, start=save_at)
        return params

    assert all(map(torch.equal, train(4), train(9)))


def test_states_go_to_torch_and_back():
    """torch casts what it loads to the parameter's dtype: float32 here, which holds every bfloat16."""
    params, others = parameters(), parameters()
    ours, theirs = AdamW(params, **BF16), torch.optim.AdamW(others, fused=True)
    advance(ours, params, 5)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
        for name in ("exp_avg", "exp_avg_sq"):
            assert theirs.state[q][name].dtype == torch.float32
            assert torch.equal(theirs.state[q][name], ours.state[p][name].float())
    advance(theirs, others, 1, start=5)
    advance(ours, params, 1, start=5)
    assert_close(params, others, tolerance=1e-6)  # an update takes moments as they are before they are rounded

    back = AdamW(others, **BF16)
    back.load_state_dict(copy.deepcopy(theirs.state_dict()))
    advance(back, others, 1, start=6)
    for q in others:
        assert back.state[q]["exp_avg"].dtype == torch.bfloat16
        assert float(back.state[q]["step"]) == 7.0


def test_small_updates_of_bfloat16_parameters_are_not_lost():
    """An update of a twentieth of a place: to nearest nothing moves, stochastically the mean does as in float32."""

    def train(**options):
        p = nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
        optimizer = AdamW([p], lr=4e-4, weight_decay=0.0, **options)
        for _ in range(100):
            p.grad = torch.ones_like(p)
            optimizer.step()
        return float(p.detach().double().mean())

    assert train() == 1.0
    assert train(stochastic_rounding=True, **BF16) == pytest.approx(1.0 - 100 * 4e-4, abs=2e-3)


def test_a_gauge_reads_the_same_within_its_error():
    readings = []
    for options in ({}, BF16):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(20, 200), nn.Tanh(), nn.Linear(200, 1))
        optimizer = AdamW(net.parameters(), lr=1e-3, **options)
        gauge = Gauge(optimizer, 32)
        for t in range(60):
            x = torch.randn(32, 20, generator=torch.Generator().manual_seed(t))
            optimizer.zero_grad()
            (net(x) - x[:, :1].sin()).square().mean().backward()
            optimizer.step()
        readings.append(gauge.reading())
    plain, rounded = readings
    assert rounded.gr_t == pytest.approx(plain.gr_t, abs=plain.gr_t_error)
    assert rounded.gr_t == pytest.approx(plain.gr_t, rel=0.02)


def test_a_gauged_run_ends_in_the_same_bits():
    plain, gauged = parameters(dtype=torch.bfloat16), parameters(dtype=torch.bfloat16)
    options = {"stochastic_rounding": True, **BF16}
    advance(AdamW(plain, **options), plain, 10)
    optimizer = AdamW(gauged, **options)
    gauge = Gauge(optimizer, 8)
    advance(optimizer, gauged, 10)
    assert gauge.reading() is not None
    assert all(map(torch.equal, plain, gauged))


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"state_dtype is torch\.float16; it must be"):
        AdamW(parameters(), state_dtype=torch.float16)


def test_stochastic_rounding_leaves_float32_parameters_as_they_are():
    ours, theirs = parameters(), parameters()
    advance(AdamW(ours, stochastic_rounding=True), ours, 5)
    advance(AdamW(theirs), theirs, 5)
    assert_close(ours, theirs, tolerance=0.0)
