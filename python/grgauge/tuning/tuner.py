"""`tune`: early stopping, guided search and state reuse around a user's own training function."""

from __future__ import annotations

import gc
import logging
import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .._validation import require, require_count
from ..invariance import Rule, Space, decay_within, unsearched
from ..optim import is_sharded
from ..policy import REPEAT, Config, Continue, Decision, Policy, Retune, Stop, verdict
from .ranks import TrainingError, World, unsharded
from .study import Segment, Trials, words_of
from .training import Training

log = logging.getLogger(__name__)

Bounds = Mapping[str, tuple[float, float]]

START = {"lr": 0.4, "batch_size": 1 / 3}
"""Where a search begins, as a share of each range in logarithms: 1e-3 of 1e-5 to 1, batch 32 of 8 to 512. From below is
cheap and safe; from above weights are destroyed."""


@dataclass(frozen=True)
class Result:
    """What `tune` ends with.

    config   the recommended learning rate, batch size in samples and weight decay
    model    trained, as the training function left it
    loss     training loss of its last trial, the mean of the last 20 steps
    used     samples taken in all
    verdict  in words, one line
    trials   all trials of the study, failed ones included
    output   what the training function returned
    """

    config: Config
    model: nn.Module
    loss: float
    used: int
    verdict: str
    trials: tuple[Segment, ...]
    output: Any


