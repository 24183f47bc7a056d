"""`tune`: early stopping, guided search and state reuse around a user's own training function."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from .._validation import require, require_count
from ..invariance import Rule, Space, unsearched
from ..policy import Config, Policy
from ..policy.settings import USUAL_LR
from .loop import Loop
from .ranks import World
from .records import TrialRecord
from .study import AGAIN, Trials
from .trial import Trial

Ends = Mapping[str, float | tuple[float, float]]
"""What a space may be given as: a range or a fixed number each."""

START = {"lr": USUAL_LR, "batch_size": 1 / 6}
"""Where a search begins, as a share of each range in logarithms: 1.7e-3 of 1e-5 to 1, batch 16 of 8 to 512. Of the
static runs that were recorded, on five families, that learning rate with batch 8 or 18 does best over any four."""


def default_start(bounds: Mapping[str, tuple[float, float]]) -> tuple[float, float]:
    """Learning rate and batch size, not rounded, at which a search in these bounds begins if it is not told."""
    lr, batch = (bounds[name][0] * (bounds[name][1] / bounds[name][0]) ** share for name, share in START.items())
    return lr, batch


@dataclass(frozen=True)
class Result:
    """What `tune` ends with.

    Attributes:
        config: the recommended learning rate, batch size in samples and weight decay.
        model: trained, as the training function left it; with averaged weights, and BatchNorm's statistics of those,
            where their training loss was lower at the end (on as many batches as half a percent of the budget makes,
            and at least 4; never in a budget of fewer than 200 steps, or of a model that fully_shard was applied to).
        loss: its training loss: the mean of the last 20 steps, or of that comparison if the weights are averaged.
        used: samples taken in all.
        verdict: in words: the first line says what was found, the second what the gauges make of it.
        trials: all trials of the study, failed ones included.
        output: what the training function returned.
    """

    config: Config
    model: nn.Module
    loss: float
    used: int
    verdict: str
    trials: tuple[TrialRecord, ...]
    output: Any


def tune(
    train: Callable[[Trial], Any],
    space: Ends | Space,
    *,
    budget: float,
    storage: str | Path = "grgauge.db",
    study_name: str = "grgauge",
    fresh: bool = False,
    policy: Callable[..., Policy] = Policy.default,
    start: Config | None = None,
    seed: int = 0,
    micro_batch: int | None = None,
    every: int = 5,
    decay: Rule = "decay",
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: float = 30.0,
    on_step: Callable[[Trial], object] = lambda trial: None,
) -> Result:
    """Train with a learning rate and a batch size that are found on the way.

    On several ranks (torchrun) call init_process_group() first, then this on all of them; the function wraps the model
    in DistributedDataParallel or applies fully_shard to it. Rank 0 decides and writes. An exception on one rank ends
    the others with an error within the process group's timeout. Another number of ranks can go on where these stopped.

    One process trains a study at a time. The newest checkpoint and the one before it are kept: if the newest is
    damaged, a warning names it, and training goes on from the other.

    Args:
        train: The training function. It builds model and optimizer, calls `trial.watch(model, optimizer)`, takes its
            batches from `trial.batches(dataset)` and calls `trial.step(loss)` for each, in place of backward, step and
            zero_grad. It is called again where training begins anew, and must then do the same.
        space: {"lr": (low, high), "batch_size": (low, high)}, in samples; one number fixes either. Or an
            `invariance.Space`, which has weight decays too. Gauges do not read those, so the learning rate alone is
            searched. Weight decay is held in the middle of its range, or where `start` has it, or as much lower as the
            range allows where the run would outlast the weights' time scale (`invariance.decay_within`). The verdict
            says whether it may still matter.
        budget: Samples to train on, in all; a whole number.
        storage: Path of an SQLite file, or the URL of any Optuna storage.
        study_name: The same name, storage and space again: go on where it stopped, or with a larger budget from its
            end. A finished one trains nothing and gives its result again; the verdict says so.
        fresh: Begin again. A study of that name is kept, with its checkpoints, as the first free of name-1, name-2, ...
            After a kill, leave it out to go on.
        policy: Makes the policy from the bounds of the space; `Policy.paper` for the published rules.
        start: Where to begin; None: below the middle of the space. Its weight decay, if it has one, is set.
        seed: Of weights and batches; sets the global generators of torch, numpy and Python.
        micro_batch: Samples that one backward pass may take on one rank; None: its part of the batch. Halved where
            memory runs out; several ranks end with an error that names a smaller one.
        every: Steps between readings.
        decay: What happens to weight decay when the learning rate or batch changes (`invariance.decay_after`), within
            its range.
        checkpoint_dir: Folder for checkpoints, which are pickles: load only your own. All ranks must see it. None:
            beside the SQLite file.
        checkpoint_every: Seconds between checkpoints, beside those at every change: what a kill can cost.
        on_step: Called after each step, on every rank, as for a progress bar.

    Returns:
        The trained model, the recommended configuration and all trials, alike on all ranks but for `model` and
            `output`.

    Raises:
        ValueError: An argument is out of range, before anything is stored; another process trains the study; or it was
            begun with another space, seed or training function (its file's name and its own).
        ImportError: Optuna is not installed.
        TrainingError: The training function raises, returns early, never steps, ignores the batch size, trains another
            model or other data than the study was begun with, or nothing that it does trains; or the disk was full.
            The trial is stored as failed, and the same call goes on from the newest checkpoint.

    Examples:
        >>> import tempfile, torch, grgauge
        >>> x = torch.randn(64, 4)
        >>> data = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))
        >>> def train(trial):
        ...     net = torch.nn.Linear(4, 1)
        ...     trial.watch(net, torch.optim.AdamW(net.parameters(), lr=trial.lr))
        ...     for inputs, wanted in trial.batches(data):
        ...         trial.step((net(inputs) - wanted).square().mean())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result = grgauge.tune(
        ...         train, {"lr": (1e-4, 1e-1), "batch_size": 16}, budget=320, storage=f"{folder}/study.db"
        ...     )
        >>> result.used, result.config.batch_size
        (320, 16)
    """
    bounds = _bounds(space)
    (low, high), (least, most) = bounds["lr"], bounds["batch_size"]
    whole = int(budget) if isinstance(budget, float) and budget.is_integer() else budget
    require_count("budget", whole, 1)
    assert isinstance(whole, int)
    require(0.0 <= checkpoint_every < math.inf, "checkpoint_every", checkpoint_every, "in seconds, at least 0")
    world = World()
    smallest, largest = -(-int(least) // world.size), int(most) // world.size  # on each rank
    require(smallest <= largest, "space['batch_size']", (least, most), f"around a multiple of the {world.size} ranks")
    if start is None:
        lr, batch = default_start(bounds)
        part = min(max(round(batch / world.size), smallest), largest)
        start = Config(min(max(lr, low), high), part * world.size)
    inside = low <= start.lr <= high and least <= start.batch_size <= most
    if isinstance(space, Space):
        start = replace(start, weight_decay=space.decay if start.weight_decay is None else start.weight_decay)
        inside = inside and bounds["weight_decay"][0] <= (start.weight_decay or 0.0) <= bounds["weight_decay"][1]
    require(inside, "start", asdict(start), f"inside {bounds}")
    own = policy(lr_bounds=(low, high), min_batch=int(least), max_batch=int(most))
    loop = Loop(start, own, micro_batch=micro_batch, every=every, seed=seed, decay=decay)
    settings = {
        "space": {name: list(ends) for name, ends in bounds.items()},
        "seed": seed,
        "train": _name(train),
    }
    zones = {name: value for name, value in asdict(own.target).items() if not name.endswith("_power")}
    with Trials(storage, study_name, checkpoint_dir, settings, world, fresh) as trials:
        trials.note(target={k: list(v) if isinstance(v, tuple) else v for k, v in zones.items()}, budget=whole)
        trial = Trial(loop, trials, bounds, whole, checkpoint_every=checkpoint_every, on_step=on_step)
        output = trial.run(train)
        assert trial.model is not None
        records = trials.records()
        stored = world.on_rank_0(lambda: trials.study.user_attrs.get("verdict"))
        words = stored if stored and trial.was_finished else _verdict(trial, loop, len(records))
        trials.note(used=trial.used, verdict=words, recommendation=asdict(trial.config))
    if trial.was_finished:
        words += (
            f" Nothing was trained: study {study_name!r} in {storage} had finished. A larger budget goes on from its "
            f"end, {AGAIN}."
        )
    return Result(trial.config, trial.model, trial.final_loss, trial.used, words, tuple(records), output)


def _name(train: Callable[..., Any]) -> str:
    """File and name of a function. A notebook's cells have no file, and the one they claim changes with each run."""
    while isinstance(train, functools.partial):
        train = train.func
    file = Path(getattr(getattr(train, "__code__", None), "co_filename", ""))
    name = getattr(train, "__qualname__", type(train).__qualname__)
    return f"{file.name}:{name}" if file.is_file() else name


