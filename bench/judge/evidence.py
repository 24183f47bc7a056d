"""What reaching a target costs, tuner by tuner: rows of results/cost_to_target.csv and results/regret.csv.

    python -m judge.evidence                        what can be replayed on the table: a minute
    python -m judge.evidence --live 5               live tuners too, five seeds each: minutes to hours
    python -m judge.evidence images --live 5 --blind 20

Run it in bench/. Targets are those of the raw weights' best configuration, and hold for raw and averaged weights alike.
A tuner, family and start whose rows are there already is not run again; delete rows to measure anew. Pictures are made
from the rows alone by `python -m judge.pictures`.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import families
import pandas as pd
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from turns import append, origin

from . import live
from .opponents import REPLAYED, calibrated, replayed, start_of, static
from .protocol import Curve, Target, cost, regret, targets
from .table import FRESH, Family, load

RESULTS = Path(__file__).parents[1] / "results"
COSTS = RESULTS / "cost_to_target.csv"
COLUMNS = (
    "date,commit,device,torch,family,weights,target,value,tuner,start,reached,samples,seconds,unit_samples,unit_seconds"
)
REGRET = RESULTS / "regret.csv"
REGRET_COLUMNS = "date,commit,family,weights,tuner,start,budget,regret"
BUDGETS = (0.25, 0.5, 1, 2, 4, 8, 16, 32)
"""In static runs."""
STARTS = 20
WEIGHTS = {False: "raw", True: "averaged"}
STATIC, CALIBRATED = "best static run", "calibrated AdamW"


class Problem:
    """One family: its table for raw and for averaged weights, and the targets."""

    def __init__(self, name: str, rows: pd.DataFrame) -> None:
        self.kind = families.kind(name)
        self.tables = {
            averaged: Family(rows, self.kind.samples, self.kind.higher, averaged) for averaged in (False, True)
        }
        raw = self.tables[False]
        self.targets: list[Target] = targets(
            [raw.curves[raw.best, seed] for seed in FRESH], self.kind.metric, self.kind.higher
        )
        finals = [raw.final(config) for config in {config for config, _ in raw.curves}]
        trained = [value for value in finals if abs(value) < float("inf")]
        self.ends = (max(trained), min(trained)) if self.kind.higher else (min(trained), max(trained))
        self.held_out = int(rows["held_out"].iloc[0])

    def rows(self, averaged: bool, tuner: str, start: str, curve: Curve) -> Iterator[dict[str, Any]]:
        """A tuner's cost until each target."""
        for target in self.targets:
            spent = cost(curve, target.value, self.kind.higher)
            yield {
                **origin(torch.device("cpu")),
                "family": self.kind.name,
                "weights": WEIGHTS[averaged],
                "target": target.name,
                "value": f"{target.value:.5g}",
                "tuner": tuner,
                "start": start,
                "reached": spent.reached,
                "samples": f"{spent.samples:.0f}",
                "seconds": f"{spent.seconds:.4g}",
                "unit_samples": f"{target.unit.samples:.0f}",
                "unit_seconds": f"{target.unit.seconds:.4g}",
            }

    def regrets(self, averaged: bool, tuner: str, start: str, curve: Curve) -> Iterator[dict[str, Any]]:
        """How far from the table's best a tuner is at each budget that it spent."""
        best, worst = self.ends
        budgets = [b for b in BUDGETS if b * self.kind.samples <= curve.samples[-1] * 1.01]
        values = regret(curve, best, worst, [b * self.kind.samples for b in budgets], self.kind.higher)
        for budget, value in zip(budgets, values, strict=True):
            names = {"family": self.kind.name, "weights": WEIGHTS[averaged], "tuner": tuner, "start": start}
            yield {**origin(torch.device("cpu")), **names, "budget": budget, "regret": f"{value:.4g}"}


Job = tuple[str, str, str, Callable[[], dict[bool, Curve]]]
"""Family, tuner, start, and what gives the curves of raw and of averaged weights."""


