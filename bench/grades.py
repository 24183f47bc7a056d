"""GradES in the four fine-tunings of `finetunings`: what freezing saves, and what it costs.

    full                 to the end
    validation           full, stopped at the third validation in a row without a new best
    delta, norm          the paper's metrics, below --tau of each matrix's early level
    signal               what freezing and ending may forfeit is below 2 % of the run's gain
    released             the package `grades`, where it is installed, with a tau that half of the matrices reach
    blind                full, stopped at the FLOPs of the arm it is compared with, without looking

All arms of a seed see the same batches, one after the other, and one AdamW. Cost is FLOPs, counted by torch for every
set of frozen matrices that occurs, validation passes included: the same on any machine, busy or not. Test loss and
accuracy are taken fifteen times in a run and at its end, so that an arm is compared as a curve. "validation" and
"blind" follow from the curve of "full". Interrupted, it goes on where it was.

--alone answers another question: it freezes each matrix alone at half of "every step helps", continues, and compares
what the run loses by it with what the readings before said.

    python bench/grades.py [--seeds 5] [--scenarios "new head" LoRA] [--alone] [--quick]

Writes bench/results/grades.csv, grades.png and, with --alone, grades-alone.csv and .png; prints tables. Needs
transformers and peft. --quick runs everything once, tiny, and writes nothing.
"""

from __future__ import annotations

import argparse
import copy
import csv
import importlib.util
import math
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from statistics import mean, stdev
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import scipy.special
import scipy.stats
import torch
import turns
from finetunings import (
    QUICK,
    SCENARIOS,
    TYPES,
    Scenario,
    Size,
    batches,
    evaluated,
    loss_of,
    pretrained,
    setup,
    texts,
)
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from grgauge import GradES
from grgauge.grades.gradients import Metric

RESULTS = Path(__file__).parent / "results"
COLUMNS = "date,commit,torch,scenario,seed,arm,step,flops,loss,accuracy,validation,frozen," + ",".join(TYPES)
ALONE_COLUMNS = "date,commit,torch,seed,matrix,norm,forecast,error,forfeited"
ARMS = ("full", "delta", "norm", "signal", "released")
FREEZING = ARMS[1:]
PAPERS: dict[str, Metric] = {"delta": "delta", "norm": "norm"}


@dataclass(frozen=True)
class Point:
    """Where a run is after a step."""

    step: int
    flops: float
    loss: float
    accuracy: float
    validation: float
    frozen: int


# --- the arms ---------------------------------------------------------------------------------------------------------


def released_package() -> ModuleType | None:
    """The installed package `grades`, whose name this file has too; None where there is none."""
    try:
        file = metadata.distribution("grades").locate_file("grades/__init__.py")
    except metadata.PackageNotFoundError:
        return None
    spec = importlib.util.spec_from_file_location("released_grades", str(file))
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["released_grades"] = package
    spec.loader.exec_module(package)
    return package


class Released:
    """The released callback, called as a Trainer would call it."""

    def __init__(self, package: ModuleType, model: nn.Module, steps: int, tau: float, alpha: float) -> None:
        config = package.GradEarlyStoppingConfig(tau=tau, alpha=alpha, enable_wandb_logging=False)
        self.callback = package.GradEarlyStoppingCallback(config)
        self._model, self._state = model, SimpleNamespace(max_steps=steps, global_step=0)
        self._control = SimpleNamespace(should_training_stop=False)
        self.callback.on_train_begin(SimpleNamespace(output_dir=""), self._state, self._control, model=model)

    def done(self, step: int) -> bool:
        self._state.global_step = step
        self.callback.on_step_end(SimpleNamespace(), self._state, self._control, model=self._model)
        return bool(self._control.should_training_stop)


