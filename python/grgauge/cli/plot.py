"""The (GR_T, GR_S) plane: where healthy training sits, and the paths that runs take through it. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .. import theory
from ..policy import Target
from ..reading import Reading

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = tuple[float, float]
"""(GR_T, GR_S)."""

COLORS = ("#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#E69F00")
"""Okabe and Ito's palette, which every kind of colour vision can distinguish."""

ZONE = "#8A8A8A"
INK = "#404040"


def path(readings: Sequence[Reading]) -> list[Point]:
    """The points of the readings that have both gauges; only of the ready ones, if there are two or more."""
    known = [reading for reading in readings if reading.gr_t is not None and reading.gr_s is not None]
    ready = [reading for reading in known if reading.ready]
    return [(reading.gr_t or math.nan, reading.gr_s or math.nan) for reading in (ready if len(ready) > 1 else known)]


def draw_plane(
    axes: Axes,
    paths: Mapping[str, Sequence[Point]],
    target: Target | None = None,
    marks: Mapping[str, Point] | None = None,
) -> None:
    """Draw the plane, its landmarks and its health box, and each path from its first point (ring) to its last (disc).

    paths   label -> points in the order of time; a path of one point is a ring
    target  the health box; None: the published one
    marks   label -> a point that stands for the whole path, drawn as a star in its colour
    """
    target = target or Target()
    points = [point for line in paths.values() for point in line] + list((marks or {}).values())
    landmarks = {
        theory.aligned(): "gradients agree",
        theory.uncorrelated(): "uncorrelated",
        theory.period2(): "flip every step",
    }
    axes.set_xscale("log")
    axes.set_xlim(
        min([0.8, *(0.9 * gr_t for gr_t, _ in points)]),
        max([1.4 * theory.period2(), *(1.2 * gr_t for gr_t, _ in points)]),
    )
    axes.set_ylim(0.0, 1.0)
    axes.set_xlabel("← LR too low      GR$_T$      LR too high →")
    axes.set_ylabel("← batch too large      GR$_S$      batch too small →")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    above = axes.secondary_xaxis("top")
    above.set_xticks(list(landmarks), [f"{gr_t:.0f}\n{meaning}" for gr_t, meaning in landmarks.items()])
    above.tick_params(which="minor", length=0)
    above.tick_params(colors=INK, labelsize="small")
    for landmark in landmarks:
        axes.axvline(landmark, color=ZONE, linewidth=0.8, linestyle=(0, (1, 3)), zorder=0)

    (left, right), (bottom, top) = target.gr_t_zone, target.gr_s_zone
    axes.axvspan(left, right, color=ZONE, alpha=0.12, linewidth=0, zorder=0)
    axes.axhspan(bottom, top, color=ZONE, alpha=0.12, linewidth=0, zorder=0)
    axes.fill(
        [left, right, right, left],
        [bottom, bottom, top, top],
        facecolor="#F0E442",
        edgecolor=INK,
        linewidth=1.2,
        alpha=0.9,
        zorder=1,
        label=f"healthy: GR$_T$ {left:g} to {right:g}, GR$_S$ {bottom:g} to {top:g}",
    )

    for i, (label, line) in enumerate(paths.items()):
        color = COLORS[i % len(COLORS)]
        _draw_path(axes, line, color, label)
        if marks and label in marks:
            axes.plot(
                *marks[label], "*", color=color, markersize=19, markeredgecolor="white", markeredgewidth=1.5, zorder=6
            )
    key = "○ first   ● last reading" + ("   ★ what the verdict rests on" if marks else "")
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.12),
        frameon=False,
        handlelength=1.6,
        title=key,
        title_fontproperties={"size": "small"},
    )


def _draw_path(axes: Axes, line: Sequence[Point], color: str, label: str) -> None:
    """A line that grows heavier with time: a ring at its start, a disc at its end."""
    axes.plot([], [], color=color, linewidth=2.5, label=label)
    if not line:
        return
    for k in range(1, len(line)):
        age = k / (len(line) - 1)
        segment = zip(line[k - 1], line[k], strict=True)
        axes.plot(*segment, color=color, alpha=0.25 + 0.65 * age, linewidth=1 + age, zorder=3)
    axes.plot(*line[-1], "o", color=color, markersize=8, zorder=5)
    axes.plot(*line[0], "o", color=color, markersize=7, markerfacecolor="white", markeredgewidth=1.6, zorder=5)


def save_plane(
    out: Path,
    paths: Mapping[str, Sequence[Point]],
    target: Target | None = None,
    marks: Mapping[str, Point] | None = None,
    title: str = "",
) -> None:
    """`draw_plane` to a file, in the format that its suffix names; PNG where it has none."""
    from matplotlib.figure import Figure

    # a Figure without pyplot: it needs no window system, and nothing stays open
    figure = Figure(figsize=(8.0, 6.4), layout="constrained")
    axes = figure.add_subplot()
    draw_plane(axes, paths, target, marks)
    axes.set_title(title, loc="left", fontweight="bold")
    figure.savefig(out, format=file_format(out), dpi=150)


def file_format(out: Path) -> str:
    """The format that the name stands for. Raises ValueError if matplotlib cannot write it."""
    from matplotlib.figure import Figure

    known = Figure().canvas.get_supported_filetypes()
    name = out.suffix[1:].lower() or "png"
    if name not in known:
        raise ValueError(f"{out} ends in .{name}; a picture can be one of {', '.join(sorted(known))}")
    return name
