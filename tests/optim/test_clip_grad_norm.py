"""Clipping inside the step: torch's clip_grad_norm_ and its fused step, in two passes."""

from __future__ import annotations

import copy

import pytest
import torch
from optim.stepping import FLAT, advance, assert_close, gradients, parameters
from torch import nn

from grgauge import AdamW


def test_bad_clipping_options_are_named():
    with pytest.raises(ValueError, match=r"max_grad_norm is 0\.0; it must be above 0"):
        AdamW(parameters(), max_grad_norm=0.0)
    with pytest.raises(ValueError, match="skip_nonfinite=True needs max_grad_norm"):
        AdamW(parameters(), skip_nonfinite=True)


@FLAT
def test_clipping_counts_gradients_that_torch_updates(flat):
    """float64 parameters are torch's to update; their gradients belong to the norm, and are clipped by it."""

    def train(make, clip):
        params = [nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(3, dtype=torch.float64))]
        optimizer = make(params)
        for t in range(5):
            for p in params:
                p.grad = torch.full_like(p, 2.0 + t)
            clip(params)
            optimizer.step()
        return params, optimizer

    ours, optimizer = train(lambda p: AdamW(p, lr=1e-2, max_grad_norm=0.5, flat=flat), lambda _: None)
    theirs, _ = train(
        lambda p: torch.optim.AdamW(p, lr=1e-2), lambda params: nn.utils.clip_grad_norm_(params, 0.5, foreach=False)
    )
    assert_close(ours, theirs)
    assert float(optimizer.grad_norm) == pytest.approx(6.0 * 8**0.5, rel=1e-6)


@FLAT
@pytest.mark.parametrize("max_norm", [0.5, 80.0, 1e9])
def test_clipping_inside_the_step_equals_clip_grad_norm(max_norm, flat):
    ours, theirs = parameters(), parameters()
    optimizer = AdamW(ours, lr=1e-2, max_grad_norm=max_norm, flat=flat)
    reference = torch.optim.AdamW(theirs, lr=1e-2)
    for t in range(50):
        for p, q, g in zip(ours, theirs, gradients(t, theirs, scale=1.0 + (t % 3)), strict=True):
            p.grad = g.clone() if p.grad is None else p.grad.copy_(g)
            q.grad = g
        norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        reference.step()
        optimizer.step()
        assert float(optimizer.grad_norm) == pytest.approx(float(norm), rel=1e-5)
    assert_close(ours, theirs)


@FLAT
@pytest.mark.parametrize("bad", [{3: float("inf")}, {3: float("nan")}, {3: float("inf"), 4: -float("inf")}, {3: 3e16}])
def test_clipping_meets_nonfinite_norms_as_clip_grad_norm_does(bad, flat):
    ours, theirs = parameters(), parameters()
    optimizer = AdamW(ours, max_grad_norm=1.0, flat=flat)
    reference = torch.optim.AdamW(theirs)
    for t in range(3):
        made = gradients(t, theirs)
        if t == 1:
            for place, value in bad.items():
                made[2][place] = value
        for p, q, g in zip(ours, theirs, made, strict=True):
            p.grad = g.clone() if p.grad is None else p.grad.copy_(g)
            q.grad = g
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        reference.step()
        optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7, equal_nan=True)


@FLAT
def test_a_step_whose_norm_is_not_finite_can_be_skipped(flat):
    params = parameters()
    optimizer = AdamW(params, max_grad_norm=1.0, skip_nonfinite=True, flat=flat)
    advance(optimizer, params, 3)
    before = [p.detach().clone() for p in params]
    state = copy.deepcopy(optimizer.state_dict()["state"])
    params[2].grad[7] = float("nan")
    optimizer.step()
    assert all(map(torch.equal, params, before))
    for i, kept in state.items():
        assert all(torch.equal(value, optimizer.state_dict()["state"][i][key]) for key, value in kept.items())
    assert not optimizer.grad_norm.isfinite()
    advance(optimizer, params, 1, start=3)
    assert not torch.equal(params[2], before[2])
    assert {float(s["step"]) for s in optimizer.state.values()} == {4.0}


def test_clipping_under_a_grad_scaler_sees_the_unscaled_norm():
    def train(scaled):
        torch.manual_seed(0)
        net = nn.Linear(6, 4)
        optimizer = AdamW(net.parameters(), lr=1e-2, max_grad_norm=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3, enabled=scaled)
        for t in range(8):
            optimizer.zero_grad()
            x = torch.randn(5, 6, generator=torch.Generator().manual_seed(t))
            scaler.scale(net(x).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        return list(net.parameters()), float(optimizer.grad_norm)

    (ours, norm), (plain, plain_norm) = train(True), train(False)
    assert_close(ours, plain)
    assert norm == pytest.approx(plain_norm, rel=1e-5)
