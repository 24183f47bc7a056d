"""Gauges in Lightning's Trainer: one line. A small network learns noisy sums, in seconds on a CPU."""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from grgauge.integrations.lightning import GaugeCallback


class Regression(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


x = torch.randn(8192, 16)
y = x.sum(1, keepdim=True) + torch.randn(8192, 1)
trainer = Trainer(
    max_steps=100,
    accumulate_grad_batches=4,
    callbacks=[GaugeCallback()],
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
)
trainer.fit(Regression(), DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True))
