"""NeuMF on MovieLens-100k as implicit feedback; leave one out, hit rate at 10 among 100 films not seen."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from . import Family
from .fetch import data

NEGATIVES = 4
"""Films not seen for each one that was, in training."""
RANKED = 100
"""Films not seen that the one left out is ranked among."""


class NeuMF(nn.Module):
    """Neural matrix factorisation (He et al. 2017): a product of embeddings beside an MLP over others."""

    def __init__(self, users: int, items: int, width: int = 16) -> None:
        super().__init__()
        self.gmf = nn.ModuleList([nn.Embedding(users, width), nn.Embedding(items, width)])
        self.mlp = nn.ModuleList([nn.Embedding(users, width), nn.Embedding(items, width)])
        self.layers = nn.Sequential(nn.Linear(2 * width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width), nn.ReLU())
        self.head = nn.Linear(2 * width, 1)
        for embedding in (*self.gmf, *self.mlp):
            nn.init.normal_(embedding.weight, std=0.05)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        product = self.gmf[0](users) * self.gmf[1](items)
        deep = self.layers(torch.cat([self.mlp[0](users), self.mlp[1](items)], -1))
        return self.head(torch.cat([product, deep], -1)).squeeze(-1)


class Recommendation(Family):
    name, metric, higher, samples = "recommendation", "HR@10", True, 80_000

    def __init__(self) -> None:
        rows = np.loadtxt(data("ml-100k.inter"), skiprows=1, dtype=np.int64)
        users, items = (np.unique(rows[:, k], return_inverse=True)[1] for k in (0, 1))
        self.users, self.items = int(users.max()) + 1, int(items.max()) + 1
        self.seen = torch.zeros(self.users, self.items, dtype=torch.bool)
        self.seen[users, items] = True
        order = np.lexsort((items, rows[:, 3], users))
        last = order[np.append(np.flatnonzero(np.diff(users[order])), len(order) - 1)]
        kept = np.setdiff1d(order, last)
        self.data = TensorDataset(torch.from_numpy(users[kept]), torch.from_numpy(items[kept]))
        generator = torch.Generator().manual_seed(0)
        unseen = torch.multinomial((~self.seen).float(), RANKED, generator=generator)[users[last]]
        ranked = torch.cat([torch.from_numpy(items[last])[:, None], unseen], 1)
        self.held_out = TensorDataset(torch.from_numpy(users[last]), ranked)

    def model(self) -> nn.Module:
        return NeuMF(self.users, self.items)

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        users, items = batch
        drawn = torch.randint(self.items, (len(users), NEGATIVES))
        wanted = torch.cat([torch.ones(len(users), 1), torch.zeros(len(users), NEGATIVES)], 1)
        # A film drawn that the user has seen is no negative; it is left out of the loss.
        counts = torch.cat([torch.ones(len(users), 1), (~self.seen[users[:, None], drawn]).float()], 1)
        scores = model(users[:, None].expand(-1, 1 + NEGATIVES), torch.cat([items[:, None], drawn], 1))
        losses = F.binary_cross_entropy_with_logits(scores, wanted, reduction="none")
        return (losses * counts).sum(1).mean() / (1 + NEGATIVES)

    def measure(self, model: nn.Module) -> float:
        users, ranked = self.held_out.tensors
        scores = model(users[:, None].expand_as(ranked), ranked)
        # Ties count half, so that a constant score is no hit.
        better, equal = scores[:, 1:] > scores[:, :1], scores[:, 1:] == scores[:, :1]
        rank = better.sum(1) + 0.5 * equal.sum(1) + RANKED * scores[:, 0].isnan()
        return float((rank < 10).double().mean())


FAMILY = Recommendation
