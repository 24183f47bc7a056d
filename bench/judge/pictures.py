"""Pictures and a page from rows alone: results/table.parquet, cost_to_target.csv and regret.csv.

python -m judge.pictures        in bench/; writes docs/evidence. Nothing is measured: the same rows, the same page
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import families
import matplotlib
import numpy as np
import pandas as pd
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import findings
from .evidence import BUDGETS, COSTS, REGRET, STATIC
from .protocol import TAU, profile, score
from .reuse import REUSE
from .summaries import (
    HEALTH,
    costs_of,
    curvature,
    exponent,
    gauges,
    in_zone,
    lemma1,
    lemma2,
    noise_scale,
    problems_of,
    top,
)
from .table import BATCHES, LRS, load

OUT = Path(__file__).resolve().parents[2] / "docs" / "evidence"
ACROSS, TALL = 7.2, 2.9
"""In inches: a page of the site shows so much at full size, with its text as large as it is set here."""

matplotlib.rcParams["font.size"] = 9
STYLES = cycler(linestyle=["-", "--", ":"]) * matplotlib.rcParamsDefault["axes.prop_cycle"]


def panels(names: Sequence[str], tall: float, **shared: bool) -> tuple[Figure, list[Axes], Axes]:
    """Two panels side by side and as many rows as that takes; the last axes are empty, for what explains them all."""
    rows = len(names) // 2 + 1
    figure = Figure((ACROSS, tall * rows), layout="constrained")
    grid = list(figure.subplots(rows, 2, squeeze=False, **shared).flat)
    for axis in grid[len(names) :]:
        axis.set_axis_off()
    return figure, grid[: len(names)], grid[len(names)]


def explain(empty: Axes, drawn: Sequence[Axes], **form: Any) -> None:
    """One legend of all panels' labels, each once."""
    known: dict[str, Any] = {}
    for axis in drawn:
        handles, labels = axis.get_legend_handles_labels()
        known = {**dict(zip(labels, handles, strict=True)), **known}
    empty.legend(known.values(), known.keys(), loc="center", frameon=False, **form)


def reactions(table: dict[str, pd.DataFrame]) -> Figure:
    """LR to GR_T at each batch, and batch to GR_S at each LR; dashed, Lemma 1 at each configuration's noise scale and
    Lemma 2 at the family's."""
    figure = Figure((ACROSS, TALL * len(table) + 1.2), layout="constrained")
    grid = figure.subplots(len(table) + 1, 2, squeeze=False, height_ratios=[TALL] * len(table) + [1.2])
    for (left, right), (name, rows) in zip(grid[:-1], table.items(), strict=True):
        seen = gauges(rows)
        seen["lemma"] = lemma1(seen, curvature(seen))
        for axis, gauge, x, line, zone in (
            (left, "gr_t", "lr", "batch", HEALTH["gr_t"]),
            (right, "gr_s", "batch", "lr", HEALTH["gr_s"]),
        ):
            exponents = []
            for key, part in seen.sort_values(x).groupby(line):
                order = LRS if line == "lr" else BATCHES
                colour = f"C{int(np.argmin(np.abs(np.log(order) - math.log(float(key)))))}"  # the same in every panel
                axis.plot(part[x], part[gauge], ".-", lw=0.8, color=colour, label=f"{key:.3g}")
                if gauge == "gr_t":
                    axis.plot(part[x], part["lemma"], "--", lw=0.8, color=colour)
                exponents.append(exponent(part[x], part[gauge]))
            if gauge == "gr_s":
                axis.plot(BATCHES, lemma2(BATCHES, noise_scale(seen)), "k--", lw=1, label="Lemma 2")
            axis.axhspan(*zone, color="tab:green", alpha=0.2, lw=0)
            axis.set(xscale="log", yscale="log", xlabel=x, ylabel=gauge.upper(), title=name)
            axis.set_title(f"{name}: exponent {np.nanmedian(exponents):.2f}", fontsize=9)
    for empty, drawn, title in zip(grid[-1], grid[:-1].T, ("batch; dashed: Lemma 1", "learning rate"), strict=True):
        empty.set_axis_off()
        explain(empty, drawn, title=title, fontsize=8, ncols=3)
    return figure


