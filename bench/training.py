"""Do fewer bytes cost anything in the end? Whole trainings by optimizers that keep less, final losses by seed.

Three tasks of bench/starts.py: language (a character transformer on Python's manual), images (a CNN on digits) and
regression (an MLP on a noisy function, the long one), each with a cosine schedule down to 0, where updates get small.
Every method starts a seed from the same weights and sees the same batches, so that losses can be compared in pairs.
The model of an all-bfloat16 method computes in bfloat16 too; its losses are taken in float32.

    python bench/training.py             the runs that bench/results/training.csv lacks, some 25 minutes of one core
    python bench/training.py --quick     every method for a few steps, no rows: does it run?
    python bench/tables.py               the table in docs/large-models.md, from the rows

held_bytes    of parameters, gradients and the optimizer's state after the run, counted, per parameter
moved_bytes   what one pass must move of these: gradients once, everything else in and out
held_out_loss, train_loss   of the last weights, on the data held out and on a fixed part of that trained on
"""

from __future__ import annotations

import argparse
import copy
import csv
import importlib.metadata
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from starts import Task, tasks
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from turns import append, origin, significant

import grgauge
from grgauge.cli.char_transformer import CharTransformer, Text

CSV = Path(__file__).parent / "results" / "training.csv"
COLUMNS = (
    "date,commit,device,torch,task,method,package,seed,steps,batch,lr,parameters,held_bytes,moved_bytes,"
    "held_out_loss,train_loss"
)

SEEDS = range(5)
TRAINED_ON = 2000
"""Samples of the data trained on that train_loss is taken of."""


@dataclass(frozen=True)
class Plan:
    """How a task is trained."""

    steps: int
    batch: int
    lr: float


PLANS = {"language": Plan(1500, 8, 3e-3), "images": Plan(2000, 32, 2e-3), "regression": Plan(10_000, 32, 3e-3)}

Params = Iterable[nn.Parameter]


@dataclass(frozen=True)
class Method:
    """An optimizer, the package that it comes from, and the dtype of model and gradients."""

    package: str
    make: Callable[[Params, float], torch.optim.Optimizer]
    dtype: torch.dtype = torch.float32


def torchao(name: str, **options: Any) -> Callable[[Params, float], torch.optim.Optimizer]:
    def make(params: Params, lr: float) -> torch.optim.Optimizer:
        import torchao.optim

        return getattr(torchao.optim, name)(params, lr=lr, **options)

    return make


def bitsandbytes(params: Params, lr: float) -> torch.optim.Optimizer:
    import bitsandbytes.optim

    return bitsandbytes.optim.AdamW8bit(params, lr=lr)


SMALL = {"state_dtype": torch.bfloat16}

METHODS = {
    "torch": Method("torch", lambda params, lr: torch.optim.AdamW(params, lr=lr, fused=True)),
    "plain": Method("grgauge-kernels", lambda params, lr: grgauge.AdamW(params, lr=lr)),
    "states": Method("grgauge-kernels", lambda params, lr: grgauge.AdamW(params, lr=lr, **SMALL)),
    "torchao_8bit": Method("torchao", torchao("AdamW8bit")),
    "bitsandbytes_8bit": Method("bitsandbytes", bitsandbytes),
    "torch_bf16": Method("torch", lambda params, lr: torch.optim.AdamW(params, lr=lr, fused=True), torch.bfloat16),
    "torchao_bf16": Method("torchao", torchao("_AdamW", bf16_stochastic_round=True), torch.bfloat16),
    "stochastic": Method(
        "grgauge-kernels",
        lambda params, lr: grgauge.AdamW(params, lr=lr, stochastic_rounding=True, **SMALL),
        torch.bfloat16,
    ),
}
"""Names as in bench/test_adamw.py, where both have a method."""


