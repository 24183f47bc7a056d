"""GR_T and GR_S of every way to train, in every precision, and what float64 reads.

Parameters stand still (lr = 0), so that all ways see the same gradients but for rounding. The truth is one process in
float64: gradients of the groups by autograd, V / |m|^2 and the two-batch S and G2, smoothed apart. `per_sample` is the
definition |sum g_i^2|_1 / |sum g_i|_2^2 over the samples of the very same batches, by torch.func, smoothed likewise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from network import BATCH, BETA, Net, batch, network, smoothed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.func import functional_call, grad, vmap
from torch.nn.parallel import DistributedDataParallel

from grgauge import AdamW, Gauge

STEPS = 30
OVERFLOW = 17
"""The step whose loss overflows with fp16, on one rank: all of them must skip it."""
GROWTH = 8
"""Steps after which GradScaler doubles its scale."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {"fp32": 2e-6, "bf16": 5e-3, "fp16": 2e-4}
"""Of a gauge relative to float64: some five times the largest error seen, rounding of weights included."""
STANDARD_ERRORS = 2.0

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "grgauge.AdamW": lambda params: AdamW(params, lr=0.0, weight_decay=0.0),  # sums of its own step
    "SGD": lambda params: torch.optim.SGD(params, lr=0.0),  # an EMA of the gauge's own
}
RUNS = [("fp32", "grgauge.AdamW"), ("bf16", "grgauge.AdamW"), ("fp16", "grgauge.AdamW"), ("fp16", "SGD")]
"""Of every setup. GradScaler leaves skipping a step to grgauge.AdamW, and does not call SGD's."""


@dataclass(frozen=True)
class Setup:
    """A way to train: processes, groups of GR_S, and how a module becomes one that trains so."""

    world: int
    groups: int
    wrap: Callable[[Net, str], nn.Module]
    micro_batches: int = 1


def plain(net: Net, precision: str) -> nn.Module:
    return net


def ddp(net: Net, precision: str) -> nn.Module:
    return DistributedDataParallel(net)


def fsdp(*shape: int) -> Callable[[Net, str], nn.Module]:
    """FSDP2 of each layer and of the rest; of two dimensions it is HSDP. Parameters are computed with in low precision,
    and gradients reduced in it."""

    def wrap(net: Net, precision: str) -> nn.Module:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        policy = MixedPrecisionPolicy(param_dtype=None if precision == "fp32" else DTYPES[precision])
        for layer in net.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(net, mesh=mesh, mp_policy=policy)
        return net

    return wrap


SETUPS = {
    "one batch, split_backward": Setup(1, 2, plain),
    "4 micro-batches": Setup(1, 4, plain, 4),
    "DDP 2": Setup(2, 2, ddp),
    "DDP 2 × accumulation 2": Setup(2, 2, ddp, 2),
    "FSDP2 2": Setup(2, 2, fsdp(2)),
    "DDP 4": Setup(4, 4, ddp),
    "FSDP2 4": Setup(4, 4, fsdp(4)),
    "HSDP 2×2": Setup(4, 4, fsdp(2, 2)),
}


def skipped(precision: str) -> set[int]:
    return {OVERFLOW} if precision == "fp16" else set()


def train(setup: Setup, precision: str, optimizer_name: str) -> dict[str, Any]:
    """The last reading of a run of this process, as one of its setup's ranks."""
    rank = dist.get_rank() if setup.world > 1 else 0
    model = setup.wrap(network(), precision)
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=GROWTH, enabled=precision == "fp16")
    gauge = Gauge(optimizer, BATCH, every=1, scaler=scaler)
    if setup.world > 1:
        gauge.attach(model)
    # FSDP2's own policy does what autocast does elsewhere.
    casts = precision != "fp32" and not isinstance(model, FSDPModule)

    for t in range(STEPS):
        blow_up = 1e38 if t in skipped(precision) and rank == 0 else 1.0

        def loss_of(rows: tuple[Tensor, Tensor], blow_up: float = blow_up) -> Tensor:
            with torch.autocast("cpu", DTYPES[precision]) if casts else nullcontext():
                prediction = model(rows[0])
            return scaler.scale(nn.functional.mse_loss(prediction.float(), rows[1]) * blow_up)

        optimizer.zero_grad()
        if setup.groups > setup.world == setup.micro_batches:
            gauge.split_backward(loss_of, batch(t))
        for k in range(setup.micro_batches if setup.micro_batches > 1 or setup.world > 1 else 0):
            last = k == setup.micro_batches - 1
            with nullcontext() if last or setup.world == 1 else model.no_sync():  # type: ignore[operator]
                rows = batch(t, rank * setup.micro_batches + k, setup.world * setup.micro_batches)
                (loss_of(rows) / setup.micro_batches).backward()
            if setup.world == 1:
                gauge.micro_step()
        scaler.step(optimizer)
        scaler.update()
    gauge.state_dict()  # what is on its way arrives
    reading = gauge.reading()
    assert reading is not None
    gauge.remove()
    return {**reading.to_dict(), "scale": scaler.get_scale()}


