"""Fit what advice rests on: how far from the best learning rate and batch a reading is, on the recorded table.

    python -m judge.calibrate                          on results/table.parquet, in bench/ as working folder; a minute
    python -m judge.calibrate --shards ../build/table  also on families there whose grid is recorded with a seed

Writes python/grgauge/policy/calibration.json. How it is made:

- The best learning rate of a family at a batch is the mean of log lr over the grid, each weighted by
  exp(-distance from the best metric / tolerance), of averaged weights at the end of the run, mean of both seeds. The
  tolerance is that of the judge's looser target: a point of accuracy or hit rate, a tenth of the loss. A batch at which
  the best metric is more than ten tolerances from the family's has learned too little to say, and is left out.
- The best batch of a family is the largest whose best metric is within the tolerance, in between by interpolation:
  beyond, samples are wasted.
- Each run's readings go through the very `Watch` of the package. Of what it picks, log10(best / lr) is described by
  quantiles over log10 GR_T: weighted by a kernel, all families alike, made monotone (isotonic regression). Runs outside
  of a band of GR_S count a fifth within. The same for the batch over GR_S.
- Intervals of few families are too narrow for the next one. So they are widened, at each end by the factor beyond
  which 5 % of the nearby readings of held-out families lie (conformalized quantile regression, Romano et al. 2019, with
  families instead of samples).

Coverage and directions are those of families that neither the fit nor the widening has seen.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import families
import numpy as np
import pandas as pd

from grgauge import Reading, theory
from grgauge.policy.advice import advice_of
from grgauge.policy.calibration import LEVELS, Calibration, Curve, spread
from grgauge.policy.watch import SPANS, Summary, Watch

from .table import BATCHES, LRS, SEEDS, load

PATH = Path(__file__).parents[2] / "python" / "grgauge" / "policy" / "calibration.json"
GR_T_KNOTS = tuple(
    round(math.log10(x), 3) for x in (1, 1.5, 2, 3, 4.5, 6.5, 9, 12, 15, 18, 22, 27, 35, 50, 75, 120, 250)
)
GR_S_KNOTS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.58, 0.65, 0.75, 0.85, 0.95, 1.0)
GR_S_BANDS = ((0.0, 0.65), (0.65, 0.9), (0.9, 1.0))
GR_T_BANDS = ((-1.0, 0.85), (0.85, 1.78), (1.78, 9.0))
"""In log10: 7 and 60 are the edges. Where the learning rate is far off, GR_S says little of the batch."""
LARGEST = 3.0
"""log10 of the factors that are told apart: the grid of learning rates ends."""
WIDTH = {"lr": 0.1, "batch": 0.08}
"""Of the kernels, in log10 GR_T and in GR_S."""
OUTSIDE = 0.2
"""Weight of runs outside of a band."""
TOLERANCES = 10.0
JUDGED = math.log10(3.0)
"""A direction is judged where the best is at least three times away."""

Row = dict[str, Any]


def quality(kind: type[families.Family], values: np.ndarray) -> np.ndarray:
    """The metric in tolerances, more being better."""
    values = np.asarray(values, float)
    if kind.metric == "loss":
        return np.where(np.isfinite(values), -np.log(np.maximum(values, 1e-12)) / math.log(1.1), -np.inf)
    return np.where(np.isfinite(values), values / 0.01, -np.inf)


def bests(kind: type[families.Family], rows: pd.DataFrame) -> tuple[dict[int, float], float]:
    """log10 of the best learning rate at each batch, and of the best batch."""
    last = rows[rows["seed"].isin(SEEDS)].sort_values("check").groupby(["lr", "batch", "seed"]).tail(1)
    last = last.assign(quality=quality(kind, last["metric_averaged"].to_numpy()))
    grid = last.groupby(["batch", "lr"])["quality"].mean().unstack()
    tops = grid.max(axis=1)
    learned = tops[tops > tops.max() - TOLERANCES].index
    lrs = {}
    for batch in learned:
        weights = np.exp(grid.loc[batch] - tops[batch])
        lrs[int(batch)] = float((weights * np.log10(grid.columns.to_numpy())).sum() / weights.sum())
    # qualities of larger batches never count for more than those of smaller ones: noise of two seeds aside
    sizes, wanted = np.log10(tops.index.to_numpy(float)), tops.max() - 1.0
    falling = np.maximum.accumulate(tops.to_numpy()[::-1])[::-1]
    within = int(np.flatnonzero(falling >= wanted)[-1])
    batch = sizes[within]
    if within + 1 < len(sizes):
        batch += (sizes[within + 1] - batch) * (falling[within] - wanted) / (falling[within] - falling[within + 1])
    return lrs, float(batch)


def readings(run: pd.DataFrame) -> list[Reading]:
    """A run's recorded readings, each once."""
    made, known = [], run[run["read_at"].notna()].drop_duplicates("read_at").sort_values("read_at")
    for row in known.to_dict("records"):
        numbers = {
            name: None if row[name] is None or not math.isfinite(row[name]) else float(row[name])
            for name in ("gr_t", "gr_t_error", "gr_s", "gr_s_error", "noise_scale", "noise_scale_error")
        }
        step = int(row["read_at"])
        made.append(
            Reading(
                step=step,
                batch_size=row["batch"],
                finite_time_factor=theory.finite_time_factor(step),
                grad_norm=float(row["grad_norm"]),
                nonfinite=0,
                ready=bool(row["ready"]),
                **numbers,
            )
        )
    return made


