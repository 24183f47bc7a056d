"""What one process sees that goes through the batches of all ranks as micro-batches; and float64, with any weights."""

import torch
from network import BATCH, Net, batch, network, smoothed
from torch import nn

from grgauge import Gauge


class Branching(Net):
    """One layer that only an odd part of the batch goes through, and one that nothing does."""

    def __init__(self):
        super().__init__()
        self.odd, self.idle = nn.Linear(37, 37), nn.Linear(37, 5)

    def forward(self, x, odd):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(torch.tanh(self.odd(x)) if odd else x)


def micro_batches(make, parts, *, steps=12, net=None, every=1, loss_of=None, start=0, optimizer=None, gauge=None):
    """(net, optimizer, gauge) after a run with each rank's part as a micro-batch."""
    net = net or network()
    optimizer = optimizer or make(net.parameters())
    gauge = gauge or Gauge(optimizer, BATCH, every=every)
    for t in range(start, start + steps):
        optimizer.zero_grad()
        for k in range(parts):
            x, y = batch(t, k, parts)
            prediction = net(x) if loss_of is None else loss_of(net, x, k)
            (nn.functional.mse_loss(prediction, y) / parts).backward()
            gauge.micro_step()
        optimizer.step()
    return net, optimizer, gauge


def weighted_truth(sizes, weights, batches, beta=0.9):
    """(GR_T, GR_S) in float64 after `batches`: groups of `sizes`, whose mean gradients are averaged with `weights`."""
    net = network().double()
    p = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    b = torch.tensor(sizes, dtype=torch.float64)
    m, squares, noises, signals = 0.0, [], [], []
    for x, y in batches:
        groups = []
        for rows in torch.arange(len(x)).split(sizes):
            net.zero_grad()
            nn.functional.mse_loss(net(x[rows].double()), y[rows].double()).backward()
            groups.append(torch.cat([q.grad.flatten() for q in net.parameters()]))
        each = torch.stack(groups)
        mean = (p[:, None] * each).sum(0)
        m = beta * m + (1 - beta) * mean
        # E sum p |G|^2 = G2 + S sum p / b and E |mean|^2 = G2 + S sum p^2 / b: two equations for S and G2.
        equations = torch.tensor([[1.0, (p / b).sum()], [1.0, (p * p / b).sum()]], dtype=torch.float64)
        sides = torch.stack([(p * each.square().sum(1)).sum(), mean.square().sum()])
        signal, noise = torch.linalg.solve(equations, sides).tolist()
        squares.append(float(mean.square().sum()))
        signals.append(signal)
        noises.append(noise)
    signal, noise = max(smoothed(signals), 0.0), smoothed(noises)
    m = m / (1 - beta ** len(squares))
    total = sum(sizes)
    return smoothed(squares) / float(m.square().sum()), (signal + noise) / (total * signal + noise)
