"""What reaching a target costs, tuner by tuner: rows of results/cost_to_target.csv and results/regret.csv.

    python -m judge.evidence                        what can be replayed on the table: a minute
    python -m judge.evidence --live 5               live tuners too, five seeds each: minutes to hours
    python -m judge.evidence images --live 5 --blind 20
    python -m judge.evidence images --live 5 --tuner "PBT (Ray)"

Run it in bench/. Targets are those of the raw weights' best configuration, and hold for raw and averaged weights alike.
A tuner, family and start whose rows are there already is not run again; delete rows to measure anew. Pictures are made
from the rows alone by `python -m judge.pictures`.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import families
import pandas as pd
import torch
from families import Family
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from turns import append, origin

from grgauge.policy import Pruning

from . import apart, devices, live
from .opponents import REPLAYED, calibrated, replayed, start_of, static
from .protocol import Curve, Target, cost, regret, targets
from .table import FRESH, Config, load
from .table import Family as Table

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
NEEDS = {
    "SMAC3 multi-fidelity": "smac",
    "lr_find (Lightning)": "lightning",
    "lr_find + batch scaler (Lightning)": "lightning",
    "PBT (Ray)": "ray",
}
"""Packages of tuners that are skipped, with a line that says so, where these are not installed."""
STATIC, CALIBRATED, ALONE = "best static run", "calibrated AdamW", "AdamW left alone"


class Problem:
    """One family: its table for raw and for averaged weights, and the targets."""

    def __init__(self, name: str, rows: pd.DataFrame) -> None:
        self.kind = families.kind(name)
        self.tables = {
            averaged: Table(rows, self.kind.samples, self.kind.higher, averaged) for averaged in (False, True)
        }
        raw = self.tables[False]
        self.targets: list[Target] = targets(
            [raw.curves[raw.best, seed] for seed in FRESH], self.kind.metric, self.kind.higher
        )
        finals = [raw.final(config) for config in {config for config, _ in raw.curves}]
        trained = [value for value in finals if abs(value) < float("inf")]
        self.ends = (max(trained), min(trained)) if self.kind.higher else (min(trained), max(trained))
        self.held_out = int(rows["held_out"].iloc[0])

    def rows(
        self, averaged: bool, tuner: str, start: str, curve: Curve, device: torch.device
    ) -> Iterator[dict[str, Any]]:
        """A tuner's cost until each target."""
        for target in self.targets:
            spent = cost(curve, target.value, self.kind.higher)
            yield {
                **origin(device),
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


Live = Callable[[int], live.Looks]
"""A live tuner, by seed."""
Job = tuple[str, str, str, Callable[[], dict[bool, Curve]]]
"""Family, tuner, start, and what gives the curves of raw and of averaged weights."""


def jobs(
    problems: dict[str, Problem], chosen: list[str], starts: int, seeds: int, blind: int, device: torch.device
) -> Iterator[Job]:
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
            for seed in range(starts):
                start = f"blind {seed}" if "CFO" in label else f"seed {seed}"
                yield name, label, start, lambda t=tuner, p=problem, s=seed: both(t, p, s)
    for name in chosen if seeds or blind else ():
        made, strict = devices.placed(families.family(name), device), problems[name].targets[0].value
        defaults, blinds = tuners(made, {False: strict, True: strict}, fixed.get(name))
        for seed in range(seeds):
            for label, run in defaults.items():
                start = f"default {seed}" if label.startswith(("GR-Gauge", ALONE)) else f"seed {seed}"
                yield name, label, start, lambda r=run, s=seed: r(s).curves()
        for seed in range(blind):
            for label, run in blinds.items():
                yield name, label, f"blind {seed}", lambda r=run, s=seed: r(s).curves()


def tuners(family: Family, goals: dict[bool, float], fixed: Config | None) -> tuple[dict[str, Live], dict[str, Live]]:
    """Those that train: who brings a default or draws its own, and who begins at a blind start; both by seed.

    fixed  the configuration calibrated over the other families
    """

    def alone(config: Config, seed: int) -> live.Looks:
        return live.trained(family, live.adamw(config.lr), config.batch, seed, goals)

    defaults: dict[str, Live] = {
        "GR-Gauge": lambda seed: live.gr_gauge(family, None, seed, goals),
        "GR-Gauge, paper": lambda seed: live.gr_gauge(family, None, seed, goals, paper=True),
        ALONE: lambda seed: alone(live.DEFAULT, seed),
        "Prodigy": lambda seed: live.trained(family, live.prodigy, live.BATCH, seed, goals),
        "Schedule-Free AdamW": lambda seed: live.trained(family, live.schedule_free, live.BATCH, seed, goals),
        "lr_find (Lightning)": lambda seed: lr_range().lr_find(family, live.BATCH, seed, goals),
        "lr_find + batch scaler (Lightning)": lambda seed: lr_range().lr_find(family, None, seed, goals),
        "PBT (Ray)": lambda seed: population().pbt(family, seed, goals),
    }
    if fixed is not None:
        defaults[f"{CALIBRATED}, up to 4 runs"] = lambda seed: alone(fixed, seed)

    def independent(seed: int, guided: bool, pruning: Pruning | None) -> live.Looks:
        following = apart.guided if guided else apart.by_chance(seed)
        return apart.apart(family, start_of(seed), seed, goals, following, pruning)

    blinds: dict[str, Live] = {
        "GR-Gauge, blind starts": lambda seed: live.gr_gauge(family, start_of(seed), seed, goals),
        "GR-Gauge, paper, blind starts": lambda seed: live.gr_gauge(family, start_of(seed), seed, goals, paper=True),
        f"{ALONE}, blind starts": lambda seed: alone(start_of(seed), seed),
        "GR-Gauge, no-R": lambda seed: independent(seed, True, Pruning()),
        "GR-Gauge, no-RS": lambda seed: independent(seed, False, Pruning()),
        "GR-Gauge, no-RT": lambda seed: independent(seed, True, None),
    }
    return defaults, blinds


def lr_range() -> ModuleType:
    """Imported when it is needed: importing Lightning takes seconds."""
    return importlib.import_module(".lr_range", __package__)


def population() -> ModuleType:
    """Imported when it is needed, as Ray is."""
    return importlib.import_module(".population", __package__)


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
    parser.add_argument("--starts", type=int, default=STARTS, help=f"of each replayed tuner (default: {STARTS})")
    parser.add_argument(
        "--live", type=int, default=0, metavar="SEEDS", help="train with live tuners, so many seeds each"
    )
    parser.add_argument(
        "--blind", type=int, default=0, metavar="STARTS", help="GR-Gauge and its ablations from so many blind starts"
    )
    parser.add_argument("--tuner", action="append", metavar="NAME", help="only this one; may be given again")
    parser.add_argument("--device", default="cpu", help="that live tuners train on (default: cpu)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = devices.require(options.device)
    origin(device)  # of the code that is about to run, not of what it is by the first row
    problems = {name: Problem(name, rows) for name, rows in load().items()}
    unknown = sorted(set(options.families) - set(problems))
    if unknown:
        parser.error(f"families {', '.join(unknown)} are not in the table; it has {', '.join(problems)}")
    known = done()
    missing = [tuner for tuner, package in NEEDS.items() if importlib.util.find_spec(package) is None]
    for tuner in missing:
        print(f"{tuner} is left out: {NEEDS[tuner]} is not installed; pip install .[judge,opponents]")
    todo = [
        job
        for job in jobs(
            problems, options.families or list(problems), options.starts, options.live, options.blind, device
        )
        if job[:3] not in known and job[1] not in missing and (options.tuner is None or job[1] in options.tuner)
    ]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("tuners", total=len(todo))
        for name, tuner, start, curves_of in todo:
            progress.update(bar, description=f"{name}: {tuner}")
            costs, regrets = [], []
            for averaged, curve in curves_of().items():
                costs += problems[name].rows(averaged, tuner, start, curve, device)
                regrets += problems[name].regrets(averaged, tuner, start, curve)
            append(REGRET, REGRET_COLUMNS, regrets)
            append(COSTS, COLUMNS, costs)
            progress.advance(bar)
    return 0


if __name__ == "__main__":
    sys.exit(main())
