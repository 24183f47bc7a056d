"""A run whose learning rate and batch size are advised on, or changed while it goes on.

Advisor    prints what gauges and policy say about a run, and acts on nothing
Autopilot  acts within one run
Training   what an autopilot and a trial of `grgauge.tune` have in common: batches, steps, changes, saved states
"""

from __future__ import annotations

import io
import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler, TensorDataset
from torch.utils.data import default_collate as collate

from .gauge import Gauge, _length, _part
from .invariance import Rule, decay_after
from .moves import require_count
from .policy import Config, Continue, Decision, Retune, Stop, verdict
from .reading import Reading
from .search import Policy

GROUPS = 4
"""Micro-batches of a step that is read, at least: the groups of GR_S."""

Factory = Callable[[int], Iterable[Any]]
Data = Dataset[Any] | DataLoader[Any] | Factory


class TrainingError(Exception):
    """Training cannot go on; the message says why and what to do."""


class Advisor:
    """Prints what gauges and policy say about a run every so often, and acts on nothing.

    gauge      the gauge of the run
    optimizer  whose learning rate is advised on, the highest of its groups
    policy     None: `Policy.default()`
    every      steps between two lines
    print      takes a line

    Raises ValueError for a number out of range.
    """

    def __init__(
        self,
        gauge: Gauge,
        optimizer: torch.optim.Optimizer,
        policy: Policy | None = None,
        *,
        every: int = 100,
        print: Callable[[str], object] = print,
    ) -> None:
        require_count("every", every, 1)
        self.policy, self.every = policy or Policy.default(), every
        self._gauge, self._optimizer, self._print = gauge, optimizer, print
        self._steps = 0
        self._seen: Reading | None = None
        self._advice: Decision | None = None

    def step(self, loss: float | Tensor | None = None) -> Decision | None:
        """Call after each `optimizer.step()`; returns the newest decision, None before the first reading.

        loss  training loss of this step. Without it the policy cannot tell a network that has been hurt
        """
        self._steps += 1
        reading = self._gauge.reading()
        peak, now = _peak(self._optimizer), _highest(self._optimizer)
        config = Config(peak, max(round(self._gauge.batch_size), 1))
        before = self.policy.state_dict()
        value = None if loss is None else float(loss)
        decision = self.policy.observe(reading, config, loss=value, lr_factor=now / peak)
        if not isinstance(decision, Continue):
            self.policy.load_state_dict(before)  # nobody acts on it, so for the policy it has not been made
        if reading is not None and reading is not self._seen:
            self._seen, self._advice = reading, decision
        if reading is not None and self._steps % self.every == 0:
            self._print(f"{_figures(reading)} — {verdict(reading, self.policy.target)}; {self._advice}")
        return self._advice


