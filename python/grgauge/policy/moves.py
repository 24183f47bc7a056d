"""What a run under the measured rules remembers, and its moves: on, back to saved weights, or from untrained ones.

Moves are booked here: which weights are saved, which learning rates have failed, and what was begun before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from .course import Course
from .decisions import Config, Continue, Decision, Evidence, Retune, Stop
from .losses import Losses
from .rules import RULES
from .settings import Settings


@dataclass
class SavedWeights:
    """The weights as the newest move began, and what they ran at."""

    lr: float
    batch_size: int
    samples: float
    loss: float
    loss_error: float
    raised: bool  # the move raised the learning rate, and whether that was well is still open
    rollbacks: int = 0


@dataclass
class Rival:
    """The weights that were abandoned last: their losses, and their learning rate carried over to a batch of 1."""

    losses: Losses
    lr: float


@dataclass
class State:
    course: Course = field(default_factory=Course)
    losses: Losses = field(default_factory=Losses)
    steps: int = 0  # that these weights have been trained for since the schedule's warm-up
    broken: int = 0  # losses in a row that were not finite
    lr_factor: float | None = None  # of the schedule, at the newest check
    peak: float = 0.0  # its highest
    recent: list[float] = field(default_factory=list)  # log GR_T of the newest readings under this configuration
    away: int = 0  # checks in a row that found the batch outside its zone
    aligned: int = 0  # ... that found gradients in agreement but for their noise
    found: bool = False  # GR_T has been in the zone or above it
    hurt: bool = False  # the loss has been well above that of untrained weights
    climbed: bool = False  # these weights have seen the learning rate rise to where it is
    on_plateau: bool = False  # ... by the loss alone, and nothing is learned yet
    patient: bool = False  # no learning rate has moved the loss: it is waited for
    repeated: bool = False  # a trial equivalent to one of `begun` was due, and it has been said
    ceiling: float | None = None  # learning rate that failed, carried over to a batch of 1
    begun: list[Config] = field(default_factory=list)  # what untrained weights began at
    saved: SavedWeights | None = None
    rival: Rival | None = None
    probed: Config | None = None  # what the newest probe compares with, until that is judged
    untrained: bool = False  # ... and whether that begins with untrained weights
    next_probe: float = 0.0  # samples of these weights, before which there is no other
    next_untrained: float = 0.0  # ... and none with untrained weights
    probe_down: bool = False  # the next one tries a lower learning rate, as the last has found none higher


class Moves:
    """The state and the settings that rules read, and every way to change the configuration."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.state = settings, State()

    def follow(self, config: Config) -> None:
        """Take up what training runs at."""
        s = self.state
        if not s.course.follow(config):
            return
        s.begun = s.begun or [config]
        self.begin()

    def begin(self) -> None:
        """A configuration begins: its gauges start cold."""
        self.state.course.begin()
        self.state.recent, self.state.away, self.state.aligned = [], 0, 0

    def to(self, lr: float, batch: float, reason: str, evidence: Evidence) -> Decision:
        """To another configuration with the weights at hand, which are saved first."""
        s, old, blocks = self.state, self.state.course.now, RULES.recent_blocks
        decision = self._book(lr, batch, reason, evidence)
        if isinstance(decision, Retune):
            level, raised = s.losses.level(min(blocks, len(s.losses.curve))), decision.config.lr > old.lr
            at = old.lr, old.batch_size, s.course.samples
            s.saved = None if level is None else SavedWeights(*at, level, s.losses.error(blocks), raised)
            s.climbed = s.climbed or raised
        return decision

    def fail(self, reason: str, evidence: Evidence, rollback: bool = True) -> Decision:
        """Back to saved weights if they can be trusted, else to untrained ones, below the learning rate that failed."""
        s, old, saved, limits = self.state, self.state.course.now, self.state.saved, self.settings
        if s.course.moves >= limits.max_moves:
            return Stop(f"{reason}, and all {limits.max_moves} moves are made", evidence)
        failed = RULES.failed * old.lr
        self.cap(failed)
        if rollback and saved is not None and saved.rollbacks < RULES.max_rollbacks:
            far = saved.lr < old.lr / RULES.far_raised and saved.batch_size == old.batch_size
            between = math.sqrt(saved.lr * old.lr) if far else saved.lr
            lr = min(between if saved.raised else RULES.failed * saved.lr, failed)
            s.course.samples, saved.raised, saved.rollbacks = saved.samples, False, saved.rollbacks + 1
            s.losses.cut(saved.samples)
            return self._book(lr, saved.batch_size, f"{reason}: back to saved weights", evidence, rollback=True)
        if old.lr <= limits.lr_bounds[0]:
            return Stop(f"{reason} at the lowest learning rate allowed", evidence)
        batch = min(old.batch_size, max(RULES.small_batch, old.batch_size // RULES.cheap_share))
        lr = min(old.lr / RULES.restart, limits.usual_lr)
        return self._restart(lr, batch, f"{reason}: start again lower", evidence)

    def start_lower(self, lr: float, reason: str, evidence: Evidence) -> Decision:
        """From untrained weights at a lower learning rate, if that is not what has been run already.

        Weight decay being what it was, such a run is equivalent where learning rate and batch are, whatever the regime.
        """
        s, old = self.state, self.state.course.now
        to = self.settings.fit(old, lr, old.batch_size)
        same = (run for run in s.begun if run.batch_size == to.batch_size)
        if not any(abs(to.lr - run.lr) <= RULES.same_lr * max(to.lr, run.lr) for run in same):
            return self._restart(lr, old.batch_size, reason, evidence)
        new, s.repeated = not s.repeated, True
        reason = f"{reason}, but {to} is equivalent to a trial that was run, and not run again"
        return Continue(reason, replace(evidence, rule="repeat") if new else evidence, notable=new)

    def start_patiently(self, reason: str, evidence: Evidence) -> Decision:
        """From untrained weights at the usual learning rate, which no plateau raises again."""
        self.state.patient = True
        return self._restart(self.settings.usual_lr, self.state.course.now.batch_size, reason, evidence)

    def caught_up(self, to: Config, reason: str, evidence: Evidence) -> Decision:
        """To weights that began untrained at another configuration, and have seen as many samples as those at hand."""
        s, old = self.state, self.state.course.now
        decision = self._book(to.lr, to.batch_size, reason, evidence, probed=True)
        if isinstance(decision, Retune):
            self.cap(old.lr)
            self.state = State(
                s.course,
                Losses(s.losses.first, s.losses.curve[:1]),
                steps=s.steps,
                lr_factor=s.lr_factor,
                peak=s.peak,
                ceiling=s.ceiling,
                begun=[*s.begun, to],
            )
        return decision

    def cap(self, lr: float) -> None:
        """Never to reach that learning rate again, at any batch, but for coupling."""
        per_batch = lr / self.state.course.now.batch_size**self.settings.coupling
        self.state.ceiling = min(per_batch, self.state.ceiling or math.inf)

    def below(self, lr: float, batch: float) -> float:
        """`lr`, but no higher than what has failed."""
        ceiling = self.state.ceiling
        return lr if ceiling is None else min(lr, ceiling * batch**self.settings.coupling)

    def _restart(self, lr: float, batch: float, reason: str, evidence: Evidence) -> Decision:
        """To another configuration from untrained weights, of which nothing is known but what failed before."""
        s, old = self.state, self.state.course.now
        decision = self._book(lr, batch, reason, evidence, reuse=False)
        if isinstance(decision, Retune):
            self.state = State(
                Course(decision.config, moves=s.course.moves),
                peak=s.peak,
                ceiling=s.ceiling,
                patient=s.patient,
                begun=[*s.begun, decision.config],
                rival=Rival(s.losses, old.lr / old.batch_size**self.settings.coupling),
            )
        return decision

    def _book(self, lr: float, batch: float, reason: str, evidence: Evidence, **weights: bool) -> Decision:
        s, most = self.state, self.settings.max_moves
        to = self.settings.fit(s.course.now, lr, batch)
        decision = s.course.move(to, most, reason, evidence, **weights)
        if isinstance(decision, Retune):
            s.broken = 0
            self.begin()
        return decision
