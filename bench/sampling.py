"""How far GR_T and GR_S of a sample are from those of all gradients: by block size and budget, on real gradients.

    python bench/sampling.py            results/sampling.csv and results/sampling.png, about three minutes on one core
    python bench/sampling.py --quick    a small part of it, printed only

Two models are trained here for some steps: a word transformer of which four fifths are embeddings, on Python's own
documentation, and a convolutional network on the digits that scikit-learn carries. Of the last step's gradients each
budget and block size takes many samples, one a seed, and reads both gauges off each, with its standard error.
"""

from __future__ import annotations

import argparse
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from statistics import NormalDist
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
from gpt import Block, Config, initialize
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional
from turns import append, commit, significant

import grgauge_kernels as gk
from grgauge_kernels import sampling

Floats = npt.NDArray[np.float64]

RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    "date,commit,model,numel,block,share,visited_share,pilot,whole_share,ns_per_element,seeds,gauge,relative_rms_error,"
    "coverage_90"
)

FINE = 128
"""Elements: the smallest block studied, 512 B of fp32."""

BLOCKS = (128, 256, 512, 1024, 2048, 4096, 16384)
SHARES = (1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 1024)
QUICK_BLOCKS, QUICK_SHARES = (256, 4096), (1 / 4, 1 / 64)
STEPS, QUICK_STEPS = 30, 3
SEEDS, QUICK_SEEDS = 100, 20
OVERDRAWN = 1.25
"""Visited / budget, from which on a point is left out: small segments and fewest blocks alone exceed the budget."""

PILOT, NO_PILOT, HASH_ALONE = (True, sampling.WHOLE_SHARE), (False, sampling.WHOLE_SHARE), (False, 0.0)
"""Ways to choose: (blocks that were heavy in the first step for certain, share of the budget for whole segments)."""

REFERENCES = {NO_PILOT: "no pilot", HASH_ALONE: "no pilot, no large segment whole"}
"""The ways studied for the default block size only."""

GROUPS = 4
BETA = 0.9
Z = NormalDist().inv_cdf(0.95)

GRAD_SQ, EMA_SQ, GROUP_SQ, STEP_SQ = range(4)
"""Columns of block sums: V of GR_T, |m|^2, the mean of the groups' |G_i|^2, |g|^2 of the last step."""

BIGRAMS = 2**15


