"""A small network of blocks, what trains it, and how tests of GradES drive it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from grgauge import AdamW, GradES

OPTIMIZERS = {
    "ours": lambda p: AdamW(p, lr=1e-2, weight_decay=0.1),
    "ours, flat": lambda p: AdamW(p, lr=1e-2, weight_decay=0.1, flat=True),
    "ours, clipping": lambda p: AdamW(p, lr=1e-2, weight_decay=0.1, max_grad_norm=0.3),
    "torch AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "torch AdamW, fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
}
EVERY_OPTIMIZER = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu_(self.up(self.norm(x))))


class Net(nn.Module):
    """Embedding, blocks, norm, head: what every transformer has around its matrices."""

    def __init__(self, width=8, depth=2, checkpointed=None):
        super().__init__()
        self.embedding = nn.Embedding(16, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 16, bias=False)
        self.checkpointed = checkpointed  # use_reentrant, or None: no checkpointing

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x) if self.checkpointed is None else checkpoint(block, x, use_reentrant=self.checkpointed)
        return self.head(self.norm(x))


MATRICES = ("blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down")


def network(seed=0, **kwargs):
    torch.manual_seed(seed)
    return Net(**kwargs)


def loss_of(net, t, scale=1.0):
    tokens = torch.randint(16, (4, 9), generator=torch.Generator().manual_seed(t))
    return scale * nn.functional.cross_entropy(net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def train(net, optimizer, steps, start=1):
    for t in range(start, start + steps):
        optimizer.zero_grad()
        loss_of(net, t).backward()
        optimizer.step()


def drive(net, optimizer, gradients):
    """One step for each entry: name of a matrix -> value that its whole gradient has (None: no gradient); else 1."""
    for given in gradients:
        for name, p in net.named_parameters():
            value = given.get(name.removesuffix(".weight"), 1.0) if isinstance(given, dict) else given
            p.grad = torch.full_like(p, value) if value is not None and p.requires_grad else None
        optimizer.step()


def grades_of(net, make=OPTIMIZERS["ours"], **kwargs):
    options = {"metric": "norm", "tau": 0.5, "total_steps": 20, "warmup": 0, "every": 1, "patience": 1} | kwargs
    optimizer = make(net.parameters())
    return GradES(net, optimizer, **options), optimizer


def values_of(grades):
    return {reading.step: dict(zip(grades.matrices, reading.values, strict=True)) for reading in grades.history}


def snapshot(net):
    return {name: p.detach().clone() for name, p in net.named_parameters()}


FREEZE_UP = {"modules": "up", "scale": "element", "tau": 1e9, "alpha": 0.25, "total_steps": 12, "every": 1}


def backward_flops(net):
    loss = loss_of(net, 0)
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    return counter.get_total_flops()


def history_of(grades):
    return [(r.step, tuple(map(str, r.values)), r.froze, r.thawed) for r in grades.history]
