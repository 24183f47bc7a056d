"""timm's optimizer factory makes ours by its name. A small ResNet learns where a square is, in seconds on a CPU."""

import timm
import timm.optim
import torch
from torch import nn

import grgauge
import grgauge.integrations.timm  # registers the name

BATCH = 32

torch.manual_seed(0)
model = timm.create_model("test_resnet", num_classes=4)
optimizer = timm.optim.create_optimizer_v2(model, "grgauge", lr=1e-3, weight_decay=0.05)
gauge = grgauge.Gauge(optimizer, BATCH)

newest = None
for _ in range(50):
    images, quarters = torch.randn(BATCH, 3, 32, 32), torch.randint(4, (BATCH,))
    for image, quarter in zip(images, quarters.tolist(), strict=True):
        row, column = 16 * (quarter // 2), 16 * (quarter % 2)
        image[:, row + 4 : row + 12, column + 4 : column + 12] += 1
    optimizer.zero_grad()
    gauge.split_backward(lambda b: nn.functional.cross_entropy(model(b[0]), b[1]), (images, quarters))
    optimizer.step()
    reading = gauge.reading()
    if reading is not None and reading is not newest:
        newest = reading
        if reading.step % 10 == 0:
            print(f"step {reading.step}: {grgauge.verdict(reading)}")
