"""Pictures and a page from rows alone: results/table.parquet, cost_to_target.csv and regret.csv.

python -m judge.pictures        in bench/; writes docs/evidence. Nothing is measured: the same rows, the same page
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

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
WIDE, TALL = 3.2, 2.9
STYLES = cycler(linestyle=["-", "--", ":"]) * matplotlib.rcParamsDefault["axes.prop_cycle"]


def reactions(table: dict[str, pd.DataFrame]) -> Figure:
    """LR to GR_T at each batch, and batch to GR_S at each LR; dashed, Lemma 1 at each configuration's noise scale and
    Lemma 2 at the family's."""
    figure = Figure((WIDE * 2, TALL * len(table)), layout="constrained")
    for (left, right), (name, rows) in zip(figure.subplots(len(table), 2, squeeze=False), table.items(), strict=True):
        seen = gauges(rows)
        seen["lemma"] = lemma1(seen, curvature(seen))
        for axis, gauge, x, line, zone in (
            (left, "gr_t", "lr", "batch", HEALTH["gr_t"]),
            (right, "gr_s", "batch", "lr", HEALTH["gr_s"]),
        ):
            exponents = []
            for key, part in seen.sort_values(x).groupby(line):
                (drawn,) = axis.plot(part[x], part[gauge], ".-", lw=0.8, label=f"{key:.3g}")
                if gauge == "gr_t":
                    axis.plot(part[x], part["lemma"], "--", lw=0.8, color=drawn.get_color())
                exponents.append(exponent(part[x], part[gauge]))
            if gauge == "gr_s":
                axis.plot(BATCHES, lemma2(BATCHES, noise_scale(seen)), "k--", lw=1, label="Lemma 2")
            axis.axhspan(*zone, color="tab:green", alpha=0.2, lw=0)
            axis.set(xscale="log", yscale="log", xlabel=x, ylabel=gauge.upper(), title=name)
            axis.set_title(f"{name}: exponent {np.nanmedian(exponents):.2f}", fontsize=9)
            axis.legend(title=line, fontsize=5, title_fontsize=6, ncols=2)
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
    figure = Figure((WIDE * len(table) + 1, TALL), layout="constrained")
    for axis, (name, rows) in zip(figure.subplots(1, len(table), squeeze=False)[0], table.items(), strict=True):
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
        axis.legend(fontsize=5, loc="lower left", facecolor="tab:gray", labelcolor="white")
    return figure


def bars(rows: pd.DataFrame, weights: str, quantity: str) -> Figure:
    """Median cost until each target with the middle 60 %; an arrow beyond the axis is a miss."""
    names = sorted(rows["family"].unique())
    figure = Figure((WIDE * 1.6 * len(names), TALL * 1.3), layout="constrained")
    for axis, family in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
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
            axis.set_yticks(range(len(order)), order, fontsize=7)
            axis.plot([], [], color="tab:blue" if target == "best" else "tab:orange", label=target)
        axis.axvline(1.0, color="black", lw=0.6)
        axis.set(
            xscale="log", xlim=(0.1, 80), xlabel=f"{quantity} / best static run's", title=f"{family}, {weights} weights"
        )
        axis.legend(fontsize=6)
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
    figure = Figure((WIDE * 2, TALL * 1.3), layout="constrained")
    axis, scores = figure.subplots(), score(merged)
    axis.set_prop_cycle(STYLES)
    for tuner, shares in sorted(profile(merged, taus.tolist()).items(), key=lambda item: -scores[item[0]]):
        axis.step(taus, shares, where="post", label=f"{tuner}: {scores[tuner]:.2f}")
    axis.set(xlabel="tau", ylabel="share of problems", ylim=(-0.02, 1.02), title="Performance profiles, samples")
    axis.legend(fontsize=6)
    return figure


def best_so_far(rows: pd.DataFrame) -> Figure:
    """Median regret against what was spent."""
    names = sorted(rows["family"].unique())
    figure = Figure((WIDE * 1.5 * len(names), TALL * 1.2), layout="constrained")
    for axis, family in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        chosen = rows[(rows["family"] == family) & (rows["weights"] == "raw") & (rows["tuner"] != STATIC)]
        axis.set_prop_cycle(STYLES)
        for tuner, part in chosen.groupby("tuner"):
            runs = part.pivot(index="start", columns="budget", values="regret").reindex(columns=list(BUDGETS))
            line = runs.ffill(axis=1).median()  # who stopped, having arrived, keeps what was found
            axis.plot(line.index, line.clip(lower=1e-3), ".-", label=str(tuner), lw=1)
        axis.set(xscale="log", yscale="log", xlabel="static runs spent", ylabel="regret of best so far", title=family)
        axis.legend(fontsize=5)
    return figure


PAGE = """# What reaching a target costs

Written by `python -m judge.pictures` from rows in `bench/results`; how they are measured is said in
`bench/results/TABLE.md` and `bench/judge/protocol.py`. Costs are training samples until validation first meets the
target, in units of what the best static run of the table needs itself; medians over starts; `inf` is a miss in half of
them or more. Ratios are geometric means over the families that both were run on, with a 90 % bootstrap interval: below
1 GR-Gauge is cheaper. An interval that contains 1 decides nothing, nor does one of fewer than five starts. Where half
of the starts or more never meet the target there is no ratio, and counts are given instead.

Read with care. "GR-Gauge" starts from its own default, LR 1.7e-3 and batch 16, which may lie near the best; opponents
that search start blind and are compared with "GR-Gauge, blind starts", those that bring a default with "GR-Gauge". Live
tuners may spend 4 static runs, replayed ones 32: "within 4 runs" counts the starts of either that met the target by
then. A replayed configuration is the nearest of 60.
"""

SECONDS = """Of one thread. Live tuners pay for all that they do, GR-Gauge for its gauges, checkpoints and study too;
replayed ones for training and validation alone. All rows were recorded while other work ran on the same two cores, some
of it more than at other times: seconds are orders of magnitude here, so ratios of them carry no verdict.
"""


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
    for weights in ("raw", "averaged"):
        for target in ("best", "looser"):
            lines += findings.costs_table(costs, weights, target)
    lines += ["## The same in CPU seconds", "", SECONDS]
    for target in ("best", "looser"):
        lines += findings.costs_table(costs, "raw", target, "seconds")
    merged = problems(costs)
    figures = {
        "cost-raw": (
            "Samples until a target, raw weights",
            bars(costs, "raw", "samples"),
            findings.of_costs(costs, "raw"),
        ),
        "cost-averaged": (
            "Samples until a target, averaged weights",
            bars(costs, "averaged", "samples"),
            findings.of_costs(costs, "averaged"),
        ),
        "cost-seconds": (
            "CPU seconds until a target, raw weights",
            bars(costs, "raw", "seconds"),
            findings.of_seconds(costs),
        ),
        "profiles": ("Performance profiles", profiles(merged), findings.of_profiles(merged)),
        "best-so-far": ("Regret of the best so far", best_so_far(regrets), findings.of_regret(regrets)),
        "gauges": ("What gauges read across the plane, near step 50", reactions(table), findings.of_gauges(table)),
        "maps": ("Mean of the metric over training", maps(table), findings.of_maps(table)),
    }
    for name, (title, figure, (holds, not_so)) in figures.items():
        figure.savefig(out / f"{name}.svg", metadata={"Date": None})
        lines += [f"## {title}", "", f"![{title}]({name}.svg)", ""]
        lines += [f"*What holds.* {holds}", "", f"*What does not.* {not_so}", ""]
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