def summaries(table: Mapping[str, pd.DataFrame]) -> list[Row]:
    """What a watch picks in each run, once each, with the distances to the best."""
    made: list[Row] = []
    for name, rows in table.items():
        lrs, batch = bests(families.kind(name), rows)
        for (lr, size, _), run in rows[rows["seed"].isin(SEEDS)].groupby(["lr", "batch", "seed"]):
            if int(size) not in lrs:
                continue
            watch, seen = Watch(), dict[tuple[str, int, int], Summary]()
            for reading in readings(run):
                watch.observe(reading)
                for summary in (watch.summary(), watch.late()):
                    if summary is not None and summary.log_gr_t is not None:
                        seen[summary.span, summary.first, summary.last] = summary
            windows = [key for key in seen if key[0] == "window"]
            for key in windows[:-1]:  # the window's readings in the end, not on the way
                del seen[key]
            for summary in seen.values():
                distances = {"lr": lrs[int(size)] - math.log10(lr), "batch": batch - math.log10(size)}
                made.append({"family": name, "summary": summary, **distances})
    return made


def exploded(table: Mapping[str, pd.DataFrame]) -> list[Row]:
    """The distance of each run whose loss exploded."""
    made: list[Row] = []
    for name, rows in table.items():
        lrs, _ = bests(families.kind(name), rows)
        for (lr, size, _), run in rows[rows["seed"].isin(SEEDS)].groupby(["lr", "batch", "seed"]):
            if int(size) in lrs:
                watch = Watch()
                for loss in run.sort_values("check")["loss"]:
                    watch.lost(float(loss))
                    if watch.diverged is not None:
                        made.append({"family": name, "lr": lrs[int(size)] - math.log10(lr)})
                        break
    return made


def balanced(rows: Sequence[Row]) -> np.ndarray:
    """Weights that make all families count alike."""
    names = [row["family"] for row in rows]
    return np.array([1.0 / names.count(name) for name in names])


def weighted_quantiles(values: np.ndarray, weights: np.ndarray, levels: Sequence[float]) -> np.ndarray:
    order = np.argsort(values)
    ends = np.cumsum(weights[order])
    return np.interp(np.asarray(levels) * ends[-1], ends - weights[order] / 2.0, values[order])


