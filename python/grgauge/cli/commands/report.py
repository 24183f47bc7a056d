"""`grgauge report`: a stored study as one HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import console

HELP = "write one HTML page on a stored study: its verdict, pictures and trials"
DESCRIPTION = """\
Write one self-contained HTML page on a stored study: the verdict, the (GR_T, GR_S) plane, what each trial
cost and how it went. Needs optuna: pip install 'grgauge-kernels[tune]'
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("storage", help="the SQLite file of the study, or any Optuna storage URL")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page (default: report.html)")
    parser.add_argument("--study", metavar="NAME", help="which study, where the storage holds several")
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")


def run(options: argparse.Namespace) -> int:
    """Write the page, and print the verdict."""
    from ... import report

    try:
        study = report.load(options.storage, options.study)
        options.out.write_text(report.page(study), encoding="utf-8")
    except report.ReportError as error:
        raise console.CommandError(error) from error
    except OSError as error:
        raise console.CommandError(
            f"cannot write {options.out}: {error.strerror}; choose another file with --out"
        ) from error
    if options.json:
        console.print_json({**study.to_dict(), "report": str(options.out.absolute())})
    else:
        print(f"{study.verdict or study.headline}\nReport: {options.out.absolute()}")
    return 0
