"""Short trainings of one small model at three learning rates, and what the gauges say about each.

The model is a character transformer of 250 000 parameters, the text the manual that ships with Python, so nothing is
downloaded and no GPU is needed. Each run begins with the same weights and sees the same batches. The verdict on a run
comes from its readings alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..gauge import Gauge
from ..optim import AdamW
from ..policy import Target, advise
from ..policy.watch import WINDOW
from ..reading import Reading

LEARNING_RATES = (1e-4, 2e-3, 3e-2)
"""Far too low, the one with the lowest loss in sweeps from 1e-3 to 3e-3 with three seeds, far too high."""

BATCH_SIZE = 24
MICRO_BATCHES = 4
CONTEXT = 64

FINAL = 20
"""The steps at the end over which the final loss is averaged."""

INTRODUCTION = """\
A character transformer learns Python's manual at three learning rates.
GR_T compares the gradients of successive steps: 1 is full agreement (LR too
low), 20 the target, and far above it they bounce back and forth (LR too high).
GR_S compares the gradients within a batch: 0.58 is the target; above it the
batch is too small, below it larger than it need be.
Factors lead to the learning rate and batch that were best in recorded trainings
with such readings; nine of ten were within the brackets.
"""


class Block(nn.Module):
    """Attention and MLP, each with a layer norm before it and a skip connection around it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class CharTransformer(nn.Module):
    """Logits of the next character at each place."""

    def __init__(self, characters: int, width: int = 96, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(characters, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, characters: Tensor) -> Tensor:
        x = self.tokens(characters) + self.positions.weight[: characters.shape[1]]
        return self.head(self.norm(self.blocks(x)))


@dataclass(frozen=True)
class Text:
    """English text as character indices, and how many different characters there are."""

    data: Tensor
    characters: int

    @staticmethod
    def manual() -> Text:
        """The topics of Python's own help(), 0.4 million characters."""
        from pydoc_data.topics import topics

        text = "\n".join(topics[name] for name in sorted(topics))
        index = {character: i for i, character in enumerate(sorted(set(text)))}
        return Text(torch.tensor([index[character] for character in text]), len(index))

    def batches(self, seed: int) -> Iterator[Tensor]:
        """Random pieces of the text, [BATCH_SIZE, CONTEXT + 1]."""
        generator = torch.Generator().manual_seed(seed)
        piece = torch.arange(CONTEXT + 1)
        while True:
            starts = torch.randint(len(self.data) - CONTEXT, (BATCH_SIZE,), generator=generator)
            yield self.data[starts[:, None] + piece]


@dataclass
class Run:
    """One training at a constant learning rate, as far as it has got."""

    lr: float
    steps: int
    losses: list[float] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)

    @property
    def step(self) -> int:
        return len(self.losses)

    @property
    def done(self) -> bool:
        return self.step == self.steps

    @property
    def loss(self) -> float:
        """Mean of the last steps; nan before the first."""
        return fmean(self.losses[-FINAL:]) if self.losses else math.nan

    @property
    def summary(self) -> Reading | None:
        """The reading of the window around step 50 that advice rests on, each quantity the median there.

        For a run that has not reached the window, of the newest five. Later GR_T keeps climbing at a constant rate,
        from 2 to 5 and from 20 to 25 by step 160 here, while a network killed by far too high a rate drifts towards
        the zone. Readings of one run scatter by 15 % within the window, hence the median of its five.
        """
        first, last = WINDOW
        window = [reading for reading in self.readings if first <= reading.step <= last] or self.readings[-5:]
        return _median(window) if window else None

    @property
    def verdict(self) -> str:
        """The line of `Gauge.advice`, without its reasons."""
        return advise(self.readings).short if self.readings else "no reading yet"

    def __str__(self) -> str:
        return f"lr {self.lr:.0e}: {self.verdict} — loss {self.loss:.2f}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON except for numbers that are not finite."""
        return {
            "lr": self.lr,
            "batch_size": BATCH_SIZE,
            "loss": self.loss,
            "losses": self.losses,
            "readings": [reading.to_dict() for reading in self.readings],
            "summary": self.summary.to_dict() if self.summary is not None else None,
            "verdict": self.verdict,
        }


def _median(readings: Sequence[Reading]) -> Reading:
    """The newest reading with the median of each quantity, without standard errors: those are of single readings."""
    newest = readings[-1]
    # each GR_T in units of what white noise reads at that step, which still grows in the first 40 steps
    gr_t = [reading.gr_t / reading.finite_time_factor for reading in readings if reading.gr_t is not None]
    gr_s = [reading.gr_s for reading in readings if reading.gr_s is not None]
    noise_scale = [reading.noise_scale for reading in readings if reading.noise_scale is not None]
    return replace(
        newest,
        gr_t=median(gr_t) * newest.finite_time_factor if gr_t else None,
        gr_t_error=None,
        gr_s=median(gr_s) if gr_s else None,
        gr_s_error=None,
        noise_scale=median(noise_scale) if noise_scale else None,
        noise_scale_error=None,
    )


def train(run: Run, text: Text, seed: int = 0) -> Iterator[None]:
    """Train from scratch, filling in the run; yields after each step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CharTransformer(text.characters)
    optimizer = AdamW(model.parameters(), lr=run.lr, flat=True)
    gauge = Gauge(optimizer, BATCH_SIZE, groups=MICRO_BATCHES)
    for _, batch in zip(range(run.steps), text.batches(seed), strict=False):
        optimizer.zero_grad()
        total = 0.0
        for piece in batch.chunk(MICRO_BATCHES):
            loss = F.cross_entropy(model(piece[:, :-1]).flatten(0, 1), piece[:, 1:].flatten()) / MICRO_BATCHES
            loss.backward()
            gauge.micro_step()
            total += loss.item()
        optimizer.step()
        run.losses.append(total)
        reading = gauge.reading()
        if reading is not None and (not run.readings or reading.step > run.readings[-1].step):
            run.readings.append(reading)
        yield


def conclusion(runs: Sequence[Run], target: Target | None = None) -> str:
    """Whether the run with the lowest loss is the one whose GR_T came nearest to the target, in one line."""
    target = target or Target()
    losses = {run.lr: run.loss for run in runs if math.isfinite(run.loss)}
    distances = {
        run.lr: abs(math.log(summary.gr_t / summary.finite_time_factor / target.gr_t))
        for run in runs
        if (summary := run.summary) is not None and summary.ready and summary.gr_t is not None
    }
    if len(distances) < len(runs) or not losses:
        return "Not every gauge was ready, so the verdicts are not to be relied on: train for more steps."
    best, nearest = min(losses, key=losses.__getitem__), min(distances, key=distances.__getitem__)
    if best == nearest:
        return f"The lowest loss and the GR_T nearest to {target.gr_t:g} are the same run's: lr {best:.0e}."
    return f"The lowest loss is lr {best:.0e}'s, the GR_T nearest to {target.gr_t:g} is lr {nearest:.0e}'s."
