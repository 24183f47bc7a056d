"""How the demo's trainings look while they run: a live table on a terminal (with rich), plain lines elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from .demo import Run, Text, train
from .policy import Target
from .reading import Reading

if TYPE_CHECKING:
    from rich.table import Table

LINE_EVERY = 20
"""Steps between two plain lines."""


def train_quietly(runs: Iterable[Run], text: Text, seed: int) -> None:
    """Train all of them and say nothing."""
    for run in runs:
        for _ in train(run, text, seed):
            pass


def train_in_lines(runs: Iterable[Run], text: Text, seed: int) -> None:
    """Train all of them, with a line every 20 steps and one for each run's verdict."""
    for run in runs:
        for _ in train(run, text, seed):
            if run.step % LINE_EVERY == 0 and run.readings:
                gr_t, gr_s, noise_scale = _figures(run.readings[-1])
                print(
                    f"lr {run.lr:.0e}  step {run.step:3d}  loss {run.loss:.2f}  GR_T {gr_t:>5}  GR_S {gr_s}  "
                    f"noise scale {noise_scale}",
                    flush=True,
                )
        print(run, flush=True)


def train_live(runs: Sequence[Run], text: Text, seed: int) -> None:
    """Train all of them under a table that is kept up to date, a progress bar below it."""
    from rich.console import Group
    from rich.live import Live
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.text import Text as Line

    bar = Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    task = bar.add_task("training", total=sum(run.steps for run in runs))
    with Live(get_renderable=lambda: Group(_table(runs), bar), refresh_per_second=8) as live:
        for run in runs:
            for _ in train(run, text, seed):
                bar.advance(task)
            live.console.print(Line(str(run)), soft_wrap=True)


def _table(runs: Iterable[Run]) -> Table:
    from rich.table import Table

    table = Table(caption="A finished run shows what its verdict rests on.", caption_justify="left")
    for name in ("lr", "step", "loss", "GR_T", "GR_S", "noise scale"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", min_width=24)
    for run in runs:
        reading = run.summary if run.done else run.readings[-1] if run.readings else None
        loss = "–" if math.isnan(run.loss) else f"{run.loss:.2f}"
        verdict = "waiting" if run.step == 0 else run.verdict
        table.add_row(f"{run.lr:.0e}", f"{run.step}", loss, *_figures(reading), verdict, style=_style(reading))
    return table


def _figures(reading: Reading | None) -> tuple[str, str, str]:
    """GR_T, GR_S and the noise scale, a dash for what is not known."""
    if reading is None:
        return "–", "–", "–"
    values = zip((reading.gr_t, reading.gr_s, reading.noise_scale), (".1f", ".2f", ".0f"), strict=True)
    gr_t, gr_s, noise_scale = ("–" if value is None else f"{value:{spec}}" for value, spec in values)
    return gr_t, gr_s, noise_scale


def _style(reading: Reading | None) -> str:
    """Green inside the zone, yellow outside, dim while there is nothing to go by."""
    if reading is None or not reading.ready:
        return "dim"
    target = Target()
    return "green" if target.lr_factor(reading) == target.batch_factor(reading) == 1.0 else "yellow"
