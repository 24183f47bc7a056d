"""How trainings look while they run: a live table on a terminal (with rich), plain lines elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..policy import Target
from ..reading import Reading
from .char_transformer import Run, Text, train

if TYPE_CHECKING:
    from rich.table import Table

    from ..tuning import Trial

LINE_EVERY = 20
"""Steps between two plain lines."""

ROWS = 12
"""How many trials the live table of a tuner shows: the newest ones."""


def train_quietly(runs: Iterable[Run], text: Text, seed: int) -> None:
    """Train all of them and print nothing."""
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

    table = Table()
    for name in ("lr", "step", "loss", "GR_T", "GR_S", "noise scale"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", min_width=24)
    for run in runs:
        reading = run.summary  # what the verdict beside it rests on
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
    """Green inside the zone, yellow outside, dim before the first reading."""
    if reading is None or not reading.ready:
        return "dim"
    target = Target()
    return "green" if target.lr_factor(reading) == target.batch_factor(reading) == 1.0 else "yellow"


@contextmanager
def tune_live(budget: int) -> Iterator[Callable[[Trial], None]]:
    """A table of trials that is kept up to date, and a progress bar by budget; yields what to call after each step."""
    from rich.console import Group
    from rich.live import Live
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.completed:.0f} of {task.total:.0f} samples"), BarColumn())
    bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn())
    task = bar.add_task("samples", total=budget)
    table: list[Table] = []
    newest: list[Trial] = []

    def on_step(trial: Trial) -> None:
        bar.update(task, completed=min(trial.used, budget))
        newest[:], table[:] = [trial], [_trials(trial)]

    with Live(get_renderable=lambda: Group(*table, bar), refresh_per_second=4):
        yield on_step
        table[:] = map(_trials, newest)  # the last trial ends after its last step


def _trials(trial: Trial) -> Table:
    from rich.table import Table

    running = [trial.record] if trial.record.state is None else []
    records = [*(record for record in trial.ended if record is not trial.record), *running]
    hidden = max(len(records) - ROWS, 0)
    table = Table(caption=f"{hidden} earlier trials are not shown." if hidden else None, caption_justify="left")
    for name in ("trial", "from", "lr", "batch", "samples", "loss", "GR_T", "GR_S"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("why it ended", min_width=20)
    style = {"COMPLETE": "", "PRUNED": "yellow", "FAIL": "red", None: "bold"}
    for record in records[hidden:]:
        newest = record.readings[-1] if record.readings else {"gr_t": None, "gr_s": None}
        gauges = zip((newest["gr_t"], newest["gr_s"]), (".1f", ".2f"), strict=True)
        table.add_row(
            "–" if record.number is None else f"{record.number}",
            "–" if record.parent is None else f"{record.parent}",
            f"{record.lr:.2e}",
            f"{record.batch_size}",
            f"{record.samples}",
            "–" if math.isnan(record.loss) else f"{record.loss:.3g}",
            *("–" if value is None else f"{value:{spec}}" for value, spec in gauges),
            record.reason or "running",
            style=style[record.state],
        )
    return table
