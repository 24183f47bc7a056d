"""A family small enough to know."""

import torch
from families import Family
from torch import nn
from torch.utils.data import TensorDataset


class Line(Family):
    """A linear function through a BatchNorm."""

    name, metric, higher, samples = "line", "loss", False, 2000

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        x = 3.0 + torch.randn(400, 4, generator=generator)
        y = x @ torch.tensor([[1.0], [-2.0], [0.5], [0.0]]) + 0.1 * torch.randn(400, 1, generator=generator)
        self.data, self.held_out = TensorDataset(x[:300], y[:300]), TensorDataset(x[300:], y[300:])

    def model(self):
        return nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1))

    def loss(self, model, batch):
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    def measure(self, model):
        return float(self.loss(model, self.held_out.tensors))
