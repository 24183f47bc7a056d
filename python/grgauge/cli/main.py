"""The command line: which command it names, and what exit code comes of it.

Nothing heavy is imported before the arguments have been checked: torch only by a command, rich and matplotlib only
where they are used.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import metadata

from . import console
from .commands import demo, doctor, report, tune

COMMANDS = {"demo": demo, "report": report, "tune": tune, "doctor": doctor}

EXIT_CODES = """\
exit codes:
  0    done; for doctor: the device trained on here has a native backend
  1    doctor: it has none; tune: the training function failed
  2    a wrong argument, a package that is missing, or a file that cannot be written
  130  interrupted with Ctrl-C
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # stdout was closed by the shell: `grgauge doctor >&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # an ASCII terminal shows "?" for "×" instead of a traceback
            stream.reconfigure(errors="replace")
    options = _parser().parse_args(arguments)
    try:
        code = int(options.run(options))
        sys.stdout.flush()
        return code
    except console.CommandError as error:
        print(f"grgauge {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"grgauge {options.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `grgauge doctor | head -1` is no error
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
    for name, command in COMMANDS.items():
        added = commands.add_parser(
            name, help=command.HELP, description=command.DESCRIPTION, epilog=EXIT_CODES, formatter_class=layout
        )
        command.add_arguments(added)
        added.set_defaults(run=command.run)
    return parser
