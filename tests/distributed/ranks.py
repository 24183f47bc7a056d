"""What ranks do in the tests of this folder: torchrun starts this file once for each number of them.

Each rank runs all scenarios of its number of ranks, in the order of this file, and saves what they return; the tests
judge it. What a scenario raises is saved in its place.
"""

from __future__ import annotations

import copy
import sys
import traceback
import warnings
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import pytest
import setups
import torch
import torch.distributed as dist
from network import BATCH, Net, batch
from one_process import Branching
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from grgauge import AdamW, Gauge

SCENARIOS = {}
STEPS = 12
FOLDER = Path(sys.argv[-1])
"""For results; that of fewer ranks lies beside it."""


def on(*worlds):
    def register(scenario):
        SCENARIOS.update({(world, scenario.__name__): scenario for world in worlds})
        return scenario

    return register


def adamw(params, **options):
    return AdamW(params, lr=1e-3, **options)


def clipped(params):
    return adamw(params, max_grad_norm=0.3)


def sgd(params):
    return torch.optim.SGD(params, lr=1e-2, momentum=0.9)


def network(kind=Net, **sizes):
    """The same weights on every rank."""
    torch.manual_seed(0)
    return kind(**sizes)


def mse(model, rows):
    return nn.functional.mse_loss(model(rows[0]), rows[1])


def own_part(t, k=0, accumulate=1):
    """This rank's share of step t's batch, or micro-batch k of it."""
    return batch(t, dist.get_rank() * accumulate + k, dist.get_world_size() * accumulate)


def train(model, optimizer, gauge=None, steps=STEPS, start=0, loss_of=None):
    """Steps on this rank's share of each batch; the reading at hand after each."""
    seen = []
    for t in range(start, start + steps):
        optimizer.zero_grad()
        (mse(model, own_part(t)) if loss_of is None else loss_of(t)).backward()
        optimizer.step()
        seen.append(told(gauge))
    return seen


def told(gauge):
    reading = gauge.reading() if gauge is not None else None
    return reading and {**reading.to_dict(), "segments": [(s.name, s.gr_t, s.grad_norm) for s in reading.segments]}


def last(gauge):
    """The reading of the last step, once it has arrived."""
    gauge.state_dict()
    return told(gauge)


def weights(model):
    """All parameters in one, whole ones of sharded ones; a copy."""
    return torch.cat([getattr(p, "full_tensor", lambda p=p: p)().detach().flatten() for p in model.parameters()])


def ddp(net=None, **options):
    return DistributedDataParallel(network() if net is None else net, **options)


def fsdp(*shape, net=None):
    net = network() if net is None else net
    shape = shape or (dist.get_world_size(),)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    for layer in net.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def gauged(model, make=adamw, every=1, batch_size=BATCH, sample=50_000_000, hook=None, state=None, attach=True):
    optimizer = make(model.parameters())
    gauge = Gauge(optimizer, batch_size, every=every, sample=sample)
    if attach:
        gauge.attach(model, comm_hook=hook, state=state)
    return optimizer, gauge


def read(model, *, steps=STEPS, loss_of=None, **options):
    optimizer, gauge = gauged(model, **options)
    seen = train(model, optimizer, gauge, steps, loss_of=loss_of)
    return {"seen": seen, "last": last(gauge), "weights": weights(model)}


@on(2, 4)
def table():
    return setups.readings_of(dist.get_world_size())


# DDP


def power_sgd():
    return powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=3)


def bf16(state, bucket):
    # Under its own name DDP wants a GPU for it.
    return default_hooks.bf16_compress_hook(state, bucket)


bf16.__annotations__ = default_hooks.bf16_compress_hook.__annotations__

HOOKS = {
    "none": (None, lambda: None),
    "bf16": (bf16, lambda: None),
    "PowerSGD": (powerSGD_hook.powerSGD_hook, power_sgd),
}


@on(2)
def hooks():
    """The same training with each hook, with a gauge and without."""
    results = {}
    for name, (hook, state) in HOOKS.items():
        plain = ddp()
        if hook is not None:
            plain.register_comm_hook(state(), hook)
        train(plain, adamw(plain.parameters()))
        results[name] = {**read(ddp(), hook=hook, state=state()), "plain": weights(plain)}
    return results


@on(4)
def plain_and_gauged():
    results = {}
    for name, wrap in (("DDP", ddp), ("FSDP2", fsdp), ("HSDP", lambda: fsdp(2, 2))):
        plain = wrap()
        train(plain, adamw(plain.parameters()))
        results[name] = {**read(wrap()), "plain": weights(plain)}
    return results


BUCKETS = {
    "one bucket": {},
    "small buckets": {"bucket_cap_mb": 0.004},
    "static graph": {"static_graph": True, "bucket_cap_mb": 0.004},
    "bucket views": {"gradient_as_bucket_view": True},
    "unused parameters looked for": {"find_unused_parameters": True, "bucket_cap_mb": 0.004},
}


@on(2)
def buckets():
    results = {}
    for name, options in BUCKETS.items():
        for make in (adamw, clipped, sgd):
            model = ddp(**options)
            indices = []

            def counted(state, bucket, indices=indices):
                indices.append(bucket.index())
                return default_hooks.allreduce_hook(state, bucket)

            optimizer, gauge = gauged(model, make, hook=counted)
            train(model, optimizer, gauge)
            results[name, make.__name__] = {"last": last(gauge), "buckets": max(indices) + 1}
    return results


