"""grgauge.AdamW against torch.optim.AdamW, on the same gradients."""

from __future__ import annotations

import copy
import io
import weakref

import pytest
import torch
import truth
from optim.stepping import FLAT, advance, assert_close, gradients, parameters, two_dtypes
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
def test_state_dict_goes_both_ways_mid_training(flat):
    def fresh(make):
        params = parameters(seed=5)
        return make(params), params

    torch_optimizer, straight = fresh(torch.optim.AdamW)
    advance(torch_optimizer, straight, 20)

    first, ours = fresh(lambda p: AdamW(p, flat=flat))
    advance(first, ours, 10)
    second, theirs = fresh(torch.optim.AdamW)
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        for p, q in zip(theirs, ours, strict=True):
            p.copy_(q)
    advance(second, theirs, 5, start=10)
    third, again = fresh(lambda p: AdamW(p, flat=flat))
    file = io.BytesIO()
    torch.save(second.state_dict(), file)
    file.seek(0)
    third.load_state_dict(torch.load(file))
    with torch.no_grad():
        for p, q in zip(again, theirs, strict=True):
            p.copy_(q)
    advance(third, again, 5, start=15)
    assert_close(again, straight)
    assert third.state_dict().keys() == torch_optimizer.state_dict().keys()
    assert third.state_dict()["state"].keys() == torch_optimizer.state_dict()["state"].keys()
    assert third.state_dict()["param_groups"][0].keys() == torch_optimizer.state_dict()["param_groups"][0].keys()


@FLAT
def test_resuming_from_ones_own_state_dict_is_exact(flat):
    """Also in bfloat16, where torch's loading would round the float32 moments."""
    for dtype in (torch.float32, torch.bfloat16):
        straight, resumed = parameters(dtype=dtype), parameters(dtype=dtype)
        optimizer = AdamW(straight, flat=flat)
        advance(optimizer, straight, 7)
        other = AdamW(resumed, flat=flat)
        state = copy.deepcopy(optimizer.state_dict())
        other.load_state_dict(state)
        with torch.no_grad():
            for p, q in zip(resumed, straight, strict=True):
                p.copy_(q)
        advance(other, resumed, 4, start=7)
        saved = state["state"][0]["exp_avg"].clone()
        advance(optimizer, straight, 4, start=7)
        assert all(map(torch.equal, resumed, straight))
        assert torch.equal(state["state"][0]["exp_avg"], saved)  # nothing is shared with what was loaded


def test_loading_into_a_running_flat_optimizer_takes_effect():
    params = parameters()
    optimizer = AdamW(params, flat=True)
    advance(optimizer, params, 3)
    early = copy.deepcopy(optimizer.state_dict())
    values = [p.detach().clone() for p in params]
    advance(optimizer, params, 3, start=3)
    ahead = [p.detach().clone() for p in params]
    optimizer.load_state_dict(early)
    with torch.no_grad():
        for p, value in zip(params, values, strict=True):
            p.copy_(value)
    advance(optimizer, params, 3, start=3)
    assert all(map(torch.equal, params, ahead))


@FLAT
def test_deepcopy_goes_on_alike(flat):
    net = nn.Linear(20, 20)
    optimizer = AdamW(net.parameters(), flat=flat)
    advance(optimizer, list(net.parameters()), 3)
    twin_net, twin = copy.deepcopy((net, optimizer))
    for n, o in ((net, optimizer), (twin_net, twin)):
        advance(o, list(n.parameters()), 3, start=3)
    assert all(map(torch.equal, net.parameters(), twin_net.parameters()))


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


def test_flat_gradients_stay_in_their_buffer_and_moments_share_one():
    net = nn.Sequential(nn.Linear(9, 5), nn.Linear(5, 3))
    optimizer = AdamW(net.parameters(), flat=True)
    places = set()
    for _ in range(4):
        optimizer.zero_grad(set_to_none=False)
        net(torch.ones(4, 9)).square().mean().backward()
        optimizer.step()
        places.add(tuple(p.grad.data_ptr() for p in net.parameters()))
    assert len(places) == 2  # those of the first backward, and the buffer's
    for name in ("exp_avg", "exp_avg_sq"):
        assert len({state[name].untyped_storage().data_ptr() for state in optimizer.state.values()}) == 1
    assert len({p.untyped_storage().data_ptr() for p in net.parameters()}) == 4


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


