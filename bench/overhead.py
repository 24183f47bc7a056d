"""What whole training steps cost with gauges, an advisor and `tune`, beside a plain loop with torch's AdamW.

    python bench/overhead.py            all models and batches, rows to bench/results/overhead.csv: about 40 minutes
    python bench/overhead.py --quick    one small batch, few turns, no rows: does it run?
    python bench/overhead.py MLP GPT --batches 32 128 --device cuda

All variants take the same samples from a DataLoader, and take turns, A B C A B C ...; a turn is five consecutive steps,
as a gauge reads every fifth:

    torch          a plain loop with torch.optim.AdamW(fused=True); what ratios are of
    torch_default  the same with AdamW's default
    torch_micro    the same as torch, each batch in two micro-batches
    adamw          grgauge.AdamW, no gauge
    gauge          grgauge.AdamW with a gauge that has no groups: GR_T alone
    gauge_halves   with `split_backward`: steps that are read take their batch in two halves
    gauge_micro    two micro-batches a step, `micro_step` after each: its ratio is to torch_micro
    gauge_hooks    torch's fused AdamW with a gauge on its hooks, and `split_backward`
    average        the same as torch, and the average of the weights that `tune` keeps, updated every fifth step
    advisor        gauge_halves, and `Advisor.step(loss)` after each step
    tune           `grgauge.tune` of one fixed learning rate and batch

Ranks as groups need processes of their own and are not among them. `tune` runs its training function itself, so it has
a thread that waits while others have their turn; the clock runs inside. A row's ratio is the median of the ratios
between turns of the same round.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import torch
import torch.nn.functional as F
from families.images import resnet18
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from turns import STEPS, Thread, append, origin, quantile_columns, ratio_columns

import grgauge
from grgauge.cli.char_transformer import CONTEXT, CharTransformer
from grgauge.tuning.averaging import average_of, update_average

RESULTS = Path(__file__).resolve().parent / "results" / "overhead.csv"
COLUMNS = (
    "date,commit,device,torch,model,parameters,batch,variant,baseline,q20_ms,q50_ms,q80_ms,ratio,ratio_q20,ratio_q80"
)
BATCHES = (8, 32, 128, 256)
SAMPLES = 4096
LR = 1e-3
WARM_UP_TURNS = 3
ROUNDS, QUICK_ROUNDS = 40, 2

Batch = tuple[Tensor, ...]


class GRU(nn.Module):
    """Logits of each next character."""

    def __init__(self, characters: int = 64, width: int = 96) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.gru, self.head = nn.GRU(width, width, batch_first=True), nn.Linear(width, characters)

    def forward(self, characters: Tensor) -> Tensor:
        return self.head(self.gru(self.embedding(characters))[0])


class ViT(nn.Module):
    """Ten classes from a grey image of 28 x 28, in patches of 7 x 7."""

    def __init__(self, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 7, 7)
        self.positions = nn.Parameter(0.02 * torch.randn(16, width))
        block = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.patches(x).flatten(2).transpose(1, 2) + self.positions).mean(1))


def vectors(shape: tuple[int, ...]) -> Batch:
    """Inputs of ten classes that a linear map tells apart."""
    x = torch.randn(SAMPLES, *shape)
    return x, (x.flatten(1) @ torch.randn(x[0].numel(), 10)).argmax(1)


def texts(length: int) -> Batch:
    """Characters that mostly follow from the one before."""
    rows = [torch.randint(64, (SAMPLES,))]
    following = torch.randperm(64)
    for _ in range(length):
        rows.append(torch.where(torch.rand(SAMPLES) < 0.7, following[rows[-1]], torch.randint(64, (SAMPLES,))))
    return (torch.stack(rows, 1),)


def classified(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def predicted(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0][:, :-1]).flatten(0, 1), batch[0][:, 1:].flatten())


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch], Callable[[nn.Module, Batch], Tensor]]] = {
    "MLP": (
        lambda: nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)),
        lambda: vectors((64,)),
        classified,
    ),
    "ViT": (ViT, lambda: vectors((1, 28, 28)), classified),
    "CNN": (resnet18, lambda: vectors((1, 28, 28)), classified),
    "GRU": (GRU, lambda: texts(48), predicted),
    "GPT": (lambda: CharTransformer(64), lambda: texts(CONTEXT), predicted),
}
"""What makes the model, what makes its data, and its loss."""


class Task:
    """A model and its data; each variant gets the same weights and batches."""

    def __init__(self, name: str, batch: int, device: torch.device) -> None:
        make, data, self.loss = MODELS[name]
        torch.manual_seed(0)
        self._make, self.batch, self.device = make, batch, device
        self.data = TensorDataset(*(t.to(device) for t in data()))
        self.parameters = sum(p.numel() for p in make().parameters())

    def model(self) -> nn.Module:
        torch.manual_seed(1)
        return self._make().to(self.device)

    def loader(self) -> DataLoader[Batch]:
        return DataLoader(
            self.data, self.batch, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(2)
        )

    def batches(self) -> Iterator[Batch]:
        return itertools.chain.from_iterable(iter(loader) for loader in itertools.repeat(self.loader()))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Plain:
    """A loop of one's own. `turn` takes five steps and gives the seconds of one.

    optimizer   what makes it of the parameters
    micro       micro-batches a step
    gauged, split, advised   with a gauge; with `split_backward`; with an advisor
    averaged   with an average of the weights
    """

    def __init__(
        self,
        task: Task,
        optimizer: Callable[..., torch.optim.Optimizer],
        micro: int = 1,
        gauged: bool = False,
        split: bool = False,
        advised: bool = False,
        averaged: bool = False,
    ) -> None:
        self.task, self.micro, self.split = task, micro, split
        self.model = task.model()
        self.optimizer = optimizer(self.model.parameters(), lr=LR)
        self.gauge = grgauge.Gauge(self.optimizer, task.batch) if gauged else None
        self.advisor: grgauge.Advisor | None = None
        if advised:
            assert self.gauge is not None
            self.advisor = grgauge.Advisor(self.gauge, self.optimizer, every=100, print=lambda line: None)
        self.average = average_of(self.model) if averaged else None
        self.batches = task.batches()

    def step(self) -> None:
        batch = next(self.batches)
        self.optimizer.zero_grad()
        if self.split:
            assert self.gauge is not None
            loss = self.gauge.split_backward(partial(self.task.loss, self.model), batch)
        else:
            for part in zip(*(t.chunk(self.micro) for t in batch), strict=True):
                loss = self.task.loss(self.model, part) / self.micro
                loss.backward()
                if self.gauge is not None and self.micro > 1:
                    self.gauge.micro_step()
        self.optimizer.step()
        if self.advisor is not None:
            self.advisor.step(loss)

    def turn(self) -> float:
        synchronize(self.task.device)
        start = time.perf_counter()
        for _ in range(STEPS):
            self.step()
        if self.gauge is not None:
            self.gauge.reading()
        if self.average is not None:
            update_average(self.average, self.model)
        synchronize(self.task.device)
        return (time.perf_counter() - start) / STEPS

    def close(self) -> None:
        """Nothing to end."""


class Tuned:
    """`tune`, which runs its training function itself."""

    def __init__(self, task: Task, turns: int) -> None:
        # More than its turns take: `tune` keeps some samples for comparing the weights with their average.
        self.task, self.budget = task, (turns + 5) * STEPS * task.batch
        self._thread = Thread(self._run, task.device)
        self.turn, self.close = self._thread.turn, self._thread.close

    def _run(self, before_step: Callable[[], None]) -> None:
        def train(trial: grgauge.Trial) -> None:
            model = self.task.model()
            trial.watch(model, grgauge.AdamW(model.parameters(), lr=LR))
            begins = True
            for batch in trial.batches(self.task.loader()):
                if begins:  # here, as what follows a step comes when the next batch is asked for
                    before_step()
                begins = trial.step(self.task.loss(model, batch))

        with tempfile.TemporaryDirectory() as folder:
            space = {"lr": LR, "batch_size": self.task.batch}
            grgauge.tune(train, space, budget=self.budget, storage=str(Path(folder) / "study.db"))


def variants(task: Task, turns: int) -> dict[str, Plain | Tuned]:
    fused, ours = partial(torch.optim.AdamW, fused=True), grgauge.AdamW
    return {
        "torch": Plain(task, fused),
        "torch_default": Plain(task, torch.optim.AdamW),
        "torch_micro": Plain(task, fused, micro=2),
        "adamw": Plain(task, ours),
        "gauge": Plain(task, ours, gauged=True),
        "gauge_halves": Plain(task, ours, gauged=True, split=True),
        "gauge_micro": Plain(task, ours, micro=2, gauged=True),
        "gauge_hooks": Plain(task, fused, gauged=True, split=True),
        "average": Plain(task, fused, averaged=True),
        "advisor": Plain(task, ours, gauged=True, split=True, advised=True),
        "tune": Tuned(task, turns),
    }


def measured(task: Task, rounds: int) -> dict[str, list[float]]:
    """Milliseconds a step, of each variant and round."""
    made = variants(task, rounds + WARM_UP_TURNS)
    samples: dict[str, list[float]] = {name: [] for name in made}
    for number in range(WARM_UP_TURNS + rounds):
        for name, variant in made.items():
            seconds = variant.turn()
            if number >= WARM_UP_TURNS:
                samples[name].append(1e3 * seconds)
    for name, variant in made.items():
        if getattr(variant, "gauge", None) is not None and variant.gauge.reading() is None:
            raise RuntimeError(f"{name} has not read anything: what was measured is not a gauged step")
        variant.close()
    return samples


def rows(name: str, task: Task, samples: dict[str, list[float]]) -> list[dict[str, Any]]:
    made = []
    for variant, times in samples.items():
        baseline = "torch_micro" if variant == "gauge_micro" else "torch"
        made.append(
            {
                **origin(task.device),
                "model": name,
                "parameters": task.parameters,
                "batch": task.batch,
                "variant": variant,
                "baseline": baseline,
                **quantile_columns(times),
                **ratio_columns(times, samples[baseline]),
            }
        )
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="model", help=f"of {', '.join(MODELS)} (default: all)")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES, metavar="N", help="samples in a batch")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each variant")
    parser.add_argument("--quick", action="store_true", help="one small batch, few turns, no rows: does it run?")
    options = parser.parse_args()
    if unknown := set(options.models) - set(MODELS):
        parser.error(f"model is {', '.join(sorted(unknown))}; it must be one of {', '.join(MODELS)}")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    rounds, batches = (QUICK_ROUNDS, (8,)) if options.quick else (options.rounds, options.batches)
    for name, batch in itertools.product(options.models or MODELS, batches):
        task = Task(name, batch, torch.device(options.device))
        made = rows(name, task, measured(task, rounds))
        if not options.quick:
            append(RESULTS, COLUMNS, made)
        for row in made:
            print(
                f"{name:4} {batch:4} {row['variant']:14} {row['q50_ms']:8.3f} ms {row['ratio']:6.3f} {row['baseline']}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
