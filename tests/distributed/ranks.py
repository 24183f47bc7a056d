"""What ranks do in the tests of this folder: torchrun starts this file once for each number of them.

Each rank runs all scenarios of its number of ranks, in the same order, and saves what they return; the tests judge
it. What a scenario raises is saved in its place.
"""

from __future__ import annotations

import traceback
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from distributed import ranks_ddp, ranks_either, ranks_fsdp  # noqa: F401  # they register their scenarios
from distributed.training import FOLDER, SCENARIOS


def main():
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    results, raised = {}, {}
    for (world, name), scenario in SCENARIOS.items():
        if world == dist.get_world_size():
            try:
                results[name] = scenario()
            except Exception:
                raised[name] = traceback.format_exc()
    torch.save((results, raised), FOLDER / f"{dist.get_rank()}.pt")
    dist.barrier()  # gloo takes it badly if one rank leaves while another still talks to it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
