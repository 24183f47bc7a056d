"""A DDPM's UNet on digits of 8 × 8 pixels; measured by how well it tells the noise that was added."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from . import Family

TRAIN = 1400


class Diffusion(Family):
    name, metric, higher, samples = "diffusion", "loss", False, 8_000

    def __init__(self) -> None:
        pixels = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8.0 - 1.0
        pixels = pixels[torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))]
        self.data, self.held_out = TensorDataset(pixels[:TRAIN]), TensorDataset(pixels[TRAIN:])
        self.scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")

    def model(self) -> nn.Module:
        return UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            attention_head_dim=16,
        )

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        (images,) = batch
        times = torch.randint(self.scheduler.config.num_train_timesteps, (len(images),))
        noise = torch.randn_like(images)
        return F.mse_loss(model(self.scheduler.add_noise(images, noise, times), times).sample, noise)

    def measure(self, model: nn.Module) -> float:
        return float(self.loss(model, self.held_out.tensors))


FAMILY = Diffusion
