"""Saved, loaded, copied and pickled."""

from __future__ import annotations

import copy
import io
import pickle

import torch
from parity.training import Net, program, started, train


@program
def its_own_state_is_loaded_back(make):
    net, optimizer = started(make)
    saved = copy.deepcopy(optimizer.state_dict())
    train(net, optimizer, 3, start=3)
    optimizer.load_state_dict(saved)
    train(net, optimizer, 3, start=6)
    return optimizer, list(net.parameters())


@program
def a_state_dict_shares_memory_with_its_optimizer(make):
    net, optimizer = started(make)
    saved = optimizer.state_dict()
    train(net, optimizer, 2, start=3)
    optimizer.load_state_dict(saved)
    train(net, optimizer, 2, start=5)
    return optimizer, list(net.parameters()), [saved["state"][0]["exp_avg"]]


@program
def a_new_process_goes_on(make):
    net, optimizer = started(make)
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = Net(seed=5)
    fresh = make(other.parameters(), lr=1.0)
    other.load_state_dict(saved["net"])
    fresh.load_state_dict(saved["optimizer"])
    train(other, fresh, 3, start=3)
    return fresh, list(other.parameters()), list(net.parameters())


@program
def hooks_change_what_is_loaded(make):
    net, optimizer = started(make)
    saved = copy.deepcopy(optimizer.state_dict())

    def double(_, state_dict):
        state_dict = copy.deepcopy(state_dict)
        for state in state_dict["state"].values():
            state["exp_avg"] *= 2.0
        return state_dict

    def negate(loading):
        for state in loading.state.values():
            state["exp_avg"] = -state["exp_avg"]

    optimizer.register_load_state_dict_pre_hook(double)
    optimizer.register_load_state_dict_post_hook(negate)
    optimizer.load_state_dict(saved)
    train(net, optimizer, 3, start=3)
    return optimizer, list(net.parameters())


@program
def hooks_change_what_is_saved(make):
    net, optimizer = started(make)
    optimizer.register_state_dict_post_hook(lambda _, state_dict: {**state_dict, "mine": 1})
    return optimizer, list(net.parameters()), sorted(optimizer.state_dict())


@program
def a_state_of_other_groups_is_refused(make):
    net, optimizer = started(make)
    other = make([{"params": net.conv.parameters()}, {"params": net.head.parameters()}])
    other.load_state_dict(optimizer.state_dict())


@program
def optimizer_and_model_are_copied(make):
    net, optimizer = started(make)
    twin, other = copy.deepcopy((net, optimizer))
    train(twin, other, 3, start=3)
    train(net, optimizer, 1, start=3)
    return other, [*twin.parameters(), *net.parameters()]


@program
def optimizer_and_model_are_pickled(make):
    net, optimizer = started(make)
    twin, other = pickle.loads(pickle.dumps((net, optimizer)))
    train(twin, other, 3, start=3)
    return other, list(twin.parameters())