@dataclass(frozen=True)
class Truth:
    gr_t: float
    gr_s: float
    per_sample: float


def flat(net: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


@functools.cache
def truth(groups: int, without: frozenset[int]) -> Truth:
    """What float64 reads of all steps but `without`, from gradients of groups and of samples."""
    net = network().double()
    weights = {name: p.detach() for name, p in net.named_parameters()}
    m, each_b = torch.zeros(()), BATCH / groups
    squares, signals, noises, tops, bottoms = [], [], [], [], []

    def sample_loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(functional_call(net, weights, (x[None],))[0], y)

    steps = [t for t in range(STEPS) if t not in without]
    for t in steps:
        parts = []
        for k in range(groups):
            net.zero_grad()
            x, y = (rows.double() for rows in batch(t, k, groups))
            nn.functional.mse_loss(net(x), y).backward()
            parts.append(flat(net))
        each = torch.stack(parts)
        mean = each.mean(0)
        m = BETA * m + (1 - BETA) * mean
        big, small = float(mean.square().sum()), float(each.square().sum()) / groups
        squares.append(big)
        signals.append((BATCH * big - each_b * small) / (BATCH - each_b))
        noises.append((small - big) / (1 / each_b - 1 / BATCH))

        rows = [part.double() for part in batch(t)]
        tensors = vmap(grad(sample_loss), in_dims=(None, 0, 0))(weights, *rows).values()
        per_sample = torch.cat([g.flatten(1) for g in tensors], 1)
        tops.append(float(per_sample.square().sum()))
        bottoms.append(float(per_sample.sum(0).square().sum()))

    m = m / (1 - BETA ** len(steps))
    signal, noise = max(smoothed(signals), 0.0), smoothed(noises)
    return Truth(
        gr_t=smoothed(squares) / float(m.square().sum()),
        gr_s=(signal + noise) / (BATCH * signal + noise),
        per_sample=smoothed(tops) / smoothed(bottoms),
    )


@dataclass(frozen=True)
class Row:
    """One line of the table. Errors are relative; `tolerance` is what they may be."""

    configuration: str
    precision: str
    optimizer: str
    gr_t: float
    gr_t_truth: float
    gr_s: float
    gr_s_truth: float
    gr_s_per_sample: float
    gr_s_standard_error: float
    tolerance: float
    ranks_alike: bool
    scale: float

    @property
    def gr_t_error(self) -> float:
        return abs(self.gr_t / self.gr_t_truth - 1)

    @property
    def gr_s_error(self) -> float:
        return abs(self.gr_s / self.gr_s_truth - 1)

    @property
    def meets_per_sample(self) -> bool:
        return abs(self.gr_s - self.gr_s_per_sample) <= STANDARD_ERRORS * self.gr_s_standard_error

    @property
    def passed(self) -> bool:
        near = max(self.gr_t_error, self.gr_s_error) <= self.tolerance
        return near and self.meets_per_sample and self.ranks_alike


def readings_of(world: int) -> dict[str, dict[str, Any]]:
    """This process's readings of all setups of `world` processes."""
    return {
        "/".join((name, precision, optimizer)): train(setup, precision, optimizer)
        for name, setup in SETUPS.items()
        if setup.world == world
        for precision, optimizer in RUNS
    }


def rows_of(ranks: list[dict[str, dict[str, Any]]]) -> Iterator[Row]:
    """The lines that the readings of each rank make."""
    for key, reading in ranks[0].items():
        name, precision, optimizer = key.split("/")
        true = truth(SETUPS[name].groups, frozenset(skipped(precision)))
        if reading["gr_t"] is None or reading["gr_s"] is None:
            raise RuntimeError(f"{key}: no reading: {reading['notes']}")
        yield Row(
            configuration=name,
            precision=precision,
            optimizer=optimizer,
            gr_t=reading["gr_t"],
            gr_t_truth=true.gr_t,
            gr_s=reading["gr_s"],
            gr_s_truth=true.gr_s,
            gr_s_per_sample=true.per_sample,
            gr_s_standard_error=reading["gr_s_error"],
            tolerance=TOLERANCE[precision],
            ranks_alike=all(other[key] == reading for other in ranks),
            scale=reading["scale"],
        )
