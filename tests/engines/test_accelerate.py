"""accelerate: micro_step() inside accumulate(), against a loop written by hand."""

import pytest
import torch
from torch import nn

from grgauge import AdamW, Gauge

accelerate = pytest.importorskip("accelerate")

ROWS = torch.randn(24 * 16, 7, generator=torch.Generator().manual_seed(3))


def readings_of(optimizer_of, accelerated):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 40), nn.Tanh(), nn.Linear(40, 1))
    optimizer = optimizer_of(model.parameters())
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=4, cpu=True)
    if accelerated:
        model, optimizer = accelerator.prepare(model, optimizer)
    gauge = Gauge(optimizer, 16, every=2)
    taken = []
    for i, rows in enumerate(ROWS.split(4)):
        if accelerated:
            with accelerator.accumulate(model):
                accelerator.backward((model(rows) - rows[:, :1]).square().mean())
                gauge.micro_step()
                optimizer.step()  # accelerate lets only every fourth of these, and of the next, through
                optimizer.zero_grad()
        else:
            ((model(rows) - rows[:, :1]).square().mean() / 4).backward()
            gauge.micro_step()
            if i % 4 == 3:
                optimizer.step()
                optimizer.zero_grad()
        reading = gauge.reading()
        if reading is not None and (not taken or taken[-1].step != reading.step):
            taken.append(reading)
    return taken


@pytest.mark.parametrize("make", [AdamW, torch.optim.AdamW, torch.optim.SGD])
def test_micro_steps_inside_accumulate(make):
    by_hand, accelerated = (readings_of(lambda p: make(p, lr=1e-3), way) for way in (False, True))
    assert accelerated == by_hand
    assert [reading.step for reading in accelerated] == list(range(2, 25, 2))
    assert accelerated[-1].gr_s is not None
    assert not any("GR_S skipped" in note or "micro_step" in note for note in accelerated[-1].notes)
