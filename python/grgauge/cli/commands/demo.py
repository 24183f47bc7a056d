"""`grgauge demo`: one model at three learning rates, in a live table or in lines, as JSON and as a picture."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path

from .. import arguments, console

INSTALL = "pip install 'grgauge-kernels[cli,plot]'"
PICTURE = Path("grgauge-demo.png")
STEPS = 160

HELP = "train a small model at three learning rates, and see what the gauges say about each"
DESCRIPTION = f"""\
Train a small character transformer on the CPU at three learning rates, far too low, about right and far too high,
read the gauges on the way and draw the paths through the (GR_T, GR_S) plane. Takes about half a minute.

The live table needs rich, the picture matplotlib: {INSTALL}
Without a terminal, or with --json, rich is not needed; without matplotlib, and without --out, the picture is left out.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    parser.add_argument("--out", type=Path, help=f"file for the picture: .png, .pdf, .svg (default: {PICTURE})")
    parser.add_argument("--steps", type=arguments.steps, default=STEPS, help=f"steps of each run (default: {STEPS})")
    parser.add_argument("--seed", type=arguments.seed, default=0, help="seed of weights and batches (default: 0)")


def run(options: argparse.Namespace) -> int:
    """Train, and say what the gauges have read."""
    live = not options.json and console.on_terminal()
    if live and not console.installed("rich"):
        raise console.CommandError(f"the live table needs rich: {INSTALL} (or pass --json)")
    out = checked_picture(options.out)
    if out is None:
        print(f"No picture: it needs matplotlib: {INSTALL}", file=sys.stderr)

    import torch

    from ...policy import Target
    from ...policy.watch import WINDOW
    from .. import char_transformer, progress

    # The model is too small for several threads: they would mostly wait for each other, and for long on a busy machine.
    # One thread also gives the same numbers on any number of cores.
    torch.set_num_threads(1)
    text = char_transformer.Text.manual()
    runs = [char_transformer.Run(lr, options.steps) for lr in char_transformer.LEARNING_RATES]
    started = time.perf_counter()
    if options.json:
        progress.train_quietly(runs, text, options.seed)
    else:
        print(char_transformer.INTRODUCTION, flush=True)
        (progress.train_live if live else progress.train_in_lines)(runs, text, options.seed)
        print(char_transformer.conclusion(runs))
    seconds = time.perf_counter() - started
    if out is not None:
        from .. import plot

        paths = {str(run): plot.path(run.readings) for run in runs}
        marks = {str(run): point for run in runs if run.summary for point in plot.path([run.summary])}
        try:
            plot.save_plane(out, paths, marks=marks, title="One model, three learning rates")
        except OSError as error:
            raise console.CommandError(f"cannot write {out}: {error.strerror}") from error
    if options.json:
        console.print_json(
            {
                "seed": options.seed,
                "steps": options.steps,
                "seconds": seconds,
                "target": asdict(Target()),
                "window": WINDOW,
                "runs": [run.to_dict() for run in runs],
                "picture": None if out is None else str(out.absolute()),
            }
        )
    elif out is not None:
        print(f"Picture: {out.absolute()}")
    return 0


def checked_picture(out: Path | None) -> Path | None:
    """Where the picture goes, found to be writable; None if matplotlib is missing and --out was not given."""
    if not console.installed("matplotlib"):
        if out is not None:
            raise console.CommandError(f"--out needs matplotlib: {INSTALL}")
        return None
    from ..plot import file_format

    out = PICTURE if out is None else out
    try:
        file_format(out)
        existed = out.exists()
        with out.open("ab"):
            pass
        if not existed:
            out.unlink()
    except ValueError as error:
        raise console.CommandError(f"--out {error}") from error
    except OSError as error:
        raise console.CommandError(f"cannot write {out}: {error.strerror}; choose another file with --out") from error
    return out
