"""grgauge.AdamW against torch.optim.AdamW, on the same gradients."""

from __future__ import annotations

import copy

import pytest
import torch
import truth
from optim.stepping import FLAT, advance, assert_close, gradients, parameters
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import grgauge
from grgauge import AdamW
from grgauge_kernels.backends import cpu

OPTIONS = [
    {},
    {"lr": 1e-2, "weight_decay": 0.1},
    {"betas": (0.8, 0.95), "eps": 1e-6},
    {"betas": (0.0, 0.5), "weight_decay": 0.0},
    {"maximize": True},
    {"lr": torch.tensor(3e-3)},
    {"eps": 1e-3},
    {"lr": 0.0},
]


@FLAT
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_hundred_steps_end_where_torch_ends(options, flat):
    ours, theirs = parameters(), parameters()
    advance(AdamW(ours, flat=flat, **options), ours, 100)
    advance(torch.optim.AdamW(theirs, **options), theirs, 100)
    assert_close(ours, theirs)


@FLAT
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_the_truth_as_torch(dtype, flat):
    """The distance to float64 after 50 steps is no more than torch's own, but for chance."""
    ours, theirs = parameters(dtype=dtype), parameters(dtype=dtype)
    twins = [truth.Adamw(p.detach().double(), torch.zeros(()), torch.zeros(())) for p in ours]
    options = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    advance(AdamW(ours, flat=flat, **options), ours, 50)
    advance(torch.optim.AdamW(theirs, fused=True, **options), theirs, 50)
    for t in range(50):
        for twin, g in zip(twins, gradients(t, ours), strict=True):
            twin.step(g, t + 1, **options)
    exact = torch.cat([twin.param.flatten() for twin in twins])
    off, off_torch = (
        float((torch.cat([p.detach().double().flatten() for p in params]) - exact).norm()) for params in (ours, theirs)
    )
    assert off <= 1.05 * off_torch


@FLAT
def test_param_groups_and_a_scheduler(flat):
    def train(make):
        params = parameters()
        optimizer = make([{"params": params[:2]}, {"params": params[2:], "lr": 1e-2, "weight_decay": 0.0}])
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[1e-2, 2e-2], total_steps=40)
        for t in range(30):
            advance(optimizer, params, 1, start=t)
            scheduler.step()
        return params

    assert_close(train(lambda g: AdamW(g, flat=flat)), train(torch.optim.AdamW))


@FLAT
def test_a_parameter_without_gradient_is_left_alone(flat):
    """As in torch: no update, no decay, no step counted; others go on."""

    def train(make):
        params = parameters()
        optimizer = make(params)
        for t in range(6):
            for i, (p, g) in enumerate(zip(params, gradients(t, params), strict=True)):
                p.grad = g if i != 2 or t in (2, 4) else None
            optimizer.step()
        return params, [float(optimizer.state[p]["step"]) for p in params]

    ours, steps = train(lambda p: AdamW(p, flat=flat))
    theirs, torch_steps = train(torch.optim.AdamW)
    assert_close(ours, theirs)
    assert steps == torch_steps == [6, 6, 2, 6, 6, 6]


@FLAT
def test_no_gradient_at_all_is_no_step(flat):
    params = parameters()
    before = [p.detach().clone() for p in params]
    AdamW(params, flat=flat).step()
    assert all(map(torch.equal, params, before))


@FLAT
def test_a_frozen_parameter_that_thaws_joins(flat):
    ours, theirs = parameters(), parameters()
    for params in (ours, theirs):
        params[0].requires_grad_(False)
    pairs = [(AdamW(ours, flat=flat), ours), (torch.optim.AdamW(theirs), theirs)]
    for optimizer, params in pairs:
        advance(optimizer, params[1:], 3)
        params[0].requires_grad_(True)
        advance(optimizer, params, 3, start=3)
    assert_close(ours, theirs)


@FLAT
def test_closure_and_zero_grad(flat):
    torch.manual_seed(0)
    net = nn.Linear(5, 3)
    x = torch.randn(7, 5)
    optimizer = AdamW(net.parameters(), lr=1e-2, flat=flat)
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        return loss.item()

    for _ in range(40):
        losses.append(optimizer.step(closure))
    assert losses[-1] < 0.2 * losses[0]
    optimizer.zero_grad()
    assert all(p.grad is None for p in net.parameters())
    net(x).square().mean().backward()
    optimizer.zero_grad(set_to_none=False)
    assert all((p.grad == 0).all() for p in net.parameters())
    assert flat == (len({p.grad.untyped_storage().data_ptr() for p in net.parameters()}) == 1)


