"""GR_T and GR_S of every way to train, in every precision, against plain float64: what a reading can be trusted with.

    python bench/readings.py          the table, and rows for results/readings.csv; about a minute on two cores
    python bench/readings.py --json   the rows alone, for machines

The ways to train and the truth are those of `tests/setups.py`. Exit status 1 if a row fails: if a gauge is off by more
than its precision's tolerance, if GR_S is off by more than two of its own standard errors from `per_sample`, or if
ranks differ by a bit.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from turns import append, origin, significant

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests"))

from setups import SETUPS, STEPS, Row, readings_of, rows_of
from torchrun import torchrun

DOCS = Path(__file__).resolve().parents[1] / "docs" / "evidence" / "readings.md"
CSV = Path(__file__).parent / "results" / "readings.csv"
COLUMNS = (
    "date,commit,device,torch,configuration,precision,optimizer,gr_t,gr_t_truth,gr_t_error,gr_s,gr_s_truth,gr_s_error,"
    "tolerance,gr_s_per_sample,gr_s_standard_error,ranks_alike,passed"
)


def started(world: int) -> list[dict[str, dict[str, Any]]]:
    """The readings of all setups of `world` processes, of each of them; they are started here."""
    if world == 1:
        return [readings_of(1)]
    with tempfile.TemporaryDirectory() as folder:
        torchrun(world, Path(__file__), "--rank-to", folder)
        return [json.loads((Path(folder) / f"{rank}.json").read_text("utf-8")) for rank in range(world)]


def values(row: Row) -> dict[str, Any]:
    """A row of the CSV file."""
    derived = {name: getattr(row, name) for name in ("gr_t_error", "gr_s_error", "passed")}
    found = {**asdict(row), **derived}
    return {key: significant(v) if key.endswith("_error") else v for key, v in found.items()}


PAGE = f"""# Readings against float64

What gauges read in {STEPS} steps of real processes (torchrun, gloo), against a plain float64 run over the same batches.
Errors are relative; all ranks must hold the same bits. "Per sample" is GR_S by its definition, from each sample's own
gradient, and how many standard errors the reading is away from it. fp16 includes a growing loss scale and a step that
overflows on one rank and is skipped on all. Each row is a test in `tests/distributed/test_readings.py`; this page is
written by `python bench/readings.py`.
"""

HEAD = (
    "configuration",
    "precision",
    "optimizer",
    "GR_T",
    "error",
    "GR_S",
    "error",
    "tolerance",
    "per sample",
    "passed",
)


def cells(row: Row) -> list[str]:
    away = (row.gr_s - row.gr_s_per_sample) / row.gr_s_standard_error
    return [
        row.configuration,
        row.precision + " + GradScaler" * (row.precision == "fp16"),
        row.optimizer,
        f"{row.gr_t:.4f}",
        f"{row.gr_t_error:.1e}",
        f"{row.gr_s:.4f}",
        f"{row.gr_s_error:.1e}",
        f"{row.tolerance:.0e}",
        f"{row.gr_s_per_sample:.4f} ({away:+.1f} s.e.)",
        "yes" if row.passed else "no" + " (ranks differ)" * (not row.ranks_alike),
    ]


def table(rows: list[Row]) -> Table:
    grid = Table(*HEAD, title=f"Readings of {STEPS} steps against float64")
    for column in grid.columns[3:-1]:
        column.justify = "right"
    for row in rows:
        *others, passed = cells(row)
        last = row is [r for r in rows if r.configuration == row.configuration][-1]
        grid.add_row(*others, f"[{'green' if row.passed else 'red'}]{passed}", end_section=last)
    return grid


def page(rows: list[Row]) -> str:
    """The text of docs/evidence/readings.md."""
    lines = [f"| {' | '.join(cells(row))} |" for row in rows]
    return "\n".join([PAGE, f"| {' | '.join(HEAD)} |", f"|{':---|' * 3}{'---:|' * (len(HEAD) - 3)}", *lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print rows as JSON; write no file")
    parser.add_argument("--rank-to", type=Path, help=argparse.SUPPRESS)  # a process that torchrun has started
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.rank_to:
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        found = readings_of(dist.get_world_size())
        (options.rank_to / f"{dist.get_rank()}.json").write_text(json.dumps(found), "utf-8")
        dist.barrier()  # gloo takes it badly if one rank leaves while another still talks to it
        dist.destroy_process_group()
        return 0
    rows = [row for world in sorted({setup.world for setup in SETUPS.values()}) for row in rows_of(started(world))]
    if options.json:
        print(json.dumps([values(row) for row in rows], indent=1))
    else:
        Console(width=None if sys.stdout.isatty() else 150).print(table(rows))
        DOCS.write_text(page(rows), "utf-8")
        append(CSV, COLUMNS, [{**origin(torch.device("cpu")), **values(row)} for row in rows])
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
