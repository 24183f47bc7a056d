"""Training at a configuration that can change between two steps: what an autopilot and a trial have in common.

Training        batches, steps, changes of configuration, saved states
frozen, thawed  a state as bytes, and back
"""

from __future__ import annotations

import io
import itertools
import math
import random
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .._validation import require, require_count
from ..gauge import Gauge
from ..gauge.gauge import _part
from ..invariance import Rule, decay_after
from ..optim import is_sharded
from ..policy import REPEAT, Config, Continue, Decision, Policy
from ..reading import Reading
from .data import BatchSizeError, Data, source
from .learning_rates import highest_lr, peak_lr, scale, scale_decay
from .ranks import TrainingError, World, spread, unreduced

GROUPS = 4
"""Micro-batches of a step that is read, at least: the groups of GR_S."""


class Training:
    """Steps at a configuration that can change between two of them.

    On several ranks each takes an equal part of every batch, and the ranks are the groups of GR_S. Losses are means
    over all of them, and rank 0's policy decides for all.

    config       what the next step runs at
    samples      that the weights at hand have been trained on
    steps        updates that they have had
    loss         of the last step, the mean over its batch; nan before the first
    reading      the newest one, None before the first
    micro_batch  samples that one backward pass on one rank may take; None: all of its part of the batch. More than that
                 are accumulated
    world        the processes that train together
    """

    _gauge: Gauge | None
    _optimizer: torch.optim.Optimizer
    _others: tuple[Any, ...]
    _open: tuple[int, bool] | None  # samples of the batch that was yielded, and whether an update follows it
    _device: torch.device  # of losses
    _sum: Tensor | None  # of the losses of the micro-batches so far
    _lr_factor: float
    _updating: bool
    _set: tuple[float, float] | None  # learning rate before the newest change, and after
    _late: Reading | None  # told in a saved state, and not yet observed: attached, a gauge tells a step late
    _stale: Reading | None  # of the configuration before

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
        self.world = World()
        ranks = self.world.size
        require(config.batch_size % ranks == 0, "batch_size", config.batch_size, f"a multiple of the {ranks} ranks")
        multiple = math.lcm(policy.batch_multiple, ranks)
        largest, words = policy.max_batch // multiple * multiple, f"{policy.min_batch} (min_batch) or more, on {ranks}"
        require(largest >= policy.min_batch, "max_batch", policy.max_batch, f"{words} ranks a multiple of {multiple}")
        policy.batch_multiple = multiple
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

        On several ranks the model is a DistributedDataParallel, or the root that fully_shard was applied to, over all
        of them.

        Raises TrainingError for a second call, for a learning rate of 0, for others without a state, and for a model
        that ranks would train apart.
        """
        if self._gauge is not None:
            raise TrainingError("trial.watch() was called twice; call it once, before the loop over trial.batches()")
        for other in others:
            if not (hasattr(other, "state_dict") and hasattr(other, "load_state_dict")):
                raise TrainingError(f"trial.watch() got a {type(other).__name__}; it must have a state_dict")
        peak = peak_lr(optimizer)
        if not 0.0 < peak < math.inf:
            raise TrainingError(f"the optimizer's lr is {peak}; it must be above 0 to be scaled")
        self.model, self._optimizer, self._others = model, optimizer, others
        self._gauge = Gauge(optimizer, self.config.batch_size, every=self._every, seed=self._seed)
        self._attach(self._gauge, model)
        self.reading = None
        optimizer.zero_grad()
        scale(optimizer, others, self.config.lr / peak)
        decays = [float(group["weight_decay"]) for group in optimizer.param_groups if "weight_decay" in group]
        if self.config.weight_decay is None and decays:
            self.config = replace(self.config, weight_decay=max(decays))
        elif self.config.weight_decay is not None and any(decays):
            scale_decay(optimizer, self.config.weight_decay / max(decays))
        elif self.config.weight_decay:
            raise TrainingError(
                f"weight_decay is to be {self.config.weight_decay:.3g}, and the {type(optimizer).__name__} has none to "
                "scale: make it with one above 0 in the groups that are to decay"
            )

    def batches(self, data: Data) -> Iterator[Any]:
        """Batches for one backward pass each, shuffled anew every epoch, until training ends. Call `step` for each.

        data  a dataset with a length, a DataLoader over one, or a function that takes a batch size and returns batches
              of that size, for as long as an epoch lasts. A dataset is continued where a stopped run was; a function's
              batches begin anew. On several ranks a dataset is shuffled alike on all, and each takes its part; a
              function is asked for batches of this rank's part in size, and for samples that no other rank has

        A batch of the present size is cut into micro-batches: tensors, or tuples, lists and dicts of tensors, with
        samples along the first axis. Only with the last of them are gradients reduced over ranks. Raises TrainingError
        where `step` was not called, for data that do not follow the batch size, and for a batch size that ranks cannot
        share equally; TypeError for other data.
        """
        if self._gauge is None:
            raise TrainingError("call trial.watch(model, optimizer) before the loop over trial.batches()")
        assert self.model is not None
        drawn_from = source(data, self._seed, self.world.rank, self.world.size)
        while not self._over():
            if self.config.batch_size % self.world.size:
                raise TrainingError(f"batch {self.config.batch_size} is no multiple of the {self.world.size} ranks")
            size = self._part_size
            try:
                batch = drawn_from.draw(self.samples, self.config.batch_size)
            except BatchSizeError as error:
                raise TrainingError(str(error)) from None
            bounds = self._cuts(size)
            for start, stop in itertools.pairwise(bounds):
                self._open = (stop - start, stop == size)
                with nullcontext() if stop == size else unreduced(self.model):
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
        share = samples / self._part_size
        (loss * share).sum().backward()
        self._gauge.micro_step(samples, samples)
        part = loss.detach().sum().double() * share
        self._sum = part if self._sum is None else self._sum + part
        if not last:
            return False
        self._lr_factor = highest_lr(self._optimizer) / self.config.lr
        self._updating = True
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._updating = False
        self.loss, self._device, self._sum = self.world.mean(self._sum), self._sum.device, None
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
        self._late = self._stale = None
        self._sum, self._lr_factor, self._updating = None, 1.0, False

    @property
    def _part_size(self) -> int:
        """Samples of a batch on each rank."""
        return self.config.batch_size // self.world.size

    @property
    def _newest(self) -> Reading | None:
        """The newest reading of this configuration."""
        assert self._gauge is not None
        reading = self._gauge.reading() or self._late
        return None if reading is self._stale else reading

    @property
    def _module(self) -> nn.Module:
        """What is trained, by the same names on any number of ranks."""
        assert self.model is not None
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    def _attach(self, gauge: Gauge, model: nn.Module) -> None:
        """Make ranks the groups of GR_S."""
        ranks = World().size
        if ranks != self.world.size:
            raise TrainingError(
                f"torch.distributed has {ranks} ranks now, and {self.world.size} when this began: call "
                "init_process_group() first"
            )
        if ranks == 1 and not any(map(is_sharded, model.parameters())):
            return
        try:
            gauge.attach(model)
        except TypeError:
            raise TrainingError(
                f"{ranks} ranks would train apart: wrap the {type(model).__name__} in DistributedDataParallel or apply "
                "torch.distributed.fsdp.fully_shard to it, build the optimizer on that, and watch it"
            ) from None
        assert gauge._ranks is not None
        if gauge._ranks.size != ranks:
            raise TrainingError(f"the model is shared by {gauge._ranks.size} ranks; it must be by all {ranks}")

    def _observe(self, due: bool = False) -> tuple[Decision | None, Reading | None]:
        """What rank 0's policy decides, and the reading if it is a new one. To go on is None, unless `due` on rank 0.

        One decides and tells the others: a rank that stopped alone would leave them waiting for its gradients. A trial
        that was spared is told, too.
        """
        newest = self._newest
        fresh = newest if newest is not self.reading else None
        self.reading = newest or self.reading
        decision: Decision | None = None
        if self.world.rank == 0:
            decision = self.policy.observe(
                newest, self.config, loss=self.loss, samples=self.samples, lr_factor=self._lr_factor
            )
            if isinstance(decision, Continue) and not due and decision.evidence.rule != REPEAT:
                decision = None
        return self.world.told(decision, self._device), fresh

    def _configure(self, config: Config) -> str:
        """Run at another configuration from the next step on; what happens to weight decay, in words."""
        assert self._gauge is not None
        config, words = self._decayed(config)
        if self.config.weight_decay and config.weight_decay is not None:
            scale_decay(self._optimizer, config.weight_decay / self.config.weight_decay)
        before = highest_lr(self._optimizer)
        scale(self._optimizer, self._others, config.lr / self.config.lr)
        self._set = (before, highest_lr(self._optimizer))
        self._stale = self._newest or self._stale
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
        (before, after), now = self._set, highest_lr(self._optimizer)
        self._set = None
        if now != after and min(before, after, now) > 0.0 and abs(math.log(now / before)) < abs(math.log(now / after)):
            raise TrainingError(
                f"lr was set to {after:.3g} and something set it back to {now:.3g}: give your LR scheduler to "
                "trial.watch(model, optimizer, scheduler)"
            )

    def _cuts(self, size: int) -> list[int]:
        """Where a batch of this rank is cut into micro-batches."""
        parts = math.ceil(size / (self.micro_batch or size))
        if self.world.size == 1 and (self.steps + 1) % self._every == 0:
            parts = max(parts, min(GROUPS, size))
        return [size * i // parts for i in range(parts + 1)]

    def _state(self) -> dict[str, Any]:
        """All that training depends on, between two steps; of a sharded model, what this rank holds. For all ranks."""
        assert self._gauge is not None
        gauge, newest = self._gauge.state_dict(), self._newest
        return {
            "model": self._module.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "others": [other.state_dict() for other in self._others],
            "gauge": gauge,
            "late": newest.to_dict() if newest is not None and newest is not self.reading else None,
            "config": asdict(self.config),
            "samples": self.samples,
            "steps": self.steps,
            "loss": self.loss,
            "random": (
                random.getstate(),
                np.random.get_state(),  # noqa: NPY002
                torch.get_rng_state(),
                torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
            ),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        assert self._gauge is not None
        if len(state["others"]) != len(self._others):
            raise TrainingError(
                f"trial.watch() got {len(self._others)} others; the saved run had {len(state['others'])}"
            )
        if any(map(is_sharded, self._module.parameters())):
            model, others = self._module.state_dict(), [other.state_dict() for other in self._others]
            state = {
                **state,
                "model": spread(state["model"], model),
                "optimizer": spread(state["optimizer"], _moments(state["optimizer"], self._optimizer)),
                "others": [spread(saved, own) for saved, own in zip(state["others"], others, strict=True)],
            }
        self._module.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        for other, own in zip(self._others, state["others"], strict=True):
            other.load_state_dict(own)
        self._gauge.load_state_dict(state["gauge"])
        self._late = None if state["late"] is None else Reading(**state["late"])
        self.config = Config(**state["config"])
        self.samples, self.steps, self.loss = state["samples"], state["steps"], state["loss"]
        if state["random"] is None:  # of another number of ranks
            return
        python, numpy, cpu, cuda = state["random"]
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if cuda and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(cuda)


def frozen(state: dict[str, Any]) -> bytes:
    """A copy on the host, out of reach of training."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def thawed(state: bytes) -> dict[str, Any]:
    # Schedulers and optimizers may keep objects of any class in their states; these bytes are our own.
    loaded: dict[str, Any] = torch.load(io.BytesIO(state), map_location="cpu", weights_only=False)
    return loaded


def _moments(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The parameters, in the place of each tensor of an optimizer's state that is sharded as they are."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    indices = [index for group in state["param_groups"] for index in group["params"]]
    return {
        "state": {
            index: {name: p for name, value in state["state"].get(index, {}).items() if _alike(value, p)}
            for index, p in zip(indices, params, strict=True)
        }
    }


def _alike(value: Any, p: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == p.shape