def isotonic(values: np.ndarray, weights: np.ndarray, rising: bool) -> np.ndarray:
    """The nearest monotone sequence, by pooling adjacent violators."""
    blocks: list[list[float]] = []  # mean, weight, length
    for value, weight in zip(values if rising else -values, weights, strict=True):
        blocks.append([float(value), float(weight), 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, v, n), (b, w, m) = blocks[-2:]
            blocks[-2:] = [[(a * v + b * w) / (v + w), v + w, n + m]]
    fitted = np.concatenate([np.full(int(n), mean) for mean, _, n in blocks])
    return fitted if rising else -fitted


def gauges(row: Row, what: str) -> tuple[float | None, float | None, float]:
    """The gauge that a curve is over, the other one, and the standard error of the first."""
    s: Summary = row["summary"]
    return (s.log_gr_t, s.gr_s, s.log_gr_t_error) if what == "lr" else (s.gr_s, s.log_gr_t, s.gr_s_error)


def curves(rows: Sequence[Row], what: str, wider: np.ndarray | None = None) -> list[Curve]:
    """The curves of one span: over any value of the other gauge, and within bands of it."""
    rows = [row for row in rows if gauges(row, what)[0] is not None]
    x, other, errors = (
        np.array([np.nan if v is None else v for v in column])
        for column in zip(*(gauges(r, what) for r in rows), strict=True)
    )
    y, base = np.array([row[what] for row in rows]), balanced(rows)
    knots, bands = (GR_T_KNOTS, GR_S_BANDS) if what == "lr" else (GR_S_KNOTS, GR_T_BANDS)
    made = []
    for band in ((-9.0, 9.0), *bands):
        within = (other > band[0]) & (other <= band[1])
        weights = base if band == (-9.0, 9.0) else base * np.where(within, 1.0, OUTSIDE)
        fitted, usual, mass = [], [], []
        for knot in knots:
            near = weights * (np.exp(-0.5 * ((x - knot) / WIDTH[what]) ** 2) + 1e-6)
            fitted.append(weighted_quantiles(y, near, LEVELS))
            usual.append(float(weighted_quantiles(errors, near, (0.5,))[0]))
            mass.append(near.sum())
        grid = np.array([isotonic(column, np.array(mass), what == "batch") for column in np.array(fitted).T]).T
        if wider is not None:
            grid[:, [0, -1]] = np.clip(grid[:, [0, -1]] + wider, -LARGEST, LARGEST)
        made.append(Curve(band, knots, [tuple(row) for row in grid.round(3).tolist()], [round(e, 3) for e in usual]))
    return made


def widening(rows: Sequence[Row], what: str) -> np.ndarray:
    """What to add to both ends of intervals, at each knot, so that 5 % of the rows of held-out families lie beyond."""
    names, knots = sorted({row["family"] for row in rows}), np.array(GR_T_KNOTS if what == "lr" else GR_S_KNOTS)
    if len(names) < 2:
        return np.zeros((len(knots), 2))
    at, beyond, weights = [], [], []
    for name in names:
        fitted = curves([row for row in rows if row["family"] != name], what)
        out = [row for row in rows if row["family"] == name and gauges(row, what)[0] is not None]
        for row in out:
            x, other, error = gauges(row, what)
            assert x is not None
            low, *_, high = spread(fitted, x, error, None if other is None else (other, other))
            at.append(x)
            beyond.append((row[what] - low, row[what] - high))
            weights.append(1.0 / len(out))
    made = []
    for knot in knots:
        near = np.array(weights) * (np.exp(-0.5 * ((np.array(at) - knot) / (2.0 * WIDTH[what])) ** 2) + 1e-6)
        below, above = np.array(beyond).T
        made.append(
            (
                min(float(weighted_quantiles(below, near, (LEVELS[0],))[0]), 0.0),
                max(float(weighted_quantiles(above, near, (LEVELS[-1],))[0]), 0.0),
            )
        )
    return np.array(made)


def fit(rows: Sequence[Row], diverged: Sequence[Row]) -> Calibration:
    spans = {span: [row for row in rows if row["summary"].span == span] for span in SPANS}
    made = {
        what: {span: curves(own, what, widening(own, what)) for span, own in spans.items()} for what in ("lr", "batch")
    }
    y = np.array([row["lr"] for row in diverged])
    quantiles = weighted_quantiles(y, balanced(diverged), LEVELS)
    return Calibration(made["lr"], made["batch"], tuple(quantiles.round(3).tolist()), {})


def judged(table: Mapping[str, pd.DataFrame], known: Calibration, steps: tuple[int, int]) -> list[Row]:
    """The advice after each recorded reading within those steps, and what would have been right."""
    made = []
    for name, rows in table.items():
        lrs, batch = bests(families.kind(name), rows)
        for (lr, size, seed), run in rows[rows["seed"].isin(SEEDS)].groupby(["lr", "batch", "seed"]):
            if int(size) not in lrs:
                continue
            losses = run.drop_duplicates("read_at").set_index("read_at")["loss"].to_dict()
            watch = Watch()
            for reading in readings(run):
                watch.observe(reading)
                watch.lost(float(losses[reading.step]))
                advice = advice_of(watch, known=known)
                if advice is None or not steps[0] <= reading.step <= steps[1]:
                    continue
                for what, best, now in (("lr", lrs[int(size)], lr), ("batch", batch, size)):
                    part, away = getattr(advice, what), best - math.log10(now)
                    low, high = part.interval
                    made.append(
                        {
                            "family": name,
                            "run": (lr, size, seed),
                            "step": reading.step,
                            "what": what,
                            "away": away,
                            "direction": part.direction,
                            "held": low <= 10.0**away <= high,
                            "given": low > 0.0,
                        }
                    )
    return made


def right(rows: pd.DataFrame) -> float:
    """Share of right directions where the best is at least three times away; "cannot tell" counts half."""
    far = rows[rows["away"].abs() >= JUDGED]
    wanted = np.where(far["away"] > 0, "raise", "lower")
    return float(np.where(far["direction"] == "unknown", 0.5, far["direction"] == wanted).mean())


def report(table: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """For each family, fitted on the others: shares of right directions, of intervals that hold, of no answer."""
    rows, diverged, made = summaries(table), exploded(table), dict[str, Any]()
    for name in table:
        known = fit([r for r in rows if r["family"] != name], [r for r in diverged if r["family"] != name])
        seen = pd.DataFrame(judged({name: table[name]}, known, (50, 400)))
        for what, own in seen.groupby("what"):
            far = own[own["away"].abs() >= JUDGED]
            near = own[own["away"].abs() < JUDGED]
            made.setdefault(str(what), {})[name] = {
                "right": round(right(own), 3),
                "unknown": round(float((far["direction"] == "unknown").mean()), 3),
                "kept_near_best": round(float((near["direction"] == "keep").mean()), 3),
                "wrong_near_best": round(
                    float(
                        (
                            near["direction"].isin(["raise", "lower"])
                            & (np.where(near["away"] > 0, "raise", "lower") != near["direction"])
                        ).mean()
                    ),
                    3,
                ),
                "held": round(float(own[own["given"]]["held"].mean()), 3),
                "cases": len(far),
            }
    return made


def whole(folder: Path) -> dict[str, pd.DataFrame]:
    """Families whose grid has been recorded with one seed or both, in a folder of shards."""
    made = {}
    for own in sorted(path for path in folder.iterdir() if path.is_dir()):
        shards = {seed: sorted(own.glob(f"*-seed{seed}.parquet")) for seed in SEEDS}
        complete = [paths for paths in shards.values() if len(paths) == len(LRS) * len(BATCHES)]
        if complete:
            rows = pd.concat([pd.read_parquet(path) for paths in complete for path in paths], ignore_index=True)
            made[str(rows["family"].iloc[0])] = rows
    return made


def count(rows: pd.DataFrame) -> int:
    """Runs of the grid."""
    return len(rows.loc[rows["seed"].isin(SEEDS), ["lr", "batch", "seed"]].drop_duplicates())


def plain(known: Calibration) -> dict[str, Any]:
    def spans(own: Mapping[str, Sequence[Curve]]) -> dict[str, Any]:
        return {span: [vars(curve) for curve in curves] for span, curves in own.items()}

    return {
        "provenance": known.provenance,
        "diverged": known.diverged,
        "lr": spans(known.lr),
        "batch": spans(known.batch),
    }


def lines(values: dict[str, Any]) -> str:
    """JSON with one row of numbers a line."""
    text = json.dumps(values, indent=1)
    return re.sub(r"\[\s+([-\d.,\s]+?)\s+\]", lambda m: "[" + " ".join(m[1].split()) + "]", text) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, help="folder of recorded runs")
    parser.add_argument("--check", action="store_true", help="print how well it holds, and write nothing")
    options = parser.parse_args()
    table = load()
    if options.shards is not None:
        table = whole(options.shards) | table
    held_out = report(table)
    for what, own in held_out.items():
        print(pd.DataFrame(own).T.rename_axis(f"{what}, held out").to_string())
    if options.check:
        return 0
    known = fit(summaries(table), exploded(table))
    provenance = {
        "made_by": "python -m judge.calibrate",
        "runs": {name: count(rows) for name, rows in sorted(table.items())},
        "held_out": held_out,
    }
    known = Calibration(known.lr, known.batch, known.diverged, provenance)
    PATH.write_text(lines(plain(known)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
