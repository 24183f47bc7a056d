"""What rows come to, in words: tables, and of each picture what holds and what does not. No more is claimed than
intervals carry."""

from __future__ import annotations

import math

import families
import numpy as np
import pandas as pd

from .evidence import ALONE, STATIC
from .live import LIMIT
from .opponents import REPLAYED
from .protocol import FEWEST, Costs, compared, paired, score, winner
from .summaries import (
    costs_of,
    curvature,
    exponent,
    gauges,
    in_zone,
    lemma1,
    lemma2,
    noise_scale,
    top,
    within,
)

OURS = "GR-Gauge"
COMPARED = (0.5, 1.0, 2.0, 4.0)
"""Budgets, in static runs, at which GR-Gauge is compared with a start that is left alone."""


def against(tuner: str, tuners: dict[str, Costs], judged: bool = True) -> tuple[str, str]:
    """GR-Gauge against a tuner, on the families that both were run on: the verdict, and the cell of a table. What
    searches is compared from blind starts, what has a default from the default."""
    own, ours = tuners[tuner], tuners.get(f"{OURS}, blind starts" if tuner in REPLAYED else OURS, {})
    shared = sorted(set(own) & set(ours))
    if tuner.startswith(OURS) or tuner == STATIC or not shared:
        return "", "–"
    for who, costs in ((tuner, own), (OURS, ours)):
        for family in shared:
            met = sum(map(math.isfinite, costs[family]))
            if 2 * met <= len(costs[family]):
                return "no ratio", f"no ratio: {who} met it in {met} of {len(costs[family])} on {family}"
    both = compared({f: ours[f] for f in shared}, {f: own[f] for f in shared})
    cell = f"{both.value:.2f} ({both.low:.2f} to {both.high:.2f})" + f": {both.verdict}" * judged
    return both.verdict, cell + f", {both.starts} starts" * (both.starts < FEWEST) + f" ({', '.join(shared)})"


def costs_table(rows: pd.DataFrame, weights: str, target: str, quantity: str = "samples") -> list[str]:
    """Median costs, and what intervals say of GR-Gauge against each other tuner."""
    tuners = costs_of(rows, weights, target, quantity)
    names = sorted(rows["family"].unique())
    head = " | ".join((f"{quantity}, {weights} weights", *names, "met", f"within {LIMIT:g} runs", f"{OURS} against it"))
    lines = [f"| {head} |", "|:---" + "|---:" * (len(names) + 2) + "|:---|"]
    early = soon(rows[(rows["weights"] == weights) & (rows["target"] == target)]).groupby("tuner")["soon"].sum()
    for tuner, own in sorted(tuners.items()):
        cells = [f"{np.median(own[name]):.2f}" if name in own else "–" for name in names]
        values = [value for part in own.values() for value in part]
        met = f"{sum(map(math.isfinite, values))} of {len(values)}"
        words = against(tuner, tuners, judged=quantity == "samples")[1]
        # said by the row itself, or the same in most rows
        words = words.replace(f"{tuner} met it", "it met it").removesuffix(f" ({', '.join(names)})")
        lines.append(f"| {' | '.join((tuner, *cells, met, str(early[tuner]), words))} |")
    if len(names) < len(families.NAMES):
        judged = f"{len(names)} of {len(families.NAMES)} families: too few to name a winner."
    else:
        complete = {tuner: own for tuner, own in tuners.items() if tuner != STATIC and set(own) == set(names)}
        best = winner(complete)
        judged = f"{best} wins: by intervals" if best else "Nobody wins: by intervals no tuner"
        judged += " is cheaper than every other."
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
        cells = (f"{power:.2f}" for power in powers(seen))
        lines.append(
            f"| {name} | {inside.sum()} of {len(seen)} | {inside.mean():.0%} | {inside[best].mean():.0%} | "
            + " | ".join(cells)
            + " |"
        )
    return [*lines, ""]


def of_costs(rows: pd.DataFrame, weights: str) -> tuple[str, str]:
    """What holds of samples until the strict target, family by family, and what does not."""
    tuners = costs_of(rows, weights, "best", "samples")
    chosen = soon(rows[(rows["weights"] == weights) & (rows["target"] == "best")])
    holds, not_so = [], []
    for family in sorted({family for name, own in tuners.items() if name.startswith(OURS) for family in own}):
        here = {name: {family: own[family]} for name, own in tuners.items() if family in own}
        verdicts: dict[str, list[str]] = {}
        for tuner in sorted(here):
            verdicts.setdefault(against(tuner, here)[0], []).append(listed(tuner))
        fewer, more = verdicts.get("cheaper", []), verdicts.get("dearer", [])
        early = chosen[chosen["family"] == family].groupby("tuner")["soon"].agg(["sum", "count"])
        early = early[early["count"] >= FEWEST].sort_values("sum", ascending=False)
        met = ((str(name), f"{row['sum']} of {row['count']}") for name, row in early.iterrows())
        counts = (f"{listed(name)} {words}" for name, words in met if name != STATIC)
        holds.append(
            f"On {family} GR-Gauge needs "
            + f"fewer samples than {', '.join(fewer) or 'nobody'}"
            + (f", and more than {', '.join(more)}" if more else "")
            + f"; within {LIMIT:g} static runs the target was met by {', '.join(counts)}."
        )
        for verdict, words in (("undecided", "is undecided against"), ("no ratio", "has no ratio to")):
            if verdict in verdicts:
                not_so.append(f"On {family} GR-Gauge {words} {', '.join(verdicts[verdict])}.")
    return "\n".join(holds), "\n".join(not_so)


