"""Gradients come, go, and are out of the ordinary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from parity.training import Net, backward, data, program, started, train
from torch import nn


@program
def experts_take_turns(make):
    net = Net()
    optimizer = make(net.parameters(), lr=1e-2)
    train(net, optimizer, 8, expert=lambda t: t // 2 % 2)
    return optimizer, list(net.parameters())


@program
def experts_take_turns_under_clipping_by_torch(make):
    net = Net()
    optimizer = make(net.parameters(), lr=1e-2)
    for t in range(8):
        optimizer.zero_grad()
        backward(net, t, t % 2)
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        optimizer.step()
    return optimizer, list(net.parameters())


@program
def gradients_are_none_after_zero_grad(make):
    net, optimizer = started(make)
    optimizer.zero_grad()
    nones = [p.grad is None for p in net.parameters()]
    backward(net, 3)
    optimizer.zero_grad(set_to_none=False)
    return optimizer, list(net.parameters()), [*nones, *(p.grad for p in net.parameters())]


@program
def gradients_are_kept_as_zeros(make):
    net = Net()
    optimizer = make(net.parameters(), lr=1e-2)
    train(net, optimizer, 6, expert=lambda t: t % 2, clear=lambda own, t: own.zero_grad(set_to_none=False))
    return optimizer, list(net.parameters())


@program
def both_ways_of_zero_grad_in_turn(make):
    net = Net()
    optimizer = make(net.parameters(), lr=1e-2)
    train(
        net,
        optimizer,
        8,
        expert=lambda t: t % 2,
        clear=lambda own, t: own.zero_grad(set_to_none=t % 3 == 0),
    )
    return optimizer, list(net.parameters())


@program
def the_models_zero_grad(make):
    net = Net()
    optimizer = make(net.parameters(), lr=1e-2)
    train(net, optimizer, 6, expert=lambda t: t % 2, clear=lambda own, t: net.zero_grad(set_to_none=t % 2 == 0))
    return optimizer, list(net.parameters())


@program
def gradients_accumulate_and_are_never_zeroed(make):
    net = Net()
    optimizer = make(net.parameters(), lr=1e-2)
    for t in range(4):
        backward(net, t)
        optimizer.step()
    return optimizer, list(net.parameters())


@program
def a_parameter_is_frozen_and_thaws(make):
    net, optimizer = started(make)
    net.conv.requires_grad_(False)
    train(net, optimizer, 3, start=3)
    net.conv.requires_grad_(True)
    train(net, optimizer, 3, start=6)
    return optimizer, list(net.parameters())


@program
def a_frozen_parameter_keeps_its_gradient(make):
    net, optimizer = started(make)
    net.conv.requires_grad_(False)
    optimizer.step()
    optimizer.step()
    return optimizer, list(net.parameters())


@program
def a_gradient_is_given_other_memory(make):
    net, optimizer = started(make)
    for t in range(3, 6):
        optimizer.zero_grad(set_to_none=False)
        backward(net, t)
        for p in net.parameters():
            if p.grad is not None:
                p.grad.data = p.grad.data * 3.0
        optimizer.step()
    return optimizer, list(net.parameters())


@program
def gradients_are_set_by_hand(make):
    p, q = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(4, 3, 2))
    optimizer = make([p, q], lr=0.1)
    for t in range(5):
        p.grad = torch.arange(12.0).reshape(4, 3).t() - t
        q.grad = None if t == 2 else torch.arange(24.0).reshape(2, 3, 4).permute(2, 1, 0) + t
        optimizer.step()
    del q.grad
    optimizer.step()
    return optimizer, [p, q]


@program
def gradients_are_expanded(make):
    p = nn.Parameter(torch.ones(3, 4))
    optimizer = make([p], lr=0.1)
    for t in range(3):
        p.grad = torch.full((1,), 0.5 + t).expand(3, 4)
        optimizer.step()
    return optimizer, [p]


@program
def gradients_are_not_finite(make):
    net, optimizer = started(make)
    backward(net, 3)
    net.head.weight.grad[0, 1] = float("nan")
    net.head.bias.grad[1] = float("inf")
    optimizer.step()
    train(net, optimizer, 1, start=4)
    return optimizer, list(net.parameters())


@program
def gradients_have_a_graph_of_their_own(make):
    net = Net()
    optimizer = make(net.parameters(), lr=1e-2)
    for t in range(3):
        optimizer.zero_grad()
        x, y = data(t)
        F.cross_entropy(net(x), y).backward(create_graph=True)
        optimizer.step()
        for p in net.parameters():
            p.grad = None
    return optimizer, list(net.parameters())


@program
def a_sparse_gradient_is_refused(make):
    net = nn.Embedding(5, 3, sparse=True)
    optimizer = make(net.parameters())
    net(torch.tensor([1, 2])).sum().backward()
    optimizer.step()


@program
def no_gradient_at_all(make):
    net = Net()
    optimizer = make(net.parameters(), lr=1e-2)
    optimizer.step()
    return optimizer, list(net.parameters()), [len(optimizer.state)]


@program
def hooks_change_gradients_before_the_step(make):
    net = Net()
    optimizer = make(net.parameters(), lr=1e-2)

    def halve(hooked, args, kwargs):
        for group in hooked.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad = 0.5 * p.grad

    seen = []
    optimizer.register_step_pre_hook(halve)
    optimizer.register_step_post_hook(lambda *_: seen.append(len(seen)))
    train(net, optimizer, 4)
    return optimizer, list(net.parameters()), seen


@program
def a_closure_that_is_called_again(make):
    net = Net()
    optimizer = make(net.parameters(), lr=1e-2)
    losses = []

    def closure():
        optimizer.zero_grad()
        return backward(net, len(losses))

    for _ in range(4):
        losses.append(optimizer.step(closure).detach())
    return optimizer, list(net.parameters()), losses


@program
def an_optimizer_in_every_backward_hook(make):
    net = Net()
    optimizers = {p: make([p], lr=1e-2) for p in net.parameters()}

    def step(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in net.parameters():
        p.register_post_accumulate_grad_hook(step)
    for t in range(4):
        backward(net, t, t % 2)
    return optimizers[net.conv.weight], list(net.parameters()), [p.grad is None for p in net.parameters()]


@program
def sam_climbs_and_comes_back(make):
    net = Net()
    optimizer = make(net.parameters(), lr=1e-2)
    for t in range(3):
        optimizer.zero_grad()
        backward(net, t)
        moved = [(p, p.detach().clone(), p.grad) for p in net.parameters() if p.grad is not None]
        for p, _, grad in moved:
            p.data.add_(grad, alpha=0.1)
        optimizer.zero_grad()
        backward(net, t)
        for p, before, _ in moved:
            p.data = before
        optimizer.step()
    return optimizer, list(net.parameters())
