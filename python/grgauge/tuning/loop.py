"""The training loop: steps at a configuration that can change between two of them, and the gauge that reads them.
`Trial` and `Autopilot` each hold a `Loop`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from .._validation import require, require_count
from ..gauge import Gauge
from ..invariance import Rule, decay_after
from ..optim.learning_rates import highest_lr, peak_lr, scale, scale_decay
from ..policy import Config, Continue, Decision, Policy, Probe, Retune
from ..reading import Reading
from . import state as states
from .averaging import average_of, copy_weights, tried, update_average
from .checkpoints import deserialize, serialize
from .data import Cuts, Data, Source, source
from .errors import TrainingError
from .ranks import World, no_sync

AFFORDED = 0.25
"""Of the samples that are left, the share that a probe may take."""

GROUPS = 2
"""Micro-batches of a step that is read, at least: the groups of GR_S. S is sharp from two; of G2, which is the noisy
one, more of them say no more."""


class Loop:
    """Steps at a configuration that can change between two of them.

    On several ranks each takes an equal part of every batch, and the ranks are the groups of GR_S. Losses are means
    over all of them, and rank 0's policy decides for all.

    config       what the next step runs at
    samples      that the weights at hand have been trained on
    steps        updates that they have had
    observed     losses of the steps that the policy was last told of
    reading      the newest one, None before the first
    micro_batch  samples that one backward pass on one rank may take; None: all of its part of the batch. More than that
                 are accumulated
    world        the processes that train together

    Raises ValueError for a number out of range, and for a batch size that ranks cannot share equally.
    """

    _optimizer: torch.optim.Optimizer
    _clear: Callable[[], None]  # the optimizer's own zero_grad
    _others: tuple[Any, ...]
    _open: tuple[int, bool] | None  # samples of the micro-batch that was yielded, and whether an update follows it
    _device: torch.device  # of losses
    _sum: Tensor | None  # of the losses of the micro-batches so far
    _kept: tuple[Tensor, Tensor, int] | None  # a parameter, its gradient so far and that one's version
    _lr_factor: float
    _set: tuple[float, float] | None  # learning rate before the newest change, and after
    _late: Reading | None  # of a saved state, and not yet observed: an attached gauge's reading comes one step late
    _stale: Reading | None  # of the configuration before
    _unseen: list[Tensor]  # losses of steps that the policy was not told of yet, where they are
    _average: AveragedModel | None  # None of a sharded model, which cannot be copied
    _tried: float | None  # loss so far of a batch on which weights are tried: while it is set nothing is updated
    _begun: bytes | None  # the state that a probe began with, while it goes on
    _untrained: bytes  # the state that training began with

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
        require_count("seed", seed, 0)
        decay_after(Config(1.0, 1, 0.0), 1.0, 1, decay)  # refuses an unknown rule
        self.world = World()
        ranks = self.world.size
        require(config.batch_size % ranks == 0, "batch_size", config.batch_size, f"a multiple of the {ranks} ranks")
        multiple = math.lcm(policy.batch_multiple, ranks)
        largest, words = policy.max_batch // multiple * multiple, f"{policy.min_batch} (min_batch) or more, on {ranks}"
        require(largest >= policy.min_batch, "max_batch", policy.max_batch, f"{words} ranks a multiple of {multiple}")
        policy.batch_multiple = multiple
        self.config, self.policy, self.micro_batch = config, policy, micro_batch
        self.seed, self.decay = seed, decay
        self.samples, self.steps, self._loss = 0, 0, math.nan
        self.observed: list[float] = []
        self.reading: Reading | None = None
        self.model: nn.Module | None = None
        self._every = every
        self.forget()

    def forget(self) -> None:
        """What is trained is to be watched anew."""
        self.gauge: Gauge | None = None
        self.updating = False  # weights may be half updated
        self._others, self._open, self._set = (), None, None
        self._late = self._stale = self._sum = self._kept = None
        self._lr_factor, self._unsettled = 1.0, False
        self._average = self._tried = self._begun = None
        self._unseen = []

    # --- what is trained ----------------------------------------------------------------------------------------------

    def watch(self, model: nn.Module, optimizer: torch.optim.Optimizer, *others: Any) -> None:
        if self.gauge is not None:
            raise TrainingError("trial.watch() was called twice; call it once, before the loop over trial.batches()")
        for other in others:
            if not (hasattr(other, "state_dict") and hasattr(other, "load_state_dict")):
                raise TrainingError(f"trial.watch() got a {type(other).__name__}; it must have a state_dict")
        kind = type(optimizer).__name__
        if not any(p.requires_grad for group in optimizer.param_groups for p in group["params"]):
            raise TrainingError(f"the {kind} has no parameter that requires a gradient: there is nothing to train")
        peak = peak_lr(optimizer)
        if not 0.0 < peak < math.inf:
            raise TrainingError(f"the optimizer's lr is {peak}; it must be above 0 to be scaled")
        self.model, self._optimizer, self._others = model, optimizer, others
        self.gauge = Gauge(optimizer, self.config.batch_size, every=self._every, seed=self.seed)
        self._attach(self.gauge, model)
        self._average = None if states.is_spread(model) else average_of(self.module)
        self.reading = None
        self._keep_gradients(optimizer)
        self._clear()
        scale(optimizer, others, self.config.lr / peak)
        decays = [float(group["weight_decay"]) for group in optimizer.param_groups if "weight_decay" in group]
        if self.config.weight_decay is None and decays:
            self.config = replace(self.config, weight_decay=max(decays))
        elif self.config.weight_decay is not None and any(decays):
            scale_decay(optimizer, self.config.weight_decay / max(decays))
        elif self.config.weight_decay:
            raise TrainingError(
                f"weight_decay is to be {self.config.weight_decay:.3g}, and the {kind} has none to scale: make it with "
                "one above 0 in the groups that are to decay"
            )

    def _keep_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """While micro-batches accumulate the optimizer's zero_grad does nothing: every tutorial's loop has it."""
        clear = type(optimizer).zero_grad
        self._clear = lambda: clear(optimizer)

        def zero_grad(set_to_none: bool = True) -> None:
            if self._sum is None:
                clear(optimizer, set_to_none)

        optimizer.zero_grad = zero_grad  # type: ignore[method-assign]

    def _attach(self, gauge: Gauge, model: nn.Module) -> None:
        """Make ranks the groups of GR_S."""
        ranks = World().size
        if ranks != self.world.size:
            raise TrainingError(
                f"torch.distributed has {ranks} ranks now, and {self.world.size} when this began: call "
                "init_process_group() first"
            )
        if ranks == 1 and not states.is_spread(model):
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

    @property
    def module(self) -> nn.Module:
        """What is trained, by the same names on any number of ranks."""
        assert self.model is not None
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    @property
    def averaged(self) -> nn.Module | None:
        """The running average of the weights; None before the first step, and of a sharded model."""
        average = self._average
        return None if average is None or self.steps == 0 else average.module

    # --- batches and steps --------------------------------------------------------------------------------------------

    def source(self, data: Data) -> Source:
        if self.gauge is None:
            raise TrainingError("call trial.watch(model, optimizer) before the loop over trial.batches()")
        return source(data, self.seed, self.world.rank, self.world.size)

    def batches(
        self,
        data: Source,
        over: Callable[[], bool],
        after: Callable[[], Probe | None],
        act: Callable[[Decision, int], None],
    ) -> Iterator[Any]:
        """Micro-batches, until it is `over`. `after` is called after each step: when the next batch is asked for, so
        that the user's scheduler has been there. If it returns a probe that is made, and `act` is called with what
        follows from it, and the samples on which averages were compared."""
        self._drop_half_a_step()
        if self._begun is not None:  # the loop was left in the middle of a probe
            self.restore(deserialize(self._begun))
            self._begun = self._tried = None
            self.updating = self._unsettled = False
        self.settle(after)
        while not over():
            yield from self._micro_batches(data)
            probe = self.settle(after)
            if probe is not None:
                decision = yield from self._probed(data, probe)
                act(decision, len(probe.configs) * probe.batches * self.config.batch_size)

    def refused(self, probe: Probe, left: int) -> str | None:
        """Why a probe is not made with so many samples left; None if it is."""
        if self.averaged is None:
            return f"{probe.reason}, and nothing was compared: a sharded model has no averaged weights"
        if probe.cost > AFFORDED * left:
            return f"{probe.reason}, and nothing was compared: that takes {probe.cost} samples, and {left} are left"
        return None

    def _probed(self, data: Source, probe: Probe) -> Generator[Any, None, Decision]:
        """What follows from a probe; the weights are then those of the configuration that it decides for."""
        begun, stop = serialize(self.state()), self.samples + (0 if probe.untrained else probe.samples)
        random = states.random_state()
        self._begun = begun
        losses: list[list[float]] = []
        ends: list[bytes] = []
        for config in probe.configs:
            if ends:
                self.restore(deserialize(self._untrained if probe.untrained else begun))
                self.configure(config)
            while self.samples < stop and (self.steps == 0 or math.isfinite(self.loss)):
                yield from self._micro_batches(data)
                self._unsettled = False
                self._guard()
            ends.append(serialize(self._state()))
            states.set_random_state(random)
            losses.append((yield from self._losses(self.averaged, data, probe.batches, stop)))
        decision = self.policy.judge((losses[0], losses[1])) if self.world.rank == 0 else None
        decision = self.world.broadcast(decision)
        assert decision is not None
        here, there = ends
        self.restore(deserialize(there if isinstance(decision, Retune) else here))
        self._begun = None
        return decision

    def _micro_batches(self, data: Source) -> Iterator[Any]:
        """Those of one step. Only with the last of them are gradients reduced over ranks."""
        assert self.model is not None
        if self.config.batch_size % self.world.size:
            raise TrainingError(f"batch {self.config.batch_size} is no multiple of the {self.world.size} ranks")
        cuts = Cuts(self.part_size, self.micro_batch, self._every, GROUPS if self.world.size == 1 else 1)
        done = 0
        for size, batch in data.draw(self.samples, self.steps + 1, cuts):
            done += size
            last = done == self.part_size
            self._open = (size, last)
            with nullcontext() if last else no_sync(self.model):
                yield batch
            self._require_step()

    def _require_step(self) -> None:
        if self._open is not None:
            raise TrainingError("trial.step(loss) was not called: call it once for each of trial.batches()")

    def compare_average(self, data: Source, count: int, taken: list[float]) -> Iterator[Any]:
        """`count` batches twice, without updates: for the weights at hand and for their average, whose losses go to
        `taken`. The random draws of a model are the same for both."""
        state = states.random_state()
        for average in (None, self.averaged):
            states.set_random_state(state)
            losses = yield from self._losses(average, data, count, self.samples)
            taken.append(sum(losses) / count)

    def _losses(
        self, average: nn.Module | None, data: Source, count: int, start: int
    ) -> Generator[Any, None, list[float]]:
        """Of each of `count` batches from that place of the data on, without updates: with the weights at hand, or with
        those of an average."""
        assert self.model is not None
        losses: list[float] = []
        cuts = Cuts(self.part_size, self.micro_batch, count + 1, 1)
        self.updating = True  # weights are exchanged: an error goes back to a checkpoint
        with tried(self.module, average), no_sync(self.model):
            for i in range(count):
                self._tried = 0.0
                for size, batch in data.draw(start + i * self.config.batch_size, i + 1, cuts):
                    self._open = (size, False)
                    yield batch
                    self._require_step()
                losses.append(self.world.mean(torch.tensor(self._tried, dtype=torch.float64, device=self._device)))
        self.updating, self._tried = False, None
        return losses

    def take_average(self) -> None:
        """Make the average the weights that are trained."""
        assert self.averaged is not None
        copy_weights(self.averaged, self.module, buffers=True)

    def step(self, loss: Tensor) -> bool:
        if self._open is None:
            raise TrainingError(
                "trial.step(loss) came without a batch of trial.batches(): the training function ignores the trial's "
                "batch size. Take every batch from trial.batches(data), and call step once for each"
            )
        if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad):
            what = f"a tensor {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise TrainingError(f"trial.step() got {what}; it must be the mean loss, one number, before backward()")
        assert self.gauge is not None
        if self._tried is not None:
            self._device = loss.device
            self._tried += float(loss.detach()) * self._open[0] / self.part_size
            self._open = None
            return False
        self._check_gradients()
        (samples, last), self._open = self._open, None
        share = samples / self.part_size
        (loss * share).sum().backward()
        self.gauge.micro_step(samples, samples)
        part = loss.detach().sum().double() * share
        self._sum = part if self._sum is None else self._sum + part
        if not last:
            params = (p for group in self._optimizer.param_groups for p in group["params"])
            self._kept = next(((p, p.grad, p.grad._version) for p in params if p.grad is not None), None)
            return False
        self._lr_factor = highest_lr(self._optimizer) / self.config.lr
        self.updating = True
        self._optimizer.step()
        self._clear()
        self.updating = False
        self._device = self._sum.device
        alone = self.world.size == 1
        self._unseen.append(self._sum if alone else torch.tensor(self.world.mean(self._sum), dtype=torch.float64))
        self._sum = self._kept = None
        self.samples, self.steps = self.samples + self.config.batch_size, self.steps + 1
        if self._average is not None and (self.steps == 1 or self.steps % self._every == 0):
            update_average(self._average, self.module)
        self._unsettled = True
        return True

    @property
    def loss(self) -> float:
        """Of the last step, the mean over its batch, which is waited for; nan before the first."""
        return self._unseen[-1].item() if self._unseen else self._loss

    def settle(self, after: Callable[[], Probe | None]) -> Probe | None:
        """What follows the newest step, unless it has been done: also where the user's loop was left by `break`."""
        if not self._unsettled:
            return None
        self._unsettled = False
        self._guard()
        return after()

    @property
    def probing(self) -> bool:
        """True in the middle of a probe: the weights at hand may not be those that training goes on with."""
        return self._begun is not None

    @property
    def part_size(self) -> int:
        """Samples of a batch on each rank."""
        return self.config.batch_size // self.world.size

    @property
    def half_done(self) -> bool:
        """True between two micro-batches of a step."""
        return self._open is not None or self._sum is not None

    def _check_gradients(self) -> None:
        if self._kept is None:
            return
        p, grad, version = self._kept
        if p.grad is not grad or grad._version != version:
            raise TrainingError(
                "gradients were cleared or changed between two micro-batches of a step, which accumulate them: remove "
                "model.zero_grad() from the loop, trial.step() clears them after each update"
            )

    def _drop_half_a_step(self) -> None:
        """Of a loop that was left between two micro-batches: its samples are drawn again."""
        assert self.gauge is not None
        self._open = None
        if self._sum is None:
            return
        self._sum = self._kept = None
        self._clear()
        self._late = self._newest if self._newest is not self.reading else None
        self.gauge.load_state_dict(self.gauge.state_dict())  # else its groups would count in the next step's

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

    # --- what is decided ----------------------------------------------------------------------------------------------

    @property
    def _newest(self) -> Reading | None:
        """The newest reading of this configuration."""
        assert self.gauge is not None
        reading = self.gauge.reading() or self._late
        return None if reading is self._stale else reading

    def observe(self, due: bool = False) -> tuple[Decision | None, Reading | None]:
        """What rank 0's policy decides, and the reading if it is a new one. To go on is None, unless `due` on rank 0 or
        an equivalent trial was not run.

        Losses on a device are waited for where there is a new reading, or `due`: the policy is then told of each, in
        order. So it hears of losses that are not finite up to `every` steps late, and that many more steps are given
        up. Those on the host are told of after each step, and so are several ranks', which agree after each step.

        One decides for all: a rank that stopped alone would leave the others waiting for its gradients.
        """
        newest = self._newest
        fresh = newest if newest is not self.reading else None
        self.reading = newest or self.reading
        self.observed = []
        if self._deferred and fresh is None and not due:
            return None, None
        self.observed = torch.stack(self._unseen).tolist()
        self._loss, self._unseen = self.observed[-1], []
        decision: Decision | None = None
        if self.world.rank == 0:
            for i, loss in enumerate(self.observed, 1 - len(self.observed)):
                decision = self.policy.observe(
                    None if i else newest, self.config, loss=loss, samples=self.samples, lr_factor=self._lr_factor
                )
                if not isinstance(decision, Continue):
                    break
            if isinstance(decision, Continue) and not due and not decision.notable:
                decision = None
        return self.world.broadcast_if_any(decision, self._device), fresh

    @property
    def _deferred(self) -> bool:
        """Reading a loss would wait for the device."""
        return not self._unseen[-1].is_cpu

    def configure(self, config: Config) -> None:
        """Run at another configuration from the next step on."""
        assert self.gauge is not None
        if self.config.weight_decay and config.weight_decay is not None:
            scale_decay(self._optimizer, config.weight_decay / self.config.weight_decay)
        before = highest_lr(self._optimizer)
        scale(self._optimizer, self._others, config.lr / self.config.lr)
        self._set = (before, highest_lr(self._optimizer))
        self._stale = self._newest or self._stale
        self.gauge.batch_size = config.batch_size
        self.gauge.restart()
        self.config = config

    def decayed(self, config: Config) -> tuple[Config, str]:
        """`config` with the weight decay that belongs to it, and why in words."""
        if self.config.weight_decay is None:
            return config, ""
        decay, words = decay_after(self.config, config.lr, config.batch_size, self.decay)
        return replace(config, weight_decay=decay), words

    # --- its state ----------------------------------------------------------------------------------------------------

    def keep_untrained(self) -> bytes:
        """The state at hand, as that of untrained weights to come back to."""
        self.samples = self.steps = 0
        self._untrained = serialize(self._state())
        return self._untrained

    def restore_untrained(self) -> None:
        self.restore(deserialize(self._untrained))

    def state(self) -> dict[str, Any]:
        """All that training depends on, between two steps; of a sharded model, what this rank holds. For all ranks.
        In the middle of a probe, what it began with."""
        return self._state() if self._begun is None else deserialize(self._begun)

    def _state(self) -> dict[str, Any]:
        assert self.gauge is not None
        gauge, newest = self.gauge.state_dict(), self._newest
        return {
            **states.take(self.module, self._optimizer, self._others),
            "average": None if self._average is None else self._average.state_dict(),
            "gauge": gauge,
            "late": newest.to_dict() if newest is not None and newest is not self.reading else None,
            "config": asdict(self.config),
            "samples": self.samples,
            "steps": self.steps,
            "loss": self.loss,
            "random": states.random_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        assert self.gauge is not None
        states.put(state, self.module, self._optimizer, self._others)
        if self._average is not None:
            self._average.load_state_dict(state["average"])
        self.gauge.load_state_dict(state["gauge"])
        self._late = None if state["late"] is None else Reading(**state["late"])
        self.config = Config(**state["config"])
        self.samples, self.steps, self._loss = state["samples"], state["steps"], state["loss"]
        self._unseen = []
        if state["random"] is not None:  # else of another number of ranks
            states.set_random_state(state["random"])