def listed(tuner: str) -> str:
    """Its name without a comma, as lists have commas of their own."""
    name, comma, kind = tuner.partition(", ")
    return f"{name} ({kind})" if comma else name


def soon(rows: pd.DataFrame) -> pd.DataFrame:
    """The same with a column that says who met the target within what a live tuner may spend."""
    runs = rows["family"].map(lambda name: families.kind(name).samples)
    return rows.assign(soon=rows["reached"] & (rows["samples"] <= LIMIT * runs))


def of_seconds(rows: pd.DataFrame) -> tuple[str, str]:
    tuners = costs_of(rows, "raw", "best", "seconds")
    ours = {name: own for name, own in tuners.items() if name.startswith(OURS)}
    medians = (
        f"{name} {np.median(values):.2g} on {family}"
        for name, own in ours.items()
        for family, values in own.items()
        if math.isfinite(np.median(values))
    )
    return (
        f"In static runs' seconds: {'; '.join(medians)}.",
        "Rows were recorded on a busy machine, at different times: no tuner is faster than another by them.",
    )


def of_profiles(merged: dict[str, dict[str, float]]) -> tuple[str, str]:
    scores = score(merged)
    order = sorted(scores, key=lambda name: -scores[name])
    problems = len(next(iter(merged.values())))
    ours = [name for name in order if name.startswith(OURS)]
    return (
        f"Of {len(order)} tuners run on every family from {FEWEST} starts or more, {order[0]} has the largest "
        f"integral ({scores[order[0]]:.2f}), {order[-1]} least ({scores[order[-1]]:.2f}), over {problems} problems.",
        "Profiles have no intervals, and raw and averaged weights of a family are not independent problems; "
        + (f"{', '.join(ours)} is one of them." if ours else "GR-Gauge is none of them: it was run on fewer families."),
    )


def of_regret(rows: pd.DataFrame, budget: float = 4.0) -> tuple[str, str]:
    chosen = rows[(rows["weights"] == "raw") & (rows["budget"] == budget) & rows["tuner"].isin(REPLAYED)]
    medians = chosen.groupby("tuner")["regret"].median().sort_values()
    return (
        f"Of what is replayed, {medians.index[0]} is nearest to the table's best after {budget:g} static runs (median "
        f"regret {medians.iloc[0]:.3f}) and {medians.index[-1]} farthest ({medians.iloc[-1]:.3f}).",
        "Live tuners stop once they arrive, so their lines go on at what they had then and are no bound on what they "
        "would find; medians are shown without intervals.",
    )


def powers(seen: pd.DataFrame) -> tuple[float, float]:
    """Exponents of GR_T in the learning rate and of GR_S in the batch: medians over the other of the two."""
    first, second = (
        float(np.nanmedian([exponent(part[x], part[gauge]) for _, part in seen.groupby(line)]))
        for gauge, x, line in (("gr_t", "lr", "batch"), ("gr_s", "batch", "lr"))
    )
    return first, second


def of_gauges(table: dict[str, pd.DataFrame]) -> tuple[str, str]:
    signs, lemmas = [], []
    for name, rows in table.items():
        seen = gauges(rows)
        temporal, spatial = powers(seen)
        signs.append(f"{name} {temporal:.2f} and {spatial:.2f}")
        near2, of2 = within(lemma2(seen["batch"], noise_scale(seen)), seen["gr_s"])
        near1, of1 = within(lemma1(seen, curvature(seen)), seen["gr_t"])
        lemmas.append(f"{name} {near1} of {of1} and {near2} of {of2}")
    return (
        f"GR_T rises with the learning rate and GR_S falls with the batch where exponents are above and below 0: "
        f"{'; '.join(signs)}. The published steps would be exact at 3 and -1.",
        "Dashed lines are Lemma 1, with one fitted curvature a family and where the noise scale is at most the batch, "
        f"and Lemma 2, with one noise scale a family; within a factor of 1.5 of them are: {'; '.join(lemmas)}.",
    )


def of_maps(table: dict[str, pd.DataFrame]) -> tuple[str, str]:
    shares, away = [], []
    for name, rows in table.items():
        seen = gauges(rows)
        inside, best = in_zone(seen), top(seen, families.kind(name).higher)
        shares.append(
            f"{name} {int((inside & best).sum())} of {int(best.sum())}, by chance {inside.mean() * best.sum():.1f}"
        )
        low, high = seen["gr_t"][best].min(), seen["gr_t"][best].max()
        away.append(
            f"{name} {low:.3g} to {high:.3g} at GR_S {seen['gr_s'][best].min():.2g} to {seen['gr_s'][best].max():.2g}"
        )
    return (
        f"The best tenth of the configurations reads GR_T near step 50 at {'; '.join(away)}.",
        f"Of it lie in the published zone: {'; '.join(shares)}. Lines of Lemma 1 (GR_T = 20) and Lemma 2 (GR_S = 0.58) "
        "at the family's noise scale and fitted curvature are drawn beside the measured contours of the same values; "
        "where a contour is missing, the value was not measured anywhere.",
    )


