"""Options, schedulers, loss scaling and averages."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from parity.training import PROGRAMS, Net, data, program, started, train
from torch import nn
from torch.optim import lr_scheduler, swa_utils


@program
def amsgrad(make):
    net, optimizer = started(make, steps=6, amsgrad=True)
    return optimizer, list(net.parameters())


@program
def amsgrad_in_one_group(make):
    net = Net()
    optimizer = make([{"params": net.conv.parameters()}, {"params": net.head.parameters(), "amsgrad": True}], lr=1e-2)
    train(net, optimizer, 5)
    return optimizer, list(net.parameters())


@program
def amsgrad_switched_on_too_late(make):
    net, optimizer = started(make)
    optimizer.param_groups[0]["amsgrad"] = True
    train(net, optimizer, 2, start=3)
    return optimizer, list(net.parameters())


@program
def amsgrad_switched_off(make):
    net, optimizer = started(make, amsgrad=True)
    optimizer.param_groups[0]["amsgrad"] = False
    train(net, optimizer, 3, start=3)
    return optimizer, list(net.parameters())


@program
def lr_is_a_tensor_that_changes_in_place(make):
    net = Net()
    lr = torch.tensor(1e-2)
    optimizer = make(net.parameters(), lr=lr)
    for t in range(4):
        lr.mul_(1.5)
        train(net, optimizer, 1, start=t)
    return optimizer, list(net.parameters())


@program
def betas_are_tensors(make):
    net, optimizer = started(make, betas=(torch.tensor(0.8), torch.tensor(0.95)))
    return optimizer, list(net.parameters())


@program
def lr_below_zero_in_a_group(make):
    net = Net()
    optimizer = make([{"params": net.conv.parameters(), "lr": -1e-2}, {"params": net.head.parameters()}], lr=1e-2)
    train(net, optimizer, 3)
    return optimizer, list(net.parameters())


def _scheduled(make, schedule):
    net = Net()
    optimizer = make([{"params": net.conv.parameters()}, {"params": net.head.parameters(), "lr": 3e-2}], lr=1e-2)
    scheduler = schedule(optimizer)
    for t in range(8):
        train(net, optimizer, 1, start=t)
        scheduler.step(*((1.0,) if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else ()))
    return optimizer, list(net.parameters())


SCHEDULES = {
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=[1e-1, 2e-1], total_steps=12),
    "cosine_with_warm_restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.3),
    "warm_up_then_decay": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.8)], milestones=[3]
    ),
    "cyclic_momentum": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-1, step_size_up=2, cycle_momentum=True),
    "swa_lr": lambda o: swa_utils.SWALR(o, swa_lr=5e-2, anneal_epochs=4),
}
for _name, _schedule in SCHEDULES.items():
    PROGRAMS[f"scheduler_{_name}"] = lambda make, schedule=_schedule: _scheduled(make, schedule)


@program
def weights_are_averaged(make):
    net = Net()
    optimizer = make(net.parameters(), lr=1e-2)
    averaged = swa_utils.AveragedModel(net, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
    for t in range(5):
        train(net, optimizer, 1, start=t)
        averaged.update_parameters(net)
    return optimizer, [*net.parameters(), *averaged.module.parameters()]


def _scaled(make, unscale):
    net = Net()
    optimizer = make(net.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for t in range(8):
        optimizer.zero_grad()
        x, y = data(t)
        scaler.scale(F.cross_entropy(net(x, t % 2), y)).backward()
        if t in (2, 5):
            net.head.bias.grad[0] = float("inf")
        if unscale:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad()  # ours and torch's fused one unscale inside the step, and leave p.grad as it was
    return optimizer, list(net.parameters()), [scaler.get_scale()]


@program
def gradients_are_scaled(make):
    return _scaled(make, unscale=False)


@program
def gradients_are_scaled_unscaled_and_clipped(make):
    return _scaled(make, unscale=True)


@program
def weights_are_tied(make):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False))
    net[1].weight = net[0].weight
    optimizer = make(net.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.arange(7)).square().mean().backward()
        optimizer.step()
    return optimizer, list(net.parameters()), [net[1].weight is net[0].weight]


@program
def weights_are_tied_by_memory(make):
    base = torch.arange(6.0)
    p, q = nn.Parameter(base), nn.Parameter(base[3:])
    optimizer = make([p], lr=1e-2)
    p.grad = torch.ones(6)
    optimizer.step()
    return optimizer, [p, q]


@program
def a_subclass_is_an_adamw(make):
    optimizer = make([nn.Parameter(torch.ones(2))])
    return optimizer, [], [isinstance(optimizer, torch.optim.AdamW), isinstance(optimizer, torch.optim.Optimizer)]