class Words(nn.Module):
    """Tokens and hashed pairs of tokens, embedded apart, and a small transformer on top; head of its own."""

    def __init__(self, vocabulary: int, width: int, context: int) -> None:
        super().__init__()
        config = Config(2, width // 64, width, micro_batch=4, context=context, vocabulary=vocabulary)
        self.tokens, self.pairs = nn.Embedding(vocabulary, width), nn.Embedding(BIGRAMS, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.apply(initialize)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        before = functional.pad(tokens[:, :-1], (1, 0))
        pairs = ((tokens * 2**16 + before) * 2_654_435_761 >> 13) % BIGRAMS  # Knuth's multiplicative hash
        x = self.tokens(tokens) + self.pairs(pairs) + self.positions.weight
        for block in self.blocks:
            x = block(x)
        return functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


class Convolutions(nn.Module):
    """3x3 convolutions, wider and coarser as they go."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise((1, *widths)))
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in widths)
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        x = images
        for i, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            x = functional.relu(norm(layer(x)))
            if i in (1, 2):
                x = functional.max_pool2d(x, 2)
        return functional.cross_entropy(self.head(x.mean((2, 3))), targets)


@dataclass(frozen=True)
class Gradients:
    """One model's gradients, as sums over blocks of FINE elements.

    sums    of each tensor float64 [blocks, 4]
    first   of each tensor float64 [blocks]: sum g^2 of the first step
    """

    model: str
    sizes: list[int]
    sums: list[Floats]
    first: list[Floats]
    batch: int

    @property
    def numel(self) -> int:
        return sum(self.sizes)

    def blocks(self, block: int) -> list[Floats]:
        """The sums over blocks of `block` elements."""
        return [np.add.reduceat(s, np.arange(0, len(s), block // FINE), axis=0) for s in self.sums]


def models(quick: bool) -> Iterator[tuple[str, nn.Module, Callable[[], tuple[Tensor, Tensor]], int]]:
    """Name, model, a function that draws a micro-batch, and its samples."""
    from sklearn.datasets import load_digits  # takes its seconds to import

    words = re.findall(r"\w+|[^\w\s]|\s+", " ".join(topics.values()))
    number = {word: i for i, (word, _) in enumerate(Counter(words).most_common())}  # by frequency, as tokenizers do
    text = torch.tensor([number[word] for word in words])
    sequences, context = 4, 64

    def excerpt() -> tuple[Tensor, Tensor]:
        start = torch.randint(len(text) - context, (sequences, 1))
        found = text[start + torch.arange(context + 1)]
        return found[:, :-1], found[:, 1:]

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    samples = 16

    def drawn() -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(images), (samples,))
        return images[chosen], labels[chosen]

    yield "words", Words(len(number), 128 if quick else 512, context), excerpt, sequences
    widths = (64, 128, 256, 512) if quick else (64, 128, 256, 512, 1024)
    yield "convolutions", Convolutions(widths), drawn, samples


def train(
    name: str,
    model: nn.Module,
    draw: Callable[[], tuple[Tensor, Tensor]],
    samples: int,
    steps: int,
    stepped: Callable[[], None],
) -> Gradients:
    """Train by AdamW, GROUPS micro-batches a step, and take sums over the last step's gradients."""
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(params, lr=1e-3, fused=True)
    emas = [torch.zeros_like(p, requires_grad=False) for p in params]
    grad_sq: list[Floats] = [np.zeros(-(-p.numel() // FINE)) for p in params]
    group_sq = [np.zeros_like(v) for v in grad_sq]
    for step in range(1, steps + 1):
        grads = [torch.zeros_like(p) for p in params]
        for _ in range(GROUPS):
            group = torch.autograd.grad(model(*draw()), params)
            torch._foreach_add_(grads, group, alpha=1 / GROUPS)
            if step == steps:
                group_sq = [a + fine(g) / GROUPS for a, g in zip(group_sq, group, strict=True)]
        torch._foreach_lerp_(emas, grads, 1 - BETA)
        grad_sq = [BETA * v + (1 - BETA) * fine(g) for v, g in zip(grad_sq, grads, strict=True)]
        if step == 1:
            first = [v / (1 - BETA) for v in grad_sq]
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        optimizer.step()
        stepped()
    grown = 1 - BETA**steps
    columns = zip(grad_sq, emas, group_sq, grads, strict=True)
    sums = [np.stack([v / grown, fine(m) / grown**2, a, fine(g)], axis=1) for v, m, a, g in columns]
    return Gradients(name, [p.numel() for p in params], sums, first, GROUPS * samples)


def fine(t: Tensor) -> Floats:
    """Sums of squares over blocks of FINE elements, float64 [blocks]."""
    flat = t.detach().flatten()
    squares = functional.pad(flat, (0, -len(flat) % FINE)).view(-1, FINE).square()
    return squares.sum(1, dtype=torch.float64).numpy()


@dataclass(frozen=True)
class Drawn:
    """A sample of one model's gradients, as a plan would be; see `sampling.Replicated`."""

    tensor: npt.NDArray[np.int64]
    stratum: npt.NDArray[np.int64]
    visited: npt.NDArray[np.int64]
    scale: Floats
    stats: Floats

    @staticmethod
    def of(sums: list[Floats], choice: sampling.Choice, sizes: list[int], block: int) -> Drawn:
        past = np.array([part[-1] + 1 for part in choice.blocks]) * block  # beyond the end, if a short block is taken
        short = (past - np.asarray(sizes)[choice.tensor]).clip(0)
        visited = np.array([len(part) for part in choice.blocks]) * block - short
        scale = choice.population / np.bincount(choice.stratum, visited)[choice.stratum]
        pairs = zip(choice.tensor.tolist(), choice.blocks, strict=True)
        stats = np.array([sums[i][part].sum(axis=0) for i, part in pairs])
        return Drawn(choice.tensor, choice.stratum, visited, scale, stats)


def gauges(sums: Floats, covariance: Floats, batch: int) -> dict[str, tuple[float, float]]:
    """Name -> value and standard error, of sums [4] over all tensors and their covariance [4, 4]."""
    gr_t, gr_t_error = sampling.sampled_ratio(sums[:2], covariance[:2, :2])
    # With S = (A - C) / (n/B - 1/B) and G2 = C - S / B, from A = mean |G_i|^2 and C = |g|^2, B G2 + S is B C, and
    # GR_S = (G2 + S) / (B G2 + S) a straight line in A / C.
    slope = (1 - 1 / batch) / (GROUPS - 1)
    excess, excess_error = sampling.sampled_ratio(sums[2:], covariance[2:, 2:])
    gr_s = 1 / batch + slope * (excess - 1)
    return {"GR_T": (float(gr_t), float(gr_t_error)), "GR_S": (float(gr_s), float(slope * excess_error))}


def study(
    gradients: Gradients, block: int, share: float, seeds: int, pilot: bool, whole_share: float
) -> list[dict[str, Any]]:
    """A row for each gauge, or none where the budget is too small for the fewest blocks that a sample has.

    pilot   True: the blocks heaviest in the first step's gradient are taken for certain
    """
    sums = gradients.blocks(block)
    total = sum(s.sum(axis=0) for s in sums)
    budget = round(share * gradients.numel)
    certain = heavy(gradients, block, budget, whole_share) if pilot else None
    truth = gauges(np.asarray(total), np.zeros((4, 4)), gradients.batch)
    found: dict[str, list[tuple[float, float]]] = {gauge: [] for gauge in truth}
    for seed in range(seeds):
        choice = sampling.choose(
            gradients.sizes, budget, seed, sampling.REPLICATES, certain, block=block, whole_share=whole_share
        )
        drawn = Drawn.of(sums, choice, gradients.sizes, block)
        if drawn.visited.sum() > OVERDRAWN * budget:
            return []
        estimate, covariance = sampling.sampled_sums(drawn.stats, drawn)
        for gauge, reading in gauges(estimate.sum(axis=0), covariance.sum(axis=0), gradients.batch).items():
            found[gauge].append(reading)
    rows = []
    for gauge, readings in found.items():
        value, error = np.array(readings).T
        off = np.abs(value - truth[gauge][0])
        rows.append(
            {
                "model": gradients.model,
                "numel": gradients.numel,
                "block": block,
                "share": significant(share),
                "visited_share": significant(drawn.visited.sum() / gradients.numel),
                "pilot": int(pilot),
                "whole_share": whole_share,
                "seeds": seeds,
                "gauge": gauge,
                "relative_rms_error": significant(math.sqrt(np.mean(off**2)) / truth[gauge][0]),
                "coverage_90": significant(np.mean(off <= Z * error)),
            }
        )
    return rows


def heavy(gradients: Gradients, block: int, budget: int, whole_share: float) -> list[npt.NDArray[np.int64]]:
    """As `Bucket.heavy_blocks` of the first step's gradient, for other block sizes than the default too."""
    sizes = np.asarray(gradients.sizes)
    kept = sampling.kept_blocks(sizes, budget, block, whole_share)
    most = sampling.most_certain(-(-sizes // block), kept)
    firsts = [np.add.reduceat(s, np.arange(0, len(s), block // FINE)) for s in gradients.first]
    heaviest = (np.argsort(-first, kind="stable")[:k] for first, k in zip(firsts, most, strict=True))
    return [np.sort(found[first[found] > 0]) for first, found in zip(firsts, heaviest, strict=True)]


def costs(blocks: tuple[int, ...], quick: bool) -> dict[int, float]:
    """Block -> nanoseconds that one visited element of it takes, gradient and EMA, on one thread.

    In turns, and the shortest counts: whatever else the machine does makes a turn longer.
    """
    elements, visited, rounds = (2**24, 2**19, 3) if quick else (2**26, 2**21, 25)
    grad = torch.randn(elements)
    bucket = gk.Bucket([grad])
    ema = torch.zeros(visited)
    plans = {}
    for block in blocks:
        count = visited // block
        begin = sampling.chosen_blocks(0, 0, elements // block, count) * block
        rows = np.stack([np.zeros_like(begin), begin, np.full(count, block), np.arange(count) * block], axis=1)
        pieces = max(1, block // gk.CHUNK)  # a kernel takes no more than CHUNK at a time
        rows = np.repeat(rows, pieces, axis=0)
        rows[:, 2] = block // pieces
        rows[:, [1, 3]] += (np.tile(np.arange(pieces), count) * (block // pieces))[:, None]
        plans[block] = gk.Plan(bucket, rows)
    seconds: dict[int, list[float]] = {block: [] for block in blocks}
    for _ in range(rounds):
        for block, plan in plans.items():
            start = time.perf_counter()
            gk.measure_([grad], plan, ema=ema, beta=BETA)
            seconds[block].append(time.perf_counter() - start)
    return {block: significant(1e9 * min(times) / visited) for block, times in seconds.items()}


def way(row: dict[str, Any]) -> tuple[bool, float]:
    return bool(row["pilot"]), row["whole_share"]


def tabulate(rows: list[dict[str, Any]], blocks: tuple[int, ...]) -> Table:
    """Relative error (coverage of the 90 % interval), a line for each model, gauge and budget."""
    table = Table(title="relative rms error, % (and how often the 90 % interval holds the truth, %)")
    headings = (*map(str, blocks), *REFERENCES.values())
    for heading in ("model", "gauge", "budget"):
        table.add_column(heading, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", max_width=12)
    lines: dict[tuple[str, str, float], dict[str, str]] = {}
    for row in rows:
        error = 100 * row["relative_rms_error"]
        text = f"{error:.{0 if error > 10 else 2}f} ({100 * row['coverage_90']:.0f})"
        heading = REFERENCES.get(way(row), str(row["block"]))
        lines.setdefault((row["model"], row["gauge"], -row["share"]), {})[heading] = text
    for (model, gauge, share), cells in sorted(lines.items()):
        table.add_row(model, gauge, f"1/{-1 / share:.0f}", *(cells.get(heading, "-") for heading in headings))
    return table


TITLES = {"words": "word transformer", "convolutions": "convolutional network"}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Error and coverage over budgets: a row of panels for each model, a line for each block size."""
    matplotlib.use("agg")
    models = list(dict.fromkeys(row["model"] for row in rows))
    blocks = sorted({row["block"] for row in rows})
    colours = dict(zip(blocks, pyplot.get_cmap("viridis")(np.linspace(0.0, 0.92, len(blocks))), strict=True))
    style: Any = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
    with pyplot.rc_context(style | {"font.size": 9, "axes.titlesize": 10, "legend.fontsize": 8.5}):
        figure, axes = pyplot.subplots(len(models), 3, figsize=(11, 6.6), sharex=True, squeeze=False)
        for panels, model in zip(axes, models, strict=True):
            own = [row for row in rows if row["model"] == model]
            columns = (("GR_T", "relative_rms_error"), ("GR_S", "relative_rms_error"), ("GR_T", "coverage_90"))
            for axis, (gauge, column) in zip(panels, columns, strict=True):
                here = [row for row in own if row["gauge"] == gauge]
                for block in blocks:
                    line = [row for row in here if row["block"] == block and way(row) == PILOT]
                    if not line:
                        continue
                    bold = block == sampling.BLOCK
                    axis.plot(
                        [row["share"] for row in line],
                        [row[column] for row in line],
                        color=colours[block],
                        linewidth=2.8 if bold else 1.3,
                        marker="o",
                        markersize=5.5 if bold else 3.5,
                        zorder=3 if bold else 2,
                        label=f"{block} elements ({line[0]['ns_per_element']:.1f} ns each)" + ", default" * bold,
                    )
                for (reference, label), dashes in zip(REFERENCES.items(), ((4, 1.5), (1, 1.5)), strict=True):
                    line = [row for row in here if way(row) == reference]
                    axis.plot(
                        [row["share"] for row in line],
                        [row[column] for row in line],
                        color="crimson",
                        linewidth=1.7,
                        linestyle=(0, dashes),
                        label=f"{sampling.BLOCK}, {label}",
                    )
                decorate(axis, gauge, column)
            panels[0].set_ylabel(f"{TITLES[model]}\n{own[0]['numel'] / 1e6:.0f} M parameters", fontsize=10)
        for axis in axes[-1]:
            axis.set_xlabel("budget, share of the parameters")
        handles, labels = max((axis.get_legend_handles_labels() for axis in axes.flat), key=lambda found: len(found[1]))
        figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False)
        figure.suptitle("Error of gauges read off a sample of contiguous blocks", fontsize=12, y=0.985)
        figure.tight_layout(rect=(0, 0.085, 1, 0.995), w_pad=1.6, h_pad=1.4)
        figure.savefig(path, dpi=100)
        pyplot.close(figure)


def decorate(axis: Axes, gauge: str, column: str) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xlim(2**-1.6, 2**-10.4)
    axis.set_xticks(SHARES, [f"1/{1 / share:.0f}" for share in SHARES])
    axis.xaxis.set_minor_locator(NullLocator())
    name = f"$\\mathrm{{{gauge[:2]}_{gauge[3]}}}$"
    if column == "coverage_90":
        axis.set_title(f"{name}: truth inside the 90 % interval")
        axis.set_ylim(0, 1.04)
        axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        axis.axhline(0.9, color="black", linewidth=1, linestyle=":", zorder=1)
        return
    axis.set_title(f"{name}: relative rms error")
    axis.set_yscale("log")
    axis.set_ylim(6e-5, 4)
    axis.set_yticks([1e-4, 1e-3, 1e-2, 1e-1, 1.0])
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axis.yaxis.set_minor_locator(NullLocator())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small part, under 20 s; nothing is written")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    blocks, shares = (QUICK_BLOCKS, QUICK_SHARES) if quick else (BLOCKS, SHARES)
    steps, seeds = (QUICK_STEPS, QUICK_SEEDS) if quick else (STEPS, SEEDS)
    origin = {"date": datetime.now(timezone.utc).date().isoformat(), "commit": commit()}
    rows: list[dict[str, Any]] = []
    console = Console()
    with Progress(console=console) as progress:
        training = progress.add_task("training", total=2 * steps)
        sampled = progress.add_task("sampling", total=2 * len(shares) * (len(blocks) + len(REFERENCES)))
        ns = costs(blocks, quick)
        for name, model, draw, samples in models(quick):
            gradients = train(name, model, draw, samples, steps, lambda: progress.advance(training))
            for share in shares:
                for block, chosen in (*((b, PILOT) for b in blocks), *((sampling.BLOCK, r) for r in REFERENCES)):
                    shared = origin | {"ns_per_element": ns[block]}
                    rows += [shared | row for row in study(gradients, block, share, seeds, *chosen)]
                    progress.advance(sampled)
    console.print(tabulate(rows, blocks))
    console.print("ns an element:", ", ".join(f"{block}: {cost}" for block, cost in ns.items()))
    if not quick:
        append(RESULTS / "sampling.csv", COLUMNS, rows)
        plot(rows, RESULTS / "sampling.png")


if __name__ == "__main__":
    main()