def flops_of(model: nn.Module, tokens: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        loss_of(model, tokens).backward()
    model.zero_grad()
    return int(counter.get_total_flops())


def released_tau(package: ModuleType, scenario: Scenario, weights: dict[str, Tensor], size: Size) -> float:
    """The released package has no tau for a model of this size: take the median over matrices of what it measures
    half-way between the end of its grace period and the end of a run."""
    own = setup(scenario, weights, size, 1000)
    released = Released(package, own.model, scenario.steps, 1e-300, 0.5)
    at = math.ceil(0.75 * scenario.steps)
    for step, tokens in zip(range(1, at + 1), batches(texts(scenario)[0], size, 1000), strict=False):
        own.step(tokens)
        released.done(step)
    changes = sorted(s.change_history[-1][1] for s in released.callback.component_stats.values())
    return float(changes[len(changes) // 2])


def trained(
    arm: str,
    scenario: Scenario,
    weights: dict[str, Tensor],
    size: Size,
    seed: int,
    tau: float,
    package: ModuleType | None,
    advance: Callable[[], None],
) -> tuple[list[Point], dict[str, int]]:
    """One arm, from its start to its end: its curve, and the step at which each matrix froze."""
    own = setup(scenario, weights, size, seed)
    model, params = own.model, own.optimizer.param_groups[0]["params"]
    train, validation, test = texts(scenario)
    grades = released = None
    every = 10 if scenario.steps >= 100 else 2
    if arm == "signal":
        grades = GradES(model, own.optimizer, total_steps=scenario.steps, metric="signal")
    elif arm in PAPERS:
        grades = GradES(model, own.optimizer, total_steps=scenario.steps, metric=PAPERS[arm], tau=tau, every=every)
    elif arm == "released":
        assert package is not None
        released = Released(package, model, scenario.steps, tau, 0.5)
    flops, counted, points = 0.0, {}, []
    between = max(1, scenario.steps // size.points)
    for step, tokens in zip(range(1, scenario.steps + 1), batches(train, size, seed), strict=False):
        trainable = frozenset(i for i, p in enumerate(params) if p.requires_grad)
        if trainable not in counted:
            counted[trainable] = flops_of(model, tokens)
        own.step(tokens)
        flops += counted[trainable]
        done = (grades is not None and grades.done) or (released is not None and released.done(step))
        if step % between == 0 or step == scenario.steps or done:
            frozen = sum(not p.requires_grad for p in params)
            loss, accuracy = evaluated(model, test, size, size.held_out)
            validated, _ = evaluated(model, validation, size, size.held_out // 2)
            points.append(Point(step, flops, loss, accuracy, validated, frozen))
        advance()
        if done:
            break
    if released is not None:
        stats = released.callback.component_stats
        return points, {name: s.frozen_at_step for name, s in stats.items() if s.frozen}
    return points, {} if grades is None else grades.frozen


# --- report -----------------------------------------------------------------------------------------------------------


def steps_by_type(frozen_at: dict[str, int]) -> dict[str, float | str]:
    """Mean freezing step of each type of matrix; empty where none froze."""
    found = defaultdict(list)
    for name, step in frozen_at.items():
        for kind in TYPES:
            if kind in name:
                found[kind].append(step)
    return {kind: mean(found[kind]) if found[kind] else "" for kind in TYPES}


Runs = dict[tuple[str, int, str], list[dict[str, Any]]]
"""(scenario, seed, arm) -> the rows of its curve."""


def read(file: Path) -> Runs:
    runs: Runs = defaultdict(list)
    if file.exists():
        with file.open(encoding="utf-8", newline="") as lines:
            for row in csv.DictReader(lines):
                keys = ("step", "flops", "loss", "accuracy", "validation", "frozen")
                numbers = {key: float(row[key]) for key in keys}
                kinds = {kind: float(row[kind]) for kind in TYPES if row[kind]}
                runs[row["scenario"], int(row["seed"]), row["arm"]].append(numbers | kinds)
    return runs


def by_validation(curve: list[dict[str, Any]], pass_flops: float) -> dict[str, Any]:
    """Where early stopping would have ended a full run, with the cost of its passes."""
    best, worse, passes, row = math.inf, 0, 0, curve[0]
    for row in curve:
        passes += 1
        worse = 0 if row["validation"] < best else worse + 1
        best = min(best, row["validation"])
        if worse == 3:
            break
    return row | {"flops": row["flops"] + passes * pass_flops}


def blind(curve: list[dict[str, Any]], flops: float) -> dict[str, float]:
    """A full run, stopped when it has cost that much."""
    own = [row["flops"] for row in curve]
    return {key: float(np.interp(flops, own, [row[key] for row in curve])) for key in ("step", "loss", "accuracy")}


def spread(values: list[float], form: str) -> str:
    deviation = f" ± {stdev(values):{form}}" if len(values) > 1 else ""
    return f"{mean(values):{form}}{deviation}"


def differences(values: list[float]) -> str:
    """The mean of paired differences with its 95 % interval."""
    if len(values) < 2:
        return f"{mean(values):+.4f}"
    half = float(scipy.special.stdtrit(len(values) - 1, 0.975)) * stdev(values) / math.sqrt(len(values))
    return f"{mean(values):+.4f} ± {half:.4f}"


def table(runs: Runs, validation_flops: dict[str, float]) -> str:
    """Means over seeds with standard deviations; differences are paired by seed, with 95 % intervals."""
    lines = [
        "| fine-tuning | arm | FLOPs | loss | accuracy, % | loss − full | loss − blind | frozen | attention, MLP at |",
        "|:---|:---|---:|---:|---:|---:|---:|---:|:---|",
    ]
    for scenario in SCENARIOS:
        for arm in ("full", "validation", *FREEZING):
            stored = "full" if arm == "validation" else arm
            seeds = sorted(seed for place, seed, name in runs if (place, name) == (scenario, stored))
            seeds = [seed for seed in seeds if (scenario, seed, "full") in runs]
            if not seeds:
                continue
            full = [runs[scenario, seed, "full"] for seed in seeds]
            ends = [runs[scenario, seed, stored][-1] for seed in seeds]
            if arm == "validation":
                ends = [by_validation(curve, validation_flops[scenario]) for curve in full]
            against = [blind(curve, end["flops"]) for curve, end in zip(full, ends, strict=True)]
            halves = []
            for kinds in (TYPES[:4], TYPES[4:]):
                known = [end[kind] for end in ends for kind in kinds if kind in end]
                halves.append(f"{mean(known):.0f}" if known else "–")
            ratios = [end["flops"] / curve[-1]["flops"] for end, curve in zip(ends, full, strict=True)]
            to_full = [end["loss"] - curve[-1]["loss"] for end, curve in zip(ends, full, strict=True)]
            to_blind = [end["loss"] - other["loss"] for end, other in zip(ends, against, strict=True)]
            cells = [
                scenario,
                arm,
                spread(ratios, ".2f") + "×",
                spread([end["loss"] for end in ends], ".4f"),
                spread([100 * end["accuracy"] for end in ends], ".2f"),
                "" if arm == "full" else differences(to_full),
                "" if arm == "full" else differences(to_blind),
                spread([end["frozen"] for end in ends], ".0f"),
                ", ".join(halves),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(file: Path, runs: Runs) -> None:
    """Test loss and accuracy against FLOPs; means over the seeds that all points of an arm have."""
    from matplotlib import pyplot

    pyplot.switch_backend("Agg")
    # as wide as a page of the site shows at full size
    figure, grid = pyplot.subplots(len(SCENARIOS), 2, figsize=(7.2, 2.7 * len(SCENARIOS)), squeeze=False)
    for scenario, pair in zip(SCENARIOS, grid, strict=True):
        for color, arm in enumerate(ARMS):
            curves = [curve for (place, _, name), curve in sorted(runs.items()) if (place, name) == (scenario, arm)]
            for i, key in enumerate(("loss", "accuracy")):
                for n, curve in enumerate(curves):
                    x, y = [row["flops"] / 1e12 for row in curve], [row[key] for row in curve]
                    label = arm if n == 0 else None
                    pair[i].plot(x, y, color=f"C{color}", lw=1, alpha=0.6, label=label)
                    pair[i].plot(x[-1], y[-1], "o", color=f"C{color}", ms=3)
        for axis, quantity in zip(pair, ("test loss", "test accuracy"), strict=True):
            axis.set_title(f"{scenario}: {quantity}", fontsize=10)
            axis.set_xlabel("TFLOP")
    grid[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=200)


# --- one matrix at a time ---------------------------------------------------------------------------------------------


def alone(weights: dict[str, Tensor], size: Size, scenario: Scenario, seed: int) -> list[dict[str, Any]]:
    """What freezing each matrix alone at half of a run costs in training loss, and what the readings before said."""
    own = setup(scenario, weights, size, seed)
    train, _, _ = texts(scenario)
    half, every = scenario.steps // 2, 2
    grades = GradES(own.model, own.optimizer, total_steps=scenario.steps, metric="signal", alpha=1.0, every=every)
    data = batches(train, size, seed)
    named = dict(own.model.named_parameters())
    norms: dict[str, list[float]] = defaultdict(list)
    for step, tokens in zip(range(1, half + 2), data, strict=False):
        if step == half + 1:  # the step that acts on the reading of the one before
            start = copy.deepcopy((own.model.state_dict(), own.optimizer.state_dict(), own.schedule.state_dict()))
        own.step(tokens)
        if step % every == 0:
            for name in grades.matrices:
                grad = named[f"{name}.weight"].grad
                assert grad is not None
                norms[name].append(float(grad.abs().sum()))
    later = [tokens, *(tokens for _, tokens in zip(range(scenario.steps - half - 1), data, strict=False))]
    forecast = grades.progress
    grades.remove()

    def ended(rests: str | None) -> float:
        again = setup(scenario, weights, size, seed)
        model_state, optimizer_state, schedule_state = copy.deepcopy(start)
        again.model.load_state_dict(model_state)
        again.optimizer.load_state_dict(optimizer_state)
        again.schedule.load_state_dict(schedule_state)
        if rests is not None:
            dict(again.model.named_parameters())[f"{rests}.weight"].requires_grad_(False)
        for tokens in later:
            again.step(tokens)
        return evaluated(again.model, train, size, 4 * size.held_out)[0]

    base = ended(None)
    rows = []
    for name in grades.matrices:
        gain, error = forecast[name]
        known = {"forecast": gain, "error": error, "norm": mean(norms[name][-10:])}
        rows.append({"matrix": name, "seed": seed, "forfeited": ended(name) - base} | known)
    return rows


def draw_alone(file: Path, rows: list[dict[str, Any]]) -> str:
    """What was forfeited against each reading, and rank correlations as text."""
    from matplotlib import pyplot

    pyplot.switch_backend("Agg")
    readings = {
        "norm: sum |g|": [float(row["norm"]) for row in rows],
        "signal: forecast": [float(row["forecast"]) for row in rows],
    }
    true = [float(row["forfeited"]) for row in rows]
    attention = ["self_attn" in row["matrix"] for row in rows]
    figure, axes = pyplot.subplots(1, len(readings), figsize=(7.2, 3.4), sharey=True)  # a page of the site
    lines = []
    for axis, (name, values) in zip(axes, readings.items(), strict=True):
        axis.scatter(values, true, c=["C0" if a else "C1" for a in attention], s=12)
        axis.set_xlabel(name)
        rank = scipy.stats.spearmanr(values, true)
        lines.append(f"{name}: rank correlation {rank.statistic:.2f} (p = {rank.pvalue:.2g})")
    axes[0].set_ylabel("training loss forfeited by freezing at half\n(blue: attention, orange: MLP)")
    figure.tight_layout()
    figure.savefig(file, dpi=200)
    for kind, is_kind in (("attention", True), ("MLP", False)):
        own = [t for t, a in zip(true, attention, strict=True) if a == is_kind]
        lines.append(f"{kind}: forfeits {mean(own):.5f} a matrix on average")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="run everything once, tiny, and write nothing")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tau", type=float, default=1.3, help="of delta and norm, a share of the level (default: 1.3)")
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=SCENARIOS, help="some of them")
    parser.add_argument("--alone", action="store_true", help="freeze each matrix alone at half of a run")
    given = parser.parse_args()
    torch.set_num_threads(1)  # the model is small: threads would mostly wait for each other
    size = QUICK if given.quick else Size()
    scenarios = {n: replace(s, steps=40) if given.quick else s for n, s in SCENARIOS.items() if n in given.scenarios}
    helps = replace(SCENARIOS["every step helps"], steps=40) if given.quick else SCENARIOS["every step helps"]
    seeds = range(1 if given.quick else given.seeds)
    weights = pretrained(size)
    if given.quick or given.alone:
        file, rows = RESULTS / "grades-alone.csv", []
        if file.exists() and not given.quick:
            with file.open(encoding="utf-8", newline="") as lines:
                rows = list(csv.DictReader(lines))
        for seed in seeds:
            if str(seed) not in {str(row["seed"]) for row in rows}:
                found = alone(weights, size, helps, seed)
                new = [turns.origin(torch.device("cpu")) | row for row in found]
                rows += new
                if not given.quick:
                    turns.append(file, ALONE_COLUMNS, new)
        if not given.quick:
            print(draw_alone(RESULTS / "grades-alone.png", rows))
            return
    package = released_package()
    arms = [arm for arm in ARMS if arm != "released" or package is not None]
    file = RESULTS / "grades.csv"
    runs = defaultdict(list) if given.quick else read(file)
    todo = [(s, n, arm) for n in seeds for s in scenarios for arm in arms if (s, n, arm) not in runs]
    taus: dict[str, float] = {}
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("steps", total=sum(scenarios[name].steps for name, *_ in todo))
        for name, seed, arm in todo:
            scenario, tau = scenarios[name], given.tau
            if arm == "released":
                assert package is not None
                if name not in taus:
                    taus[name] = released_tau(package, scenario, weights, size)
                tau = taus[name]
            start = bar.tasks[0].completed
            points, at = trained(arm, scenario, weights, size, seed, tau, package, lambda: bar.advance(task))
            bar.update(task, completed=start + scenario.steps)  # one that ended early has no more to do
            origin = turns.origin(torch.device("cpu")) | {"scenario": name, "seed": seed, "arm": arm}
            rows = [origin | asdict(point) for point in points]
            rows[-1] |= steps_by_type(at)
            if not given.quick:
                turns.append(file, COLUMNS, rows)
            runs[name, seed, arm] = [{key: value for key, value in row.items() if value != ""} for row in rows]
    if not given.quick:
        runs = read(file)
    flops = {}
    for name, scenario in SCENARIOS.items():
        own = setup(scenario, weights, size, 0)
        tokens = next(batches(texts(scenario)[1], replace(size, batch=32), 0))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            own.model(input_ids=tokens)
        flops[name] = float(counter.get_total_flops()) * (size.held_out // 2)
    print(table(runs, flops))
    if package is None:
        print("the released package is not compared: pip install grades")
    if not given.quick:
        draw(RESULTS / "grades.png", runs)


if __name__ == "__main__":
    main()