class Training:
    """Steps at a configuration that can change between two of them.

    config       what the next step runs at
    samples      that the weights at hand have been trained on
    steps        updates that they have had
    loss         of the last step, the mean over its batch; nan before the first
    reading      the newest one, None before the first
    micro_batch  samples that one backward pass may take; None: the whole batch. More than that are accumulated
    """

    _gauge: Gauge | None
    _optimizer: torch.optim.Optimizer
    _others: tuple[Any, ...]
    _open: tuple[int, bool] | None  # samples of the batch that was yielded, and whether an update follows it
    _sum: Tensor | float  # of the losses of the micro-batches so far
    _lr_factor: float
    _updating: bool
    _set: tuple[float, float] | None  # learning rate before the newest change, and after

    def __init__(
        self,
        config: Config,
        policy: Policy,
        *,
        micro_batch: int | None = None,
        every: int = 5,
        seed: int = 0,
        decay: Rule = "decay",
    ) -> None:
        if micro_batch is not None:
            require_count("micro_batch", micro_batch, 1)
        require_count("every", every, 1)
        decay_after(Config(1.0, 1, 0.0), 1.0, 1, decay)  # refuses an unknown rule before anything is trained
        self.config, self.policy, self.micro_batch = config, policy, micro_batch
        self.samples, self.steps, self.loss = 0, 0, math.nan
        self.reading: Reading | None = None
        self.model: nn.Module | None = None
        self._every, self._seed, self._decay = every, seed, decay
        self._forget()

    @property
    def lr(self) -> float:
        """Peak learning rate, the one that a schedule multiplies."""
        return self.config.lr

    @property
    def batch_size(self) -> int:
        """Global batch in samples."""
        return self.config.batch_size

    def watch(self, model: nn.Module, optimizer: torch.optim.Optimizer, *others: Any) -> None:
        """What is trained. Its learning rate becomes `lr`, groups and schedule in proportion.

        others  whatever else has `state_dict` and `load_state_dict` and changes in training: LR schedulers, which from
                then on count from the learning rate set here, or an average of weights

        Raises TrainingError for a second call, for a learning rate of 0 and for others without a state.
        """
        if self._gauge is not None:
            raise TrainingError("trial.watch() was called twice; call it once, before the loop over trial.batches()")
        for other in others:
            if not (hasattr(other, "state_dict") and hasattr(other, "load_state_dict")):
                raise TrainingError(f"trial.watch() got a {type(other).__name__}; it must have a state_dict")
        peak = _peak(optimizer)
        if not 0.0 < peak < math.inf:
            raise TrainingError(f"the optimizer's lr is {peak}; it must be above 0 to be scaled")
        self.model, self._optimizer, self._others = model, optimizer, others
        self._gauge = Gauge(optimizer, self.config.batch_size, every=self._every, seed=self._seed)
        self.reading = None
        optimizer.zero_grad()
        _scale(optimizer, others, self.config.lr / peak)
        decays = [float(group["weight_decay"]) for group in optimizer.param_groups if "weight_decay" in group]
        if self.config.weight_decay is None and decays:
            self.config = replace(self.config, weight_decay=max(decays))
        elif self.config.weight_decay is not None and any(decays):
            _scale_decay(optimizer, self.config.weight_decay / max(decays))

    def batches(self, data: Data) -> Iterator[Any]:
        """Batches for one backward pass each, shuffled anew every epoch, until training ends. Call `step` for each.

        data  a dataset with a length, a DataLoader over one, or a function that takes a batch size and returns batches
              of that size, for as long as an epoch lasts. A dataset is continued where a stopped run was; a function's
              batches begin anew

        A batch of the present size is cut into micro-batches: tensors, or tuples, lists and dicts of tensors, with
        samples along the first axis. Raises TrainingError where `step` was not called, and for data that do not follow
        the batch size; TypeError for other data.
        """
        if self._gauge is None:
            raise TrainingError("call trial.watch(model, optimizer) before the loop over trial.batches()")
        source = _source(data, self._seed)
        while not self._over():
            size = self.config.batch_size
            batch = source.draw(self.samples, size)
            bounds = self._cuts(size)
            for start, stop in itertools.pairwise(bounds):
                self._open = (stop - start, stop == size)
                yield _part(batch, slice(start, stop)) if len(bounds) > 2 else batch
                if self._open is not None:
                    raise TrainingError("trial.step(loss) was not called: call it once for each of trial.batches()")
            self._guard()
            self._between()

    def step(self, loss: Tensor) -> bool:
        """Backward of a batch's mean loss and, with the last micro-batch, the update; gradients are then cleared.

        Returns True after an update, which is when a scheduler's own `step()` is due. Raises TrainingError where no
        batch of `batches` is open, and for a loss that is not one number with a graph.
        """
        if self._open is None:
            raise TrainingError(
                "trial.step(loss) came without a batch of trial.batches(): the training function ignores the trial's "
                "batch size. Take every batch from trial.batches(data), and call step once for each"
            )
        if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad):
            what = f"a tensor {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise TrainingError(f"trial.step() got {what}; it must be the mean loss, one number, before backward()")
        assert self._gauge is not None
        (samples, last), self._open = self._open, None
        share = samples / self.config.batch_size
        (loss * share).sum().backward()
        self._gauge.micro_step(samples, samples)
        self._sum = self._sum + loss.detach().sum().double() * share
        if not last:
            return False
        self._lr_factor = _highest(self._optimizer) / self.config.lr
        self._updating = True
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._updating = False
        self.loss, self._sum = float(self._sum), 0.0
        self.samples, self.steps = self.samples + self.config.batch_size, self.steps + 1
        return True

    def _over(self) -> bool:
        raise NotImplementedError

    def _between(self) -> None:
        """What happens between two steps, after the user's scheduler."""
        raise NotImplementedError

    def _forget(self) -> None:
        """What is trained is to be told anew."""
        self._gauge, self._others, self._open, self._set = None, (), None, None
        self._sum, self._lr_factor, self._updating = 0.0, 1.0, False

    def _observe(self) -> tuple[Decision, Reading | None]:
        """The policy's decision, and the reading if it is a new one."""
        assert self._gauge is not None
        newest = self._gauge.reading()
        fresh = newest if newest is not self.reading else None
        self.reading = newest or self.reading
        decision = self.policy.observe(
            newest, self.config, loss=self.loss, samples=self.samples, lr_factor=self._lr_factor
        )
        return decision, fresh

    def _configure(self, config: Config) -> str:
        """Run at another configuration from the next step on; what happens to weight decay, in words."""
        assert self._gauge is not None
        config, words = self._decayed(config)
        if self.config.weight_decay and config.weight_decay is not None:
            _scale_decay(self._optimizer, config.weight_decay / self.config.weight_decay)
        before = _highest(self._optimizer)
        _scale(self._optimizer, self._others, config.lr / self.config.lr)
        self._set = (before, _highest(self._optimizer))
        self._gauge.batch_size = config.batch_size
        self._gauge.restart()
        self.config = config
        return words

    def _decayed(self, config: Config) -> tuple[Config, str]:
        """`config` with the weight decay that belongs to it, and why in words."""
        if self.config.weight_decay is None:
            return config, ""
        decay, words = decay_after(self.config, config.lr, config.batch_size, self._decay)
        return replace(config, weight_decay=decay), words

    def _guard(self) -> None:
        """A scheduler that `watch` was not given would set the learning rate back."""
        if self._set is None:
            return
        (before, after), now = self._set, _highest(self._optimizer)
        self._set = None
        if now != after and min(before, after, now) > 0.0 and abs(math.log(now / before)) < abs(math.log(now / after)):
            raise TrainingError(
                f"lr was set to {after:.3g} and something set it back to {now:.3g}: give your LR scheduler to "
                "trial.watch(model, optimizer, scheduler)"
            )

    def _cuts(self, size: int) -> list[int]:
        """Where a batch is cut into micro-batches."""
        parts = math.ceil(size / (self.micro_batch or size))
        if (self.steps + 1) % self._every == 0:
            parts = max(parts, min(GROUPS, size))
        return [size * i // parts for i in range(parts + 1)]

    def _state(self) -> dict[str, Any]:
        """All that training depends on, between two steps."""
        assert self.model is not None
        assert self._gauge is not None
        return {
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "others": [other.state_dict() for other in self._others],
            "gauge": self._gauge.state_dict(),
            "config": asdict(self.config),
            "samples": self.samples,
            "steps": self.steps,
            "loss": self.loss,
            "random": (random.getstate(), np.random.get_state(), torch.get_rng_state()),  # noqa: NPY002
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        }

    def _restore(self, state: dict[str, Any]) -> None:
        assert self.model is not None
        assert self._gauge is not None
        if len(state["others"]) != len(self._others):
            raise TrainingError(
                f"trial.watch() got {len(self._others)} others; the saved run had {len(state['others'])}"
            )
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        for other, own in zip(self._others, state["others"], strict=True):
            other.load_state_dict(own)
        self._gauge.load_state_dict(state["gauge"])
        self.config = Config(**state["config"])
        self.samples, self.steps, self.loss = state["samples"], state["steps"], state["loss"]
        python, numpy, cpu = state["random"]
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if state["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda"])


