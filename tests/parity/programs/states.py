"""States change."""

from __future__ import annotations

import collections

import torch
from parity.training import Net, program, started, train


@program
def one_state_is_emptied(make):
    net, optimizer = started(make)
    optimizer.state[net.conv.weight] = {}
    train(net, optimizer, 3, start=3)
    return optimizer, list(net.parameters())


@program
def one_state_is_popped(make):
    net, optimizer = started(make)
    optimizer.state.pop(net.conv.weight)
    train(net, optimizer, 3, start=3)
    return optimizer, list(net.parameters())


@program
def all_states_are_cleared(make):
    net, optimizer = started(make)
    optimizer.state.clear()
    train(net, optimizer, 3, start=3)
    return optimizer, list(net.parameters())


@program
def state_is_a_new_dict(make):
    net, optimizer = started(make)
    optimizer.state = collections.defaultdict(dict)
    train(net, optimizer, 3, start=3)
    return optimizer, list(net.parameters())


@program
def a_moment_is_replaced(make):
    net, optimizer = started(make)
    moment = torch.full_like(net.conv.weight, 0.01)
    optimizer.state[net.conv.weight]["exp_avg"] = moment
    train(net, optimizer, 3, start=3)
    return optimizer, list(net.parameters()), [moment, optimizer.state[net.conv.weight]["exp_avg"] is moment]


@program
def a_moment_is_replaced_by_one_of_another_layout(make):
    net, optimizer = started(make)
    state = optimizer.state[net.head.weight]
    state["exp_avg_sq"] = state["exp_avg_sq"].t().contiguous().t()
    train(net, optimizer, 3, start=3)
    return optimizer, list(net.parameters())


@program
def a_moment_is_written_to(make):
    net, optimizer = started(make)
    for state in optimizer.state.values():
        state["exp_avg"].mul_(-1.0)
        state["exp_avg_sq"][...] = state["exp_avg_sq"] * 4.0
    train(net, optimizer, 3, start=3)
    return optimizer, list(net.parameters())


@program
def a_moment_is_given_other_memory(make):
    net, optimizer = started(make)
    for state in optimizer.state.values():
        state["exp_avg"].data = state["exp_avg"].data * 2.0
    train(net, optimizer, 3, start=3)
    return optimizer, list(net.parameters())


@program
def steps_are_set(make):
    net, optimizer = started(make)
    optimizer.state[net.conv.weight]["step"] = torch.tensor(500.0)
    optimizer.state[net.conv.bias]["step"] += 20
    optimizer.state[net.head.weight]["step"].fill_(7.0)
    train(net, optimizer, 3, start=3)
    return optimizer, list(net.parameters())


@program
def a_state_has_something_of_the_users(make):
    net, optimizer = started(make)
    for state in optimizer.state.values():
        state["mine"] = torch.ones(2)
    train(net, optimizer, 3, start=3)
    return optimizer, list(net.parameters()), sorted({name for s in optimizer.state.values() for name in s})


@program
def states_are_as_lazy_as_torchs(make):
    net = Net()
    optimizer = make(net.parameters(), lr=1e-2)
    before = len(optimizer.state)
    train(net, optimizer, 2, expert=lambda t: 1)
    return optimizer, list(net.parameters()), [before, len(optimizer.state), net.experts[0].weight in optimizer.state]