def test_adding_a_group_keeps_what_was_learned():
    ours, theirs = parameters(), parameters()
    for params, make in ((ours, lambda p: AdamW(p, flat=True)), (theirs, torch.optim.AdamW)):
        optimizer = make(params[:3])
        advance(optimizer, params[:3], 4)
        optimizer.add_param_group({"params": params[3:], "lr": 1e-2})
        advance(optimizer, params, 4, start=4)
    assert_close(ours, theirs)


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


def test_bad_clipping_options_are_named():
    with pytest.raises(ValueError, match=r"max_grad_norm is 0\.0; it must be above 0"):
        AdamW(parameters(), max_grad_norm=0.0)
    with pytest.raises(ValueError, match="skip_nonfinite=True needs max_grad_norm"):
        AdamW(parameters(), skip_nonfinite=True)


@FLAT
def test_sparse_gradients_are_refused_before_anything_changes(flat):
    net = nn.Sequential(nn.Linear(3, 4), nn.Embedding(5, 3, sparse=True))
    optimizer = AdamW(net.parameters(), flat=flat)
    net[0](net[1](torch.tensor([1, 2]))).sum().backward()
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert all(map(torch.equal, net.parameters(), before))


def test_moments_of_another_shape_are_refused_before_anything_changes():
    params = parameters()
    optimizer = AdamW(params)
    advance(optimizer, params, 2)
    before = [p.detach().clone() for p in params]
    optimizer.state[params[0]]["exp_avg"] = torch.zeros(3)
    with pytest.raises(
        ValueError, match=r"state\[p\]\['exp_avg'\] has shape \(3,\) for a parameter of shape \(64, 33\)"
    ):
        optimizer.step()
    assert all(map(torch.equal, params, before))
    assert float(optimizer.state[params[1]]["step"]) == 2.0


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


@FLAT
@pytest.mark.parametrize("bucket", [0, 1])
def test_out_of_memory_for_any_bucket_leaves_all_of_them_as_they_were(flat, bucket, monkeypatch):
    """Memory for all buckets is taken before the first of them changes."""
    params = parameters()
    optimizer = AdamW([{"params": params[:1]}, {"params": params[1:], "lr": 1e-4}], flat=flat)
    advance(optimizer, params, 2)
    before = copy.deepcopy(optimizer.state_dict()["state"]), [p.detach().clone() for p in params]
    prepare, calls = cpu.prepare_adamw_, []

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) > bucket:
            raise torch.OutOfMemoryError("out of memory")
        return prepare(*args, **kwargs)

    monkeypatch.setattr(cpu, "prepare_adamw_", fail)
    with pytest.raises(torch.OutOfMemoryError, match="adamw_: out of memory"):
        optimizer.step()
    monkeypatch.undo()
    assert all(map(torch.equal, params, before[1]))
    for i, kept in before[0].items():
        assert all(torch.equal(value, optimizer.state_dict()["state"][i][key]) for key, value in kept.items())


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


REFUSED = {
    "betas": lambda group: group.update(betas=(1.0, 0.999)),
    "lr of integers": lambda group: group.update(lr=torch.tensor(1)),
    "another size": lambda group: setattr(group["params"][0], "data", torch.zeros(3, dtype=torch.bfloat16)),
    "no dense gradient": lambda group: setattr(group["params"][1], "grad", torch.zeros(33).bfloat16().to_sparse()),
}


@pytest.mark.parametrize("spoil", REFUSED.values(), ids=REFUSED.keys())
def test_what_a_later_group_is_refused_for_leaves_all_groups_as_they_were(spoil):
    params, groups = two_dtypes()
    optimizer = AdamW(groups)
    seen = []
    advance(optimizer, params, 2)
    optimizer.observe(seen.append)
    states = [{name: value.clone() for name, value in optimizer.state[p].items()} for p in params]
    values = [p.detach().clone() for p in params]
    spoil(optimizer.param_groups[1])
    with pytest.raises((ValueError, RuntimeError)):
        optimizer.step()
    assert all(map(torch.equal, params[:6], values))
    for p, state in zip(params, states, strict=True):
        assert all(torch.equal(value, optimizer.state[p][name]) for name, value in state.items())
    assert {float(s["step"]) for s in optimizer.state.values()} == {2.0}
    assert seen == []


def test_gradients_set_to_none_give_their_memory_back():
    net = nn.Linear(20, 20)
    optimizer = AdamW(net.parameters())
    grgauge.Gauge(optimizer, 8, every=2)
    net(torch.ones(1, 20)).sum().backward()
    held = weakref.ref(net.weight.grad)
    optimizer.step()
    optimizer.zero_grad()
    assert held() is None


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
