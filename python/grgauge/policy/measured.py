"""The measured rules: gauges judged by their intervals, and the loss where gauges cannot tell.

Numbers are in `rules`, with their reasons.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean, stdev
from typing import Any

from ..reading import Reading
from ..theory import batch_for_gr_s, noise_scale_from_gr_s, uncorrelated
from .course import Course, restored
from .decisions import Config, Continue, Decision, Evidence, Probe, Retune, Stop
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
class RaiseOnTrial:
    """Learning rate and loss as the learning rate was raised against a stalled loss."""

    lr: float
    loss: float
    loss_error: float


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
    found: bool = False  # GR_T has been in the zone or above it
    hurt: bool = False  # the loss has been well above that of untrained weights
    climbed: bool = False  # these weights have seen the learning rate rise to where it is
    on_plateau: bool = False  # ... by the loss alone, and nothing is learned yet
    repeated: bool = False  # a trial equivalent to one of `begun` was due, and it has been said
    ceiling: float | None = None  # learning rate that failed, carried over to a batch of 1
    begun: list[Config] = field(default_factory=list)  # what untrained weights began at
    saved: SavedWeights | None = None
    trial: RaiseOnTrial | None = None
    rival: Rival | None = None
    probed: Config | None = None  # what the newest probe compares with, until that is judged
    next_probe: float = 0.0  # samples of these weights, before which there is no other


class Measured:
    """Up step by step from below, down by the loss, the batch by its noise scale; see `Policy`."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._state = settings, State()

    def observe(
        self,
        reading: Reading | None,
        config: Config,
        *,
        loss: float | None = None,
        samples: float | None = None,
        lr_factor: float = 1.0,
    ) -> Decision:
        s, course, limits = self._state, self._state.course, self._settings
        step = None if reading is None else reading.step
        self._follow(config)
        if loss is not None and abs(loss) < RULES.largest:
            s.broken = 0
            s.losses.add(loss)
        elif loss is not None:
            s.broken += 1
        inside = limits.fit(config, config.lr, config.batch_size)
        if inside != config and course.moves < limits.max_moves:
            return self._move(inside.lr, inside.batch_size, "configuration out of bounds", Evidence("bounds", step))
        if s.broken >= RULES.max_broken:
            return self._fail("the loss is not finite", Evidence("diverged", step, "loss"))
        steps = course.advance(reading, samples, limits.every)
        if reading is None or steps is None:
            return Continue("no new reading", Evidence("waiting", step))
        warming = s.lr_factor is not None and lr_factor > s.lr_factor
        s.lr_factor, s.peak = lr_factor, max(s.peak, lr_factor)
        s.steps += steps
        if warming:  # nothing that is seen so far is the doing of this learning rate
            s.steps = 0
            course.begin()
            self._forget()
        block = s.losses.close(course.samples)
        return (
            self._wrecked(block)
            or self._plateau_left()
            or self._trial()
            or self._spatial(reading)
            or self._probe(reading, warming)
            or self._temporal(reading, warming)
            or Continue("nothing to change", Evidence("steady", course.step))
        )

    @property
    def probed(self) -> Config | None:
        """What a probe that was asked for compares with."""
        return self._state.probed

    def judge(self, here: Sequence[float], there: Sequence[float]) -> Decision:
        """What a probe has shown; see `Policy.judge`."""
        s, other = self._state, self._state.probed
        assert other is not None
        level, difference, error = fmean(here), math.inf, 0.0
        if all(map(math.isfinite, (*here, *there))):
            differences = [after - before for before, after in zip(here, there, strict=True)]
            difference, error = fmean(differences), stdev(differences) / math.sqrt(len(differences))
        margin = error + RULES.probe_better * abs(level)
        evidence = self._evidence("probe", "loss", level + difference, (level - margin, level + margin))
        s.probed = None
        if difference < -margin:
            decision = self._move(other.lr, other.batch_size, "a higher learning rate has a lower loss", evidence)
            s.next_probe = s.course.samples
            return decision
        if not difference <= abs(level):
            self._cap(RULES.failed * other.lr)
        return Continue(f"lr {other.lr:.2e} has no lower loss", evidence, notable=True)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._state = restored(State, state)

    # --- what the loss says -------------------------------------------------------------------------------------------

    def _wrecked(self, block: float | None) -> Decision | None:
        """Exploded, dead, or worse than before the newest move."""
        s, age, losses, saved = self._state, self._state.course.age, self._state.losses, self._state.saved
        if block is None or losses.first is None:
            return None
        first, noise = losses.first, RULES.judged_errors * losses.error(1)
        scale = abs(first)
        known = max(first, saved.loss) if saved else first
        evidence = self._evidence("loss", "loss", block, (known - noise, known + noise))
        recent = losses.level(RULES.level_blocks, s.course.start)
        # A learning rate on trial may shake the loss: it is judged when that is over, unless the loss doubles.
        doubled = s.trial is not None and recent is not None and recent > s.trial.loss + abs(s.trial.loss)
        if block > known + RULES.exploded * scale or doubled:
            return self._fail("the loss exploded", replace(evidence, rule="explosion"))
        if block > first + RULES.hurt * scale:
            s.hurt = True
        blocks = RULES.recent_blocks
        if saved and saved.raised and s.trial is None and blocks * self._settings.every <= age <= RULES.worse_steps:
            now, error = losses.level(blocks, s.course.start), math.hypot(losses.error(blocks), saved.loss_error)
            margin = RULES.judged_errors * error + RULES.worse * abs(saved.loss)
            if now is not None and now > saved.loss + margin:
                reason = "the loss is worse than before the learning rate was raised"
                return self._fail(reason, replace(evidence, rule="worse", value=now))
        if s.hurt and age >= RULES.dead_steps and not self._learned():
            return self._fail("the network is dead", replace(evidence, rule="dead"), rollback=False)
        return None

    def _learned(self) -> bool:
        """The loss is clearly below that of untrained weights. True where there is no loss to tell."""
        losses, untrained = self._state.losses, self._state.losses.untrained()
        now = losses.level(RULES.learned_blocks)
        if untrained is None or now is None:
            return untrained is None
        error = losses.error(RULES.learned_blocks)
        return now < untrained - max(RULES.learned_errors * error, RULES.learned * abs(untrained))

    def _rival_further(self) -> Decision | None:
        """Weights abandoned for a learning rate too high were further at equal samples: back towards it."""
        s, old = self._state, self._state.course.now
        now = s.losses.level(RULES.level_blocks, s.course.start)
        then = None if s.rival is None else s.rival.losses.at(s.course.samples)
        if now is None or then is None or s.rival is None:
            return None
        error = math.hypot(s.losses.error(RULES.level_blocks), s.rival.losses.error(1))
        margin = RULES.judged_errors * error + RULES.rival * abs(then)
        lr = min(RULES.rival_raise * old.lr, s.rival.lr * old.batch_size**self._settings.coupling)
        if now < then + margin or lr < RULES.least_raise * old.lr:
            return None
        s.ceiling = None
        evidence = self._evidence("behind", "loss", now, (then - margin, then + margin))
        return self._move(lr, old.batch_size, "an earlier trial was further at equal samples", evidence)

    def _plateau(self) -> Decision | None:
        """Nothing learned and nothing hurt, where noise alone reads GR_T 19 at any learning rate: by the loss, up."""
        s, course, old, losses = self._state, self._state.course, self._state.course.now, self._state.losses
        blocks = losses.blocks(course.start)
        now, untrained = losses.level(blocks, course.start), losses.untrained()
        if now is None or untrained is None or course.age < RULES.settled_steps or s.hurt or s.found or self._learned():
            return None
        error, scale = losses.error(blocks), abs(untrained)
        falls = RULES.plateau_errors * error + RULES.plateau_slope * scale
        if (
            error > RULES.plateau_error * scale
            or now < untrained - RULES.plateau_fall * scale
            or (losses.fall(blocks, course.start) or 0.0) > falls
        ):
            return None
        cheap = min(old.batch_size, max(RULES.plateau_batch, old.batch_size // RULES.plateau_share))
        batch = self._settings.fit(old, old.lr, cheap).batch_size
        lr = old.lr * self._plateau_raise * (batch / old.batch_size) ** self._settings.coupling
        if lr > RULES.plateau_below * self._below(math.inf, batch):
            return None
        decision = self._move(lr, batch, "the loss does not move", self._evidence("plateau", "loss", now))
        s.on_plateau = s.on_plateau or isinstance(decision, Retune)
        return decision

    def _plateau_left(self) -> Decision | None:
        """One move back, for the learning rate was raised until after it was enough."""
        s, old = self._state, self._state.course.now
        if not s.on_plateau or not self._learned():
            return None
        s.on_plateau = False
        evidence = self._evidence("plateau", "loss", s.losses.level(RULES.learned_blocks))
        return self._move(old.lr / self._plateau_raise, old.batch_size, "the plateau is left: one move back", evidence)

    @property
    def _plateau_raise(self) -> float:
        return min(RULES.plateau_raise, self._settings.max_lr_factor)

    def _stall(self, reading: Reading, lr: float, batch: float, reason: str, evidence: Evidence) -> Decision | None:
        """Against a loss that has not fallen for a while, all of it under this configuration.

        With less noise, at the configuration given; but where GR_T cannot tell, with a higher learning rate, on trial.
        """
        s, old, losses = self._state, self._state.course.now, self._state.losses
        since = (1.0 - RULES.stall_share) * s.course.samples
        blocks = losses.blocks(since) // 2 * 2
        level, fall = losses.level(blocks, since), losses.fall(blocks, since)
        if since < s.course.start or blocks < RULES.stall_blocks or level is None or fall is None:
            return None
        error = losses.error(blocks // 2)
        if error > RULES.stall_error * abs(level) or fall > RULES.stall_errors * error:
            return None
        higher = self._below(RULES.stall_raise * old.lr, old.batch_size)
        if not _jumps(reading) or higher < RULES.least_raise * old.lr:
            if lr < old.lr:
                self._cap(old.lr)
            return self._move(lr, batch, reason, evidence)
        evidence = replace(evidence, rule="stall")
        decision = self._move(higher, old.batch_size, "the loss has stalled, and GR_T cannot tell why", evidence)
        s.trial = RaiseOnTrial(old.lr, level, losses.error(blocks)) if isinstance(decision, Retune) else None
        return decision

    def _trial(self) -> Decision | None:
        """What a learning rate raised against a stall has done to the loss."""
        s, course, losses, trial = self._state, self._state.course, self._state.losses, self._state.trial
        if trial is None:
            return None
        blocks = losses.blocks(course.start) // 2  # the newer half: at first the change itself shows
        now, error = losses.level(blocks, course.start), math.hypot(losses.error(max(blocks, 1)), trial.loss_error)
        scale, seen = abs(trial.loss), course.samples
        unsure = error > RULES.trial_error * scale and seen < (1.0 + RULES.trial_share_unsure) * course.start
        if now is None or blocks < RULES.trial_blocks or seen < (1.0 + RULES.trial_share) * course.start or unsure:
            return Continue("a higher learning rate is on trial", Evidence("stall", course.step))
        margin = max(RULES.trial_errors * error, RULES.trial_worse * scale)
        s.trial = None
        if s.saved:
            s.saved.raised = False
        if now < trial.loss + margin:
            return None
        self._cap(trial.lr)
        evidence = self._evidence("stall", "loss", now, (trial.loss - margin, trial.loss + margin))
        reason = "the loss is worse than before the learning rate was raised"
        return self._move(trial.lr, course.now.batch_size, reason, evidence)

    # --- what the gauges say ------------------------------------------------------------------------------------------

    def _spatial(self, reading: Reading) -> Decision | None:
        """The batch: down as soon as it is far too large, since that is dear; up with care."""
        s, limits, target, old = self._state, self._settings, self._settings.target, self._state.course.now
        gr_s, error, mu = reading.gr_s, _finite(reading.gr_s_error), reading.noise_scale
        if gr_s is None or not 0.0 < gr_s < math.inf:
            return None
        low, high = target.gr_s_zone
        if error is None:
            if s.found or gr_s > RULES.far_above * low:
                return None
            wanted, interval = old.batch_size * gr_s / target.gr_s, None
        else:
            interval = (gr_s - limits.z * error, gr_s + limits.z * error)
            unsure = gr_s > high and interval[1] > 1.0 and s.course.age >= RULES.unsure_steps
            if interval[1] < low:
                known = mu is not None and 0.0 < mu < math.inf
                known = known and (reading.noise_scale_error or math.inf) < RULES.noise_scale_error * (mu or 0.0)
                wanted = batch_for_gr_s(target.gr_s, mu or 0.0) if known else old.batch_size * gr_s / target.gr_s
            elif interval[0] > high or unsure:
                # from below: to the near edge of the zone, as the near end of the interval has it
                near = min(max(interval[0], 1.0 / old.batch_size), RULES.near_one)
                known = near > high and old.batch_size > 1  # a batch of 1 reads 1 whatever the noise is
                wanted = batch_for_gr_s(high, noise_scale_from_gr_s(near, old.batch_size)) if known else math.inf
            else:
                s.away = 0
                return None
        most = min(RULES.found_raise, limits.max_batch_factor) if s.found else limits.max_batch_factor
        wanted = min(max(wanted, old.batch_size / limits.max_batch_factor**2), old.batch_size * most)
        s.away += 1
        evidence = self._evidence("batch", "GR_S", gr_s, interval)
        batch = limits.fit(old, old.lr, wanted).batch_size
        ratio = batch / old.batch_size
        needed, checks = (RULES.found_batch_change, RULES.found_checks) if s.found else (RULES.batch_change, 1)
        if max(ratio, 1.0 / ratio) < needed or s.away < checks:
            return None
        quiet = not s.recent or s.recent[-1] <= math.log(target.gr_t_zone[1])
        if ratio > 1.0 and s.found:
            return self._stall(reading, old.lr, batch, "the batch is too small", evidence) if quiet else None
        if ratio > 1.0 and (batch > RULES.largest_raised or not self._learned()):
            return None
        # Up only where GR_T asks for it too: from below. Later, noise that grows with progress asks for averaging.
        low_lr = not (s.found or s.hurt) and bool(s.recent) and max(s.recent) < math.log(target.gr_t_zone[0])
        lr = old.lr * ratio**limits.coupling if ratio < 1.0 or low_lr else old.lr
        reason = "the batch is too small" if ratio > 1.0 else "the batch is larger than it need be"
        return self._move(self._below(lr, batch), batch, reason, evidence)

    def _probe(self, reading: Reading, warming: bool) -> Decision | None:
        """Noise hides the learning rate from GR_T, at any value: a higher one is tried beside the present one."""
        s, course, old = self._state, self._state.course, self._state.course.now
        hidden = (_finite(reading.gr_s) or 0.0) > RULES.probe_gr_s
        due = s.steps >= RULES.probe_steps and course.samples >= s.next_probe
        higher = self._below(RULES.probe_factor * old.lr, old.batch_size)
        to = self._settings.fit(old, higher, old.batch_size)
        if (
            not (hidden and due)
            or course.age < RULES.settled_steps
            or warming
            or self._decaying
            or s.trial is not None
            or s.losses.first is None
            or to.lr < RULES.least_raise * old.lr
            or course.moves >= self._settings.max_moves
        ):
            return None
        s.probed, s.next_probe = to, RULES.probe_again * course.samples
        steps = max(RULES.probe_steps, RULES.probe_share * s.steps)
        evidence = self._evidence("probe", "GR_S", reading.gr_s)
        return Probe((old, to), round(steps * old.batch_size), "GR_S says that GR_T cannot tell", evidence)

    def _temporal(self, reading: Reading, warming: bool) -> Decision | None:
        """The learning rate: up step by step while GR_T is low, down where it is high."""
        s, course, limits, (low, high) = (
            self._state,
            self._state.course,
            self._settings,
            self._settings.target.gr_t_zone,
        )
        if reading.gr_t is None or not (0.0 < reading.gr_t < math.inf and reading.finite_time_factor > 0.0):
            return None
        if warming:
            return Continue("the schedule is warming up", self._evidence("schedule", "GR_T", reading.gr_t))
        grown = full_grown(max(reading.gr_t, 1.0), reading.finite_time_factor)
        s.recent = [*s.recent[1 - RULES.readings :], math.log(min(grown, RULES.largest))]
        error = (_finite(reading.gr_t_error) or 0.0) / reading.gr_t
        spread = min(max(error, RULES.least_error), RULES.most_error) / math.sqrt(len(s.recent))
        gr_t, reach = math.exp(sum(s.recent) / len(s.recent)), math.exp(limits.z * spread)
        evidence = self._evidence("learning rate", "GR_T", gr_t, (gr_t / reach, gr_t * reach))
        gr_s, gr_s_error = _finite(reading.gr_s) or 0.0, _finite(reading.gr_s_error)
        if gr_s > limits.blind:
            evidence = replace(evidence, rule="blind")
            return self._plateau() or Continue("GR_S says that GR_T is blind", evidence)
        if gr_t * reach < low:
            return self._too_low(gr_t, reach, evidence)
        if self._begun_badly and (
            (s.hurt and gr_t > high) or (gr_t > RULES.overshot * high and gr_t / reach > high and self._learned())
        ):
            # What far too high a learning rate does to fresh weights later gauges do not show: trust no such start.
            self._cap(course.now.lr)
            lr = course.now.lr / (RULES.restart if s.hurt else RULES.restart_high)
            return self._start_lower(lr, "started too high: again, from below", evidence)
        if gr_t / reach > high:
            return self._plateau() or self._too_high(reading, gr_t, evidence)
        unseen = gr_s_error is not None and (reading.gr_s or 0.0) + limits.z * gr_s_error > 1.0
        if course.age >= limits.grace and self._learned() and not unseen:
            s.found = True
        return self._plateau() or self._rival_further() or Continue("in the zone", evidence)

    @property
    def _begun_badly(self) -> bool:
        """The learning rate that untrained weights began at is still what shows."""
        s = self._state
        return not s.climbed and s.course.age >= RULES.start_steps and s.steps <= RULES.target_step

    @property
    def _decaying(self) -> bool:
        """The schedule is clearly below its peak."""
        s = self._state
        return s.lr_factor is not None and s.lr_factor < RULES.decayed * s.peak

    def _too_low(self, gr_t: float, reach: float, evidence: Evidence) -> Decision:
        s, course, limits, old = self._state, self._state.course, self._settings, self._state.course.now
        # Once: with small batches a first loss low by chance is enough to look hurt.
        if s.hurt and s.rival is None and self._begun_badly:
            return self._start_lower(old.lr / RULES.restart, "hurt by its first steps: again, from below", evidence)
        patience = RULES.target_step if s.found else RULES.patience + RULES.patience_per_gr_t * gr_t
        trending = reach > RULES.trend and course.age < RULES.trend_steps
        good = s.found and gr_t > RULES.far_below * limits.target.gr_t_zone[0]
        if self._decaying:
            return Continue("below the zone, as the schedule decays", evidence)
        if len(s.recent) < RULES.least_readings or trending or course.age < patience or good:
            return Continue("below the zone, waiting", evidence)
        factor = min((limits.target.gr_t / gr_t) ** limits.gain, limits.max_lr_factor)
        batch = old.batch_size if s.steps > RULES.young_steps else min(old.batch_size, RULES.young_batch)
        lr = self._below(old.lr * factor, batch)
        if lr < RULES.least_raise * old.lr:
            further = self._rival_further()
            return further or Continue("below the zone, just below a learning rate that failed", evidence)
        return self._move(lr, batch, "the learning rate is too low", evidence)

    def _too_high(self, reading: Reading, gr_t: float, evidence: Evidence) -> Decision:
        s, age, limits, old = self._state, self._state.course.age, self._settings, self._state.course.now
        beyond = gr_t > RULES.overshot * limits.target.gr_t_zone[1]
        overshot = not s.found and beyond and age >= RULES.settled_steps and not _jumps(reading)
        s.found = s.found or (age >= limits.grace and self._learned())
        factor = min((limits.target.gr_t / gr_t) ** RULES.lower_power, RULES.least_lowered)
        lr, reason = old.lr * max(factor, 1.0 / limits.max_lr_factor), "the learning rate is too high"
        if overshot:
            self._cap(old.lr)
            return self._move(lr, old.batch_size, reason, evidence)
        stalled = self._stall(reading, lr, old.batch_size, reason, evidence)
        return stalled or Continue("above the zone, but the loss falls", evidence)

    # --- moves --------------------------------------------------------------------------------------------------------

    def _follow(self, config: Config) -> None:
        s, before = self._state, self._state.course.config
        if config == before:
            return
        if before is not None and (before.lr, before.batch_size) != (config.lr, config.batch_size):
            s.trial = None  # what was on trial is not what runs
        s.course.config = config
        s.begun = s.begun or [config]
        s.course.begin()
        self._forget()

    def _forget(self) -> None:
        """A configuration begins: its gauges start cold."""
        self._state.recent, self._state.away = [], 0

    def _move(self, lr: float, batch: float, reason: str, evidence: Evidence) -> Decision:
        """To another configuration with the weights at hand, which are saved first."""
        s, old = self._state, self._state.course.now
        decision = self._book(lr, batch, reason, evidence)
        if isinstance(decision, Retune):
            blocks = RULES.recent_blocks
            level, raised = s.losses.level(min(blocks, len(s.losses.curve))), decision.config.lr > old.lr
            error = s.losses.error(blocks)
            at = old.lr, old.batch_size, s.course.samples
            s.saved = None if level is None else SavedWeights(*at, level, error, raised)
            s.climbed = s.climbed or raised
        return decision

    def _fail(self, reason: str, evidence: Evidence, rollback: bool = True) -> Decision:
        """Back to saved weights if they can be trusted, else to untrained ones, below the learning rate that failed."""
        s, old, saved, limits = self._state, self._state.course.now, self._state.saved, self._settings
        if s.course.moves >= limits.max_moves:
            return Stop(f"{reason}, and all {limits.max_moves} moves are made", evidence)
        failed = RULES.failed * old.lr
        self._cap(failed)
        if rollback and saved is not None and saved.rollbacks < RULES.max_rollbacks:
            far = saved.lr < old.lr / RULES.far_raised and saved.batch_size == old.batch_size
            between = math.sqrt(saved.lr * old.lr) if far else saved.lr
            lr = min(between, failed) if saved.raised else min(RULES.failed * saved.lr, failed)
            s.course.samples, saved.raised, saved.rollbacks = saved.samples, False, saved.rollbacks + 1
            s.losses.cut(saved.samples)
            return self._book(lr, saved.batch_size, f"{reason}: back to saved weights", evidence, rollback=True)
        if old.lr <= limits.lr_bounds[0]:
            return Stop(f"{reason} at the lowest learning rate allowed", evidence)
        batch = min(old.batch_size, max(RULES.restart_batch, old.batch_size // RULES.restart_share))
        return self._restart(old.lr / RULES.restart, batch, f"{reason}: start again lower", evidence)

    def _start_lower(self, lr: float, reason: str, evidence: Evidence) -> Decision:
        """From untrained weights at a lower learning rate, if that is not what has been run already.

        Weight decay being what it was, such a run is equivalent where learning rate and batch are, whatever the regime.
        """
        s, old = self._state, self._state.course.now
        to = self._settings.fit(old, lr, old.batch_size)
        if any(
            to.batch_size == run.batch_size and abs(to.lr - run.lr) <= RULES.same_lr * max(to.lr, run.lr)
            for run in s.begun
        ):
            new, s.repeated = not s.repeated, True
            reason = f"{reason}, but {to} is equivalent to a trial that was run, and not run again"
            return Continue(reason, replace(evidence, rule="repeat") if new else evidence, notable=new)
        return self._restart(lr, old.batch_size, reason, evidence)

    def _restart(self, lr: float, batch: float, reason: str, evidence: Evidence) -> Decision:
        """To another configuration from untrained weights."""
        s, old = self._state, self._state.course.now
        decision = self._book(lr, batch, reason, evidence, reuse=False)
        if isinstance(decision, Retune):
            self._state = State(
                Course(decision.config, moves=s.course.moves),
                peak=s.peak,
                ceiling=s.ceiling,
                begun=[*s.begun, decision.config],
                rival=Rival(s.losses, old.lr / old.batch_size**self._settings.coupling),
            )
        return decision

    def _book(
        self, lr: float, batch: float, reason: str, evidence: Evidence, *, reuse: bool = True, rollback: bool = False
    ) -> Decision:
        s, course = self._state, self._state.course
        to = self._settings.fit(course.now, lr, batch)
        decision = course.move(to, self._settings.max_moves, reason, evidence, reuse=reuse, rollback=rollback)
        if isinstance(decision, Retune):
            s.broken, s.trial = 0, None
            self._forget()
        return decision

    def _cap(self, lr: float) -> None:
        """Never to reach that learning rate again, at any batch, but for coupling."""
        per_batch = lr / self._state.course.now.batch_size**self._settings.coupling
        self._state.ceiling = min(per_batch, self._state.ceiling or math.inf)

    def _below(self, lr: float, batch: float) -> float:
        """`lr`, but no higher than what has failed."""
        ceiling = self._state.ceiling
        return lr if ceiling is None else min(lr, ceiling * batch**self._settings.coupling)

    def _evidence(
        self, rule: str, quantity: str, value: float | None, interval: tuple[float, float] | None = None
    ) -> Evidence:
        return Evidence(rule, self._state.course.step, quantity, value, interval)


def full_grown(gr_t: float, finite_time_factor: float) -> float:
    """What a GR_T read after a cold start would become: `theory.steady_signal` solved for the signal, and t -> inf.

    1 stays 1, and what white noise reads by then becomes the 19 that it ends at; above, in proportion.
    """
    white = uncorrelated()
    young = white * finite_time_factor
    if gr_t >= young:
        return gr_t / finite_time_factor
    signal = (young - gr_t) / (young * max(gr_t - 1.0, 1e-9))
    return (1.0 + signal) / (signal + 1.0 / white)


def _jumps(reading: Reading) -> bool:
    """GR_T's error is about its own size: it says little of the learning rate, and nothing of noise."""
    return (_finite(reading.gr_t_error) or 0.0) > RULES.jumps * (reading.gr_t or 0.0)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
