"""The moves of a policy: what it remembers of a training, and how a change of configuration is booked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from .._validation import require, require_count
from .losses import Losses
from .target import Config, Continue, Decision, Evidence, Retune, Stop

Interval = tuple[float, float]

SAME = 0.02
"""The relative difference up to which two learning rates are taken for equal: what seeds alone do to a run is more."""

REPEAT = "repeat"
"""The rule by which a trial is not run that would be equivalent to one before; told once of each trial."""


@dataclass
class State:
    config: list[Any] | None = None  # what training was last seen to run at, or told to
    step: int = 0  # of the newest reading that was judged
    age: int = 0  # steps under this configuration
    steps: int = 0  # that these weights have been trained for
    samples: float = 0.0  # that they have been trained on
    start: float = 0.0  # `samples` when this configuration began
    cost: float = 0.0  # samples in all, those of abandoned weights included
    moves: int = 0
    broken: int = 0  # losses in a row that were not finite
    lr_factor: float | None = None  # of the schedule, at the newest check
    peak: float = 0.0  # its highest
    grad_norm: float | None = None
    recent: list[float] = field(default_factory=list)  # log GR_T of the newest readings under this configuration
    away: int = 0  # checks in a row that found the batch outside its zone
    found: bool = False  # GR_T has been in the zone or above it
    hurt: bool = False  # the loss has been well above that of untrained weights
    inherited: bool = False  # reused weights, not yet back in the zone (published rules)
    raised: bool = False  # the newest move raised the learning rate
    climbed: bool = False  # these weights have seen the learning rate rise to where it is
    groping: bool = False  # these weights have seen it rise by the loss alone
    test: list[float] | None = None  # lr, batch, loss level and its error as lr was raised against a stalled loss
    rollbacks: int = 0  # to the weights saved
    ceiling: float | None = None  # learning rate that failed, carried over to a batch of 1
    saved: list[float] | None = None  # lr, batch, samples, loss level and its error as the newest move began
    losses: Losses = field(default_factory=Losses)
    rival: Losses = field(default_factory=Losses)  # of the weights abandoned last
    rival_lr: float | None = None  # their learning rate, carried over to a batch of 1
    begun: list[list[Any]] = field(default_factory=list)  # lr and batch that untrained weights began at
    spared: bool = False  # a trial equivalent to one of them, and it has been said


class Moves:
    """What is allowed, what has been, and how to go on from there.

    lr_bounds       learning rates allowed
    min_batch, max_batch, batch_multiple  batches allowed, in samples: `max_batch` is where memory ends
    coupling        a batch that changes by r changes the learning rate by r^coupling
    max_moves       changes of configuration, after which the last one stays

    Raises ValueError for a number out of range.
    """

    def __init__(
        self,
        lr_bounds: Interval,
        min_batch: int,
        max_batch: int,
        batch_multiple: int,
        coupling: float,
        max_moves: int,
    ) -> None:
        low, high = lr_bounds
        require(0.0 < low <= high < math.inf, "lr_bounds", lr_bounds, "(low, high) with 0 < low <= high, finite")
        for name, count, least in (
            ("min_batch", min_batch, 1),
            ("batch_multiple", batch_multiple, 1),
            ("max_moves", max_moves, 0),
        ):
            require_count(name, count, least)
        room = max_batch // batch_multiple * batch_multiple >= min_batch
        require(room, "max_batch", max_batch, f"at least {min_batch} (min_batch) as a multiple of {batch_multiple}")
        require(0.0 <= coupling <= 1.0, "coupling", coupling, "in [0, 1]")
        self.lr_bounds, self.min_batch, self.max_batch = (low, high), min_batch, max_batch
        self.batch_multiple, self.coupling, self.max_moves = batch_multiple, coupling, max_moves
        self._state = State()

    @property
    def cost(self) -> float:
        """Samples that training has taken so far, those of abandoned weights included."""
        return self._state.cost

    def state_dict(self) -> dict[str, Any]:
        """All that decisions depend on but the arguments of `Policy`, as plain values ready for JSON."""
        return asdict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken, bit for bit. Raises ValueError if it does not fit; nothing changes."""
        names = {f.name for f in fields(State)}
        require(set(state) == names, "state", sorted(state), f"keyed {sorted(names)}")
        losses, rival = Losses.from_state(state["losses"]), Losses.from_state(state["rival"])
        copied: dict[str, Any] = {
            name: list(value) if isinstance(value, list) else value for name, value in state.items()
        }
        self._state = State(**{**copied, "losses": losses, "rival": rival})

    @property
    def _config(self) -> Config:
        return Config(*(self._state.config or (1.0, 1)))

    def _follow(self, config: Config) -> None:
        s, seen = self._state, [config.lr, config.batch_size, config.weight_decay]
        if s.config != seen:
            if s.config is not None and s.config[:2] != seen[:2]:
                s.test = None  # what was on trial is not what runs
            s.config = seen
            s.begun = s.begun or [seen[:2]]
            self._begin()

    def _begin(self) -> None:
        """A configuration begins."""
        s = self._state
        s.age, s.start, s.recent, s.away, s.grad_norm = 0, s.samples, [], 0, None

    def _fit(self, lr: float, batch: float) -> tuple[float, int]:
        """The nearest configuration that is allowed."""
        low, high = self.lr_bounds
        m = self.batch_multiple
        most, least = self.max_batch // m * m, -(-self.min_batch // m) * m
        return min(max(lr, low), high), min(max(round(min(batch, most) / m) * m, least), most)

    def _move(self, lr: float, batch: float, reason: str, evidence: Evidence) -> Decision:
        """To another configuration with the weights at hand, which are saved first."""
        s, old = self._state, self._config
        lr, size = self._fit(lr, batch)
        if (lr, size) == (old.lr, old.batch_size):
            return Continue(f"{reason}, but the bounds allow no change", evidence)
        if s.moves >= self.max_moves:
            return Continue(f"{reason}, but all {self.max_moves} moves are made", evidence)
        level = s.losses.level(2) if len(s.losses.curve) > 1 else s.losses.level(1)
        s.saved = None if level is None else [old.lr, old.batch_size, s.samples, level, s.losses.error(2)]
        s.raised = lr > old.lr
        s.climbed, s.rollbacks = s.climbed or s.raised, 0
        return self._book(lr, size, reason, evidence, reuse=True)

    def _rollback(self, lr: float, batch: float, reason: str, evidence: Evidence) -> Decision:
        """To another configuration with the weights that the newest move saved."""
        s = self._state
        assert s.saved is not None
        s.samples, s.raised, s.rollbacks = s.saved[2], False, s.rollbacks + 1
        s.losses.cut(s.samples)
        return self._book(*self._fit(lr, batch), reason, evidence, reuse=True, rollback=True)

    def _lower(self, lr: float, batch: float, reason: str, evidence: Evidence) -> Decision:
        """From untrained weights at a lower learning rate, if that is not what has been run already.

        Weight decay being what it was, such a run is equivalent where learning rate and batch are, whatever the regime.
        """
        rate, size = self._fit(lr, batch)
        if any(size == b and abs(rate - a) <= SAME * max(rate, a) for a, b in self._state.begun):
            why = f"{reason}, but {Config(rate, size)} is equivalent to a trial that was run, and not run again"
            said, self._state.spared = self._state.spared, True
            return Continue(why, evidence if said else replace(evidence, rule=REPEAT))
        return self._restart(lr, batch, reason, evidence)

    def _restart(self, lr: float, batch: float, reason: str, evidence: Evidence) -> Decision:
        """To another configuration from untrained weights."""
        s, old = self._state, self._config
        lr, size = self._fit(lr, batch)
        if s.moves >= self.max_moves:
            return Continue(f"{reason}, but all {self.max_moves} moves are made", evidence)
        rival_lr = old.lr / old.batch_size**self.coupling
        self._state = State(
            config=s.config,
            cost=s.cost,
            moves=s.moves,
            ceiling=s.ceiling,
            peak=s.peak,
            rival=s.losses,
            rival_lr=rival_lr,
            begun=[*s.begun, [lr, size]],
        )
        return self._book(lr, size, reason, evidence, reuse=False)

    def _book(
        self, lr: float, batch: int, reason: str, evidence: Evidence, reuse: bool, rollback: bool = False
    ) -> Retune:
        s, config = self._state, replace(self._config, lr=lr, batch_size=batch)
        s.config, s.moves, s.broken = [config.lr, config.batch_size, config.weight_decay], s.moves + 1, 0
        s.test = None
        self._begin()
        return Retune(config, reuse, reason, evidence, rollback)

    def _fail(self, reason: str, evidence: Evidence, rollback: bool = True) -> Decision:
        """Back to saved weights if they can be trusted, else to untrained ones, below the learning rate that failed."""
        s, old = self._state, self._config
        if s.moves >= self.max_moves:
            return Stop(f"{reason}, and all {self.max_moves} moves are made", evidence)
        self._cap(0.5 * old.lr)
        if rollback and s.saved is not None and s.rollbacks < 2:
            lr, batch = s.saved[0], s.saved[1]
            between = math.sqrt(lr * old.lr) if lr < old.lr / 4.0 and batch == old.batch_size else lr
            lr = min(between, 0.5 * old.lr) if s.raised else 0.5 * min(lr, old.lr)
            return self._rollback(lr, batch, f"{reason}: back to saved weights", evidence)
        if old.lr <= self.lr_bounds[0]:
            return Stop(f"{reason} at the lowest learning rate allowed", evidence)
        # What the gauges of a wrecked network say about its batch is void; a small one makes the next attempt cheap.
        batch = min(old.batch_size, max(16, old.batch_size // 4))
        return self._restart(old.lr / 30.0, batch, f"{reason}: start again lower", evidence)

    def _cap(self, lr: float) -> None:
        """Never to reach that learning rate again, at any batch, but for coupling."""
        per_batch = lr / self._config.batch_size**self.coupling
        self._state.ceiling = min(per_batch, self._state.ceiling or math.inf)

    def _below(self, lr: float, batch: float) -> float:
        """`lr`, but no higher than what has failed."""
        ceiling = self._state.ceiling
        return lr if ceiling is None else min(lr, ceiling * batch**self.coupling)
