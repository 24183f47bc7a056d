"""A gauge inside Accelerate's accumulate(). A small network learns noisy sums, in seconds on a CPU."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import grgauge

MICRO, GROUPS = 16, 4

x = torch.randn(8192, 16)
y = x.sum(1, keepdim=True) + torch.randn(8192, 1)
net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1))

accelerator = Accelerator(gradient_accumulation_steps=GROUPS, cpu=True)
model, optimizer, data = accelerator.prepare(
    net,
    torch.optim.AdamW(net.parameters(), lr=1e-4),
    DataLoader(TensorDataset(x, y), MICRO, shuffle=True),
)
gauge = grgauge.Gauge(optimizer, MICRO * GROUPS * accelerator.num_processes)
accelerator.register_for_checkpointing(gauge)
if accelerator.num_processes > 1:
    gauge.attach(model)

newest = None
for rows, targets in data:
    with accelerator.accumulate(model):
        accelerator.backward(nn.functional.mse_loss(model(rows), targets))
        gauge.micro_step()
        optimizer.step()
        optimizer.zero_grad()
    reading = gauge.reading()
    if reading is not None and reading is not newest:
        newest = reading
        if reading.step % 50 == 0:
            accelerator.print(f"step {reading.step}: {grgauge.verdict(reading)}")