class Autopilot(Training):
    """Acts within one run: learning rate and batch size change live, each change printed with its reading.

    model, optimizer, others   as for `Training.watch`; the optimizer's learning rate is where it begins
    batch_size   to begin with, in samples
    budget       samples to train on, those of abandoned weights included
    policy       None: `Policy.default()`
    print        takes a line
    micro_batch, every, seed, decay   as for `grgauge.tune`

    Loop over `batches(data)` and call `step(loss)` for each. Weights to return to are kept in memory, on the host: as
    they came, and before the newest change. Raises ValueError for a number out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *others: Any,
        batch_size: int,
        budget: int,
        policy: Policy | None = None,
        print: Callable[[str], object] = print,
        micro_batch: int | None = None,
        every: int = 5,
        seed: int = 0,
        decay: Rule = "decay",
    ) -> None:
        require_count("budget", budget, 1)
        config, policy = Config(_peak(optimizer), batch_size), policy or Policy.default()
        super().__init__(config, policy, micro_batch=micro_batch, every=every, seed=seed, decay=decay)
        self.budget, self.used, self.decisions = budget, 0, list[Retune | Stop]()
        self._print = print
        self.watch(model, optimizer, *others)
        self._first = self._saved = frozen(self._state())

    def _over(self) -> bool:
        return self.used >= self.budget or any(isinstance(decision, Stop) for decision in self.decisions)

    def _between(self) -> None:
        self.used += self.config.batch_size
        decision, _ = self._observe()
        if isinstance(decision, Continue):
            return
        self.decisions.append(decision)
        figures = "no reading" if self.reading is None else _figures(self.reading)
        words = ""
        if isinstance(decision, Retune):
            if decision.reuse and not decision.rollback:
                self._saved = frozen(self._state())
            else:
                self._restore(thawed(self._saved if decision.reuse else self._first))
            words = self._configure(decision.config)
        self._print(f"{self.used} samples, {figures}: {decision}. {words}".rstrip())


def frozen(state: dict[str, Any]) -> bytes:
    """A copy on the host, out of reach of training."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def thawed(state: bytes) -> dict[str, Any]:
    # Schedulers and optimizers may keep objects of any class in their states; these bytes are our own.
    loaded: dict[str, Any] = torch.load(io.BytesIO(state), map_location="cpu", weights_only=False)
    return loaded