def overlay(axis: Axes, seen: pd.DataFrame) -> None:
    """Where GR_T is 20 and GR_S is 0.58: as measured (solid), and by the lemmas at the family's noise scale and fitted
    curvature (dashed)."""
    x, y = np.linspace(0, len(LRS) - 1, 91), np.linspace(0, len(BATCHES) - 1, 51)
    lrs, batches = LRS[0] * (LRS[-1] / LRS[0]) ** (x / x[-1]), BATCHES[0] * (BATCHES[-1] / BATCHES[0]) ** (y / y[-1])
    plane = pd.DataFrame([(lr, batch) for batch in batches for lr in lrs], columns=["lr", "batch"])
    plane["noise_scale"] = noise_scale(seen)
    predicted = {"gr_t": lemma1(plane, curvature(seen)), "gr_s": lemma2(plane["batch"], noise_scale(seen))}
    for gauge, level, colour in (("gr_t", 20.0, "white"), ("gr_s", 0.58, "tab:orange")):
        fields = (
            (range(len(LRS)), range(len(BATCHES)), seen.pivot(index="batch", columns="lr", values=gauge), "solid"),
            (x, y, np.asarray(predicted[gauge]).reshape(len(y), len(x)), "dashed"),
        )
        for columns, lines, field, style in fields:
            values = np.ma.masked_invalid(np.asarray(field, float))
            if values.min() < level < values.max():
                axis.contour(columns, lines, values, levels=[level], colors=colour, linestyles=style, linewidths=1.2)
            axis.plot(
                [], [], color=colour, ls=style, label=f"{gauge.upper()} {level:g}" + ", lemma" * (style == "dashed")
            )


def maps(table: dict[str, pd.DataFrame]) -> Figure:
    """The mean of the metric over training, normalised to [0, 1], over the plane; health zone and best tenth."""
    figure, grid, empty = panels(list(table), TALL)
    for axis, (name, rows) in zip(grid, table.items(), strict=True):
        seen, higher = gauges(rows), families.kind(name).higher
        values = seen["mean"] if higher else -seen["mean"]
        low = values.quantile(0.1)
        seen["aupc"] = ((values - low) / (values.max() - low)).clip(0, 1)
        image = seen.pivot(index="batch", columns="lr", values="aupc").to_numpy()
        axis.imshow(image, origin="lower", aspect="auto", cmap="viridis", vmin=0, vmax=1)
        for mask, marker, label in ((top(seen, higher), "*", "best tenth"), (in_zone(seen), "s", "gauges in zone")):
            chosen = seen[mask]
            x = [LRS.index(min(LRS, key=lambda lr, own=own: abs(math.log(lr / own)))) for own in chosen["lr"]]
            y = [BATCHES.index(int(batch)) for batch in chosen["batch"]]
            axis.scatter(x, y, marker=marker, s=70, facecolors="none", edgecolors="red", label=label)
        overlay(axis, seen)
        axis.set_xticks(range(0, len(LRS), 3), [f"{lr:.0e}" for lr in LRS[::3]], fontsize=7)
        axis.set_yticks(range(len(BATCHES)), [str(batch) for batch in BATCHES], fontsize=7)
        axis.set(xlabel="LR", ylabel="batch", title=name)
    explain(empty, grid, title="yellow: best, dark blue: worst", labelcolor="white")
    empty.get_legend().set_frame_on(True)
    empty.get_legend().get_frame().set_facecolor("tab:gray")
    return figure