@on(2)
def unused():
    model = ddp(network(Branching), find_unused_parameters=True, bucket_cap_mb=0.004)

    def loss_of(t):
        x, y = own_part(t)
        return nn.functional.mse_loss(model(x, dist.get_rank() % 2 == 1), y)

    return read(model, loss_of=loss_of)


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


@on(4)
def hsdp_reduced_over_replicas_last():
    model = fsdp(2, 2)
    optimizer, gauge = gauged(model)
    for t in range(STEPS):
        optimizer.zero_grad()
        for k in range(2):
            model.set_requires_all_reduce(k == 1)
            (mse(model, own_part(t, k, 2)) / 2).backward()
        optimizer.step()
    return last(gauge)


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


@on(2)
def overflow_in_the_hook():
    """fp16 compression of gradients that fp16 cannot hold: nothing is wrong but behind the hook."""
    model = ddp()
    optimizer, gauge = gauged(model, sgd, hook=default_hooks.fp16_compress_hook)
    train(model, optimizer, gauge, 3)
    before = last(gauge)
    train(model, optimizer, gauge, 1, start=3, loss_of=lambda t: mse(model, own_part(t)) * 1e6)
    return before, last(gauge)


# FSDP2


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


@on(2, 4)
def clipping():
    """Clipping inside our step, and by torch in front of it."""
    results = {}
    shape = () if dist.get_world_size() == 2 else (2, 2)
    for most in (0.3, 1e3):
        ours, theirs = fsdp(*shape), fsdp(*shape)
        inside, outside = adamw(ours.parameters(), max_grad_norm=most), adamw(theirs.parameters())
        norms = []
        for t in range(STEPS):
            for model, optimizer in ((ours, inside), (theirs, outside)):
                optimizer.zero_grad()
                mse(model, own_part(t)).backward()
            norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), most).full_tensor()
            inside.step()
            outside.step()
            norms.append((float(inside.grad_norm), float(norm)))
        results[most] = {"norms": norms, "ours": weights(ours), "theirs": weights(theirs)}
    return results


@on(4)
def replicated_only():
    with pytest.raises(ValueError, match="replicated only") as caught:
        gauged(fsdp(4, 1))
    return str(caught.value)


@on(2)
def refusals():
    messages = {}
    model = fsdp()
    optimizer = adamw(model.parameters(), flat=True)
    mse(model, own_part(0)).backward()
    with pytest.raises(ValueError, match="flat=True needs parameters in one piece") as caught:
        optimizer.step()
    messages["flat"] = str(caught.value)
    for make in (adamw, sgd):
        model = fsdp()
        optimizer, _ = gauged(model, make, attach=False)
        mse(model, own_part(0)).backward()
        with pytest.raises(RuntimeError, match=r"call gauge\.attach\(module\)") as caught:
            optimizer.step()
        messages[make.__name__] = str(caught.value)
    model = fsdp()
    gauged(model)
    for module in (model, *model.layers):
        module.set_gradient_divide_factor(3.0)
    with pytest.raises(RuntimeError, match="GR_S needs gradients reduced by AVG or SUM") as caught:
        mse(model, own_part(0)).backward()
    messages["divide factor"] = str(caught.value)
    return messages


@on(2, 4)
def rounded():
    """Weights and moments rounded stochastically, sharded and whole; every rank sees the whole batch."""
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        for kind in ("whole", "sharded"):
            net = network().to(dtype)
            model = net if kind == "whole" else fsdp(*((2, 2) if dist.get_world_size() == 4 else ()), net=net)
            optimizer = adamw(model.parameters(), state_dtype=torch.bfloat16, stochastic_rounding=True)
            for t in range(STEPS):
                optimizer.zero_grad()
                mse(model, [rows.to(dtype) for rows in batch(t, 0, 1)]).backward()
                optimizer.step()
            results[dtype, kind] = weights(model)
    return results


@on(2)
def checkpointed_optimizer():
    """grgauge.AdamW through torch.distributed.checkpoint's state_dicts, and on to torch.optim.AdamW's."""
    model = fsdp()
    optimizer = adamw(model.parameters())
    train(model, optimizer, steps=5)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    results = {"names": sorted(saved["state"])}
    at = copy.deepcopy(model.state_dict())
    train(model, optimizer, start=5, steps=5)
    results["straight"] = weights(model)
    for name, make in (("ours", adamw), ("torch's", lambda p: torch.optim.AdamW(p, lr=1e-3))):
        model = fsdp()
        model.load_state_dict(at)
        optimizer = make(model.parameters())
        set_optimizer_state_dict(model, optimizer, copy.deepcopy(saved))
        train(model, optimizer, start=5, steps=5)
        results[name] = weights(model)
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


def main():
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    results, raised = {}, {}
    for (world, name), scenario in SCENARIOS.items():
        if world == dist.get_world_size():
            try:
                results[name] = scenario()
            except Exception:
                raised[name] = traceback.format_exc()
    torch.save((results, raised), FOLDER / f"{dist.get_rank()}.pt")
    dist.barrier()  # gloo takes it badly if one rank leaves while another still talks to it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
