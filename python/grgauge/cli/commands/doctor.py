"""`grgauge doctor`: what this installation has to work with, as a table, as lines or as JSON."""

from __future__ import annotations

import argparse
from typing import Any

from .. import console

HELP = "show versions, devices and backends, and what to do where one is missing"
DESCRIPTION = "Show versions, devices and backends, and what to do where one is missing."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")


def run(options: argparse.Namespace) -> int:
    """Show them; whether the device trained on here has a native backend is the exit code."""
    from .. import installation

    facts = installation.examine()
    if options.json:
        console.print_json(facts)
    elif console.on_terminal() and console.installed("rich"):
        _print_table(facts)
    else:
        for section, name, value in installation.lines(facts):
            print(f"{section:9} {name:16} {value}")
        print(facts["conclusion"])
    return 0 if facts["ok"] else 1


def _print_table(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from .. import installation

    table = Table.grid(padding=(0, 2))
    previous = ""
    for section, name, value in installation.lines(facts):
        state = {"works": "green"}.get(value, "yellow" if value.startswith(("missing", "not installed")) else "")
        table.add_row(Text(section if section != previous else "", style="bold"), name, Text(value, style=state))
        previous = section
    console = Console()
    console.print(table)
    console.print(Text(facts["conclusion"], style="green" if facts["ok"] else "bold red"))
