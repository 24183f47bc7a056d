"""What the optimizer keeps: saved, loaded, copied, in one buffer, and given back."""

from __future__ import annotations

import copy
import io
import weakref

import torch
from optim.stepping import FLAT, advance, assert_close, parameters
from torch import nn

import grgauge
from grgauge import AdamW


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


def test_adding_a_group_keeps_what_was_learned():
    ours, theirs = parameters(), parameters()
    for params, make in ((ours, lambda p: AdamW(p, flat=True)), (theirs, torch.optim.AdamW)):
        optimizer = make(params[:3])
        advance(optimizer, params[:3], 4)
        optimizer.add_param_group({"params": params[3:], "lr": 1e-2})
        advance(optimizer, params, 4, start=4)
    assert_close(ours, theirs)


def test_gradients_set_to_none_give_their_memory_back():
    net = nn.Linear(20, 20)
    optimizer = AdamW(net.parameters())
    grgauge.Gauge(optimizer, 8, every=2)
    net(torch.ones(1, 20)).sum().backward()
    held = weakref.ref(net.weight.grad)
    optimizer.step()
    optimizer.zero_grad()
    assert held() is None
