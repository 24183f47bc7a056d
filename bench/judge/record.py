"""Record the table: each family at ten learning rates, six batches and two seeds; resumable, killed at any moment.

    python -m judge.record                      all families, in bench/ as working folder; hours
    python -m judge.record images language      some of them
    python -m judge.record --assemble           put what is complete into results/table.parquet

Each run is a shard of its own in build/table, moved there when it is whole, so a run is there or is done again. After
the grid come five fresh seeds of the best configuration, for raw weights and for averaged ones: they set the targets.
Assembly takes complete families only, and keeps those of the table that have no shards here.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
from families import NAMES, Family, family
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from . import table, training
from .devices import Placed, placed, require
from .table import FRESH, SEEDS, Config, grid

ROOT = Path(__file__).resolve().parents[2]
SHARDS = ROOT / "build" / "table"


@functools.cache
def folder(made: Family) -> Path:
    """Where a family's shards lie: another folder once the code of the family or of the training loop is another, and
    for another device."""
    family, device = (made.family, f"-{made.device.type}") if isinstance(made, Placed) else (made, "")
    modules = sys.modules[type(family).__module__], training
    code = "".join(ast.dump(ast.parse(inspect.getsource(module))) for module in modules)
    return SHARDS / f"{family.name}-{hashlib.sha256(code.encode()).hexdigest()[:12]}{device}"


def shard(into: Path, config: Config, seed: int) -> Path:
    return into / f"lr{config.lr:.3e}-batch{config.batch}-seed{seed}.parquet"


def record(made: Family, config: Config, seed: int, into: Path) -> Path:
    """The shard of a run; it is trained unless it is there."""
    path = shard(into, config, seed)
    if not path.exists():
        into.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        pd.DataFrame(training.recorded(made, config, seed)).to_parquet(part, index=False)
        part.replace(path)
    return path


def rows_of(made: Family) -> pd.DataFrame | None:
    """All rows of a family's grid and fresh seeds; None while the grid is not complete."""
    into = folder(made)
    wanted = [shard(into, config, seed) for seed in SEEDS for config in grid()]
    if not all(path.exists() for path in wanted):
        return None
    return pd.concat([pd.read_parquet(path) for path in sorted(into.glob("*.parquet"))], ignore_index=True)


def fresh(made: Family) -> list[tuple[Config, int]]:
    """The runs that set the targets, once the grid is complete."""
    rows = rows_of(made)
    if rows is None:
        return []
    bests = [table.Family(rows, made.samples, made.higher, averaged).best for averaged in (False, True)]
    return [(config, seed) for config in dict.fromkeys(bests) for seed in FRESH]


def runs(made: Family) -> Iterator[tuple[Config, int]]:
    yield from ((config, seed) for seed in SEEDS for config in grid())
    yield from fresh(made)


def assembled(device: torch.device) -> pd.DataFrame:
    """The rows of all families that are complete on that device, and those of the table of which nothing is here.

    Raises RuntimeError if no family is complete.
    """
    parts: dict[str, pd.DataFrame] = {}
    for name in NAMES:
        made = placed(family(name), device)
        rows = rows_of(made)
        if rows is not None and all(shard(folder(made), *run).exists() for run in fresh(made)):
            parts[name] = rows.assign(held_out=len(made.held_out))
    if not parts:
        raise RuntimeError("no family is complete: record one first")
    kept = pd.read_parquet(table.PATH).astype({"family": "str"}) if table.PATH.exists() else pd.DataFrame()
    others = [rows for name, rows in kept.groupby("family") if name not in parts] if len(kept) else []
    rows = pd.concat([*others, *parts.values()], ignore_index=True).sort_values(
        ["family", "lr", "batch", "seed", "check"], ignore_index=True
    )
    narrow = {name: "float32" for name in rows.select_dtypes("float64").columns if name != "lr"}
    return rows.astype({**narrow, "family": "category"})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="family", help=f"of {', '.join(NAMES)} (default: all)")
    parser.add_argument("--assemble", action="store_true", help="write the table from the shards there are")
    parser.add_argument("--device", default="cpu", help="to train on, or whose shards to take (default: cpu)")
    options = parser.parse_args()
    device = require(options.device)
    if options.assemble:
        rows = assembled(device)
        part = table.PATH.with_suffix(".part")
        rows.to_parquet(part, index=False, compression="zstd")
        part.replace(table.PATH)
        print(f"{table.PATH}: {len(rows)} rows of {', '.join(rows['family'].cat.categories)}")
        return 0
    torch.set_num_threads(1)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        for name in options.families or NAMES:
            made = placed(family(name), device)
            bar = progress.add_task(name, total=len(SEEDS) * len(grid()) + len(FRESH))
            for config, seed in runs(made):
                record(made, config, seed, folder(made))
                progress.advance(bar)
            progress.update(bar, total=progress.tasks[bar].completed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