def bars(rows: pd.DataFrame, weights: str, quantity: str) -> Figure:
    """Median cost until each target with the middle 60 %; an arrow beyond the axis is a miss."""
    names = sorted(rows["family"].unique())
    figure, grid, empty = panels(names, TALL * 1.2)
    for axis, family in zip(grid, names, strict=True):
        for shift, target in ((-0.17, "best"), (0.17, "looser")):
            tuners = costs_of(rows[rows["family"] == family], weights, target, quantity)
            order = sorted(rows["tuner"].unique(), reverse=True)
            for y, tuner in enumerate(order):
                values = np.array(tuners.get(tuner, {}).get(family, []))
                if not len(values):
                    continue
                low, middle, high = (float(np.quantile(values, q, method="nearest")) for q in (0.2, 0.5, 0.8))
                colour = "tab:blue" if target == "best" else "tab:orange"
                edge = 64.0
                axis.plot([low if low < edge else edge, min(high, edge)], [y + shift] * 2, color=colour, lw=2)
                axis.plot(min(middle, edge), y + shift, "o" if middle < edge else ">", color=colour, ms=5)
            axis.set_yticks(range(len(order)), order if axis in grid[::2] else [""] * len(order), fontsize=8)
            axis.plot([], [], color="tab:blue" if target == "best" else "tab:orange", label=f"target: {target}")
        axis.axvline(1.0, color="black", lw=0.6)
        axis.grid(axis="y", lw=0.3)
        axis.set(
            xscale="log", xlim=(0.1, 80), xlabel=f"{quantity} / best static run's", title=f"{family}, {weights} weights"
        )
    explain(empty, grid, title="dot: median, line: middle 60 %,\narrow at the edge: a miss")
    return figure


def problems(rows: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Median samples of each tuner that was run on every family, for each family, target and weights."""
    merged: dict[str, dict[str, float]] = {}
    for weights in rows["weights"].unique():
        for target in rows["target"].unique():
            for tuner, own in problems_of(costs_of(rows, weights, target, "samples")).items():
                merged.setdefault(tuner, {}).update({f"{family} {target} {weights}": c for family, c in own.items()})
    merged.pop(STATIC, None)
    return merged


def profiles(merged: dict[str, dict[str, float]]) -> Figure:
    """Shares of problems that a tuner solves within tau times the cheapest tuner's samples."""
    taus = np.linspace(1, TAU, 301)
    figure = Figure((ACROSS, TALL * 2), layout="constrained")
    axis, scores = figure.subplots(), score(merged)
    axis.set_prop_cycle(STYLES)
    for tuner, shares in sorted(profile(merged, taus.tolist()).items(), key=lambda item: -scores[item[0]]):
        axis.step(taus, shares, where="post", label=f"{tuner}: {scores[tuner]:.2f}")
    axis.set(xlabel="samples, in units of the cheapest tuner's (tau)", ylabel="share of problems")
    axis.set(ylim=(-0.02, 1.02), title="Performance profiles, samples")
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False)
    return figure


def best_so_far(rows: pd.DataFrame) -> Figure:
    """Median regret against what was spent."""
    names = sorted(rows["family"].unique())
    figure, grid, empty = panels(names, TALL)
    looks = dict(zip(sorted(rows["tuner"].unique()), STYLES, strict=False))
    for axis, family in zip(grid, names, strict=True):
        chosen = rows[(rows["family"] == family) & (rows["weights"] == "raw") & (rows["tuner"] != STATIC)]
        for tuner, part in chosen.groupby("tuner"):
            runs = part.pivot(index="start", columns="budget", values="regret").reindex(columns=list(BUDGETS))
            line = runs.ffill(axis=1).median()  # who stopped, having arrived, keeps what was found
            axis.plot(line.index, line.clip(lower=1e-3), marker=".", label=str(tuner), lw=1, **looks[str(tuner)])
        axis.set(xscale="log", yscale="log", xlabel="static runs spent", ylabel="regret of best so far", title=family)
    explain(empty, grid, fontsize=7)
    return figure


