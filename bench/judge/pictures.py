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
from matplotlib.figure import Figure

from .evidence import BUDGETS, COSTS, REGRET, STATIC
from .opponents import REPLAYED
from .protocol import TAU, Costs, compared, medians, profile, score, winner
from .table import BATCHES, LRS, SEEDS, load

OUT = Path(__file__).resolve().parents[2] / "docs" / "evidence"
HEALTH = {"gr_t": (18.0, 22.0), "gr_s": (0.5, 0.65)}
"""The published zone."""
STEP = 50
"""Gauges are looked at near this step: the published target of GR_T belongs there."""
WIDE, TALL = 3.2, 2.9


def gauges(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each configuration the readings of the check nearest to step 50, and the metric over the whole run: medians
    over seeds. A run whose readings are not ready by then has none."""
    rows = rows[rows["seed"].isin(SEEDS)]
    keys = ["lr", "batch", "seed"]
    read = rows[rows["ready"].eq(True)].assign(away=lambda r: (np.log(r["read_at"].astype(float) / STEP)).abs())
    near = read.sort_values("away").groupby(keys).first()[["gr_t", "gr_s", "read_at"]]
    curve = rows.groupby(keys).agg(
        mean=("metric", "mean"), final=("metric", "last"), failed=("metric", lambda m: m.isna().any())
    )
    return curve.join(near).groupby(["lr", "batch"]).median(numeric_only=True).reset_index()


def exponent(x: pd.Series, y: pd.Series) -> float:
    """Of a power law fitted to positive values; not a number for fewer than three."""
    both = (x > 0) & (y > 0)
    return float(np.polyfit(np.log(x[both]), np.log(y[both]), 1)[0]) if both.sum() >= 3 else math.nan


def reactions(table: dict[str, pd.DataFrame]) -> Figure:
    """LR to GR_T at each batch, and batch to GR_S at each LR."""
    figure = Figure((WIDE * 2, TALL * len(table)), layout="constrained")
    for (left, right), (name, rows) in zip(figure.subplots(len(table), 2, squeeze=False), table.items(), strict=True):
        seen = gauges(rows)
        for axis, gauge, x, line, zone in (
            (left, "gr_t", "lr", "batch", HEALTH["gr_t"]),
            (right, "gr_s", "batch", "lr", HEALTH["gr_s"]),
        ):
            exponents = []
            for key, part in seen.sort_values(x).groupby(line):
                axis.plot(part[x], part[gauge], ".-", lw=0.8, label=f"{key:.2g}")
                exponents.append(exponent(part[x], part[gauge]))
            axis.axhspan(*zone, color="tab:green", alpha=0.2, lw=0)
            axis.set(xscale="log", yscale="log", xlabel=x, ylabel=gauge.upper(), title=name)
            axis.set_title(f"{name}: exponent {np.nanmedian(exponents):.2f}", fontsize=9)
            axis.legend(title=line, fontsize=5, title_fontsize=6, ncols=2)
    return figure


def in_zone(seen: pd.DataFrame) -> pd.Series:
    (low_t, high_t), (low_s, high_s) = HEALTH["gr_t"], HEALTH["gr_s"]
    return seen["gr_t"].between(low_t, high_t) & seen["gr_s"].between(low_s, high_s)


def top(seen: pd.DataFrame, higher: bool) -> pd.Series:
    """The best tenth of the configurations, by the mean of the metric over training."""
    return (seen["mean"] if higher else -seen["mean"]).rank(ascending=False, na_option="bottom") <= len(seen) / 10


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
        axis.set_xticks(range(0, len(LRS), 3), [f"{lr:.0e}" for lr in LRS[::3]], fontsize=7)
        axis.set_yticks(range(len(BATCHES)), [str(batch) for batch in BATCHES], fontsize=7)
        axis.set(xlabel="LR", ylabel="batch", title=name)
        axis.legend(fontsize=6, loc="lower left")
    return figure


def costs_of(rows: pd.DataFrame, weights: str, target: str, quantity: str) -> dict[str, Costs]:
    """Of each tuner its costs in units of the best static run's, by family."""
    chosen = rows[(rows["weights"] == weights) & (rows["target"] == target)]
    relative = (chosen[quantity] / chosen[f"unit_{quantity}"]).where(chosen["reached"], math.inf)
    tuners: dict[str, Costs] = {}
    for (tuner, family), part in relative.groupby([chosen["tuner"], chosen["family"]]):
        tuners.setdefault(str(tuner), {})[str(family)] = part.tolist()  # type: ignore[index]
    return tuners


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


def problems_of(tuners: dict[str, Costs]) -> dict[str, dict[str, float]]:
    """Median costs of the tuners that were run on every family."""
    every = {family for own in tuners.values() for family in own}
    return {tuner: medians(own) for tuner, own in tuners.items() if set(own) == every}


def profiles(rows: pd.DataFrame) -> Figure:
    """Shares of (family, target, weights) that a tuner solves within tau times the cheapest tuner's samples."""
    merged: dict[str, dict[str, float]] = {}
    for weights in rows["weights"].unique():
        for target in rows["target"].unique():
            for tuner, own in problems_of(costs_of(rows, weights, target, "samples")).items():
                merged.setdefault(tuner, {}).update({f"{family} {target} {weights}": c for family, c in own.items()})
    merged.pop(STATIC, None)
    taus = np.linspace(1, TAU, 301)
    figure = Figure((WIDE * 2, TALL * 1.3), layout="constrained")
    axis, scores = figure.subplots(), score(merged)
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
        for tuner, part in chosen.groupby("tuner"):
            runs = part.pivot(index="start", columns="budget", values="regret").reindex(columns=list(BUDGETS))
            line = runs.ffill(axis=1).median()  # who stopped, having arrived, keeps what was found
            axis.plot(line.index, line.clip(lower=1e-3), ".-", label=str(tuner), lw=1)
        axis.set(xscale="log", yscale="log", xlabel="static runs spent", ylabel="regret of best so far", title=family)
        axis.legend(fontsize=5)
    return figure


def words(rows: pd.DataFrame, weights: str, target: str, quantity: str = "samples") -> list[str]:
    """A table of median costs, and what intervals say of GR-Gauge against each other tuner."""
    tuners = costs_of(rows, weights, target, quantity)
    names = sorted(rows["family"].unique())
    lines = [
        f"| {quantity}, {weights} weights, target: {target} | "
        + " | ".join(names)
        + " | reached | GR-Gauge against it |"
    ]
    lines.append("|---" * (len(names) + 3) + "|")
    for tuner, own in sorted(tuners.items()):
        cells = [f"{np.median(own[name]):.2f}" if name in own else "–" for name in names]
        values = [value for part in own.values() for value in part]
        against = "–"
        # What searches is compared from blind starts, what has a default from the default.
        ours = tuners.get("GR-Gauge, blind starts" if tuner in REPLAYED else "GR-Gauge", {})
        if not tuner.startswith("GR-Gauge") and tuner != STATIC:
            shared = sorted(set(own) & set(ours))
            if shared:
                both = compared({f: ours[f] for f in shared}, {f: own[f] for f in shared})
                against = f"{both.value:.2f} ({both.low:.2f} to {both.high:.2f}): {both.verdict}"
        reached = f"{sum(map(math.isfinite, values))} of {len(values)}"
        lines.append(f"| {tuner} | " + " | ".join(cells) + f" | {reached} | {against} |")
    if len(names) < len(families.NAMES):
        judged = f"{len(names)} of {len(families.NAMES)} families: too few to name a winner."
    else:
        complete = {tuner: own for tuner, own in tuners.items() if tuner != STATIC and set(own) == set(names)}
        judged = f"By intervals against every other tuner the winner is: {winner(complete) or 'none'}."
    return [*lines, "", judged, ""]


def zones(table: dict[str, pd.DataFrame]) -> list[str]:
    """How many of the best tenth have gauges in the published zone, against how many of all have."""
    lines = [
        "| family | cells in the zone | of all cells | of the best tenth | exponent of GR_T in LR | of GR_S in batch |"
    ]
    lines.append("|---" * 6 + "|")
    for name, rows in table.items():
        seen = gauges(rows)
        inside, best = in_zone(seen), top(seen, families.kind(name).higher)
        powers = [
            float(np.nanmedian([exponent(part[x], part[gauge]) for _, part in seen.groupby(line)]))
            for gauge, x, line in (("gr_t", "lr", "batch"), ("gr_s", "batch", "lr"))
        ]
        lines.append(
            f"| {name} | {inside.sum()} of {len(seen)} | {inside.mean():.0%} | {inside[best].mean():.0%} | "
            + " | ".join(f"{power:.2f}" for power in powers)
            + " |"
        )
    return [*lines, ""]


PAGE = """# What reaching a target costs

Written by `python -m judge.pictures` from rows in `bench/results`; how they are measured is said in
`bench/results/TABLE.md` and `bench/judge/protocol.py`. Costs are training samples until validation first meets the
target, in units of what the best static run of the table needs itself; medians over starts; `inf` is a miss in half of
them or more. Ratios are geometric means over the families that both were run on, with a 90 % bootstrap interval: below
1 GR-Gauge is cheaper. An interval that contains 1 decides nothing.

Read with care. "GR-Gauge" starts from its own default, LR 1e-3 and batch 32, which may lie near the best; opponents
that search start blind and are compared with "GR-Gauge, blind starts", those that bring a default with "GR-Gauge". Live
tuners may spend 4 static runs, replayed ones 32. A replayed configuration is the nearest of 60. Few seeds make
intervals of live tuners narrower than they should be.

"""

SECONDS = """Of one thread. Live tuners pay for all that they do, GR-Gauge for its gauges, checkpoints and study too;
replayed ones for training and validation alone. All was measured on a shared machine: a factor of 1.5 is no finding.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of page and pictures (default: docs/evidence)")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    matplotlib.rcParams["svg.hashsalt"] = "judge"  # the same rows, the same file
    table = load()
    costs = pd.read_csv(COSTS, dtype={"reached": bool})
    lines = [PAGE]
    for weights in ("raw", "averaged"):
        for target in ("best", "looser"):
            lines += words(costs, weights, target)
    lines += ["## The same in CPU seconds", "", SECONDS]
    for target in ("best", "looser"):
        lines += words(costs, "raw", target, "seconds")
    figures = {
        "cost-raw": ("Samples until a target, raw weights", bars(costs, "raw", "samples")),
        "cost-averaged": ("Samples until a target, averaged weights", bars(costs, "averaged", "samples")),
        "cost-seconds": ("CPU seconds until a target, raw weights", bars(costs, "raw", "seconds")),
        "profiles": ("Performance profiles", profiles(costs)),
        "best-so-far": (
            "Regret of the best so far (live tuners stop once they arrive)",
            best_so_far(pd.read_csv(REGRET)),
        ),
        "gauges": ("What gauges read across the plane, near step 50", reactions(table)),
        "maps": ("Mean of the metric over training", maps(table)),
    }
    for name, (title, figure) in figures.items():
        figure.savefig(out / f"{name}.svg", metadata={"Date": None})
        lines += [f"## {title}", "", f"![{title}]({name}.svg)", ""]
    lines += ["## Gauges and good configurations", "", *zones(table)]
    (out / "costs.md").write_text("\n".join(lines), encoding="utf-8")
    print(f"{out / 'costs.md'} and {len(figures)} pictures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
