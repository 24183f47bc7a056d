"""What all scenarios train, and `on`, which says how many ranks run one."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from network import BATCH, Net, batch
from torch import nn
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
