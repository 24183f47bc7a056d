"""What a second dimension costs: `grgauge.tune` over learning rate and weight decay against learning rate alone.

    one              weight decay 0.1 in every start
    two              an `invariance.Space`, weight decay 0.01 to 1, starts anywhere in it; kept when the rest changes,
                     or as much lower as keeps the run within the time scale of its weights
    gamma            the same; lr * weight decay is kept instead
    gamma per batch  the same; lr * weight decay goes with the batch size

Tasks, starts and marks are those of bench/starts.py: its newest row of a task has the mark, and a start has arrived
when validation first meets it. All arms have the same learning rates, batches and seeds to start from, so costs are
compared start by start; one that never arrives counts as the limit of bench/starts.py. The target is a median ratio of
two to one of 1.2 at most, with as many arrivals.

    python bench/space.py               12 starts a task, rows to bench/results/space.csv (half an hour)
    python bench/space.py --quick       two starts, short runs; no rows
"""

from __future__ import annotations

import argparse
import csv
import random
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import get_args

import optuna
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from starts import CSV as STARTS
from starts import LIMIT, SPACE, Start, Task, starts_of, tasks, tuned
from turns import append, origin

from grgauge.invariance import Rule, Space

CSV = Path(__file__).parent / "results" / "space.csv"
COLUMNS = (
    "date,commit,device,torch,task,samples,mark,arm,start_lr,start_batch,start_decay,arrived,cost,final,lr,batch,decay"
)
ONE, RANGE = 0.1, (0.01, 1.0)
ARMS: dict[str, tuple[Space, Rule]] = {
    "one": (Space(**SPACE, weight_decay=ONE), "decay"),
    **{"two" if rule == "decay" else rule: (Space(**SPACE, weight_decay=RANGE), rule) for rule in get_args(Rule)},
}


def mark_of(task: Task) -> float:
    with STARTS.open(newline="") as file:
        return float([row["mark"] for row in csv.DictReader(file) if row["task"] == task.name][-1])


def cost(task: Task, start: Start) -> float:
    return LIMIT if start.arrived is None else start.arrived / task.samples


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=12, help="starts of each task (default: 12)")
    parser.add_argument("--seed", type=int, default=1, help="of the starts (default: 1)")
    parser.add_argument("--task", choices=("language", "images", "regression"), help="one task only")
    parser.add_argument("--quick", action="store_true", help="short runs, to see that it works; no rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    chosen, count = [task for task in tasks() if options.task in (None, task.name)], options.starts
    if options.quick:
        chosen, count = [replace(task, samples=task.samples // 10) for task in chosen], 2
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    title = "Cost in samples of a static run; against one dimension, start by start"
    summary = Table("task", "arm", "arrived", "median cost", "against one", "20/80 %", title=title)
    met = True
    console = Console(width=None if sys.stdout.isatty() else 120)
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        for task in chosen:
            bar = progress.add_task(task.name, total=len(ARMS) * count)
            mark, rng, outcomes = mark_of(task), random.Random(options.seed - 1), {arm: list[Start]() for arm in ARMS}
            for config in starts_of(count, options.seed):
                decay = RANGE[0] * (RANGE[1] / RANGE[0]) ** rng.random()
                for arm, (space, rule) in ARMS.items():
                    at = replace(config, weight_decay=ONE if arm == "one" else decay)
                    outcomes[arm].append(tuned(task, at, mark, space, rule))
                    progress.advance(bar)
            arrived = {arm: sum(s.arrived is not None for s in starts) for arm, starts in outcomes.items()}
            for arm, starts in outcomes.items():
                costs = [cost(task, start) for start in starts]
                pairs = zip(costs, outcomes["one"], strict=True)
                ratios = sorted(own / cost(task, other) for own, other in pairs)
                middle, ends = median(ratios), (ratios[int(0.2 * count)], ratios[min(int(0.8 * count), count - 1)])
                if arm == "two":
                    met = met and middle <= 1.2 and arrived[arm] >= arrived["one"]
                cells = (
                    f"{arrived[arm]} of {count}",
                    f"{median(costs):.2f}×",
                    f"{middle:.2f}×",
                    "{:.2f} / {:.2f}".format(*ends),
                )
                summary.add_row(task.name, arm, *cells)
                if not options.quick:
                    append(CSV, COLUMNS, [row(task, mark, arm, start) for start in starts])
    console.print(summary)
    return 0 if met or options.quick else 1


def row(task: Task, mark: float, arm: str, start: Start) -> dict[str, object]:
    ended = start.ended
    return {
        **origin(torch.device("cpu")),
        "task": task.name,
        "samples": task.samples,
        "mark": f"{mark:.5g}",
        "arm": arm,
        "start_lr": f"{start.config.lr:.3g}",
        "start_batch": start.config.batch_size,
        "start_decay": f"{start.config.weight_decay:.3g}",
        "arrived": start.arrived is not None,
        "cost": f"{cost(task, start):.3f}",
        "final": f"{start.final:.5g}",
        "lr": "" if ended is None else f"{ended.lr:.3g}",
        "batch": "" if ended is None else ended.batch_size,
        "decay": "" if ended is None else f"{ended.weight_decay:.3g}",
    }


if __name__ == "__main__":
    sys.exit(main())
