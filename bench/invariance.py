"""Trajectory invariance on a small transformer: 3 gammas x 3 (lr, weight decay) pairs each, constant and decaying.

Every run sees the same batches of Python's library source. From the curves of loss, gradient norm, noise scale and GR_T
come, for either schedule,

    late    collapse within equal gamma against across gammas, after the early phase
    early   collapse within equal learning rate against across learning rates, before its end

`grgauge.invariance.collapse_error` says what these numbers are: 0 is one curve for each group, 1 a grouping without
meaning. Two more seeds of one configuration give the floor: what chance alone makes of equal curves. Writes
bench/results/invariance.csv and invariance.png, and prints the table.

    python bench/invariance.py [--quick]

--quick runs everything once, tiny, and writes nothing.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpt
import torch
import turns
from torch import Tensor

from grgauge import AdamW, Gauge
from grgauge.invariance import Collapse, Curve, collapse_error, gamma, regime

RESULTS = Path(__file__).parent / "results"
COLUMNS = "date,commit,device,torch,schedule,quantity,phase,group,within,between,error,floor"
QUANTITIES = ("loss", "gradient norm", "noise scale", "GR_T")


@dataclass(frozen=True)
class Size:
    """Tokens are bytes. The last lr of each gamma must be a stable one."""

    width: int = 64
    layers: int = 2
    context: int = 64
    batch: int = 16
    groups: int = 4
    """Micro-batches in a step: what GR_S and the noise scale are told from."""
    steps: int = 6000
    early: int = 200
    every: int = 10
    smoothing: int = 10
    """Readings whose mean is a point of a curve."""
    gammas: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    lrs: tuple[float, ...] = (1e-3, 2e-3, 4e-3)


QUICK = Size(width=16, layers=1, context=16, batch=8, groups=2, steps=60, early=20, every=2, smoothing=3)


@dataclass(frozen=True)
class Run:
    """A configuration, and its curves: quantity -> (steps, values)."""

    lr: float
    gamma: float
    schedule: str
    seed: int
    curves: dict[str, tuple[list[int], list[float]]]


def batches(text: Tensor, size: Size, seed: int) -> Iterator[Tensor]:
    """Random windows, int64 [batch, context + 1], without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - size.context - 1, (size.batch,), generator=generator)
        yield torch.stack([text[i : i + size.context + 1] for i in starts.tolist()])


