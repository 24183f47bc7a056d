"""The measured rules: gauges where they can tell, the loss for what was damaged.

Numbers are in `rules`, with their reasons.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..reading import Reading
from ..theory import batch_for_gr_s, uncorrelated
from .course import Course, restored
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
class State:
    course: Course = field(default_factory=Course)
    losses: Losses = field(default_factory=Losses)
    steps: int = 0  # that these weights have been trained for since the schedule's warm-up
    broken: int = 0  # losses in a row that were not finite
    lr_factor: float | None = None  # of the schedule, at the newest check
    peak: float = 0.0  # its highest
    recent: list[float] = field(default_factory=list)  # log GR_T of the newest readings under this configuration
    found: bool = False  # GR_T has been in the zone or above it
    hurt: bool = False  # the loss has been well above that of untrained weights
    climbed: bool = False  # these weights have seen the learning rate rise to where it is
    on_plateau: bool = False  # ... by the loss alone, and nothing is learned yet
    repeated: bool = False  # a trial equivalent to one of `begun` was due, and it has been said
    ceiling: float | None = None  # learning rate that failed, carried over to a batch of 1
    begun: list[Config] = field(default_factory=list)  # what untrained weights began at
    saved: SavedWeights | None = None


class Measured:
    """The rule set of `Policy.default()`.

    GR_T raises the learning rate where it is clearly low, GR_S cuts the batch where it is clearly too large, and the
    loss shows what was damaged.
    """

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
            s.recent = []
        block = s.losses.close(course.samples)
        return (
            self._wrecked(block)
            or self._plateau_left()
            or self._spatial(reading)
            or self._temporal(reading, warming)
            or Continue("nothing to change", Evidence("steady", course.step))
        )

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
        if block > known + RULES.exploded * scale:
            return self._fail("the loss exploded", replace(evidence, rule="explosion"))
        if block > first + RULES.hurt * scale:
            s.hurt = True
        blocks = RULES.recent_blocks
        if saved and saved.raised and blocks * self._settings.every <= age <= RULES.worse_steps:
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

    def _stall(self, gr_t: float, least: float, jumps: bool, evidence: Evidence) -> Decision | None:
        """Down where the loss has not fallen for a while and GR_T, `least` or more, is clearly too high."""
        s, old, losses, limits = self._state, self._state.course.now, self._state.losses, self._settings
        since = (1.0 - RULES.stall_share) * s.course.samples
        blocks = losses.blocks(since) // 2 * 2
        level, fall = losses.level(blocks, since), losses.fall(blocks, since)
        if since < s.course.start or blocks < RULES.stall_blocks or level is None or fall is None:
            return None
        error = losses.error(blocks // 2)
        if error > RULES.stall_error * abs(level) or fall > RULES.stall_errors * error:
            return None
        if least > RULES.overshot * limits.target.gr_t_zone[1] and not jumps:
            factor = max(
                min((limits.target.gr_t / gr_t) ** RULES.lower_power, RULES.least_lowered), 1.0 / limits.max_lr_factor
            )
            reason = "the learning rate is too high, and the loss has stalled"
            return self._move(factor * old.lr, old.batch_size, reason, evidence)
        return None

    # --- what the gauges say ------------------------------------------------------------------------------------------

    def _spatial(self, reading: Reading) -> Decision | None:
        """The batch: down where it is clearly too large, since that is dear; up where a small one leaves GR_T blind."""
        s, limits, target, old = self._state, self._settings, self._settings.target, self._state.course.now
        gr_s, error, mu = reading.gr_s, _finite(reading.gr_s_error), reading.noise_scale
        if gr_s is None or not 0.0 < gr_s < math.inf:
            return None
        low = target.gr_s_zone[0]
        interval = None if error is None else (gr_s - limits.z * error, gr_s + limits.z * error)
        if interval is None:
            if s.found or gr_s > RULES.far_above * low:
                return None
            wanted = old.batch_size * gr_s / target.gr_s
        elif interval[1] < low:
            known = mu is not None and 0.0 < mu < math.inf
            known = known and (reading.noise_scale_error or math.inf) < RULES.noise_scale_error * (mu or 0.0)
            wanted = batch_for_gr_s(target.gr_s, mu or 0.0) if known else old.batch_size * gr_s / target.gr_s
        elif gr_s > limits.blind and not s.found and s.course.age >= RULES.blind_steps and self._learned():
            wanted = max(RULES.small_batch, old.batch_size)
        else:
            return None
        least = old.batch_size / limits.max_batch_factor**2
        if s.steps < RULES.young_steps:
            least = max(least, min(old.batch_size, RULES.small_batch))
        batch = limits.fit(old, old.lr, min(max(wanted, least), old.batch_size * limits.max_batch_factor)).batch_size
        ratio = batch / old.batch_size
        if max(ratio, 1.0 / ratio) < RULES.batch_change:
            return None
        reason = "the batch leaves GR_T blind" if ratio > 1.0 else "the batch is larger than it need be"
        # Up at the same learning rate: noise that grows with progress asks for averaging.
        lr = self._below(old.lr * min(ratio, 1.0) ** limits.coupling, batch)
        return self._move(lr, batch, reason, self._evidence("batch", "GR_S", gr_s, interval))

    def _temporal(self, reading: Reading, warming: bool) -> Decision | None:
        """The learning rate: up step by step while GR_T is low, down where it is high."""
        s, course, limits = self._state, self._state.course, self._settings
        low, high = limits.target.gr_t_zone
        if reading.gr_t is None or not (0.0 < reading.gr_t < math.inf and reading.finite_time_factor > 0.0):
            return None
        if warming:
            return Continue("the schedule is warming up", self._evidence("schedule", "GR_T", reading.gr_t))
        gr_s, gr_s_error = _finite(reading.gr_s) or 0.0, _finite(reading.gr_s_error)
        if gr_s > limits.blind:
            blind = self._evidence("blind", "GR_T", reading.gr_t)
            return self._plateau() or Continue("GR_S says that GR_T is blind", blind)
        grown = full_grown(max(reading.gr_t, 1.0), reading.finite_time_factor)
        s.recent = [*s.recent[1 - RULES.readings :], math.log(min(grown, RULES.largest))]
        error = (_finite(reading.gr_t_error) or 0.0) / reading.gr_t
        spread = min(max(error, RULES.least_error), RULES.most_error) / math.sqrt(len(s.recent))
        gr_t, reach = math.exp(sum(s.recent) / len(s.recent)), math.exp(limits.z * spread)
        evidence = self._evidence("learning rate", "GR_T", gr_t, (gr_t / reach, gr_t * reach))
        too_low, begun = gr_t * reach < low, not s.climbed and course.age >= RULES.start_steps
        # Where GR_T is low only once: with small batches a first loss low by chance is enough to look hurt.
        doubtful = gr_t > high or (too_low and len(s.begun) == 1)
        if s.hurt and begun and doubtful and s.steps <= RULES.target_step:
            reason = "hurt by its first steps: again, from below"
            return self._start_lower(course.now.lr / RULES.restart, reason, evidence)
        if too_low:
            return self._too_low(gr_t, reach, evidence)
        if gr_t / reach > high:
            s.found = s.found or (course.age >= limits.grace and self._learned())
            stalled = self._stall(gr_t, gr_t / reach, _jumps(reading), evidence)
            return self._plateau() or stalled or Continue("above the zone, where GR_T cannot tell", evidence)
        unseen = gr_s_error is not None and gr_s + limits.z * gr_s_error > 1.0
        if course.age >= limits.grace and self._learned() and not unseen:
            s.found = True
        return self._plateau() or Continue("in the zone", evidence)

    def _too_low(self, gr_t: float, reach: float, evidence: Evidence) -> Decision:
        s, course, limits, old = self._state, self._state.course, self._settings, self._state.course.now
        patience = RULES.target_step if s.found else RULES.patience + RULES.patience_per_gr_t * gr_t
        trending = reach > RULES.trend and course.age < RULES.trend_steps
        good = s.found and gr_t > RULES.far_below * limits.target.gr_t_zone[0]
        if s.lr_factor is not None and s.lr_factor < RULES.decayed * s.peak:
            return Continue("below the zone, as the schedule decays", evidence)
        if len(s.recent) < RULES.least_readings or trending or course.age < patience or good:
            return Continue("below the zone, waiting", evidence)
        factor = min((limits.target.gr_t / gr_t) ** limits.gain, limits.max_lr_factor)
        lr = self._below(old.lr * factor, old.batch_size)
        if lr < RULES.least_raise * old.lr:
            return Continue("below the zone, just below a learning rate that failed", evidence)
        return self._move(lr, old.batch_size, "the learning rate is too low", evidence)

    # --- moves --------------------------------------------------------------------------------------------------------

    def _follow(self, config: Config) -> None:
        s = self._state
        if s.course.follow(config):
            s.recent = []
            s.begun = s.begun or [config]

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
        s = self._state
        decision = self._book(lr, batch, reason, evidence, reuse=False)
        if isinstance(decision, Retune):
            self._state = State(
                Course(decision.config, moves=s.course.moves),
                peak=s.peak,
                ceiling=s.ceiling,
                begun=[*s.begun, decision.config],
            )
        return decision

    def _book(
        self, lr: float, batch: float, reason: str, evidence: Evidence, *, reuse: bool = True, rollback: bool = False
    ) -> Decision:
        s, course = self._state, self._state.course
        to = self._settings.fit(course.now, lr, batch)
        decision = course.move(to, self._settings.max_moves, reason, evidence, reuse=reuse, rollback=rollback)
        if isinstance(decision, Retune):
            s.broken, s.recent = 0, []
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
