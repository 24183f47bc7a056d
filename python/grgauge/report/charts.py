"""A study in pictures, as SVG: the (GR_T, GR_S) plane, the timeline of trials, and curves over samples."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import NamedTuple

from .. import theory
from . import numerals
from .study import Study, Trial

CROWD = 30
"""With more trials than this, the plane shows numbers only for those of the recommended line."""

WIDE, NARROW = 1000, 358
"""Every picture is drawn twice, for a wide screen and for a phone, so that its text stays readable on both."""


def tag(name: str, *inside: str, **attributes: object) -> str:
    """An element. What is inside must be markup already; attributes are escaped, None leaves one out."""
    given = [(key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None]
    words = "".join(f' {key}="{escape(_plain(value))}"' for key, value in given)
    return f"<{name}{words}>{''.join(inside)}</{name}>"


def _plain(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)


def _svg(width: float, height: float, label: str, *inside: str) -> str:
    # role=group: a screen reader still reads what is inside, where every trial says what it is
    return tag("svg", *inside, viewBox=f"0 0 {width:.0f} {height:.0f}", role="group", aria_label=label)


def _text(x: float, y: float, words: str, class_: str = "", anchor: str = "start") -> str:
    # nothing follows the subscript, so the baseline need not be restored
    lowered = re.sub(r"GR_([TS])$", r'GR<tspan class="sub" dy="3">\1</tspan>', escape(words))
    return tag("text", lowered, x=x, y=y, class_=class_ or None, text_anchor=None if anchor == "start" else anchor)


def _line(x1: float, y1: float, x2: float, y2: float, class_: str) -> str:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def _rect(x: float, y: float, width: float, height: float, class_: str, round_: float = 0.0) -> str:
    return tag("rect", x=x, y=y, width=width, height=height, class_=class_, rx=round_ or None)


def _of(trial: Trial, *inside: str, class_: str) -> str:
    """A group for what belongs to one trial; all of a trial's groups are highlighted together."""
    return tag("g", *inside, class_=f"trial {class_}", data_trial=trial.number)


def _with_tooltip(trial: Trial, *inside: str, class_: str) -> str:
    """The same with a tooltip, which a screen reader reads."""
    return _of(trial, tag("title", escape(str(trial))), *inside, class_=class_)


def _curve(points: Iterable[tuple[float, float]], class_: str) -> str:
    """A line through pixels, broken where one is nan; at most one point for each pixel across."""
    commands, pen, before = [], "M", -math.inf
    for x, y in points:
        if math.isnan(x) or math.isnan(y):
            pen, before = "M", -math.inf
        elif abs(x - before) >= 1.0:
            # a first point draws a dot of its own, should no other follow
            commands.append(f"M{x:.1f} {y:.1f}h.01" if pen == "M" else f"L{x:.1f} {y:.1f}")
            pen, before = "L", x
    return tag("path", d="".join(commands), class_=class_) if commands else ""


@dataclass(frozen=True)
class Scale:
    """Values to pixels along one axis."""

    low: float
    high: float
    start: float
    end: float
    base: int = 0
    """Of the logarithm; 0: linear."""

    @staticmethod
    def over(values: Iterable[float], start: float, end: float, base: int = 0) -> Scale:
        """Just wide enough for the values that can be shown, with a margin."""
        known = [value for value in values if (value > 0.0 if base else not math.isnan(value))]
        low, high = (min(known), max(known)) if known else (1.0, 1.0)
        if base:
            # whole powers of the base; an end that lies just beside one counts as it
            below, above = math.floor(math.log(low, base) + 0.02), math.ceil(math.log(high, base) - 0.02)
            return Scale(float(base) ** below, float(base) ** max(above, below + 1), start, end, base)
        spread = high - low
        air = 0.08 * spread if spread > 1e-9 * abs(high) else 0.5 * abs(high) or 0.5
        return Scale(low - air, high + air, start, end)

    def __call__(self, value: float) -> float:
        if self.base:
            if not value > 0.0:
                return math.nan
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int) -> list[float]:
        """Round numbers, at most so many."""
        if self.base:
            low, high = (math.log(end, self.base) for end in (self.low, self.high))
            powers = range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1)
            stride = math.ceil(len(powers) / most)
            return [float(self.base) ** power for power in powers if power % stride == 0]
        rough = (self.high - self.low) / most
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= rough)
        first = math.ceil(self.low / step)
        return [k * step for k in range(first, math.floor(self.high / step) + 1)]


