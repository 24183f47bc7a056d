"""Parameters and groups change."""

from __future__ import annotations

import torch
from parity.training import Net, program, started, train
from torch import nn


@program
def a_parameter_is_replaced_and_its_state_moved(make):
    net, optimizer = started(make)
    old = net.head.weight
    new = nn.Parameter(old.detach() * 1.5)
    group = optimizer.param_groups[0]
    i = next(i for i, p in enumerate(group["params"]) if p is old)
    state = optimizer.state.pop(old)
    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(new), torch.zeros_like(new)
    group["params"][i], optimizer.state[new], net.head.weight = new, state, new
    train(net, optimizer, 3, start=3)
    return optimizer, [*net.parameters(), old]


@program
def a_layer_grows_with_its_state(make):
    net, optimizer = started(make)
    group = optimizer.param_groups[0]
    old = net.experts[0].weight
    new = nn.Parameter(torch.cat([old.detach(), 0.01 * torch.ones(2, 8)]))
    state = optimizer.state.pop(old)
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = torch.cat([state[name], torch.zeros(2, 8)])
    group["params"] = [new if p is old else p for p in group["params"]]
    optimizer.state[new] = state
    for t in range(3):
        new.grad = torch.full_like(new, 0.1 * t)
        optimizer.step()
    return optimizer, [new, old]


@program
def a_parameter_is_cut_in_place_with_its_state(make):
    net, optimizer = started(make)
    p = net.experts[0].weight
    p.grad, p.data = None, p.data[:5]
    for name in ("exp_avg", "exp_avg_sq"):
        optimizer.state[p][name] = optimizer.state[p][name][:5]
    for t in range(3):
        p.grad = torch.full_like(p, 0.1 + t)
        optimizer.step()
    return optimizer, [p]


@program
def columns_are_cut_which_leaves_gaps(make):
    net, optimizer = started(make)
    p = net.experts[0].weight
    p.grad, p.data = None, p.data[:, 2:5]
    for name in ("exp_avg", "exp_avg_sq"):
        optimizer.state[p][name] = optimizer.state[p][name][:, 2:5].clone()
    for t in range(3):
        p.grad = torch.full((8, 3), 0.1 + t)
        optimizer.step()
    return optimizer, [p]


@program
def a_parameter_with_gaps_from_the_start(make):
    whole = torch.arange(24.0).reshape(4, 6)
    p = nn.Parameter(whole[:, ::2])
    optimizer = make([p], lr=0.1)
    for t in range(4):
        p.grad = torch.cos(torch.arange(12.0) + t).reshape(4, 3)
        optimizer.step()
    return optimizer, [p], whole


@program
def a_parameter_is_appended_to_a_group(make):
    net = Net()
    optimizer = make([net.conv.weight, net.conv.bias], lr=1e-2)
    train(net, optimizer, 3)
    optimizer.param_groups[0]["params"].append(net.head.weight)
    train(net, optimizer, 3, start=3)
    return optimizer, list(net.parameters())


@program
def a_parameter_is_taken_from_a_group(make):
    net, optimizer = started(make)
    del optimizer.param_groups[0]["params"][2]
    train(net, optimizer, 3, start=3)
    return optimizer, list(net.parameters())


@program
def a_group_is_deleted(make):
    net = Net()
    optimizer = make([{"params": net.conv.parameters()}, {"params": net.head.parameters(), "lr": 1e-1}], lr=1e-2)
    train(net, optimizer, 3)
    del optimizer.param_groups[1]
    train(net, optimizer, 3, start=3)
    return optimizer, list(net.parameters())


@program
def groups_are_replaced_by_copies_and_then_given_another_lr(make):
    net, optimizer = started(make)
    optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
    optimizer.param_groups[0]["lr"] = 1e-1
    train(net, optimizer, 3, start=3)
    return optimizer, list(net.parameters())


@program
def groups_swap_their_parameters(make):
    net = Net()
    optimizer = make([{"params": net.conv.parameters()}, {"params": net.head.parameters(), "lr": 1e-1}], lr=1e-2)
    train(net, optimizer, 3)
    a, b = optimizer.param_groups
    a["params"], b["params"] = b["params"], a["params"]
    train(net, optimizer, 3, start=3)
    return optimizer, list(net.parameters())


@program
def a_group_is_added_in_mid_run(make):
    net = Net()
    optimizer = make(net.conv.parameters(), lr=1e-2)
    train(net, optimizer, 3)
    optimizer.add_param_group({"params": net.head.parameters(), "lr": 1e-1, "betas": (0.5, 0.9), "weight_decay": 0.3})
    train(net, optimizer, 3, start=3)
    return optimizer, list(net.parameters())


@program
def options_of_a_group_change(make):
    net, optimizer = started(make)
    group = optimizer.param_groups[0]
    for changes in ({"lr": 1e-1}, {"betas": (0.5, 0.7)}, {"weight_decay": 0.5}, {"eps": 1e-2}, {"maximize": True}):
        group.update(changes)
        train(net, optimizer, 1, start=len(changes))
    return optimizer, list(net.parameters())


@program
def named_parameters_in_groups(make):
    net = Net()
    named = list(net.named_parameters())
    optimizer = make([{"params": named[:3]}, {"params": named[3:], "lr": 1e-1}], lr=1e-2)
    train(net, optimizer, 3)
    return optimizer, list(net.parameters())


@program
def a_parameter_given_twice(make):
    p = nn.Parameter(torch.ones(3))
    make([{"params": [p]}, {"params": [p]}])


@program
def no_parameters(make):
    make([])


@program
def a_tensor_where_a_list_is_due(make):
    make(torch.ones(3, requires_grad=True))


@program
def what_is_no_leaf(make):
    make([torch.ones(3, requires_grad=True) * 2])
