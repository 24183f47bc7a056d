"""Fit what advice rests on: how far from the best learning rate and batch a reading is, on the recorded table.

    python -m judge.calibrate                          on results/table.parquet, in bench/ as working folder; a minute
    python -m judge.calibrate --shards ../build/table  judges the package's numbers on families there whose grid is
                                                       recorded with a seed, and writes nothing

Writes python/grgauge/policy/calibration.json. How it is made:

- The best learning rate of a family at a batch is the mean of log lr over the grid, each weighted by
  exp(-distance from the best metric / tolerance), of averaged weights at the end of the run, mean of both seeds. The
  tolerance is that of the judge's looser target: a point of accuracy or hit rate, a tenth of the loss. A batch at which
  the best metric is more than ten tolerances from the family's has learned too little to say, and is left out.
- The best batch of a family is the largest whose best metric is within the tolerance, in between by interpolation:
  beyond, samples are wasted.
- Each run's readings go through the very `Watch` of the package. Of what it picks, the gauge is described over the
  distance log10(best / value), not the distance over the gauge: else the grid of learning rates would decide how far
  away the best is where all gradients agree. The curve is a mean weighted by a kernel, and made monotone (isotonic
  regression). Scatter about it is what the readings' own standard errors do not explain.
- Families are a random effect. The whole curve of the learning rate is shifted sideways from family to family, that of
  the batch up or down. A family not seen is one shifted more, by the variance between those seen, (1 + 1/k) times for
  the error of the mean of k. Advice inverts the curve: its interval has all distances at which some such family reads
  the like.

Directions and intervals are judged on each family by a fit on the others.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import families
import numpy as np
import pandas as pd

from grgauge import Reading, theory
from grgauge.policy.advice import advice_of
from grgauge.policy.calibration import LEVELS, Calibration, Curve, Interval, calibration
from grgauge.policy.watch import SPANS, Summary, Watch

from .table import BATCHES, LRS, SEEDS, load

PATH = Path(__file__).parents[2] / "python" / "grgauge" / "policy" / "calibration.json"
AWAY = np.linspace(-3.0, 3.0, 25)
"""log10 of the factors that are told apart: the grid of learning rates ends."""
WIDTH = 0.25
"""Of the kernel, in decades: half a step of the grid."""
SHIFTS = np.linspace(-1.5, 1.5, 61)
LEAST = 0.05
"""Scatter of the gauge: a fit that knows no other error is not exact."""
ROUNDS = 10
TOLERANCES = 10.0
JUDGED = math.log10(3.0)
"""A direction is judged where the best is at least three times away."""
AT, NEARBY = (50, 100, 200, 400), 0.1
"""Steps that are judged one by one, with readings up to a tenth away: checks lie where samples put them."""

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
                    if summary is not None and summary.gr_t is not None:
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


def curve(rows: Sequence[Row], what: str) -> Curve:
    """The curve of one span: a common one, from which each family's is shifted, as the module's docstring says."""
    known = [row for row in rows if gauge(row, what)[0] is not None]
    names = sorted({row["family"] for row in known})
    family = np.array([names.index(row["family"]) for row in known])
    value, error = np.array([gauge(row, what) for row in known], float).T
    away, alike = np.array([row[what] for row in known]), 1.0 / np.bincount(family)[family]
    sideways, upwards, scatter = np.zeros(len(names)), np.zeros(len(names)), np.full(len(AWAY), 0.3)
    for _ in range(ROUNDS):
        at, level = away + sideways[family], value - upwards[family]
        near = alike[:, None] * (np.exp(-0.5 * ((at[:, None] - AWAY) / WIDTH) ** 2) + 1e-9)
        weights = near / np.hypot(np.interp(at, AWAY, scatter), np.hypot(error, 0.1))[:, None] ** 2
        read = isotonic(weights.T @ level / weights.sum(0), near.sum(0), what == "batch")
        beyond = (level - np.interp(at, AWAY, read)) ** 2 - error**2
        scatter = np.sqrt(np.maximum(weights.T @ beyond / weights.sum(0), LEAST**2))
        for i in range(len(names)):
            own = family == i
            if what == "batch":
                upwards[i] = np.mean(value[own] - np.interp(away[own], AWAY, read))
                continue
            tried = away[own, None] + SHIFTS
            variance = np.interp(tried, AWAY, scatter) ** 2 + error[own, None] ** 2
            misfit = (value[own, None] - np.interp(tried, AWAY, read)) ** 2 / variance + np.log(variance)
            sideways[i] = SHIFTS[misfit.sum(0).argmin()]
        sideways, upwards = sideways - sideways.mean(), upwards - upwards.mean()
    columns = (column.round(3).tolist() for column in (AWAY, read, np.hypot(scatter, between(upwards))))
    return Curve(*columns, round(between(sideways), 3))


def between(means: Sequence[float] | np.ndarray) -> float:
    """Standard deviation of a family not seen about the mean of those seen: unbiased, as that of few is too small."""
    count = len(means)
    bias = math.sqrt(2.0 / (count - 1)) * math.gamma(count / 2.0) / math.gamma((count - 1) / 2.0)
    return float(np.std(means, ddof=1)) / bias * math.sqrt(1.0 + 1.0 / count)


def gauge(row: Row, what: str) -> tuple[float | None, float]:
    """The gauge that a curve is over, and its standard error."""
    s: Summary = row["summary"]
    return (s.signal, s.signal_error) if what == "lr" else (s.gr_s, s.gr_s_error)


def fit(rows: Sequence[Row], diverged: Sequence[Row]) -> Calibration:
    spans = {span: [row for row in rows if row["summary"].span == span] for span in SPANS}
    lr, batch = ({span: curve(own, what) for span, own in spans.items()} for what in ("lr", "batch"))
    common = math.sqrt(np.mean([one.between**2 for one in lr.values()]))  # families are few: one variance for all spans
    lr = {span: replace(one, between=round(common, 3)) for span, one in lr.items()}
    names = sorted({row["family"] for row in diverged})
    away = [[row["lr"] for row in diverged if row["family"] == name] for name in names]
    means = [np.mean(own) for own in away]
    deviation = math.hypot(math.sqrt(np.mean([np.var(own) for own in away])), between(means))
    exploded = NormalDist(float(np.mean(means)), deviation)
    return Calibration(lr, batch, Interval(*(round(exploded.inv_cdf(level), 3) for level in LEVELS)), {})


def judged(table: Mapping[str, pd.DataFrame], known: Calibration) -> list[Row]:
    """The advice after each recorded reading within the steps that are judged, and what would have been right."""
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
                if advice is None or not AT[0] * (1.0 - NEARBY) <= reading.step <= AT[-1]:
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
                            "words": part.describe("LR"),
                            "given": (low, high) != (0.0, math.inf),
                        }
                    )
    return made


def held_out(table: Mapping[str, pd.DataFrame], rows: Sequence[Row], diverged: Sequence[Row]) -> pd.DataFrame:
    """The advice on each family by a fit on the others."""
    made = []
    for name in table:
        known = fit([r for r in rows if r["family"] != name], [r for r in diverged if r["family"] != name])
        made += judged({name: table[name]}, known)
    return pd.DataFrame(made)


def shares(rows: pd.DataFrame) -> dict[str, float]:
    """Of the cases where the best is three times away or more: right (cannot tell counts half), spoken and right,
    wrong, cannot tell. Of all cases: an interval given, and of those, held."""
    far = rows[rows["away"].abs() >= JUDGED]
    right = far["direction"] == np.where(far["away"] > 0, "raise", "lower")
    unknown = far["direction"] == "unknown"
    made = {
        "right": (right + 0.5 * unknown).mean(),
        "spoken": right.mean(),
        "wrong": (~right & ~unknown).mean(),
        "unknown": unknown.mean(),
        "given": rows["given"].mean(),
    }
    held = {"held": rows[rows["given"]]["held"].mean()} if rows["given"].any() else {}
    return {name: round(float(share), 3) for name, share in (made | held).items()} | {"cases": len(far)}


def report(rows: pd.DataFrame) -> dict[str, dict[str, dict[str, float]]]:
    """Shares of each family: of the learning rate at all steps and around some, of the batch at all steps."""
    made: dict[str, dict[str, dict[str, float]]] = {}
    for name, own in rows.groupby("family"):
        lr = own[own["what"] == "lr"]
        spans = {f"step {step}": lr[(lr["step"] / step - 1.0).abs() <= NEARBY] for step in AT}
        parts = {"lr": lr[lr["step"] >= AT[0]], **spans, "batch": own[own["what"] == "batch"]}
        made[str(name)] = {part: shares(part_rows) for part, part_rows in parts.items()}
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
    spans = {what: {span: vars(own) for span, own in getattr(known, what).items()} for what in ("lr", "batch")}
    return {"provenance": known.provenance, "diverged": vars(known.diverged), **spans}


def lines(values: dict[str, Any]) -> str:
    """JSON with one row of numbers a line."""
    text = json.dumps(values, indent=1)
    return re.sub(r"\[\s+([-\d.,\s]+?)\s+\]", lambda m: "[" + " ".join(m[1].split()) + "]", text) + "\n"


def made_of(table: Mapping[str, pd.DataFrame]) -> Calibration:
    """What the file holds."""
    rows, diverged = summaries(table), exploded(table)
    provenance = {
        "made_by": "python -m judge.calibrate",
        "runs": {name: count(rows) for name, rows in sorted(table.items())},
        "held_out": report(held_out(table, rows, diverged)),
    }
    return replace(fit(rows, diverged), provenance=provenance)


def show(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    for name, parts in found.items():
        print(pd.DataFrame(parts).T.rename_axis(name).to_string())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, help="folder of recorded runs to judge the package's numbers on")
    options = parser.parse_args()
    table = load()
    if options.shards is not None:
        others = {name: rows for name, rows in whole(options.shards).items() if name not in table}
        show(report(pd.DataFrame(judged(others, calibration()))))
        return 0
    known = made_of(table)
    show(known.provenance["held_out"])
    PATH.write_text(lines(plain(known)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