@FLAT
@pytest.mark.parametrize("explicit_unscale", [False, True])
def test_grad_scaler(flat, explicit_unscale):
    """Scaled, unscaled and skipped steps end where unscaled training ends; a skipped step changes nothing."""

    def train(make, scaled):
        torch.manual_seed(0)
        net = nn.Linear(6, 4)
        optimizer = make(net.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=3, enabled=scaled)
        for t in range(12):
            x = torch.randn(5, 6, generator=torch.Generator().manual_seed(t))
            optimizer.zero_grad()
            loss = scaler.scale(net(x).square().mean())
            loss.backward()
            if t in (4, 9):
                if scaled:
                    net.weight.grad[1, 2] = float("inf")
                else:
                    continue
            if explicit_unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        return list(net.parameters()), optimizer

    ours, optimizer = train(lambda p: AdamW(p, lr=1e-2, flat=flat), scaled=True)
    theirs, _ = train(lambda p: torch.optim.AdamW(p, lr=1e-2), scaled=False)
    assert_close(ours, theirs)
    assert {float(s["step"]) for s in optimizer.state.values()} == {10.0}


@FLAT
def test_channels_last_and_gradients_of_another_layout(flat):
    def train(make):
        torch.manual_seed(0)
        net = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
        optimizer = make(net.parameters())
        for t in range(4):
            for p in net.parameters():
                g = torch.randn(p.shape, generator=torch.Generator().manual_seed(t))  # contiguous, unlike the weight
                p.grad = g if p.grad is None else p.grad.copy_(g)
            optimizer.step()
        return list(net.parameters())

    assert_close(train(lambda p: AdamW(p, flat=flat)), train(torch.optim.AdamW))


def test_tied_weights_move_once():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False))
    net[1].weight = net[0].weight
    twin = copy.deepcopy(net)
    for n, o in ((net, AdamW(net.parameters(), flat=True)), (twin, torch.optim.AdamW(twin.parameters()))):
        for _ in range(3):
            o.zero_grad()
            n(torch.arange(7)).square().mean().backward()
            o.step()
    assert net[1].weight is net[0].weight
    assert_close(net.parameters(), twin.parameters())


@FLAT
@pytest.mark.parametrize("options", [{}, {"betas": (0.5, 0.9)}, {"maximize": True}], ids=str)
def test_a_gauged_run_ends_in_the_same_bits(options, flat):
    plain, gauged = parameters(), parameters()
    advance(AdamW(plain, flat=flat, **options), plain, 25)
    optimizer = AdamW(gauged, flat=flat, **options)
    gauge = grgauge.Gauge(optimizer, 32)
    advance(optimizer, gauged, 25)
    assert gauge.reading().step == 25
    assert all(map(torch.equal, plain, gauged))


@FLAT
def test_nonfinite_gradients_do_what_they_do_in_torch(flat):
    def train(make):
        params = parameters()
        optimizer = make(params)
        for t in range(3):
            for p, g in zip(params, gradients(t, params), strict=True):
                if t == 1 and g.numel() > 40:
                    g.view(-1)[[3, 40]] = torch.tensor([float("nan"), float("inf")])
                p.grad = g if p.grad is None else p.grad.copy_(g)
            optimizer.step()
        return params

    for p, q in zip(train(lambda p: AdamW(p, flat=flat)), train(torch.optim.AdamW), strict=True):
        assert torch.equal(p.isfinite(), q.isfinite())
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7, equal_nan=True)


def test_hooks_run_once_and_the_profiler_sees_the_step():
    params = parameters()
    optimizer = AdamW(params)
    called = []
    hooks = [
        optimizer.register_step_pre_hook(lambda *_: called.append("pre")),
        optimizer.register_step_post_hook(lambda *_: called.append("post")),
        register_optimizer_step_pre_hook(lambda *_: called.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: called.append("global post")),
    ]
    advance(optimizer, params, 1)
    assert sorted(called) == ["global post", "global pre", "post", "pre"]
    for hook in hooks:
        hook.remove()
    advance(optimizer, params, 1, start=1)
    assert len(called) == 4
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, acc_events=True) as profile:  # without, torch 2.11 warns
        advance(optimizer, params, 1, start=2)
    assert "Optimizer.step#AdamW.step" in {event.name for event in profile.events()}


@FLAT
def test_a_graph_from_before_the_step_refuses_its_backward(flat):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = AdamW(net.parameters(), flat=flat)
    loss = net(torch.randn(2, 3)).square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    optimizer.zero_grad()
    stale = net(torch.randn(2, 3)).square().sum()
    stale.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


def test_one_kernel_call_a_bucket(monkeypatch):
    calls = []
    run = cpu._run
    monkeypatch.setattr(cpu, "_run", lambda op, task: (calls.append(op), run(op, task)))
    params = [nn.Parameter(torch.randn(10)) for _ in range(300)]
    optimizer = AdamW(params, flat=True)
    gauge = grgauge.Gauge(optimizer, 8)
    advance(optimizer, params, 5)
    assert calls == ["adamw_"] * 5
    assert gauge.reading() is not None
