"""Scenarios under DDP: communication hooks, buckets, parameters that are not used."""

from __future__ import annotations

import torch.distributed as dist
from distributed.training import (
    adamw,
    clipped,
    ddp,
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
from one_process import Branching
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook


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
def overflow_in_the_hook():
    """fp16 compression of gradients that fp16 cannot hold: nothing is wrong but behind the hook."""
    model = ddp()
    optimizer, gauge = gauged(model, sgd, hook=default_hooks.fp16_compress_hook)
    train(model, optimizer, gauge, 3)
    before = last(gauge)
    train(model, optimizer, gauge, 1, start=3, loss_of=lambda t: mse(model, own_part(t)) * 1e6)
    return before, last(gauge)
