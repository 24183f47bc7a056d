"""One of two ranks, of which the second comes to grief, and what the first writes meanwhile."""

import json
import os
import signal
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from network import BATCH, batch, network
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from grgauge import AdamW, Gauge

TIMEOUT, FATAL = 5.0, 8


def come_to_grief(end):
    if end == "exit":
        os._exit(3)
    if end == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def main(rank, meeting, path, module, end, then):
    """Train as one of two ranks.

    module  DDP or FSDP2
    end     exit, kill or hang: what becomes of rank 1 in step 8, between its backward and the optimizer's step
    then    train: rank 0 goes on training; ask: it asks the gauge for its state

    Rank 0 writes a line of JSON to `path` for each reading, and one for the exception that ends it.
    """

    def tell(line):
        if rank == 0:
            with open(path, "a", encoding="utf-8") as file:
                print(json.dumps(line), file=file)

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=TIMEOUT),
    )
    model = DistributedDataParallel(network()) if module == "DDP" else fully_shard(network())
    optimizer = AdamW(model.parameters(), lr=1e-3)
    gauge = Gauge(optimizer, BATCH, every=2)
    gauge.attach(model)
    seen = None
    for t in range(20):
        optimizer.zero_grad()
        x, y = batch(t, rank, 2)
        since = time.monotonic()
        try:
            nn.functional.mse_loss(model(x), y).backward()
            if t + 1 == FATAL and rank == 1:
                come_to_grief(end)
            optimizer.step()
            if t + 1 == FATAL and then == "ask":
                gauge.state_dict()
            reading = gauge.reading()
        except RuntimeError as error:
            tell({"raised": str(error), "after": time.monotonic() - since, "in": t + 1})
            raise
        if reading is not seen:
            seen = reading
            tell({"step": reading.step, "gr_t": reading.gr_t, "gr_s": reading.gr_s})
