"""One of two ranks in tune(), of which both or one come to grief; and what rank 0 writes of it."""

from __future__ import annotations

import json
import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tuning.ranks import tuned

TIMEOUT, KILL_AT = 10.0, 704


def main(rank, folder, end):
    """end: "kill", both by SIGKILL, or "raise", rank 1 alone. How rank 0 ends goes into `end`.json."""
    torch.set_num_threads(1)
    folder = Path(folder)
    timeout = timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", init_method=f"file://{folder / end}", rank=rank, world_size=2, timeout=timeout)
    since = time.monotonic()

    def grief(trial):
        nonlocal since
        since = time.monotonic()
        if trial.used != KILL_AT:
            return
        if end == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 1:
            raise KeyError("label")

    try:
        tuned(folder / f"{end}.db", die_at=grief)
    except Exception as error:
        if rank == 0:
            report = {"raised": f"{type(error).__name__}: {error}", "after": time.monotonic() - since}
            (folder / f"{end}.json").write_text(json.dumps(report))
        raise