VARIANTS = {
    "GR-Gauge, no-R": "without state reuse: fresh weights at each configuration",
    "GR-Gauge, no-RS": "without reuse and guided search: configurations by chance",
    "GR-Gauge, no-RT": "without reuse and early stopping: whole runs",
    "GR-Gauge, paper, blind starts": "the published rules, `Policy.paper`",
}


def ablations(rows: pd.DataFrame) -> list[str]:
    """GR-Gauge from blind starts beside what is left of it, on the starts that both were run from."""
    full = rows[rows["tuner"] == f"{OURS}, blind starts"]
    lines = [
        "Samples until a target in units of the best static run's, raw weights; in brackets how many of the starts met "
        "it within 4 static runs. Only starts that both were run from. What runs without reuse is made of what the "
        "library has for trials apart, `suggest` and `Pruning`.",
        "",
        "| family | left out | target | starts | all of GR-Gauge | what is left |",
        "|---" * 6 + "|",
    ]
    keys = ["family", "weights", "target", "start"]
    for tuner, words in VARIANTS.items():
        both = full.merge(rows[rows["tuner"] == tuner], on=keys, suffixes=("", "_left"))
        for (family, target), part in both[both["weights"] == "raw"].groupby(["family", "target"]):
            cells = []
            for end in ("", "_left"):
                met = part[f"reached{end}"]
                costs = (part[f"samples{end}"] / part[f"unit_samples{end}"]).where(met, math.inf)
                cells.append(f"{costs.median():.2f} ({met.sum()})")
            lines.append(f"| {family} | {words} | {target} | {len(part)} | {' | '.join(cells)} |")
    few = "Fewer than five starts decide nothing; the counts say what was seen."
    return [*lines, "", few, ""] if len(lines) > 4 else ["Not measured yet.", ""]


def left_alone(regrets: pd.DataFrame) -> list[str]:
    """GR-Gauge beside the same start that is left alone, at equal samples."""
    lines = [
        "Regret of the best so far at equal samples, GR-Gauge less AdamW that keeps the configuration of the start: "
        "below 0 tuning has helped. Better and worse count differences of more than twice the standard deviation over "
        "the seeds of the default start left alone. Who has met the strict target stops, and keeps the regret of then.",
        "",
        "| family, weights | starts | "
        + " | ".join(f"{budget:g} static runs: median, better, worse" for budget in COMPARED)
        + " |",
        "|---" * (len(COMPARED) + 2) + "|",
    ]
    at = regrets.pivot_table("regret", ["family", "weights", "tuner", "start"], "budget").ffill(axis=1)
    for (family, weights), part in at.groupby(level=["family", "weights"]):
        own = part.droplevel(["family", "weights"])
        tuners = set(own.index.get_level_values("tuner"))
        if ALONE not in tuners:
            continue
        noise = 2.0 * own.loc[ALONE].std()
        for kind in ("", ", blind starts"):
            if not {f"{OURS}{kind}", f"{ALONE}{kind}"} <= tuners:
                continue
            apart = (own.loc[f"{OURS}{kind}"] - own.loc[f"{ALONE}{kind}"]).dropna(how="all")
            cells = [
                f"{apart[budget].median():+.3f}, {(apart[budget] < -noise[budget]).sum()}, "
                f"{(apart[budget] > noise[budget]).sum()}"
                for budget in COMPARED
            ]
            lines.append(f"| {family}, {weights}{kind or ', default start'} | {len(apart)} | {' | '.join(cells)} |")
    return [*lines, ""] if len(lines) > 4 else ["Not measured yet.", ""]


def reuse(rows: pd.DataFrame) -> list[str]:
    """The metric with state reuse less that from scratch, of pairs."""
    lines = [
        "`tune` spends two static runs from a blind start; fresh weights then train at the configuration that it ended "
        "at, on as many samples as its own weights had. Differences of the metric are reused less from scratch, "
        "the mean of pairs with a 90 % bootstrap interval.",
        "",
        "| family | metric | pairs | reused, median | from scratch, median | difference |",
        "|---" * 6 + "|",
    ]
    for family, part in rows.groupby("family"):
        mean, low, high = paired((part["reused"] - part["from_scratch"]).tolist())
        medians = " | ".join(f"{part[name].median():.3f}" for name in ("reused", "from_scratch"))
        words = f"{mean:+.3f} ({low:+.3f} to {high:+.3f})" + ": too few pairs" * (len(part) < FEWEST)
        lines.append(f"| {family} | {families.kind(str(family)).metric} | {len(part)} | {medians} | {words} |")
    return [*lines, ""]