# --- batches of any size ----------------------------------------------------------------------------------------------


class _Rows:
    """Rows of a dataset in an endless order, a new shuffle every epoch."""

    def __init__(self, length: int, seed: int | None) -> None:
        if length < 1:
            raise ValueError("data has no samples; it must have at least 1")
        self._length, self._seed = length, seed
        self._epoch, self._order = -1, torch.arange(length)

    def take(self, cursor: int, size: int) -> Tensor:
        """The rows at places cursor to cursor + size."""
        parts, stop = [], cursor + size
        while cursor < stop:
            epoch, place = divmod(cursor, self._length)
            if epoch != self._epoch and self._seed is not None:
                generator = torch.Generator().manual_seed(self._seed + 0x9E3779B1 * epoch)
                self._order = torch.randperm(self._length, generator=generator)
            self._epoch = epoch
            parts.append(self._order[place : place + stop - cursor])
            cursor += len(parts[-1])
        return torch.cat(parts)


class _Tensors:
    """Batches of a TensorDataset, without the detour over single samples."""

    def __init__(self, dataset: TensorDataset, rows: _Rows) -> None:
        self._tensors, self._rows = dataset.tensors, rows

    def draw(self, cursor: int, size: int) -> Any:
        rows = self._rows.take(cursor, size)
        return tuple(tensor[rows.to(tensor.device)] for tensor in self._tensors)


class _Loaded:
    """Batches of a DataLoader of our own, begun again wherever the order of samples breaks."""

    def __init__(self, dataset: Dataset[Any], rows: _Rows, options: dict[str, Any]) -> None:
        self._dataset, self._rows, self._options = dataset, rows, options
        self._next: tuple[int, int] | None = None
        self._batches: Iterator[Any] = iter(())

    def draw(self, cursor: int, size: int) -> Any:
        if self._next != (cursor, size):
            sampler = _Sampler(self._rows, cursor, size)
            generator = torch.Generator().manual_seed(cursor)  # else a new loader would draw from the global one
            loader: DataLoader[Any] = DataLoader(
                self._dataset,
                batch_sampler=sampler,
                generator=generator,
                **self._options,
            )
            self._batches = iter(loader)
        self._next = (cursor + size, size)
        return next(self._batches)


class _Sampler:
    def __init__(self, rows: _Rows, cursor: int, size: int) -> None:
        self._rows, self._cursor, self._size = rows, cursor, size

    def __iter__(self) -> Iterator[list[int]]:
        cursor = self._cursor
        while True:
            yield self._rows.take(cursor, self._size).tolist()
            cursor += self._size


