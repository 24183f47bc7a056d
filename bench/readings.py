"""GR_T and GR_S of every way to train, in every precision, against plain float64: what a reading can be trusted with.

    python bench/readings.py          the table, and rows for results/readings.csv; about a minute on two cores
    python bench/readings.py --json   the rows alone, for machines

Parameters stand still (lr = 0), so that all ways see the same gradients but for rounding. The truth is one process in
float64: gradients of the groups by autograd, V / |m|^2 and the two-batch S and G2, smoothed apart. `per_sample` is the
definition |sum g_i^2|_1 / |sum g_i|_2^2 over the samples of the very same batches, by torch.func, smoothed likewise.
Exit status 1 if a row fails: if a gauge is off by more than its precision's tolerance, if GR_S is off by more than two
of its own standard errors from `per_sample`, or if ranks differ by a bit.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.func import functional_call, grad, vmap
from torch.nn.parallel import DistributedDataParallel
from turns import append, origin, significant

from grgauge import AdamW, Gauge

DOCS = Path(__file__).resolve().parents[1] / "docs" / "evidence" / "readings.md"
CSV = Path(__file__).parent / "results" / "readings.csv"
COLUMNS = (
    "date,commit,device,torch,configuration,precision,optimizer,gr_t,gr_t_truth,gr_t_error,gr_s,gr_s_truth,gr_s_error,"
    "tolerance,gr_s_per_sample,gr_s_standard_error,ranks_alike,passed"
)

BATCH, STEPS, BETA = 64, 30, 0.9
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


class Net(nn.Module):
    """Sizes that no number of ranks divides."""

    def __init__(self, inputs: int = 13, width: int = 37, outputs: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(inputs, width), nn.Linear(width, width), nn.Linear(width, width)])
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


def network() -> Net:
    """The same weights on every rank."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


@functools.cache
def samples() -> tuple[Tensor, Tensor]:
    """Inputs [2000, 13] and noisy targets [2000, 3]."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2000, 13, generator=generator)
    return x, x[:, :3] + x[:, 3:6].sin() + 1.5 * torch.randn(2000, 3, generator=generator)


def batch(t: int, part: int = 0, parts: int = 1, size: int = BATCH) -> tuple[Tensor, Tensor]:
    """Part `part` of `parts` of step t's batch, drawn with replacement."""
    x, y = samples()
    rows = torch.randint(len(x), (size,), generator=torch.Generator().manual_seed(1000 + t)).chunk(parts)[part]
    return x[rows], y[rows]


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


def smoothed(values: list[float]) -> float:
    """The bias-corrected EMA after the last of them."""
    ema = 0.0
    for value in values:
        ema = BETA * ema + (1 - BETA) * value
    return ema / (1 - BETA ** len(values))


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

    def to_dict(self) -> dict[str, Any]:
        derived = {name: getattr(self, name) for name in ("gr_t_error", "gr_s_error", "passed")}
        values = {**asdict(self), **derived}
        return {key: significant(v) if key.endswith("_error") else v for key, v in values.items()}


def readings_of(world: int) -> dict[str, dict[str, Any]]:
    """This process's readings of all setups of `world` processes."""
    return {
        "/".join((name, precision, optimizer)): train(setup, precision, optimizer)
        for name, setup in SETUPS.items()
        if setup.world == world
        for precision, optimizer in RUNS
    }


def started(world: int) -> list[dict[str, dict[str, Any]]]:
    """The readings of all setups of `world` processes, of each of them; they are started here."""
    if world == 1:
        return [readings_of(1)]
    with tempfile.TemporaryDirectory() as folder:
        torchrun(world, Path(__file__), "--rank-to", folder)
        return [json.loads((Path(folder) / f"{rank}.json").read_text("utf-8")) for rank in range(world)]


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


def torchrun(world: int, script: Path, *arguments: str, limit: float = 240.0) -> str:
    """What a script writes when it runs on `world` processes of this machine, of one thread each, with our import path.

    Raises RuntimeError with it if a process fails, or if they take longer than `limit` seconds; then all are ended.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", str(script)]
    process = subprocess.Popen(
        [*command, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # torchrun then ends its processes
        output, _ = process.communicate()
        raise RuntimeError(f"{script.name} on {world} processes took more than {limit:.0f} s:\n{output}") from None
    if process.returncode:
        raise RuntimeError(f"{script.name} on {world} processes failed:\n{output}")
    return output


PAGE = f"""# Readings against float64

What gauges read in {STEPS} steps of real processes (torchrun, gloo), against a plain float64 run over the same batches.
Errors are relative; all ranks must hold the same bits. "Per sample" is GR_S by its definition, from each sample's own
gradient, and how many standard errors the reading is away from it. fp16 includes a growing loss scale and a step that
overflows on one rank and is skipped on all. Each row is a test in `tests/distributed/test_readings.py`; this page is
written by `python bench/readings.py`.
"""

HEAD = (
    "configuration",
    "precision",
    "optimizer",
    "GR_T",
    "error",
    "GR_S",
    "error",
    "tolerance",
    "per sample",
    "passed",
)


def cells(row: Row) -> list[str]:
    away = (row.gr_s - row.gr_s_per_sample) / row.gr_s_standard_error
    return [
        row.configuration,
        row.precision + " + GradScaler" * (row.precision == "fp16"),
        row.optimizer,
        f"{row.gr_t:.4f}",
        f"{row.gr_t_error:.1e}",
        f"{row.gr_s:.4f}",
        f"{row.gr_s_error:.1e}",
        f"{row.tolerance:.0e}",
        f"{row.gr_s_per_sample:.4f} ({away:+.1f} s.e.)",
        "yes" if row.passed else "no" + " (ranks differ)" * (not row.ranks_alike),
    ]


def table(rows: list[Row]) -> Table:
    grid = Table(*HEAD, title=f"Readings of {STEPS} steps against float64")
    for column in grid.columns[3:-1]:
        column.justify = "right"
    for row in rows:
        *others, passed = cells(row)
        last = row is [r for r in rows if r.configuration == row.configuration][-1]
        grid.add_row(*others, f"[{'green' if row.passed else 'red'}]{passed}", end_section=last)
    return grid


def page(rows: list[Row]) -> str:
    """The text of docs/evidence/readings.md."""
    lines = [f"| {' | '.join(cells(row))} |" for row in rows]
    return "\n".join([PAGE, f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}", *lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print rows as JSON; write no file")
    parser.add_argument("--rank-to", type=Path, help=argparse.SUPPRESS)  # a process that torchrun has started
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.rank_to:
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        found = readings_of(dist.get_world_size())
        (options.rank_to / f"{dist.get_rank()}.json").write_text(json.dumps(found), "utf-8")
        dist.barrier()  # gloo takes it badly if one rank leaves while another still talks to it
        dist.destroy_process_group()
        return 0
    rows = [row for world in sorted({setup.world for setup in SETUPS.values()}) for row in rows_of(started(world))]
    if options.json:
        print(json.dumps([row.to_dict() for row in rows], indent=1))
    else:
        Console(width=None if sys.stdout.isatty() else 150).print(table(rows))
        DOCS.write_text(page(rows), "utf-8")
        append(CSV, COLUMNS, [{**origin(torch.device("cpu")), **row.to_dict()} for row in rows])
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
