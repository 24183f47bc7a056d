"""The documentation's helper for loggers: what it logs can be read back from TensorBoard's event files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from grgauge import AdamW, Gauge

PAGE = Path(__file__).parents[2] / "docs" / "integrations" / "loggers.md"

pytestmark = pytest.mark.engines


def test_values_are_read_back_from_event_files(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from torch.utils.tensorboard import SummaryWriter

    code = PAGE.read_text().split("```python\n")[1].split("\n\n\n")[0]
    assert len(code.splitlines()) <= 20
    names = {}
    exec(code, names)
    net = torch.nn.Linear(8, 1)
    optimizer = AdamW(net.parameters())
    gauge, written, last = Gauge(optimizer, 16), {}, None
    with SummaryWriter(tmp_path) as writer:
        for _ in range(20):
            x = torch.randn(16, 8)
            optimizer.zero_grad()
            gauge.split_backward(lambda x: (net(x) - x.sum(1, keepdim=True)).square().mean(), x)
            optimizer.step()
            reading = gauge.reading()
            if reading is not None and reading is not last:
                last = reading
                for name, value in names["scalars"](reading).items():
                    writer.add_scalar(name, value, reading.step)
                written[reading.step] = reading
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert list(written) == [5, 10, 15, 20]
    for name in ("gr_t", "gr_s", "grad_norm", "ready"):
        back = {event.step: event.value for event in events.Scalars(f"gauge/{name}")}
        expected = {step: float(v) for step, r in written.items() if (v := getattr(r, name)) is not None}
        assert back == pytest.approx(expected, rel=1e-6)
