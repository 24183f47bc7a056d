"""Does `grgauge.tune` end where the best of a static grid does, wherever it starts, and at what cost?

Three tasks: language (a character transformer), images (a CNN on digits), regression (an MLP on a noisy function). For
each a grid of static runs, 8 learning rates x 4 batches, of which the best by validation sets the mark: its loss plus
10 %, or its accuracy less one point. Then starts, log-uniform over LR 1e-5 to 1 and batch 8 to 512, each given up to
`LIMIT` times the samples of a static run. A start has arrived when validation first meets the mark; its cost is all
samples until then, those of abandoned weights included, in units of one static run. Validation is looked at from
outside: the tuner knows training loss and gauges alone.

    python bench/starts.py              30 starts a task, rows to bench/results/starts.csv (an hour or more)
    python bench/starts.py --quick      two starts, a grid of 2 x 2, short runs; no rows
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import optuna
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from turns import append, origin

from grgauge import AdamW, Autopilot, Config, Policy, TrainingError, Trial, tune
from grgauge.cli.char_transformer import CONTEXT, CharTransformer, Text
from grgauge.invariance import Rule, Space

CSV = Path(__file__).parent / "results" / "starts.csv"
COLUMNS = (
    "date,commit,device,torch,task,measure,samples,best_lr,best_batch,best,mark,start_lr,start_batch,arrived,cost,"
    "final,lr,batch,trials"
)

LRS = tuple(10.0 ** (-5 + 5 * i / 7) for i in range(8))
BATCHES = (8, 32, 128, 512)
SPACE = {"lr": (1e-5, 1.0), "batch_size": (8, 512)}
LIMIT = 4
LOOKS = 20
"""Validations in one static run's samples."""


@dataclass(frozen=True)
class Task:
    """A model, its data and what is measured on the part that is held out; `measure` is "loss" or "accuracy"."""

    name: str
    measure: str
    samples: int
    model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, tuple[Tensor, ...]], Tensor]
    data: TensorDataset
    held_out: tuple[Tensor, ...]

    def validate(self, model: nn.Module) -> float:
        model.eval()
        with torch.no_grad():
            if self.measure == "accuracy":
                x, y = self.held_out
                value = float((model(x).argmax(1) == y).double().mean())
            else:
                value = float(self.loss(model, self.held_out))
        model.train()
        return value

    def better(self, one: float, other: float) -> bool:
        """A value that is not finite is worse than any."""
        if not (math.isfinite(one) and math.isfinite(other)):
            return math.isfinite(one)
        return one > other if self.measure == "accuracy" else one < other

    def mark(self, best: float) -> float:
        return best - 0.01 if self.measure == "accuracy" else 1.1 * best


def tasks() -> list[Task]:
    return [language(), images(), regression()]


def language() -> Task:
    text = Text.manual()
    pieces = text.data.unfold(0, CONTEXT + 1, CONTEXT // 4)
    cut = len(pieces) * 9 // 10

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        (piece,) = batch
        return F.cross_entropy(model(piece[:, :-1]).flatten(0, 1), piece[:, 1:].flatten())

    def model() -> nn.Module:
        return CharTransformer(text.characters, width=48, layers=1, heads=4)

    return Task("language", "loss", 16_000, model, loss, TensorDataset(pieces[:cut]), (pieces[cut + 4 :: 8],))


def images() -> Task:
    x, y = load_digits(return_X_y=True)
    images, labels = torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 16.0, torch.tensor(y)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    def model() -> nn.Module:
        convolutions = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU()]
        return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(288, 10))

    data = TensorDataset(images[:1400], labels[:1400])
    return Task("images", "accuracy", 28_000, model, loss, data, (images[1400:], labels[1400:]))


def regression() -> Task:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(6000, 10, generator=generator)
    y = torch.sin(math.pi * x[:, 0] * x[:, 1]) + 2.0 * (x[:, 2] - 0.5) ** 2 + x[:, 3] + 0.5 * x[:, 4]
    y = y + 0.1 * torch.randn(6000, generator=generator)

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return F.mse_loss(model(batch[0])[:, 0], batch[1])

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))

    return Task("regression", "loss", 40_000, model, loss, TensorDataset(x[:5000], y[:5000]), (x[5000:], y[5000:]))


def static(task: Task, config: Config) -> float:
    """Validation at the end of a run that changes nothing."""
    torch.manual_seed(0)
    model = task.model()
    optimizer = AdamW(model.parameters(), lr=config.lr)
    pilot = Autopilot(
        model, optimizer, batch_size=config.batch_size, budget=task.samples, policy=Policy.paper(max_moves=0)
    )
    for batch in pilot.batches(task.data):
        pilot.step(task.loss(model, batch))
    return task.validate(model)