def _bounds(space: Ends | Space) -> dict[str, tuple[float, float]]:
    if isinstance(space, Space):
        own = space.ends
        decays = own.pop("weight_decay")
        return {**_bounds(own), "weight_decay": decays}
    require(set(space) == {"lr", "batch_size"}, "space", sorted(space), "keyed 'lr' and 'batch_size'")
    bounds: dict[str, tuple[float, float]] = {}
    for name, whole in (("lr", False), ("batch_size", True)):
        given = space[name]
        ends = (given, given) if isinstance(given, (int, float)) else tuple(given)
        fits = len(ends) == 2 and all(isinstance(end, (int, float)) for end in ends)
        fits = fits and 0.0 < ends[0] <= ends[1] < math.inf
        fits = fits and (not whole or (ends[0] >= 1 and all(float(end).is_integer() for end in ends)))
        require(
            fits,
            f"space[{name!r}]",
            space[name],
            f"(low, high) or one number, {'whole' if whole else 'finite'} and above 0",
        )
        bounds[name] = (int(ends[0]), int(ends[1])) if whole else (float(ends[0]), float(ends[1]))
    return bounds


def _verdict(trial: Trial, loop: Loop, count: int) -> str:
    advice = None if loop.gauge is None else loop.gauge.advice(target=loop.policy.target)
    gauges = advice or "No reading"
    end = f" Stopped early: {trial.record.reason}." if trial.record.state == "PRUNED" else ""
    least, most = trial.bounds.get("weight_decay", (0.0, 0.0))
    decay = f", {unsearched(trial.config, trial.steps)}" if least < most else ""
    averaged = " of averaged weights" if trial.final_loss != trial.record.loss else ""
    found = f"{trial.config}: loss {trial.final_loss:.4g}{averaged}"
    return f"{found} after {count} trial{'s' * (count != 1)} and {trial.used} samples\n{gauges}{decay}.{end}"
