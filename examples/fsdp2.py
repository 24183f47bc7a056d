"""The gauge on FSDP2; run with `torchrun --nproc-per-node 4 examples/fsdp2.py`.

A character transformer learns Python's manual, with parameters, gradients and optimizer state spread over the ranks.
`attach` comes after `fully_shard` and takes the root module. With a mesh of two dimensions this is HSDP.
"""

import os
import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import grgauge
from grgauge.cli.char_transformer import CharTransformer, Text

warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # which nothing here writes to
BATCH_SIZE, STEPS, CONTEXT = 32, 61, 64

cuda = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
dist.init_process_group("nccl" if cuda else "gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
if cuda:
    torch.cuda.set_device(device)
else:
    torch.set_num_threads(1)

text = Text.manual()
torch.manual_seed(0)
model = CharTransformer(text.characters).to(device)
mesh = init_device_mesh(device.type, (ranks,))
for block in model.blocks:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = grgauge.AdamW(model.parameters(), lr=2e-3)
gauge = grgauge.Gauge(optimizer, BATCH_SIZE)
gauge.attach(model)

generator = torch.Generator().manual_seed(0)  # the same batch on all ranks, of which each takes its part
for step in range(1, STEPS + 1):
    starts = torch.randint(len(text.data) - CONTEXT, (BATCH_SIZE,), generator=generator)[rank::ranks]
    rows = text.data[starts[:, None] + torch.arange(CONTEXT + 1)].to(device)
    optimizer.zero_grad()
    loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    reading = gauge.reading()
    if rank == 0 and reading is not None and step % 10 == 1:
        gr_s = "-" if reading.gr_s is None else f"{reading.gr_s:.2f}"
        print(f"step {reading.step:3d}  loss {loss:.2f}  GR_T {reading.gr_t:5.1f}  GR_S {gr_s}", flush=True)

if rank == 0:
    print(*reading.notes, grgauge.verdict(reading), sep="\n")
dist.barrier()  # gloo takes it badly if one rank leaves while another still talks to it
dist.destroy_process_group()
