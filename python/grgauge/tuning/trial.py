"""The live handle that a user's training function trains with."""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..invariance import decay_within
from ..policy import Config, Continue, Decision, Probe, Retune, Stop
from . import state as states
from .data import Data
from .errors import StorageError, TrainingError
from .loop import Loop
from .origin import Origin
from .records import TrialRecord, in_words
from .study import Trials
from .view import View

log = logging.getLogger(__name__)

Bounds = Mapping[str, tuple[float, float]]


class Trial(View):
    """What a training function trains with: `watch` once, then `step` for each of `batches`.

    `tune` makes it and hands it to the training function. `lr` and `batch_size` are what to train at: `watch` sets the
    learning rate, and `batches` follow the batch size.

    Attributes:
        budget: samples to train on, over all trials and all ranks.
        used: of them, those taken so far.
        bounds: ends of each range that is searched.
        record: of the stretch that is being trained.
        ended: records of those before it.
        was_finished: True if the study had ended before this call.
    """

    record: TrialRecord
    _live: dict[str, Any] | None  # what `watch` has to restore
    _snapshot: str | None  # the checkpoint of weights to go back to
    _stopped: bool
    _loss_of_average: float | None  # at the end, where it is lower than that of the newest weights
    _origin: Origin  # what the study was begun with

    def __init__(
        self,
        loop: Loop,
        trials: Trials,
        bounds: Bounds,
        budget: int,
        *,
        checkpoint_every: float,
        on_step: Callable[[Trial], object],
    ) -> None:
        super().__init__(loop)
        self.budget, self.used, self.bounds = budget, 0, bounds
        self._trials, self._checkpoints = trials, trials.checkpoints
        self._checkpoint_every, self._on_step = checkpoint_every, on_step
        self._fresh_policy = loop.policy.state_dict()
        self._wanted = loop.config.weight_decay
        if "weight_decay" in bounds:
            loop.config = replace(loop.config, weight_decay=self._held(loop.config))
        self._start = loop.config
        self._load()
        self.was_finished = self._over()
        self.ended = [record for record in trials.records() if record.state is not None]

    def watch(self, model: nn.Module, optimizer: torch.optim.Optimizer, *others: Any) -> None:
        """What is trained. Its learning rate becomes `lr`, groups and schedule in proportion.

        Args:
            model: On several ranks a DistributedDataParallel, or the root that fully_shard was applied to, over all of
                them.
            optimizer: Of its parameters.
            others: Whatever else has `state_dict` and `load_state_dict` and changes in training: LR schedulers, which
                from then on count from the learning rate set here, or an average of weights.

        Raises:
            TrainingError: For a second call, without a parameter to train, for a learning rate of 0, for others without
                a state, for a model that ranks would train apart, and for one whose parameters have other names or
                shapes than the study was begun with.
        """
        loop = self._loop
        loop.watch(model, optimizer, *others)
        self._origin.compare_model(loop.module)
        if loop.world.size > 1:  # with the same dropout, gradients would agree more than the ranks' samples do
            states.seed_all(loop.seed + 1 + loop.world.rank)
        loop.keep_untrained()
        if self._live is not None:
            loop.restore(self._live)
            self._live = None
        self.record.weight_decay = loop.config.weight_decay
        if self.record.state is None:
            self._begin()
        self._clock = time.monotonic()

    def batches(self, data: Data) -> Iterator[Any]:
        """Batches for one backward pass each, shuffled anew every epoch, until training ends. Call `step` for each.

        A batch of the present size comes as one or several micro-batches, each made of whole samples by the loader's
        own collate_fn, so samples may be anything. On one rank each step that is read has at least two, the groups of
        GR_S; none has a single sample, unless micro_batch is 1, or 2 and the batch odd, or the batch itself is. What a
        function returns cannot be cut: it is asked for micro-batches of equal size, at least two a step, for the whole
        batch where it has no such parts, and where it makes whole batches only they are taken; GR_S is then not
        available, and each reading says so.

        A loop that was left by `break` can be entered again: steps made count, and one that was left between two of its
        micro-batches is begun again.

        Args:
            data: A dataset with a length, a DataLoader over one, or a function that takes a size and returns batches of
                that size, for as long as an epoch lasts. A dataset is continued where a stopped run was; a function's
                batches begin anew. On several ranks a dataset is shuffled alike on all, and each takes its part; a
                function must give each rank samples that no other has.

        Raises:
            TrainingError: Where `step` was not called, for data that do not follow the batch size, for a batch size
                that ranks cannot share equally, and for data of other length or with other samples than the study was
                begun with.
            TypeError: For other kinds of data.
        """
        drawn_from, loop = self._loop.source(data), self._loop
        self._origin.compare_data(drawn_from.fingerprint())
        yield from loop.batches(drawn_from, self._over, self._after_step, self._act)
        if not self._stopped and self.used < self.budget and (count := self._compared):
            losses: list[float] = []
            yield from loop.compare_average(drawn_from, count, losses)
            self.used += 2 * count * self.batch_size
            self.record.samples += 2 * count * self.batch_size
            self._loss_of_average = losses[1] if losses[1] < losses[0] else None
            note = f"training loss of the averaged weights {losses[1]:.4g}, of the newest {losses[0]:.4g}"
            log.info("%d samples: %s", self.used, note)
            self.record.notes.append(note)

    def step(self, loss: Tensor) -> bool:
        """Backward of a batch's mean loss and, with the last micro-batch, the update; gradients are then cleared.

        Until then they accumulate: the optimizer's own zero_grad() does nothing.

        Args:
            loss: One number with a graph, the mean over this micro-batch.

        Returns:
            True after an update, which is when a scheduler's own `step()` is due.

        Raises:
            TrainingError: Where no batch of `batches` is open, for a loss that is not one number with a graph, and for
                gradients that were cleared on the way.
        """
        stepped = self._loop.step(loss)
        if stepped:
            self.used += self.batch_size
            if self.probing:  # no curve of losses: half of these weights are given up
                self.record.samples += self.batch_size
                self._on_step(self)
        return stepped

    def run(self, train: Callable[[Trial], Any]) -> Any:
        """Call the training function until the budget is spent. `tune` does that; a training function does not.

        Args:
            train: The training function, called with this trial.

        Returns:
            What the training function returned.

        Raises:
            TrainingError: As for `tune`.
        """
        loop = self._loop
        while True:
            loop.forget()
            loop.model = None
            gc.collect()  # what an abandoned attempt held
            states.seed_all(loop.seed)
            try:
                output = train(self)
                self._check_finished()
                break
            except _FromScratch:
                continue
            except torch.OutOfMemoryError as error:
                self._halve(error)
            except StorageError:  # the failure could not be stored either
                raise
            except TrainingError as error:
                self._fail(error)
                raise
            except Exception as error:
                self._fail(error)
                raise TrainingError(
                    f"the training function raised {type(error).__name__} in trial {self.record.number} "
                    f"({self.config}): {error}"
                ) from error
        if self.record.state is None:
            self.record.end("COMPLETE", "the budget is spent", _decided("continue", "budget"))
        self._save(closed=self.record)
        self._trials.write(self.record)
        if self._loss_of_average is not None:
            loop.take_average()
        return output

    @property
    def final_loss(self) -> float:
        """Of the weights that are the result: the mean of the last steps, or the average's in the comparison."""
        return self.record.loss if self._loss_of_average is None else self._loss_of_average

    @property
    def _compared(self) -> int:
        """Batches on which the newest weights and their average are compared at the end, each: half a percent of the
        budget, and at least 4, since fewer would tell nothing; none where those are more than 2 percent of it."""
        count = max(self.budget // (200 * self.batch_size), 4)
        return count if 50 * count * self.batch_size <= self.budget and self.averaged is not None else 0

    def _over(self) -> bool:
        """All is used, but for what the comparison at the end takes."""
        return self.used + 2 * self._compared * self.batch_size >= self.budget or self._stopped

    def _after_step(self) -> Probe | None:
        loop = self._loop
        if loop.steps == 1 and not math.isfinite(loop.loss):
            raise TrainingError(f"the loss of untrained weights is {loop.loss}: no learning rate will help that")
        now = time.monotonic()
        spent = self._over()
        decision, fresh = loop.observe(due=spent or now - self._saved_at >= self._checkpoint_every)
        for loss in loop.observed:
            self.record.add(loss, self.batch_size)
        if fresh is not None:
            self.record.read(fresh)
        self.record.seconds += now - self._clock
        self._clock = now
        if isinstance(decision, Probe) and not spent:
            refused = loop.refused(decision, self.budget - self.used)
            if refused is not None:
                log.info("%d samples: %s", self.used, refused)
                self.record.notes.append(refused)
            self._on_step(self)
            return None if refused else decision
        if decision is not None and (spent or isinstance(decision, Stop)):
            self._end(decision)
        elif isinstance(decision, Retune):
            self._retune(decision)
        elif decision is not None:
            self._go_on(decision)
        self._on_step(self)
        return None

    def _act(self, decision: Decision, compared: int) -> None:
        """What follows from a probe, after so many samples on which averages were compared."""
        self.used += compared
        self.record.samples += compared
        self.record.probes += 1
        if isinstance(decision, Retune):
            self._retune(decision)
        else:
            self._go_on(decision)
        self._on_step(self)

    def _go_on(self, decision: Decision) -> None:
        """Store where training is, and what is worth a note."""
        if isinstance(decision, Continue) and decision.notable:
            log.info("%d samples: %s", self.used, decision)
            self.record.notes.append(str(decision))
        self._save()
        self._trials.write(self.record)
        self._trials.note(used=self.used)

    def _retune(self, decision: Retune) -> None:
        """Another configuration: with these weights, with those saved before, or from untrained ones."""
        loop, old, state = self._loop, self.record, "PRUNED"
        parent: int | None = None
        if not decision.reuse:
            self._snapshot = None
        elif decision.rollback:
            parent = self._roll_back()
        else:
            state, parent = "COMPLETE", old.number
            self._snapshot = f"before-{self.used}.pt"
            collected = self._collected()
            if loop.world.rank == 0:
                self._checkpoints.save(self._snapshot, {"live": collected, "trial": old.number})
        old.end(state, decision.reason, in_words(decision))
        config, words = self._decayed(decision.config)
        if decision.reuse:
            loop.configure(config)
        else:
            loop.config = config
            loop.samples = loop.steps = 0
        self.record = TrialRecord(**asdict(config), parent=parent, start_samples=self.used)
        self._save(closed=old, fresh=not decision.reuse)
        self._trials.write(old)
        self._trials.note(used=self.used)
        self.ended.append(old)
        log.info("%d samples: %s. %s", self.used, decision, words)
        if not decision.reuse:
            self._on_step(self)
            raise _FromScratch
        self._begin()

    def _decayed(self, config: Config) -> tuple[Config, str]:
        follows, words = self._loop.decayed(config)
        if "weight_decay" not in self.bounds or follows.weight_decay is None:
            return follows, words
        held = self._held(follows if self._loop.decay != "decay" else replace(config, weight_decay=self._wanted))
        if held == follows.weight_decay:
            return follows, words
        return replace(config, weight_decay=held), f"{words}; in its range and for a run of this length {held:.3g}"

    def _held(self, config: Config) -> float:
        """The weight decay nearest to the one wanted that is in its range, and with which the run stays well within the
        weights' time scale: beyond, gamma counts, which gauges do not read."""
        (low, high), wanted = self.bounds["weight_decay"], config.weight_decay or 0.0
        return min(max(min(wanted, decay_within(config.lr, self.budget / config.batch_size)), low), high)

    def _begin(self) -> None:
        """Give the record its trial."""
        self._trials.begin(self.record, self.bounds)
        self.record.number = self._loop.world.broadcast(self.record.number)

    def _end(self, decision: Decision) -> None:
        """The last step: the result is these weights, or those saved before if these are worth nothing."""
        stopped = isinstance(decision, Stop)
        failing = stopped or (isinstance(decision, Retune) and (decision.rollback or not decision.reuse))
        if not math.isfinite(self.loss) or (failing and self._snapshot is not None):
            self.record.end("PRUNED", decision.reason, in_words(decision))
            if self._snapshot is None:
                raise TrainingError(f"training ended with loss {self.loss} and no weights to go back to: {decision}")
            self._roll_back()
        elif stopped:
            raise TrainingError(f"no configuration of the space trains: {decision}")
        self._stopped = stopped
        self._save()

    def _roll_back(self) -> int | None:
        """Load the weights saved last; the number of the trial that they are of."""
        saved = self._checkpoints.load(self._snapshot) if self._snapshot is not None else None
        if saved is None:
            raise TrainingError(f"the policy goes back to saved weights, but {self._checkpoints.folder} has none")
        self._loop.restore(states.own(saved["live"], self._loop.world))
        number: int | None = saved["trial"]
        return number

    def _check_finished(self) -> None:
        loop = self._loop
        if loop.gauge is not None:
            loop.settle(self._after_step)
        if loop.half_done or not (self.used >= self.budget or self._stopped):
            done = f"{self.used} of {self.budget} samples"
            where = "calling trial.watch(model, optimizer)" if loop.gauge is None else "the loop over trial.batches()"
            raise TrainingError(
                f"the training function returned early, after {done}: "
                + (f"without {where}" if loop.gauge is None else f"let {where} run until it ends")
            )
        if loop.gauge is None:
            raise TrainingError("the training function returned without calling trial.watch(model, optimizer)")

    def _fail(self, error: Exception) -> None:
        """Store the trial as failed. No rank waits for another here, as it may be the only one."""
        record = self.record
        if record.state == "COMPLETE":  # the loop is over; what follows it has failed
            return
        if record.number is None:
            self._trials.begin(record, self.bounds)
        record.error = f"{type(error).__name__}: {error}"
        record.end("FAIL", f"failed: {error}", record.decision or _decided("fail", type(error).__name__))
        self._trials.write(record)
        self._trials.note(used=self.used)

    def _halve(self, error: torch.OutOfMemoryError) -> None:
        """Half the micro-batch, the same batch: go on with the weights of the last step. One of several ranks ends."""
        loop = self._loop
        size = loop.part_size
        largest = math.ceil(size / math.ceil(size / (loop.micro_batch or size)))
        if loop.gauge is None or largest == 1:
            what = "for the model alone" if loop.gauge is None else "with one sample at a time"
            self._fail(error)
            raise TrainingError(f"out of memory {what}: {error}") from error
        if loop.world.size > 1:  # the others wait for this rank's gradients, and learn nothing else
            self._fail(error)
            raise TrainingError(
                f"out of memory on rank {loop.world.rank} with {largest} samples in one backward pass: go on with "
                f"micro_batch={math.ceil(largest / 2)}, which several ranks cannot change while they train ({error})"
            ) from error
        if loop.updating:  # weights may be half updated
            self._load()
        else:
            self._live = loop.state()
        loop.micro_batch = math.ceil(largest / 2)
        log.warning("out of memory: micro-batch %d -> %d, batch %d as before", largest, loop.micro_batch, size)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    # --- what survives ------------------------------------------------------------------------------------------------

    def _collected(self) -> dict[str, Any]:
        """The state of all ranks, for rank 0 to save."""
        return states.gather(self._loop.state(), self._loop.module, self._loop.world)

    def _save(self, closed: TrialRecord | None = None, fresh: bool = False) -> None:
        """A checkpoint. closed: the record that has just ended; fresh: begin from untrained weights."""
        state = {
            "live": None if fresh else self._collected(),
            "policy": self._loop.policy.state_dict(),
            "record": asdict(self.record),
            "closed": None if closed is None else asdict(closed),
            "used": self.used,
            "snapshot": self._snapshot,
            "stopped": self._stopped,
            "loss_of_average": self._loss_of_average,
            "micro_batch": self._loop.micro_batch,
            "origin": self._origin.state_dict(),
        }
        if self._loop.world.rank == 0:
            self._checkpoints.save_last(state)
        self._saved_at = time.monotonic()

    def _load(self) -> None:
        """Go on from the newest checkpoint, or begin."""
        loop = self._loop
        self._live, self._snapshot, self._stopped, self._loss_of_average = None, None, False, None
        self._clock = self._saved_at = time.monotonic()
        saved = self._checkpoints.newest()
        found = None if saved is None else saved["used"]
        if loop.world.broadcast(found) != found:
            raise TrainingError(
                f"rank {loop.world.rank} does not find rank 0's checkpoint in {self._checkpoints.folder}; "
                "checkpoint_dir must be a folder that all ranks see"
            )
        if saved is None:
            self.used = loop.samples = loop.steps = 0
            loop.config = self._start
            loop.policy.load_state_dict(self._fresh_policy)
            self.record = TrialRecord(**asdict(loop.config))
            self._origin = Origin(self._trials.name)
            return
        loop.policy.load_state_dict(saved["policy"])
        self.record, self.used = TrialRecord(**saved["record"]), saved["used"]
        self._origin = Origin(self._trials.name, saved["origin"])
        loop.config = self.record.config
        self._live = None if saved["live"] is None else states.own(saved["live"], loop.world)
        self._snapshot, self._stopped = saved["snapshot"], saved["stopped"]
        self._loss_of_average = saved["loss_of_average"]
        sizes = [size for size in (loop.micro_batch, saved["micro_batch"]) if size is not None]
        loop.micro_batch = min(sizes) if sizes else None
        if saved["closed"] is not None:
            self._trials.write(TrialRecord(**saved["closed"]))
        if self.record.state is None:
            self.record.number = None  # `begin` finds it if it is still running
        elif not self._over():  # finished, and now the budget is larger
            self.record = TrialRecord(**asdict(loop.config), parent=self.record.number, start_samples=self.used)
            self._loss_of_average = None


class _FromScratch(BaseException):
    """Leaves the training function, to call it again. No Exception, which a user's `except` would take for its own."""


def _decided(kind: str, rule: str) -> dict[str, Any]:
    return {"kind": kind, "rule": rule, "evidence": {}}