class Trial(Training):
    """What a training function trains with: `watch` once, then `step` for each of `batches`.

    lr, batch_size   to train at. `watch` sets the learning rate, and `batches` follow the batch size
    budget, used     samples, over all trials and all ranks
    bounds           ends of each range that is searched
    segment, ended   the stretch that is being trained, and those before it
    """

    segment: Segment
    _live: dict[str, Any] | None  # what `watch` has to restore
    _snapshot: str | None  # the checkpoint of weights to go back to
    _stopped: bool

    def __init__(
        self,
        config: Config,
        policy: Policy,
        trials: Trials,
        bounds: Bounds,
        budget: int,
        *,
        checkpoint_every: float,
        on_step: Callable[[Trial], object],
        micro_batch: int | None,
        every: int,
        seed: int,
        decay: Rule,
    ) -> None:
        super().__init__(config, policy, micro_batch=micro_batch, every=every, seed=seed, decay=decay)
        self.budget, self.used, self.bounds = budget, 0, bounds
        self._trials, self._checkpoint_every, self._on_step = trials, checkpoint_every, on_step
        self._fresh_policy = policy.state_dict()
        self._wanted = config.weight_decay
        if "weight_decay" in bounds:
            config = replace(config, weight_decay=self._held(config))
        self._start = config
        self._load()
        self.ended = [segment for segment in trials.segments() if segment.state is not None]

    def watch(self, model: nn.Module, optimizer: torch.optim.Optimizer, *others: Any) -> None:
        super().watch(model, optimizer, *others)
        if self.world.size > 1:  # with the same dropout, gradients would agree more than the ranks' samples do
            _seed(self._seed + 1 + self.world.rank)
        if self._live is not None:
            self._restore(self._live)
            self._live = None
        self.segment.weight_decay = self.config.weight_decay
        if self.segment.state is None:
            self._begin()
        self._clock = time.monotonic()

    def run(self, train: Callable[[Trial], Any]) -> Any:
        """Call the training function until the budget is spent; returns what it returns."""
        while True:
            self._forget()
            self.model = None
            gc.collect()  # what an abandoned attempt held
            _seed(self._seed)
            try:
                output = train(self)
                self._check_finished()
                break
            except _FromScratch:
                continue
            except torch.OutOfMemoryError as error:
                self._halve(error)
            except TrainingError as error:
                self._fail(error)
                raise
            except Exception as error:
                self._fail(error)
                raise TrainingError(
                    f"the training function raised {type(error).__name__} in trial {self.segment.number} "
                    f"({self.config}): {error}"
                ) from error
        if self.segment.state is None:
            self.segment.end("COMPLETE", "the budget is spent", _decided("continue", "budget"))
        self._save(closed=self.segment)
        self._trials.write(self.segment)
        return output

    def _over(self) -> bool:
        return self.used >= self.budget or self._stopped

    def _between(self) -> None:
        self.used += self.config.batch_size
        if self.steps == 1 and not math.isfinite(self.loss):
            raise TrainingError(f"the loss of untrained weights is {self.loss}: no learning rate will help that")
        now = time.monotonic()
        spent = self.used >= self.budget
        decision, fresh = self._observe(due=spent or now - self._saved_at >= self._checkpoint_every)
        self.segment.add(self.loss, self.config.batch_size, self.used, now - self._clock, fresh)
        self._clock = now
        if decision is not None and (spent or isinstance(decision, Stop)):
            self._end(decision)
        elif isinstance(decision, Retune):
            self._retune(decision)
        elif decision is not None:
            if isinstance(decision, Continue) and decision.evidence.rule == REPEAT:
                log.info("%d samples: %s", self.used, decision)
                self.segment.notes.append(str(decision))
            self._save()
            self._trials.write(self.segment)
            self._trials.note(used=self.used)
        self._on_step(self)

    def _retune(self, decision: Retune) -> None:
        """Another configuration: with these weights, with those saved before, or from untrained ones."""
        old, state = self.segment, "PRUNED"
        parent: int | None = None
        if not decision.reuse:
            self._snapshot = None
        elif decision.rollback:
            parent = self._roll_back()
        else:
            state, parent = "COMPLETE", old.number
            self._snapshot = f"before-{self.used}.pt"
            self._trials.save(self._snapshot, {"live": self._collected(), "trial": old.number})
        old.end(state, decision.reason, words_of(decision))
        if decision.reuse:
            words = self._configure(decision.config)
        else:
            self.config, words = self._decayed(decision.config)
            self.samples = self.steps = 0
        self.segment = Segment(**asdict(self.config), parent=parent, start_samples=self.used)
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
        follows, words = super()._decayed(config)
        if "weight_decay" not in self.bounds or follows.weight_decay is None:
            return follows, words
        held = self._held(follows if self._decay != "decay" else replace(config, weight_decay=self._wanted))
        if held == follows.weight_decay:
            return follows, words
        return replace(config, weight_decay=held), f"{words}; in its range and for a run of this length {held:.3g}"

    def _held(self, config: Config) -> float:
        """The weight decay nearest to the one wanted that is in its range, and with which the run stays well within the
        weights' time scale: beyond, gamma counts, which gauges do not read."""
        (low, high), wanted = self.bounds["weight_decay"], config.weight_decay or 0.0
        return min(max(min(wanted, decay_within(config.lr, self.budget / config.batch_size)), low), high)

    def _begin(self) -> None:
        """Give the segment its trial."""
        self._trials.begin(self.segment, self.bounds)
        self.segment.number = self.world.same(self.segment.number)

    def _end(self, decision: Decision) -> None:
        """The last step: what comes out are these weights, or those saved before if these are worth nothing."""
        stopped = isinstance(decision, Stop)
        failing = stopped or (isinstance(decision, Retune) and (decision.rollback or not decision.reuse))
        if not math.isfinite(self.loss) or (failing and self._snapshot is not None):
            self.segment.end("PRUNED", decision.reason, words_of(decision))
            if self._snapshot is None:
                raise TrainingError(f"training ended with loss {self.loss} and no weights to go back to: {decision}")
            self._roll_back()
        elif stopped:
            raise TrainingError(f"no configuration of the space trains: {decision}")
        self._stopped = stopped
        self._save()

    def _roll_back(self) -> int | None:
        """Load the weights saved last; the number of the trial that they are of."""
        saved = self._trials.load(self._snapshot) if self._snapshot is not None else None
        if saved is None:
            raise TrainingError(f"the policy goes back to saved weights, but {self._trials.folder} has none")
        self._restore(self._own(saved["live"]))
        number: int | None = saved["trial"]
        return number

    def _check_finished(self) -> None:
        if self._open is not None or not self._over():
            done = f"{self.used} of {self.budget} samples"
            where = "calling trial.watch(model, optimizer)" if self._gauge is None else "the loop over trial.batches()"
            raise TrainingError(
                f"the training function returned early, after {done}: "
                + (f"without {where}" if self._gauge is None else f"let {where} run until it ends")
            )
        if self._gauge is None:
            raise TrainingError("the training function returned without calling trial.watch(model, optimizer)")

    def _fail(self, error: Exception) -> None:
        """Store the trial as failed. No rank waits for another here, as it may be the only one."""
        segment = self.segment
        if segment.state == "COMPLETE":  # the loop is over; what follows it has failed
            return
        if segment.number is None:
            self._trials.begin(segment, self.bounds)
        segment.error = f"{type(error).__name__}: {error}"
        segment.end("FAIL", f"failed: {error}", segment.decision or _decided("fail", type(error).__name__))
        self._trials.write(segment)
        self._trials.note(used=self.used)

    def _halve(self, error: torch.OutOfMemoryError) -> None:
        """Half the micro-batch, the same batch: go on with the weights of the last step. One of several ranks ends."""
        size = self._part_size
        largest = math.ceil(size / math.ceil(size / (self.micro_batch or size)))
        if self._gauge is None or largest == 1:
            what = "for the model alone" if self._gauge is None else "with one sample at a time"
            self._fail(error)
            raise TrainingError(f"out of memory {what}: {error}") from error
        if self.world.size > 1:  # the others wait for this rank's gradients, and hear of nothing else
            self._fail(error)
            raise TrainingError(
                f"out of memory on rank {self.world.rank} with {largest} samples in one backward pass: go on with "
                f"micro_batch={math.ceil(largest / 2)}, which several ranks cannot change while they train ({error})"
            ) from error
        if self._updating:  # weights may be half updated
            self._load()
        else:
            self._live = self._state()
        self.micro_batch = math.ceil(largest / 2)
        log.warning("out of memory: micro-batch %d -> %d, batch %d as before", largest, self.micro_batch, size)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    # --- what survives ------------------------------------------------------------------------------------------------

    def _collected(self) -> dict[str, Any]:
        """The state of all ranks, for rank 0 to save: of each what is its own, of the others' copies one."""
        state = self._state()
        sharded = any(map(is_sharded, self._module.parameters()))
        shared = {name: unsharded(state[name]) if sharded else state[name] for name in ("model", "optimizer", "others")}
        gauges = self.world.gathered(state["gauge"]) if sharded else [state["gauge"]]
        return {**state, **shared, "gauge": gauges, "random": self.world.gathered(state["random"])}

    def _own(self, state: dict[str, Any]) -> dict[str, Any]:
        """What `_collected` has, as this rank's; on another number of ranks random numbers begin anew."""
        gauges, rank, size = state["gauge"], self.world.rank, self.world.size
        return {
            **state,
            "gauge": gauges[rank if len(gauges) == size else 0],
            "random": state["random"][rank] if len(state["random"]) == size else None,
        }

    def _save(self, closed: Segment | None = None, fresh: bool = False) -> None:
        """A checkpoint. closed: the segment that has just ended; fresh: begin from untrained weights."""
        self._trials.save(
            "last.pt",
            {
                "live": None if fresh else self._collected(),
                "policy": self.policy.state_dict(),
                "segment": asdict(self.segment),
                "closed": None if closed is None else asdict(closed),
                "used": self.used,
                "snapshot": self._snapshot,
                "stopped": self._stopped,
                "micro_batch": self.micro_batch,
            },
        )
        self._trials.keep("last.pt", self._snapshot)
        self._saved_at = time.monotonic()

    def _load(self) -> None:
        """Go on from the newest checkpoint, or begin."""
        self._live, self._snapshot, self._stopped = None, None, False
        self._clock = self._saved_at = time.monotonic()
        saved = self._trials.load("last.pt")
        found = None if saved is None else saved["used"]
        if self.world.same(found) != found:
            raise TrainingError(
                f"rank {self.world.rank} does not find rank 0's checkpoint in {self._trials.folder}; checkpoint_dir "
                "must be a folder that all ranks see"
            )
        if saved is None:
            self.used = self.samples = self.steps = 0
            self.config = self._start
            self.policy.load_state_dict(self._fresh_policy)
            self.segment = Segment(**asdict(self.config))
            return
        self.policy.load_state_dict(saved["policy"])
        self.segment, self.used = Segment(**saved["segment"]), saved["used"]
        self.config = self.segment.config
        self._live = None if saved["live"] is None else self._own(saved["live"])
        self._snapshot, self._stopped = saved["snapshot"], saved["stopped"]
        sizes = [size for size in (self.micro_batch, saved["micro_batch"]) if size is not None]
        self.micro_batch = min(sizes) if sizes else None
        if saved["closed"] is not None:
            self._trials.write(Segment(**saved["closed"]))
        if self.segment.state is None:
            self.segment.number = None  # `begin` finds it if it is still running
        elif not self._over():  # finished, and now the budget is larger
            self.segment = Segment(**asdict(self.config), parent=self.segment.number, start_samples=self.used)


