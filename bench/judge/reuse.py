"""What state reuse costs: the metric that tuning ends at, against training from scratch at what it found, in pairs.

    python -m judge.reuse recommendation images --starts 10        in bench/; rows into results/reuse.csv

`tune` spends two static runs from a blind start. Then fresh weights train at the configuration that it ended at, on as
many samples as its own weights had, from their first step on. A start whose row is there is not run again.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from pathlib import Path
from typing import Any

import families
import torch
from families import Family
from turns import append, origin

import grgauge
from grgauge import Result

from . import devices
from .live import Looks, tuned
from .opponents import start_of
from .table import Config
from .training import batches

REUSE = Path(__file__).parents[1] / "results" / "reuse.csv"
COLUMNS = "date,commit,device,torch,family,start,lr,batch,trials,samples,reused,from_scratch"
BUDGET = 2.0
"""Static runs that tuning spends."""


def trained_on(result: Result) -> int:
    """Samples that the weights at the end have seen, through all trials that they were handed on by."""
    by_number = {record.number: record for record in result.trials}
    record, samples = result.trials[-1], 0
    while True:
        samples += record.samples
        if record.parent is None:
            return samples
        record = by_number[record.parent]


def from_scratch(family: Family, config: grgauge.Config, samples: int, seed: int) -> float:
    """The metric of fresh weights after that many samples."""
    torch.manual_seed(seed)
    model = family.model()
    groups = family.param_groups(model, config.weight_decay or 0.0)
    optimizer = grgauge.AdamW(groups, lr=config.lr)  # type: ignore[arg-type]
    done = 0
    for batch in batches(family, config.batch_size, seed):
        if done >= samples:
            break
        loss = family.loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        done += config.batch_size
        if not math.isfinite(float(loss.detach())):
            return math.nan
    return family.validate(model)


def pair(family: Family, start: Config, seed: int) -> dict[str, Any] | None:
    """One start; None where tuning failed."""
    worst = -math.inf if family.higher else math.inf
    never = {False: -worst, True: -worst}
    result = tuned(family, start, seed, Looks(family, never), BUDGET)
    if result is None:
        return None
    samples = trained_on(result)
    return {
        "lr": f"{result.config.lr:.4g}",
        "batch": result.config.batch_size,
        "trials": len(result.trials),
        "samples": samples,
        "reused": f"{family.validate(result.model):.5g}",
        "from_scratch": f"{from_scratch(family, result.config, samples, seed):.5g}",
    }


def done() -> set[tuple[str, str]]:
    if not REUSE.exists():
        return set()
    with REUSE.open(encoding="utf-8", newline="") as file:
        return {(row["family"], row["start"]) for row in csv.DictReader(file)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="family", help=f"of {', '.join(families.NAMES)} (default: all)")
    parser.add_argument("--starts", type=int, default=10, help="blind starts of each (default: 10)")
    parser.add_argument("--device", default="cpu", help="to train on (default: cpu)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = devices.require(options.device)
    origin(device)  # of the code that is about to run, not of what it is by the first row
    for name in options.families or families.NAMES:
        made = devices.placed(families.family(name), device)
        for seed in range(options.starts):
            if (name, f"blind {seed}") in done():
                continue
            row = pair(made, start_of(seed), seed)
            if row is not None:
                append(REUSE, COLUMNS, [{**origin(device), "family": name, "start": f"blind {seed}", **row}])
    return 0


if __name__ == "__main__":
    sys.exit(main())
