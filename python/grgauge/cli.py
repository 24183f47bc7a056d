"""The command line: `grgauge demo` and `grgauge doctor`.

Nothing heavy is imported before the arguments are known to be good: torch only by a command, rich and matplotlib only
where they are used.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

INSTALL = "pip install 'grgauge-kernels[cli,plot]'"
PICTURE = Path("grgauge-demo.png")
STEPS, LEAST_STEPS = 160, 10

EXIT_CODES = """\
exit codes:
  0    done; for doctor: the device trained on here has a native backend
  1    doctor: it has none
  2    a wrong argument, a package that is missing, or a file that cannot be written
  130  interrupted with Ctrl-C
"""


class CommandError(Exception):
    """A command cannot do what was asked; the message says why and what to do. Exit code 2."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # an ASCII terminal shows "?" for "×", rather than a traceback
            stream.reconfigure(errors="replace")
    options = _parser().parse_args(arguments)
    try:
        code = int(options.run(options))
        sys.stdout.flush()
        return code
    except CommandError as error:
        print(f"grgauge {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"grgauge {options.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `grgauge doctor | head -1` is nobody's mistake
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="grgauge",
        description="Learning rate and batch size, read off a gauge.",
        epilog=EXIT_CODES,
        formatter_class=layout,
    )
    parser.add_argument("--version", action="version", version=f"grgauge {metadata.version('grgauge-kernels')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    demo = commands.add_parser(
        "demo",
        help="train a small model at three learning rates and see the gauges tell them apart",
        description="Train a small character transformer on the CPU at three learning rates, far too low, about right "
        "and far too high,\nread the gauges on the way and draw the paths through the (GR_T, GR_S) plane. Takes about "
        "half a minute.\n\nThe live table needs rich, the picture matplotlib: " + INSTALL + "\nWithout a terminal, or "
        "with --json, rich is not needed; without matplotlib, and without --out, the picture is left out.",
        epilog=EXIT_CODES,
        formatter_class=layout,
    )
    demo.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    demo.add_argument("--out", type=Path, help=f"file for the picture: .png, .pdf, .svg (default: {PICTURE})")
    demo.add_argument("--steps", type=_steps, default=STEPS, help=f"steps of each run (default: {STEPS})")
    demo.add_argument("--seed", type=_seed, default=0, help="seed of weights and batches (default: 0)")
    demo.set_defaults(run=_demo)

    doctor = commands.add_parser(
        "doctor",
        help="show versions, devices and backends, and what to do where one is missing",
        description="Show versions, devices and backends, and what to do where one is missing.",
        epilog=EXIT_CODES,
        formatter_class=layout,
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    doctor.set_defaults(run=_doctor)
    return parser


def _steps(argument: str) -> int:
    steps = int(argument)
    if steps < LEAST_STEPS:
        raise argparse.ArgumentTypeError(f"{steps} is too few for the gauges; it must be at least {LEAST_STEPS}")
    return steps


def _seed(argument: str) -> int:
    seed = int(argument)
    if not 0 <= seed < 2**63:
        raise argparse.ArgumentTypeError(f"{seed} is out of range; it must lie in [0, 2^63)")
    return seed


# --- demo ------------------------------------------------------------------------------------------------------------


def _demo(options: argparse.Namespace) -> int:
    live = not options.json and _on_terminal()
    if live and not _installed("rich"):
        raise CommandError(f"the live table needs rich: {INSTALL} (or pass --json)")
    out = _picture(options.out)
    if out is None:
        print(f"No picture: it needs matplotlib: {INSTALL}", file=sys.stderr)

    import torch

    from . import demo, progress
    from .policy import Target

    # The model is too small to share out: threads would mostly wait for each other, and on a busy machine for long.
    # One thread also gives the same numbers whatever the number of cores.
    torch.set_num_threads(1)
    text = demo.Text.manual()
    runs = [demo.Run(lr, options.steps) for lr in demo.LEARNING_RATES]
    started = time.perf_counter()
    if options.json:
        progress.train_quietly(runs, text, options.seed)
    else:
        print(demo.INTRODUCTION, flush=True)
        (progress.train_live if live else progress.train_in_lines)(runs, text, options.seed)
        print(demo.conclusion(runs))
    seconds = time.perf_counter() - started
    if out is not None:
        from . import plot

        paths = {str(run): plot.path(run.readings) for run in runs}
        marks = {str(run): point for run in runs if run.summary for point in plot.path([run.summary])}
        try:
            plot.save_plane(out, paths, marks=marks, title="One model, three learning rates")
        except OSError as error:
            raise CommandError(f"cannot write {out}: {error.strerror}") from error
    if options.json:
        _print_json(
            {
                "seed": options.seed,
                "steps": options.steps,
                "seconds": seconds,
                "target": asdict(Target()),
                "window": demo.WINDOW,
                "runs": [run.to_dict() for run in runs],
                "picture": None if out is None else str(out.absolute()),
            }
        )
    elif out is not None:
        print(f"Picture: {out.absolute()}")
    return 0


def _installed(package: str) -> bool:
    try:
        import_module(package)
    except ImportError:
        return False
    return True


def _on_terminal() -> bool:
    """Whether stdout is a terminal on which lines can be redrawn."""
    return sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def _picture(out: Path | None) -> Path | None:
    """Where the picture goes, found to be writable; None if there can be none and none was asked for."""
    if not _installed("matplotlib"):
        if out is not None:
            raise CommandError(f"--out needs matplotlib: {INSTALL}")
        return None
    from .plot import file_format

    out = PICTURE if out is None else out
    try:
        file_format(out)
        existed = out.exists()
        with out.open("ab"):
            pass
        if not existed:
            out.unlink()
    except ValueError as error:
        raise CommandError(f"--out {error}") from error
    except OSError as error:
        raise CommandError(f"cannot write {out}: {error.strerror}; choose another file with --out") from error
    return out


# --- doctor ----------------------------------------------------------------------------------------------------------


def _doctor(options: argparse.Namespace) -> int:
    from . import doctor

    facts = doctor.examine()
    if options.json:
        _print_json(facts)
    elif _on_terminal() and _installed("rich"):
        _print_table(facts)
    else:
        for section, name, value in doctor.lines(facts):
            print(f"{section:9} {name:16} {value}")
        print(facts["conclusion"])
    return 0 if facts["ok"] else 1


def _print_table(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from . import doctor

    table = Table.grid(padding=(0, 2))
    previous = ""
    for section, name, value in doctor.lines(facts):
        state = {"works": "green"}.get(value, "yellow" if value.startswith(("missing", "not installed")) else "")
        table.add_row(Text(section if section != previous else "", style="bold"), name, Text(value, style=state))
        previous = section
    console = Console()
    console.print(table)
    console.print(Text(facts["conclusion"], style="green" if facts["ok"] else "bold red"))


def _print_json(document: dict[str, Any]) -> None:
    print(json.dumps(_finite(document), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    """The same with null for numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