@dataclass(frozen=True)
class Start:
    config: Config
    arrived: int | None  # samples
    final: float
    ended: Config | None
    trials: int


class _Arrived(BaseException):
    """Enough has been seen: leaves the training function. No Exception, which tune() would take for a failure."""


def tuned(
    task: Task, config: Config, mark: float, space: Mapping[str, Any] | Space = SPACE, decay: Rule = "decay"
) -> Start:
    """From one start until the mark is met."""
    looked, final = 0, math.nan
    seen: list[Trial] = []

    def look(trial: Trial) -> None:
        nonlocal looked, final
        seen[:] = [trial]
        if trial.used - looked >= task.samples / LOOKS and trial.model is not None:
            looked, final = trial.used, task.validate(trial.model)
            if not task.better(mark, final) and math.isfinite(final):
                raise _Arrived

    def train(trial: Trial) -> None:
        model = task.model()
        trial.watch(model, AdamW(model.parameters(), lr=trial.lr))
        for batch in trial.batches(task.data):
            trial.step(task.loss(model, batch))

    arrived = None
    with tempfile.TemporaryDirectory() as folder:
        try:
            tune(
                train,
                space,
                budget=LIMIT * task.samples,
                storage=Path(folder) / "run.db",
                start=config,
                decay=decay,
                on_step=look,
            )
        except _Arrived:
            arrived = looked
        except TrainingError as error:  # a start that failed has not arrived; say why
            print(f"{task.name} from {config}: {error}", file=sys.stderr)
    trial = seen[0] if seen else None
    return Start(config, arrived, final, trial and trial.config, len(trial.ended) + 1 if trial else 0)


def starts_of(count: int, seed: int) -> list[Config]:
    rng = random.Random(seed)
    return [Config(10.0 ** rng.uniform(-5, 0), round(2.0 ** rng.uniform(3, 9))) for _ in range(count)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=30, help="starts of each task (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="of the starts (default: 0)")
    parser.add_argument("--task", choices=("language", "images", "regression"), help="one task only")
    parser.add_argument("--quick", action="store_true", help="short runs, to see that it works; no rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    chosen = [task for task in tasks() if options.task in (None, task.name)]
    lrs, batches, count = LRS, BATCHES, options.starts
    if options.quick:
        chosen = [replace(task, samples=task.samples // 10) for task in chosen]
        lrs, batches, count = (1e-3, 1e-2), (32, 128), 2
    grid = [Config(lr, batch) for lr in lrs for batch in batches]
    console = Console(width=None if sys.stdout.isatty() else 150)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    summary = Table("task", "best static", "mark", "arrived", "median cost", "20/80 %", "grid's cost", title="Starts")
    met = True
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        for task in chosen:
            bar = progress.add_task(task.name, total=len(grid) + count)
            values = {}
            for config in grid:
                values[config] = static(task, config)
                progress.advance(bar)
            best = grid[0]
            for config in grid[1:]:
                best = config if task.better(values[config], values[best]) else best
            mark, starts = task.mark(values[best]), []
            for config in starts_of(count, options.seed):
                starts.append(tuned(task, config, mark))
                progress.advance(bar)
            costs = sorted(math.inf if s.arrived is None else s.arrived / task.samples for s in starts)
            share = sum(cost < math.inf for cost in costs) / count
            met = met and share >= 0.9 and median(costs) <= 2.0
            summary.add_row(
                f"{task.name} ({task.samples} samples)",
                f"{task.measure} {values[best]:.4g} at {best}",
                f"{mark:.4g}",
                f"{share:.0%} of {count}",
                f"{median(costs):.2f}×",
                f"{costs[int(0.2 * count)]:.2f} / {costs[min(int(0.8 * count), count - 1)]:.2f}",
                f"{len(grid)}×",
            )
            if not options.quick:
                append(CSV, COLUMNS, [row(task, best, values[best], mark, start) for start in starts])
    console.print(summary)
    return 0 if met or options.quick else 1


def row(task: Task, best: Config, value: float, mark: float, start: Start) -> dict[str, Any]:
    return {
        **origin(torch.device("cpu")),
        "task": task.name,
        "measure": task.measure,
        "samples": task.samples,
        "best_lr": f"{best.lr:.3g}",
        "best_batch": best.batch_size,
        "best": f"{value:.5g}",
        "mark": f"{mark:.5g}",
        "start_lr": f"{start.config.lr:.3g}",
        "start_batch": start.config.batch_size,
        "arrived": start.arrived is not None,
        "cost": "" if start.arrived is None else f"{start.arrived / task.samples:.3f}",
        "final": f"{start.final:.5g}",
        "lr": "" if start.ended is None else f"{start.ended.lr:.3g}",
        "batch": "" if start.ended is None else start.ended.batch_size,
        "trials": start.trials,
    }


if __name__ == "__main__":
    sys.exit(main())
