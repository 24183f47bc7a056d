"""Scenarios under DDP and FSDP2 alike."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext

import pytest
import setups
import torch
import torch.distributed as dist
from distributed.training import (
    FOLDER,
    STEPS,
    adamw,
    clipped,
    ddp,
    fsdp,
    gauged,
    last,
    mse,
    network,
    on,
    own_part,
    read,
    sgd,
    train,
    weights,
)
from network import BATCH, batch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from grgauge import Gauge


@on(2, 4)
def table():
    return setups.readings_of(dist.get_world_size())


@on(4)
def plain_and_gauged():
    results = {}
    for name, wrap in (("DDP", ddp), ("FSDP2", fsdp), ("HSDP", lambda: fsdp(2, 2))):
        plain = wrap()
        train(plain, adamw(plain.parameters()))
        results[name] = {**read(wrap()), "plain": weights(plain)}
    return results


@on(2)
def accumulation():
    """Micro-batches of which only the last is reduced; and such of which each is."""
    results = {}
    for kind, wrap in (("DDP", ddp), ("FSDP2", fsdp)):
        for reduced in ("last", "each"):
            model = wrap()
            optimizer, gauge = gauged(model)
            for t in range(STEPS):
                optimizer.zero_grad()
                for k in range(2):
                    hold = k == 0 and reduced == "last"
                    if kind == "FSDP2":
                        model.set_requires_gradient_sync(not hold)
                    with model.no_sync() if hold and kind == "DDP" else nullcontext():
                        (mse(model, own_part(t, k, 2)) / 2).backward()
                optimizer.step()
            results[kind, reduced] = last(gauge)
    return results


UNEQUAL = (24, 40)
"""Samples on each rank."""


def unequal_rows(t, rank):
    first = sum(UNEQUAL[:rank])
    return [part[first : first + UNEQUAL[rank]] for part in batch(t)]


@on(2)
def unequal():
    """Ranks with batches of unequal size, whose gradients are averaged as they are, and weighted by their size."""
    results = {}
    size = UNEQUAL[dist.get_rank()]
    for kind, wrap in (("DDP", ddp), ("FSDP2", fsdp)):
        for weighted in (False, True):
            model = wrap()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            gauge = Gauge(optimizer, BATCH, every=1)
            gauge.attach(model)
            for t in range(STEPS):
                optimizer.zero_grad()
                loss = mse(model, unequal_rows(t, dist.get_rank()))
                (loss * size * len(UNEQUAL) / BATCH if weighted else loss).backward()
                for _ in range(2):  # two calls add up
                    gauge.micro_step(samples=size / 2, weight=size / 2 if weighted else None)
                optimizer.step()
            results[kind, weighted] = last(gauge)
    model = ddp()
    optimizer, gauge = gauged(model)
    mse(model, own_part(0)).backward()
    if dist.get_rank() == 0:
        gauge.micro_step(samples=3)
    optimizer.step()
    results["one rank only"] = last(gauge)
    return results


@on(2)
def second_hooks():
    messages = {}
    model = ddp()
    model.register_comm_hook(None, default_hooks.allreduce_hook)
    with pytest.raises(ValueError, match="communication hook already") as caught:
        gauged(model)
    messages["DDP with a hook"] = str(caught.value)
    model = ddp()
    _, gauge = gauged(model)
    with pytest.raises(ValueError, match="attached to one already") as caught:
        gauge.attach(ddp())
    messages["gauge attached twice"] = str(caught.value)
    for kind, wrap in (("DDP", ddp), ("FSDP2", fsdp)):
        model = wrap()
        gauged(model)
        with pytest.raises(ValueError, match="already") as caught:
            gauged(model)
        messages[f"{kind} with a gauge"] = str(caught.value)
    model = fsdp()
    model.layers[0].set_all_reduce_hook(lambda reduced: None)
    with pytest.raises(ValueError, match="already") as caught:
        gauged(model)
    messages["FSDP2 with a hook"] = str(caught.value)
    with pytest.raises(ValueError, match="comm_hook is for DDP") as caught:
        gauged(fsdp(), hook=default_hooks.allreduce_hook)
    messages["FSDP2 and comm_hook"] = str(caught.value)
    with pytest.raises(TypeError, match="module is Net") as caught:
        gauged(network())
    messages["neither"] = str(caught.value)
    with pytest.raises(ValueError, match="split_backward is for one device") as caught:
        gauge.split_backward(lambda rows: mse(model, rows), batch(0))
    messages["split_backward"] = str(caught.value)
    return messages


@on(2)
def late_parameters():
    messages = {}
    for kind, wrap in (("DDP", ddp), ("FSDP2", fsdp)):
        model = wrap()
        optimizer, gauge = gauged(model)
        train(model, optimizer, gauge, 2)
        extra = nn.Parameter(torch.zeros(7))
        optimizer.add_param_group({"params": [extra]})
        extra.grad = torch.ones(7)
        with pytest.raises(RuntimeError, match=r"1\.0 is no parameter of the attached module") as caught:
            train(model, optimizer, gauge, 1)
        messages[kind] = str(caught.value)
    return messages


@on(2, 4)
def sampled():
    """A tenth of a model, on whatever ranks hold of it, and all of it."""
    results = {}
    world = dist.get_world_size()
    for kind, wrap in (("DDP", ddp), ("FSDP2", fsdp)) if world == 2 else (("HSDP", lambda net: fsdp(2, 2, net=net)),):
        for sample in (50_000_000, 20_000):
            model = wrap(net=network(width=300))
            results[kind, sample] = read(model, steps=10, make=sgd, sample=sample)["last"]
    return results


# Resuming

CUT, END = 13, 30
"""Steps: where a run is cut, between two readings; and its end."""


@on(2, 4)
def resumed():
    """Runs straight through, and runs that others continue."""
    results = {}
    wraps = {"DDP": ddp, "FSDP2": fsdp} if dist.get_world_size() == 2 else {"HSDP": lambda **o: fsdp(2, 2, **o)}
    for kind, wrap in wraps.items():
        for make in (adamw, clipped, sgd):
            model = wrap()
            optimizer, gauge = gauged(model, make, every=5)
            train(model, optimizer, gauge, CUT)
            saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), gauge.state_dict()])
            straight = train(model, optimizer, gauge, END - CUT, CUT), last(gauge)
            model = wrap()
            model.load_state_dict(saved[0])
            optimizer, gauge = gauged(model, make, every=5)
            optimizer.load_state_dict(copy.deepcopy(saved[1]))
            gauge.load_state_dict(saved[2])
            fresh = gauge.reading()
            again = train(model, optimizer, gauge, END - CUT, CUT), last(gauge)
            results[kind, make.__name__] = {"straight": straight, "again": again, "fresh": fresh}
            saved = {"gauge": saved[2]} | ({"model": saved[0], "optimizer": saved[1]} if kind == "DDP" else {})
            results[kind, make.__name__]["saved"] = saved
    return results


@on(4)
def resumed_on_other_ranks():
    """What two ranks have saved, on four: an EMA of the gauge's own that was in two parts is of no use there."""
    results = {}
    earlier, _ = torch.load(FOLDER.parent / "2" / "0.pt", weights_only=False)
    for kind, wrap in (("DDP", ddp), ("FSDP2", fsdp)):
        for make in (adamw, clipped, sgd):
            saved = earlier["resumed"][kind, make.__name__]["saved"]
            model = wrap()
            optimizer, gauge = gauged(model, make, every=5)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                gauge.load_state_dict(saved["gauge"])
            if kind == "DDP":
                model.load_state_dict(saved["model"])
                optimizer.load_state_dict(saved["optimizer"])
            train(model, optimizer, gauge, END - CUT, CUT)
            results[kind, make.__name__] = {"said": [str(w.message) for w in caught], "last": last(gauge)}
    return results