def _samples_axis(study: Study, width: float) -> Scale:
    """The axis that the timeline and the curves share, so that they can be read together.

    Where the study costs far more than what came before the last trial, the axis ends at three times that, so that the
    tuning can be seen beside it. A cut that would save less than a third is not made.
    """
    end = max([1.0, *(trial.end for trial in study.trials)])
    before = max([0.0, *(trial.end for trial in study.trials[:-1])])
    return Scale(0.0, 3.0 * before if end > 4.5 * before > 0.0 else end, _gutter(width), width - 14.0)


def _gutter(width: float) -> float:
    return 62.0 if width > NARROW else 46.0


def _samples_ticks(x: Scale, bottom: float, end: float) -> str:
    ticks = x.ticks(8 if x.end > NARROW else 5)
    beyond = "" if x.high >= end else f" (the last trial goes on to {numerals.abridged(end)})"
    return "".join(_text(x(tick), bottom + 16, numerals.abridged(tick), "tick", "middle") for tick in ticks) + _text(
        x.end, bottom + 33, f"samples{beyond}", "axis", "end"
    )


# --- the plane -------------------------------------------------------------------------------------------------------


def plane(study: Study, width: float) -> str:
    """The (GR_T, GR_S) plane: health box, a path and a numbered end for each trial, arrows from trial to trial."""
    width = min(width, 660)
    height, left, top = (480.0, 52.0, 44.0) if width > NARROW else (350.0, 38.0, 40.0)
    bottom = height - 48.0
    target, trials = study.target, study.trials
    right = width - 12.0
    points = [point for trial in trials for point in trial.path]
    low = min([0.8, *(0.9 * point.gr_t for point in points)])
    high = max([1.4 * theory.period2(), *(1.2 * point.gr_t for point in points)])
    x = Scale(low, high, left, right, 10)
    y = Scale(0.0, max([1.0, *(point.gr_s for point in points)]), bottom, top)

    parts = [_line(left, y(tick), right, y(tick), "grid") for tick in (0.0, 0.25, 0.5, 0.75, 1.0)]
    parts += [_text(left - 7, y(tick) + 4, f"{tick:g}", "tick", "end") for tick in (0.0, 0.25, 0.5, 0.75, 1.0)]
    parts += [_text(x(tick), bottom + 16, f"{tick:g}", "tick", "middle") for tick in x.ticks(6)]
    (low, high), (floor, roof) = target.gr_t_zone, target.gr_s_zone
    box = x(low), y(roof), x(high) - x(low), y(floor) - y(roof)
    parts += [_rect(box[0], top, box[2], bottom - top, "band"), _rect(left, box[1], right - left, box[3], "band")]
    meanings = {theory.aligned(): "agree", theory.uncorrelated(): "noise", theory.period2(): "bounce"}
    for landmark, meaning in meanings.items():
        parts.append(_line(x(landmark), top, x(landmark), bottom, "landmark"))
        parts.append(_text(x(landmark), top - 20, f"{landmark:.0f}", "tick strong", "middle"))
        parts.append(_text(x(landmark), top - 7, meaning, "tick", "middle"))
    parts.append(_rect(*box, "box", 2))
    parts.append(_text(left, bottom + 38, "← LR too low", "axis"))
    parts.append(_text((left + right) / 2, bottom + 38, "GR_T", "axis strong", "middle"))
    parts.append(_text(right, bottom + 38, "LR too high →", "axis", "end"))
    parts.append(_text(left - 7, y(0.625) + 4, "GR_S", "axis strong", "end"))
    # legends stand in the two corners where trials are least likely to end
    hints = x(0.92 * theory.period2()), y(0.96), y(0.025)
    parts.append(_text(hints[0], hints[1], "batch too small ↑", "axis", "end"))
    parts.append(_text(hints[0], hints[2], "batch too large ↓", "axis", "end"))

    spots = {trial.number: (x(trial.place[0]), y(trial.place[1])) for trial in trials if trial.place}
    crowded = len(spots) > CROWD
    if not spots:
        parts.append(_text((left + right) / 2, y(0.3), "no trial has read both gauges yet", "note", "middle"))

    def look(trial: Trial) -> str:
        hue = study.hues[trial.number]
        return f"{hue} crowd" if crowded and hue != "l0" else hue

    for trial in trials:
        trace = [f"{x(gr_t):.1f} {y(gr_s):.1f}" for gr_t, gr_s in trial.trace]
        if len(trace) > 1:
            parts.append(_of(trial, tag("path", d=f"M{'L'.join(trace)}", class_="trace"), class_=look(trial)))
    for before, trial in pairwise(trials):
        here, hue = spots.get(trial.number), look(trial)
        if here is None:
            continue
        if before.number in spots:
            kind = "heir" if trial.parent == before.number else "fresh"
            parts.append(_of(trial, _arrow(spots[before.number], here, kind), class_=hue))
        if trial.parent is not None and trial.parent != before.number and trial.parent in spots:
            parts.append(_of(trial, _arrow(spots[trial.parent], here, "heir"), class_=hue))

    frame = left, top, right, bottom
    taken = [(hints[0] - 104, hint - 11, hints[0], hint + 3) for hint in hints[1:]]
    # the recommended trial and the newest ones are drawn on top, and get a place for their number first
    ordered = sorted(trials, key=lambda trial: (look(trial) == "l0", trial is study.best, trial.number))
    shown = [trial for trial in ordered if trial.number in spots]
    for trial in shown:
        (px, py), r = spots[trial.number], 10.0 if trial is study.best else 4.0
        taken.append((px - r, py - r, px + r, py + r))
    numbers: dict[int, str] = {}
    for trial in shown[::-1]:
        named = not crowded or study.hues[trial.number] == "l0"
        numbers[trial.number] = _label(spots[trial.number], f"{trial.number}", taken, frame) if named else ""
    for trial in shown:
        dot = _mark(*spots[trial.number], trial is study.best, trial.outcome)
        parts.append(_with_tooltip(trial, dot, numbers[trial.number], class_=look(trial)))
    label = f"Plane of GR_T and GR_S with {len(spots)} trials on {len(study.lines)} lines of weights. "
    if study.best and study.best.place:
        label += "Trial {} ended at GR_T {:.3g}, GR_S {:.2f}.".format(study.best.number, *study.best.place)
    return _svg(width, height, label, *parts)