PAGE = """# What reaching a target costs

Written by `python -m judge.pictures` from rows in `bench/results`. `bench/results/TABLE.md` and
`bench/judge/protocol.py` say how they were measured.

- **Cost** is the number of training samples until validation first meets the target. 1 is what the best run of a static
  grid needs itself. Tables have medians over starts; `inf` means that half of the starts or more missed the target.
- **Targets.** "Best" is what that best run reaches at its end, the median over fresh seeds. "Looser" is one point of
  accuracy or hit rate below, or a loss a tenth above.
- **GR-Gauge against it** is the ratio of costs, GR-Gauge's to the other's: below 1 GR-Gauge is cheaper. It is a
  geometric mean over the families that both were run on, with a 90 % bootstrap interval. An interval that contains 1
  decides nothing, nor does one of fewer than five starts. There is no ratio where half of the starts or more missed the
  target; the table then says how many met it.
- **Starts.** "GR-Gauge" starts from its own default, LR 1.7e-3 and batch 16, which may lie near the best. Tuners that
  search start blind and are compared with "GR-Gauge, blind starts"; those that bring a default, with "GR-Gauge".
- **Limits.** Live tuners may spend 4 static runs, replayed ones 32. "Within 4 runs" counts the starts of either that
  met the target by then. A replayed configuration is the nearest of 60.
"""

SECONDS = """Of one thread. Live tuners pay for all that they do, GR-Gauge for its gauges, checkpoints and study too;
replayed ones for training and validation alone. All rows were recorded while other work ran on the same two cores, some
of it more than at other times: seconds are orders of magnitude here, so ratios of them carry no verdict.
"""


def itemised(title: str, sentences: str) -> list[str]:
    """A paragraph, or a list where there are several lines."""
    items = sentences.split("\n")
    if len(items) == 1:
        return [f"**{title}.** {sentences}", ""]
    return [f"**{title}**", "", *(f"- {item}" for item in items), ""]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of page and pictures (default: docs/evidence)")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    matplotlib.rcParams["svg.hashsalt"] = "judge"  # the same rows, the same file
    table = load()
    costs, regrets = pd.read_csv(COSTS, dtype={"reached": bool}), pd.read_csv(REGRET)
    commits = costs[costs["tuner"].str.startswith(findings.OURS)].groupby("commit")["family"].unique()
    recorded = "; ".join(f"{commit} ({', '.join(names)})" for commit, names in commits.items())
    lines = [PAGE, f"GR-Gauge's rows are of these commits: {recorded}.", ""]

    def tables(weights: str, quantity: str = "samples") -> list[str]:
        made = ((target, findings.costs_table(costs, weights, target, quantity)) for target in ("best", "looser"))
        return [line for target, own in made for line in (f"Target: {target}.", "", *own)]

    merged = problems(costs)
    figures = {
        "cost-raw": (
            "Samples until a target, raw weights",
            bars(costs, "raw", "samples"),
            findings.of_costs(costs, "raw"),
            tables("raw"),
        ),
        "cost-averaged": (
            "Samples until a target, averaged weights",
            bars(costs, "averaged", "samples"),
            findings.of_costs(costs, "averaged"),
            tables("averaged"),
        ),
        "cost-seconds": (
            "CPU seconds until a target, raw weights",
            bars(costs, "raw", "seconds"),
            findings.of_seconds(costs),
            [SECONDS, *tables("raw", "seconds")],
        ),
        "profiles": ("Performance profiles", profiles(merged), findings.of_profiles(merged), []),
        "best-so-far": ("Regret of the best so far", best_so_far(regrets), findings.of_regret(regrets), []),
        "gauges": ("What gauges read across the plane, near step 50", reactions(table), findings.of_gauges(table), []),
        "maps": ("Mean of the metric over training", maps(table), findings.of_maps(table), []),
    }
    for name, (title, figure, (holds, not_so), more) in figures.items():
        figure.savefig(out / f"{name}.svg", metadata={"Date": None})
        lines += [f"## {title}", "", f"![{title}]({name}.svg)", ""]
        lines += [*itemised("What holds", holds), *itemised("What does not", not_so), *more]
    lines += ["## Tuning against leaving the start alone", "", *findings.left_alone(regrets)]
    lines += ["## Gauges and good configurations", "", *findings.zones(table)]
    lines += ["## What each of the three actions is worth", "", *findings.ablations(costs)]
    if REUSE.exists():
        lines += ["## What state reuse costs in the end", "", *findings.reuse(pd.read_csv(REUSE))]
    (out / "costs.md").write_text("\n".join(lines), encoding="utf-8")
    print(f"{out / 'costs.md'} and {len(figures)} pictures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