class Within(nn.Module):
    """A model of any dtype between float32 inputs and float32 outputs."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model.to(dtype), dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.to(self.dtype) if x.is_floating_point() else x).float()


def chosen_tasks() -> list[Task]:
    """With a transformer that has matrices large enough for 8-bit states, which begin at 4096 elements."""
    characters = Text.manual().characters
    larger = {"language": lambda: CharTransformer(characters, width=64, layers=1, heads=4)}
    return [replace(task, model=larger.get(task.name, task.model)) for task in tasks()]


def train(task: Task, plan: Plan, method: Method, seed: int) -> dict[str, Any]:
    """One training; its columns of the CSV."""
    torch.manual_seed(seed)
    model = Within(task.model(), method.dtype)
    params = list(model.parameters())
    optimizer = method.make(params, plan.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, plan.steps)
    for batch in batches(task.data.tensors, plan, seed):
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
        schedule.step()
    count = sum(p.numel() for p in params)
    states = [state for p in params for name, state in optimizer.state[p].items() if name != "step"]
    kept = size(params) + size(states)
    grads = size(p.grad for p in params if p.grad is not None)
    in_float32 = Within(copy.deepcopy(model.model), torch.float32)
    seen = tuple(t[:TRAINED_ON] for t in task.data.tensors)
    with torch.no_grad():
        losses = {"held_out_loss": task.loss(in_float32, task.held_out), "train_loss": task.loss(in_float32, seen)}
    return {
        "steps": plan.steps,
        "batch": plan.batch,
        "lr": plan.lr,
        "parameters": count,
        "held_bytes": significant((kept + grads) / count),
        "moved_bytes": significant((2 * kept + grads) / count),
        **{name: f"{float(loss):.6g}" for name, loss in losses.items()},
    }


def batches(data: tuple[Tensor, ...], plan: Plan, seed: int) -> Iterator[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(plan.steps):
        indices = torch.randint(len(data[0]), (plan.batch,), generator=generator)
        yield tuple(t[indices] for t in data)


def size(values: Iterable[Any]) -> int:
    """Bytes of the tensors in nested values, of subclasses those of what they consist of. Shared ones count once."""
    found = {id(t): t for value in tree_leaves(list(values)) if isinstance(value, Tensor) for t in inner(value)}
    return sum(t.nbytes for t in found.values())


def inner(t: Tensor) -> list[Tensor]:
    if not hasattr(t, "__tensor_flatten__"):
        return [t]
    return [part for name in t.__tensor_flatten__()[0] for part in inner(getattr(t, name))]


def done(path: Path) -> set[tuple[str, str, int]]:
    """(task, method, seed) of the rows that are there."""
    if not path.exists():
        return set()
    with path.open(encoding="utf-8", newline="") as file:
        return {(row["task"], row["method"], int(row["seed"])) for row in csv.DictReader(file)}


def missing(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return True
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=PLANS, help="one task only")
    parser.add_argument("--method", choices=METHODS, help="one method only")
    parser.add_argument("--quick", action="store_true", help="a few steps of every method, no rows")
    parser.add_argument("--csv", type=Path, default=CSV, help="where rows are read and added")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = [name for name in METHODS if options.method in (None, name)]
    absent = sorted({METHODS[name].package for name in names if missing(METHODS[name].package)})
    if absent:
        print(f"not installed, so left out: {', '.join(absent)}", file=sys.stderr)
    there = set() if options.quick else done(options.csv)
    seeds = SEEDS[:1] if options.quick else SEEDS
    wanted = [
        (task, name, seed)
        for task in chosen_tasks()
        for seed in seeds
        for name in names
        if options.task in (None, task.name)
        and METHODS[name].package not in absent
        and (task.name, name, seed) not in there
    ]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=len(wanted))
        for task, name, seed in wanted:
            progress.update(bar, description=f"{task.name}, {name}, seed {seed}")
            plan = PLANS[task.name]
            found = train(task, replace(plan, steps=5) if options.quick else plan, METHODS[name], seed)
            if not math.isfinite(float(found["held_out_loss"])):
                raise RuntimeError(f"{task.name} by {name}, seed {seed}: the loss is {found['held_out_loss']}")
            if not options.quick:
                version = importlib.metadata.version(METHODS[name].package)
                labels = {"task": task.name, "method": name, "seed": seed}
                labels["package"] = f"{METHODS[name].package} {version}"
                append(options.csv, COLUMNS, [{**origin(torch.device("cpu")), **labels, **found}])
            progress.advance(bar)
    return 0


if __name__ == "__main__":
    sys.exit(main())