def library() -> Tensor:
    """The source of the standard library's modules, as bytes."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = "".join(file.read_text(errors="ignore") for file in sorted(folder.glob("*.py")))
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def trained(size: Size, text: Tensor, lr: float, rate: float, schedule: str, seed: int = 0) -> Run:
    """One run with weight decay rate / lr; the weights of all seeds start alike, and only the batches differ."""
    torch.manual_seed(0)
    config = gpt.Config(size.layers, 4, size.width, size.batch, context=size.context, vocabulary=256)
    model = gpt.GPT(config)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]  # no norm behind them takes out their scale
    groups = [{"params": matrices, "weight_decay": rate / lr}, {"params": rest, "weight_decay": 0.0}]
    optimizer = AdamW(groups, lr=lr, betas=(0.9, 0.95))
    gauge = Gauge(optimizer, size.batch, groups=size.groups, every=size.every)
    warm_up = size.early // 4

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warm_up) * (1.0 - step / size.steps if schedule == "decaying" else 1.0)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    steps: list[int] = []
    values: dict[str, list[float]] = {quantity: [] for quantity in QUANTITIES}
    losses: list[float] = []
    for step, tokens in zip(range(1, size.steps + 1), batches(text, size, seed), strict=False):
        optimizer.zero_grad()
        loss = 0.0
        for part in tokens.chunk(size.groups):
            one = model(part[:, :-1], part[:, 1:]) / size.groups
            one.backward()
            gauge.micro_step()
            loss += float(one.detach())
        losses.append(loss)
        optimizer.step()
        scheduler.step()
        if step % size.every == 0 and (reading := gauge.reading()) is not None:
            steps.append(step)
            values["loss"].append(sum(losses[-size.every :]) / size.every)
            values["gradient norm"].append(reading.grad_norm)
            values["noise scale"].append(math.nan if reading.noise_scale is None else reading.noise_scale)
            values["GR_T"].append(math.nan if reading.gr_t is None else reading.gr_t)
    return Run(lr, rate, schedule, seed, {name: smoothed(steps, v, size.smoothing) for name, v in values.items()})


def smoothed(steps: list[int], values: list[float], n: int) -> tuple[list[int], list[float]]:
    """Geometric means of n readings in a row; those that are not above 0 say nothing. NaN where none says anything."""
    at, means = [], []
    for i in range(0, len(steps) - n + 1, n):
        known = [math.log(v) for v in values[i : i + n] if v > 0]
        at.append(steps[i + n // 2])
        means.append(math.exp(sum(known) / len(known)) if known else math.nan)
    return at, means


def collapse(runs: list[Run], quantity: str, phase: str, size: Size) -> Collapse | None:
    """Of a phase; None where too little of a quantity is known for it."""
    late = phase == "late"
    curves = [Curve(run.gamma if late else run.lr, *run.curves[quantity]) for run in runs]
    limits = {"after": late_from(runs, size)} if late else {"before": float(size.early)}
    try:
        return collapse_error(curves, **limits)
    except ValueError as error:
        print(f"{quantity}, {phase}: {error}")
        return None


def late_from(runs: list[Run], size: Size) -> float:
    """The first step at which gamma is salient in all of the runs; half of the run where that is later."""
    for step in range(size.steps // 2):
        if all(regime(step, run.gamma, early=size.early).salient == "gamma" for run in runs):
            return float(step)
    return float(size.steps // 2)


def figures(runs: list[Run], size: Size, floor: list[Run]) -> list[dict[str, Any]]:
    rows = []
    for schedule, quantity, phase in itertools.product(("constant", "decaying"), QUANTITIES, ("late", "early")):
        own = [run for run in runs if run.schedule == schedule]
        found = collapse(own, quantity, phase, size)
        if found is None:
            continue
        late = phase == "late"
        seeds = [Curve("seeds", *run.curves[quantity]) for run in floor]
        limits = {"after": late_from(own, size)} if late else {"before": float(size.early)}
        other = Curve("other", *own[0].curves[quantity])
        rows.append(
            {"schedule": schedule, "quantity": quantity, "phase": phase, "group": "gamma" if late else "lr"}
            | {"within": f"{found.within:.4g}", "between": f"{found.between:.4g}", "error": f"{found.error:.4g}"}
            | {"floor": f"{collapse_error([*seeds, other], **limits).within:.4g}"}
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    names = ("schedule", "quantity", "phase", "group", "within", "between", "error", "floor")
    lines = [f"| {' | '.join(names)} |", "|:---|:---|:---|:---|---:|---:|---:|---:|"]
    return "\n".join(lines + [f"| {' | '.join(str(row[name]) for name in names)} |" for row in rows])


def draw(file: Path, runs: list[Run], size: Size) -> None:
    """A colour for each gamma, a line style for each learning rate: colours are to coincide late, styles early."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(len(QUANTITIES), 2, figsize=(8, 3 * len(QUANTITIES)), squeeze=False)
    colors = dict(zip(size.gammas, ("#0072B2", "#009E73", "#D55E00"), strict=True))
    styles = dict(zip(size.lrs, ("-", "--", ":"), strict=True))
    for column, schedule in zip(grid.T, ("constant", "decaying"), strict=True):
        for axes, quantity in zip(column, QUANTITIES, strict=True):
            for run in runs:
                if run.schedule == schedule:
                    label = f"γ {run.gamma:g}, lr {run.lr:g}"
                    axes.plot(*run.curves[quantity], styles[run.lr], color=colors[run.gamma], lw=1, label=label)
            axes.axvline(size.early, color="#8A8A8A", lw=0.5)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_title(f"{quantity}, {schedule}")
    grid[0, 0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="run everything once, tiny, and write nothing")
    given = parser.parse_args()
    size = QUICK if given.quick else Size()
    text = library()
    runs = []
    for schedule, rate, lr in itertools.product(("constant", "decaying"), size.gammas, size.lrs):
        assert math.isclose(gamma(lr, rate / lr), rate)
        runs.append(trained(size, text, lr, rate, schedule))
        print(f"{schedule}, gamma {rate:g}, lr {lr:g}: loss {runs[-1].curves['loss'][1][-1]:.4f}", flush=True)
    floor = [trained(size, text, size.lrs[1], size.gammas[1], "constant", seed) for seed in (0, 1, 2)]
    rows = figures(runs, size, floor)
    print(table(rows))
    if not given.quick:
        origin = turns.origin(torch.device("cpu"))
        turns.append(RESULTS / "invariance.csv", COLUMNS, [origin | row for row in rows])
        draw(RESULTS / "invariance.png", runs, size)


if __name__ == "__main__":
    main()