def tune(
    train: Callable[[Trial], Any],
    space: Bounds | Space,
    *,
    budget: int,
    storage: str | Path = "grgauge.db",
    study_name: str = "grgauge",
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

    train         the training function. It builds model and optimizer, calls `trial.watch(model, optimizer)`, takes its
                  batches from `trial.batches(dataset)` and calls `trial.step(loss)` for each, in place of backward,
                  step and zero_grad. It is called again where training begins anew, and must then do the same
    space         {"lr": (low, high), "batch_size": (low, high)}, in samples. Or an `invariance.Space`, which has
                  weight decays too. Gauges do not read those, so the learning rate alone is searched. Weight decay is
                  held in the middle of its range, or where `start` has it, or as much lower as the range allows and
                  the run would else outlast the weights' time scale (`invariance.decay_within`). The verdict says
                  whether it still may matter
    budget        samples to train on, in all
    storage       path of an SQLite file, or the URL of any Optuna storage
    study_name    the same name, storage and space again: go on where it stopped, or with a larger budget from its end
    policy        makes the policy from the bounds of the space; `Policy.paper` for the published rules
    start         where to begin; None: below the middle of the space. Its weight decay, if it has one, is set
    seed          of weights and batches; sets the global generators of torch, numpy and Python
    micro_batch   samples that one backward pass may take on one rank; None: its part of the batch. Halved where memory
                  runs out; several ranks end with an error that names a smaller one
    every         steps between readings
    decay         what happens to weight decay when the learning rate or batch changes (`invariance.decay_after`),
                  within its range
    checkpoint_dir    folder for checkpoints, which are pickles: load only your own. None: beside the SQLite file
    checkpoint_every  seconds between checkpoints, beside those at every change: what a kill can cost
    on_step       called after each step, on every rank, as for a progress bar

    On several ranks (torchrun) call init_process_group() first, then this on all of them; the function wraps the model
    in DistributedDataParallel or applies fully_shard to it. Rank 0 decides and writes; all must see checkpoint_dir, and
    return the same but for `model` and `output`. An exception on one rank ends the others with an error within the
    process group's timeout. Another number of ranks can go on where these stopped.

    Raises ValueError for an argument out of range and for a study begun with others, before anything is stored;
    ImportError without Optuna; TrainingError if the training function raises, returns early, never steps, ignores the
    batch size, or nothing that it does trains. The trial is then stored as failed, and the same call goes on from the
    newest checkpoint.
    """
    bounds = _bounds(space)
    (low, high), (least, most) = bounds["lr"], bounds["batch_size"]
    require_count("budget", budget, 1)
    require_count("seed", seed, 0)
    require(0.0 <= checkpoint_every < math.inf, "checkpoint_every", checkpoint_every, "in seconds, at least 0")
    world = World()
    smallest, largest = -(-int(least) // world.size), int(most) // world.size  # on each rank
    require(smallest <= largest, "space['batch_size']", (least, most), f"around a multiple of the {world.size} ranks")
    if start is None:
        lr, batch = (bounds[name][0] * (bounds[name][1] / bounds[name][0]) ** share for name, share in START.items())
        part = min(max(round(batch / world.size), smallest), largest)
        start = Config(min(max(lr, low), high), part * world.size)
    inside = low <= start.lr <= high and least <= start.batch_size <= most
    if isinstance(space, Space):
        start = replace(start, weight_decay=space.decay if start.weight_decay is None else start.weight_decay)
        inside = inside and bounds["weight_decay"][0] <= (start.weight_decay or 0.0) <= bounds["weight_decay"][1]
    require(inside, "start", asdict(start), f"inside {bounds}")
    own = policy(lr_bounds=(low, high), min_batch=int(least), max_batch=int(most))
    settings = {"space": {name: list(ends) for name, ends in bounds.items()}, "seed": seed}
    # refuses what is out of range before a study is made
    Training(start, own, micro_batch=micro_batch, every=every, seed=seed, decay=decay)
    trials = Trials(storage, study_name, checkpoint_dir, settings, world)
    zones = {name: value for name, value in asdict(own.target).items() if not name.endswith("_power")}
    trials.note(target={k: list(v) if isinstance(v, tuple) else v for k, v in zones.items()}, budget=budget)
    trial = Trial(
        start,
        own,
        trials,
        bounds,
        budget,
        checkpoint_every=checkpoint_every,
        on_step=on_step,
        micro_batch=micro_batch,
        every=every,
        seed=seed,
        decay=decay,
    )
    output = trial.run(train)
    assert trial.model is not None
    segments = trials.segments()
    told = world.first(lambda: trials.study.user_attrs.get("verdict"))
    words = told if told and trial.reading is None else _verdict(trial, len(segments))  # nothing was left to train
    trials.note(used=trial.used, verdict=words, recommendation=asdict(trial.config))
    return Result(trial.config, trial.model, trial.segment.loss, trial.used, words, tuple(segments), output)


class _FromScratch(BaseException):
    """Leaves the training function, to call it again. No Exception, which a user's `except` would take for its own."""


def _bounds(space: Bounds | Space) -> dict[str, tuple[float, float]]:
    if isinstance(space, Space):
        own = space.ends
        decays = own.pop("weight_decay")
        return {**_bounds(own), "weight_decay": decays}
    require(set(space) == {"lr", "batch_size"}, "space", sorted(space), "keyed 'lr' and 'batch_size'")
    bounds: dict[str, tuple[float, float]] = {}
    for name, whole in (("lr", False), ("batch_size", True)):
        ends = tuple(space[name])
        fits = len(ends) == 2 and 0.0 < ends[0] <= ends[1] < math.inf
        fits = fits and (not whole or (ends[0] >= 1 and all(float(end).is_integer() for end in ends)))
        require(
            fits, f"space[{name!r}]", space[name], f"(low, high), {'whole numbers' if whole else 'numbers'} above 0"
        )
        bounds[name] = (int(ends[0]), int(ends[1])) if whole else (float(ends[0]), float(ends[1]))
    return bounds


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


def _decided(kind: str, rule: str) -> dict[str, Any]:
    return {"kind": kind, "rule": rule, "evidence": {}}


def _verdict(trial: Trial, count: int) -> str:
    reading = trial.reading
    gauges = "no reading" if reading is None else verdict(reading, trial.policy.target)
    end = f" Stopped early: {trial.segment.reason}." if trial.segment.state == "PRUNED" else ""
    least, most = trial.bounds.get("weight_decay", (0.0, 0.0))
    decay = f", {unsearched(trial.config, trial.steps)}" if least < most else ""
    found = f"{trial.config}: loss {trial.segment.loss:.4g}"
    return f"{found} after {count} trial{'s' * (count != 1)} and {trial.used} samples; {gauges}{decay}.{end}"
