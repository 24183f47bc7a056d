"""Lightning's learning-rate range test and batch scaler, and a run at what they find."""

from __future__ import annotations

import logging
import tempfile
import warnings
from pathlib import Path

import torch
from families import Family
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .live import LIMIT, Looks, adamw, trained
from .table import BOUNDS

TRIED = 100
"""Learning rates of a range test, one step each: Lightning's default."""


class Counted(LightningModule):
    """A family's model, which counts the samples that it trains on."""

    def __init__(self, family: Family, looks: Looks, batch: int) -> None:
        super().__init__()
        self.family, self.looks = family, looks
        self.inner: nn.Module = family.model()
        self.lr, self.batch_size = 1e-3, batch

    def training_step(self, batch: tuple[Tensor, ...], index: int) -> Tensor:
        self.looks.spent += len(batch[0])
        return self.family.loss(self.inner, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.family.param_groups(self.inner), lr=self.lr)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.family.data, self.batch_size, shuffle=True)


def lr_find(family: Family, batch: int | None, seed: int, goals: dict[bool, float]) -> Looks:
    """A range test over the plane's learning rates, then one run at what it suggests. `batch` None: what the batch
    scaler finds first, which on a machine with room for it is the plane's largest."""
    looks = Looks(family, goals)
    torch.manual_seed(seed)
    least, most = (int(end) for end in BOUNDS["batch"])
    module = Counted(family, looks, least if batch is None else batch)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*logging interval.*")
        trainer = Trainer(
            accelerator="cpu" if next(module.parameters()).device.type == "cpu" else "gpu",
            devices=1,
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=Path(folder),
        )
        tuner = Tuner(trainer)
        if batch is None:
            tuner.scale_batch_size(module, init_val=least, max_val=most)
        low, high = BOUNDS["lr"]
        tuner.lr_find(module, min_lr=low, max_lr=high, num_training=TRIED)  # sets module.lr where it has a suggestion
    if looks.spent >= LIMIT * family.samples:
        looks.look(looks.spent, lambda: float("nan"), lambda: float("nan"))
        return looks
    return trained(family, adamw(module.lr), module.batch_size, seed, goals, looks)