def jobs(problems: dict[str, Problem], chosen: list[str], seeds: int, blind: int) -> Iterator[Job]:
    """Everything that is to be measured, what is replayed first."""
    fixed = {}
    for name in chosen:
        problem = problems[name]
        for seed in FRESH:
            config = problem.tables[False].best
            curves = {averaged: table.curves[config, seed] for averaged, table in problem.tables.items()}
            yield name, STATIC, f"seed {seed}", lambda curves=curves: curves
        others = [other.tables[False] for label, other in problems.items() if label != name]
        if others:
            fixed[name] = calibrated(others)
            for seed in range(2):
                tuner = static(fixed[name])
                yield name, CALIBRATED, f"seed {seed}", lambda t=tuner, p=problem, s=seed: both(t, p, s)
        for label, tuner in REPLAYED.items():
            for seed in range(STARTS):
                start = f"blind {seed}" if "CFO" in label else f"seed {seed}"
                yield name, label, start, lambda t=tuner, p=problem, s=seed: both(t, p, s)
    if not seeds and not blind:
        return
    for name in chosen:
        made, strict = families.family(name), problems[name].targets[0].value
        goals = {False: strict, True: strict}
        optimizers: dict[str, tuple[live.Optimizers, int]] = {
            "Prodigy": (live.prodigy, live.BATCH),
            "Schedule-Free AdamW": (live.schedule_free, live.BATCH),
        }
        if name in fixed:
            optimizers[f"{CALIBRATED}, up to 4 runs"] = (live.adamw(fixed[name].lr), fixed[name].batch)
        for seed in range(seeds):
            yield (
                name,
                "GR-Gauge",
                f"default {seed}",
                lambda f=made, g=goals, s=seed: live.gr_gauge(f, None, s, g).curves(),
            )
            for label, (optimizer, batch) in optimizers.items():
                yield (
                    name,
                    label,
                    f"seed {seed}",
                    lambda f=made, o=optimizer, b=batch, s=seed, g=goals: live.trained(f, o, b, s, g).curves(),
                )
        for seed in range(blind):
            yield (
                name,
                "GR-Gauge, blind starts",
                f"blind {seed}",
                lambda f=made, g=goals, s=seed: live.gr_gauge(f, start_of(s), s, g).curves(),
            )


def both(tuner: Any, problem: Problem, seed: int) -> dict[bool, Curve]:
    """A replay by the raw weights' metric, and another one by the averaged weights'."""
    return {averaged: replayed(tuner, table, seed, problem.held_out) for averaged, table in problem.tables.items()}


def done() -> set[tuple[str, str, str]]:
    if not COSTS.exists():
        return set()
    with COSTS.open(encoding="utf-8", newline="") as file:
        return {(row["family"], row["tuner"], row["start"]) for row in csv.DictReader(file)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="family", help="of those in the table (default: all)")
    parser.add_argument(
        "--live", type=int, default=0, metavar="SEEDS", help="train with live tuners, so many seeds each"
    )
    parser.add_argument("--blind", type=int, default=0, metavar="STARTS", help="GR-Gauge from so many blind starts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    problems = {name: Problem(name, rows) for name, rows in load().items()}
    unknown = sorted(set(options.families) - set(problems))
    if unknown:
        parser.error(f"families {', '.join(unknown)} are not in the table; it has {', '.join(problems)}")
    known = done()
    todo = [
        job
        for job in jobs(problems, options.families or list(problems), options.live, options.blind)
        if job[:3] not in known
    ]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("tuners", total=len(todo))
        for name, tuner, start, curves_of in todo:
            progress.update(bar, description=f"{name}: {tuner}")
            costs, regrets = [], []
            for averaged, curve in curves_of().items():
                costs += problems[name].rows(averaged, tuner, start, curve)
                regrets += problems[name].regrets(averaged, tuner, start, curve)
            append(REGRET, REGRET_COLUMNS, regrets)
            append(COSTS, COLUMNS, costs)
            progress.advance(bar)
    return 0


if __name__ == "__main__":
    sys.exit(main())