class _Made:
    """Batches of what the user's function returns, called anew for each epoch and each size."""

    def __init__(self, factory: Factory) -> None:
        self._factory = factory
        self._size, self._drawn = 0, 0
        self._batches: Iterator[Any] = iter(())

    def draw(self, cursor: int, size: int) -> Any:
        if size != self._size:
            self._size, self._drawn, self._batches = size, 0, iter(self._factory(size))
        for _ in range(2):
            for batch in self._batches:
                found = _length(batch)
                if found == size:
                    self._drawn += 1
                    return batch
                if found > size or not self._drawn:  # the last of an epoch may be short, and is left out
                    raise TrainingError(
                        f"the data ignore the trial's batch size: asked for {size} samples, they gave {found}. Pass "
                        "the argument of the function that makes them on to the DataLoader"
                    )
            self._batches = iter(self._factory(size))
        raise TrainingError(f"the function given to trial.batches() made no batch of {size} samples")


def _source(data: Data, seed: int) -> _Tensors | _Loaded | _Made:
    options: dict[str, Any] = {}
    shuffle = True
    if isinstance(data, DataLoader):
        if not isinstance(data.sampler, (RandomSampler, SequentialSampler)) or data.batch_size is None:
            raise TypeError("data is a DataLoader with a sampler of its own; pass a function of the batch size instead")
        shuffle = isinstance(data.sampler, RandomSampler)
        names = ("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context")
        options = {name: getattr(data, name) for name in names}
        data = data.dataset
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, IterableDataset):
        rows = _Rows(len(data), seed if shuffle else None)
        plain = not options.get("num_workers") and options.get("collate_fn", collate) is collate
        if isinstance(data, TensorDataset) and plain and not options.get("pin_memory"):
            return _Tensors(data, rows)
        return _Loaded(data, rows, options)  # type: ignore[arg-type]
    if callable(data):
        return _Made(data)
    raise TypeError(
        f"data is a {type(data).__name__}; it must be a dataset with a length, a DataLoader over one, or a function "
        "that takes a batch size and returns batches"
    )


# --- learning rates ---------------------------------------------------------------------------------------------------


def _peak(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate that a schedule multiplies, the highest of all groups."""
    return max(
        float(group.get("max_lr", group.get("initial_lr", group["lr"])))  # OneCycleLR's, any scheduler's, none
        for group in optimizer.param_groups
    )


def _highest(optimizer: torch.optim.Optimizer) -> float:
    return max(float(group["lr"]) for group in optimizer.param_groups)


def _scale(optimizer: torch.optim.Optimizer, others: Iterable[Any], ratio: float) -> None:
    """Multiply the learning rates of all groups, and all that schedulers compute the next ones from."""
    for group in optimizer.param_groups:
        for name in ("lr", "initial_lr", "max_lr", "min_lr"):
            if name == "lr" and isinstance(group[name], Tensor):
                group[name].mul_(ratio)  # a captured graph reads this very tensor
            elif name in group:
                group[name] = group[name] * ratio
    for other in others:
        if isinstance(other, LRScheduler):
            _scale_scheduler(other, ratio)


def _scale_decay(optimizer: torch.optim.Optimizer, ratio: float) -> None:
    for group in optimizer.param_groups if ratio != 1.0 else ():
        if "weight_decay" in group:
            group["weight_decay"] *= ratio


def _scale_scheduler(scheduler: LRScheduler, ratio: float) -> None:
    for name in ("base_lrs", "max_lrs", "min_lrs", "_last_lr"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, [lr * ratio for lr in getattr(scheduler, name)])
    if hasattr(scheduler, "eta_min"):
        scheduler.eta_min *= ratio
    for inner in getattr(scheduler, "_schedulers", ()):
        _scale_scheduler(inner, ratio)


def _figures(reading: Reading) -> str:
    values = (("GR_T", reading.gr_t, reading.gr_t_error, ".1f"), ("GR_S", reading.gr_s, reading.gr_s_error, ".2f"))
    told = [
        f"{name} –" if value is None else f"{name} {value:{spec}}" + ("" if error is None else f"±{error:{spec}}")
        for name, value, error, spec in values
    ]
    return f"step {reading.step}, {', '.join(told)}"