def _mark(x: float, y: float, best: bool, outcome: str) -> str:
    if best:
        turns = [(k * math.pi / 5.0, 11.0 if k % 2 == 0 else 4.9) for k in range(10)]
        star = " ".join(f"{x + r * math.sin(a):.1f},{y - r * math.cos(a):.1f}" for a, r in turns)
        return tag("polygon", points=star, class_="star")
    if outcome == "failed":
        return tag("path", d=f"M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8", class_="cross")
    return tag("circle", cx=x, cy=y, r=4.2, class_="dot")


def _arrow(a: tuple[float, float], b: tuple[float, float], kind: str) -> str:
    """A slightly bent arrow between two marks; nothing where they nearly touch."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    length = math.hypot(dx, dy)
    if length < 26.0:
        return ""
    ux, uy = dx / length, dy / length
    tip = b[0] - 9 * ux, b[1] - 9 * uy
    bend = min(0.12 * length, 26.0)
    middle = (a[0] + b[0]) / 2 - bend * uy, (a[1] + b[1]) / 2 + bend * ux
    turn = math.atan2(tip[1] - middle[1], tip[0] - middle[0])
    wings = [(tip[0] - 8 * math.cos(turn + side), tip[1] - 8 * math.sin(turn + side)) for side in (0.42, -0.42)]
    shaft = f"M{a[0] + 6 * ux:.1f} {a[1] + 6 * uy:.1f}Q{middle[0]:.1f} {middle[1]:.1f} {tip[0]:.1f} {tip[1]:.1f}"
    head = " ".join(f"{px:.1f},{py:.1f}" for px, py in [tip, *wings])
    return tag("path", d=shaft, class_=f"arrow {kind}") + tag("polygon", points=head, class_="head")


def _label(
    spot: tuple[float, float],
    words: str,
    taken: list[tuple[float, float, float, float]],
    frame: tuple[float, float, float, float],
) -> str:
    """The label at the first free place around the spot; nothing if there is none."""
    half, (left, top, right, bottom) = 3.6 * len(words) + 1, frame
    for reach in (13.0, 19.0, 27.0):
        for eighth in (1, 7, 3, 5, 0, 2, 4, 6):
            angle = eighth * math.pi / 4.0
            cx = spot[0] + (reach + half - 5.0) * math.sin(angle)
            cy = spot[1] - reach * math.cos(angle)
            box = cx - half, cy - 6.0, cx + half, cy + 6.0
            inside = box[0] > left and box[2] < right and box[1] > top and box[3] < bottom
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                leader = _line(*spot, cx, cy, "leader") if reach > 13.0 else ""
                return leader + _text(cx, cy + 4.2, words, "number", "middle")
    return ""


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


# --- the timeline ----------------------------------------------------------------------------------------------------


def timeline(study: Study, width: float) -> str:
    """A row for each trial: the bar is its cost, an elbow comes from the trial whose weights it inherited."""
    trials, x = study.trials, _samples_axis(study, width)
    row = max(3.5, min(26.0, 720.0 / len(trials)))
    thick, top = max(2.5, row - 8.0 if row > 16.0 else row - 2.0), 6.0
    middle = {trial.number: top + row * (i + 0.5) for i, trial in enumerate(trials)}
    bottom = top + row * len(trials)
    parts = [_line(x(tick), top, x(tick), bottom, "grid") for tick in x.ticks(8 if width > NARROW else 5)]
    parts.append(_line(x.start, bottom, x.end, bottom, "base"))
    ends = {trial.number: trial.end for trial in trials}
    stride = math.ceil(13.0 / row)
    starred = trials.index(study.best) if study.best else -stride
    for i, trial in enumerate(trials):
        y, start, end = middle[trial.number], x(trial.start), x(min(trial.end, x.high))
        elbow, left = "", start
        if trial.parent in middle:
            left = min(start, x(ends[trial.parent]))
            d = f"M{x(ends[trial.parent]):.1f} {middle[trial.parent]:.1f}V{y:.1f}H{start:.1f}"
            elbow = tag("path", d=d, class_="elbow")
        kind = f"bar {class_of(trial.outcome)}"
        bar = _rect(start, y - thick / 2, max(end - start, 2.0), thick, kind, min(3.0, thick / 3))
        shown = i == starred or (i % stride == 0 and abs(i - starred) >= stride)
        star = "★ " if trial is study.best else ""
        name = _text(x.start - 8, y + 4, f"{star}{trial.number}", "number", "end") if shown else ""
        note = _beside(trial, left, end, x, y) if row > 13.0 else ""
        parts.append(_with_tooltip(trial, elbow, bar, name, note, class_=study.hues[trial.number]))
    label = f"Timeline of {len(trials)} trials over {numerals.count(max(ends.values()))} samples."
    return _svg(width, bottom + 40, label, *parts, _samples_ticks(x, bottom, max(ends.values())))


def _beside(trial: Trial, left: float, right: float, x: Scale, y: float) -> str:
    """The configuration, to the right of the bar, or to the left of the bar and its elbow."""
    words = f"lr {numerals.scientific(trial.lr)} · batch {numerals.count(trial.batch)}"
    room = 6.4 * len(words) + 14.0
    if right + room < x.end:
        return _text(right + 9, y + 4, words, "note")
    return _text(left - 9, y + 4, words, "note", "end") if left - room > x.start else ""


def class_of(outcome: str) -> str:
    return outcome.replace(" ", "-")


# --- the curves ------------------------------------------------------------------------------------------------------


class Panel(NamedTuple):
    """One of the curves' diagrams: `read` gives a trial's (samples, value), `reach` is always shown."""

    name: str
    height: float
    read: Callable[[Trial], Sequence[tuple[float, float]]]
    base: int = 0
    reach: tuple[float, ...] = ()
    zone: tuple[float, float] | None = None


def _panels(study: Study) -> list[Panel]:
    losses = [loss for trial in study.trials for _, loss in trial.losses if not math.isnan(loss)]
    steep = bool(losses) and 0.0 < 20.0 * min(losses) < max(losses)
    zones = study.target.gr_t_zone, study.target.gr_s_zone
    return [
        Panel("training loss", 130, lambda trial: trial.losses, 10 if steep else 0),
        Panel("GR_T", 96, lambda trial: [(at.samples, at.gr_t) for at in trial.readings], 10, (1.0, 99.0), zones[0]),
        Panel("GR_S", 96, lambda trial: [(at.samples, at.gr_s) for at in trial.readings], 0, (0.0, 1.0), zones[1]),
        Panel("learning rate", 76, lambda trial: [(trial.start, trial.lr), (trial.end, trial.lr)], 10),
        Panel("batch size", 76, lambda trial: [(trial.start, trial.batch), (trial.end, trial.batch)], 2),
    ]


def curves(study: Study, width: float) -> str:
    """Loss, gauges and configuration over the samples, one above the other."""
    x, parts, top = _samples_axis(study, width), [], 0.0
    for name, height, read, base, reach, zone in _panels(study):
        top += 26.0
        points = {trial.number: read(trial) for trial in study.trials}
        values = [value for line in points.values() for _, value in line]
        y = Scale.over([*reach, *values], top + height - 5.0, top + 5.0, base)
        parts.append(_text(0, top - 9, name, "axis strong"))
        if zone is not None:
            parts.append(_rect(x.start, y(zone[1]), x.end - x.start, y(zone[0]) - y(zone[1]), "band"))
            parts.append(_text(x.end, top - 9, f"healthy {zone[0]:g} to {zone[1]:g}", "note", "end"))
        for tick in y.ticks(4):
            parts.append(_line(x.start, y(tick), x.end, y(tick), "grid"))
            words = numerals.scientific(tick) if name == "learning rate" else numerals.abridged(tick)
            parts.append(_text(x.start - 8, y(tick) + 4, words, "tick", "end"))
        parts.append(_line(x.start, top + height, x.end, top + height, "base"))
        if all(map(math.isnan, values)):
            parts.append(_text((x.start + x.end) / 2, top + height / 2, "nothing recorded", "note", "middle"))
        for trial in study.trials:
            line = [(min(samples, x.high), value) for samples, value in points[trial.number]]
            curve = _curve(((x(samples), y(value)) for samples, value in line), "curve")
            parts.append(_of(trial, curve, class_=study.hues[trial.number]) if curve else "")
        top += height + 8.0
    label = "Training loss, GR_T, GR_S, learning rate and batch size over the samples of the study."
    return _svg(width, top + 30, label, *parts, _samples_ticks(x, top - 8.0, max(trial.end for trial in study.trials)))
