"""The measured rules: gauges where they can tell, and elsewhere two trainings compared side by side.

Numbers are in `rules`, with their reasons.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean, stdev
from typing import Any

from ..reading import Reading
from ..theory import batch_for_gr_s, uncorrelated
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
class State:
    course: Course = field(default_factory=Course)
    losses: Losses = field(default_factory=Losses)
    steps: int = 0  # that these weights have been trained for since the schedule's warm-up
    broken: int = 0  # losses in a row that were not finite
    lr_factor: float | None = None  # of the schedule, at the newest check
    peak: float = 0.0  # its highest
    recent: list[float] = field(default_factory=list)  # log GR_T of the newest readings under this configuration
    hurt: bool = False  # the loss has been well above that of untrained weights
    climbed: bool = False  # these weights have seen the learning rate rise to where it is
    upward: bool = True  # the next probe's direction
    next_probe: float = 0.0  # samples
    refused: int = 0
    fresh: int = 0
    level: float | None = None  # the loss at the newest probe that changed nothing
    high: bool = False  # GR_T is clearly above its zone
    asked: bool = False  # that was why the probe was made
    probed: list[Config] = field(default_factory=list)
    ceiling: float | None = None  # learning rate that failed, carried over to a batch of 1
    saved: SavedWeights | None = None


class Probing:
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
        if course.follow(config):
            s.recent = []
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
            or self._spatial(reading)
            or self._temporal(reading, warming)
            or self._probe()
            or Continue("nothing to change", Evidence("steady", course.step))
        )

    def judge(self, losses: Sequence[Sequence[float]]) -> Decision:
        s, (here, there) = self._state, self._state.probed
        first, second = losses
        up, samples = there.lr > here.lr, s.course.samples
        differences = [b - a for a, b in zip(first, second, strict=True)]
        level, mean = fmean(first), fmean(differences)
        error = stdev(differences) / math.sqrt(len(differences))
        most = level + RULES.probe_up_margin * abs(level) + RULES.probe_up_errors * error if up else level + error if s.asked else level - error - RULES.probe_down_margin * abs(level)
        evidence = self._evidence("probe", "loss", level + mean, None)
        words = f"lr {there.lr:.2e} has loss {level + mean:.4g} where {here.lr:.2e} has {level:.4g}"
        if s.fresh == 1:
            s.fresh = 2
            if level + mean < most or not math.isfinite(level):
                self._cap(here.lr)
                decision = self._book(there.lr, there.batch_size, f"begun anew, {words}", evidence)
                s.hurt, s.refused = False, 0
                s.next_probe = samples
                return decision
        elif level + mean < most or (not up and not math.isfinite(level)):
            decision = self._move(there.lr, there.batch_size, f"compared on the same batches, {words}", evidence)
            s.next_probe, s.refused = samples, 0
            return decision
        if up and not mean <= abs(level):
            self._cap(RULES.failed * there.lr)
        s.refused += 1
        s.next_probe = (RULES.probe_again if s.refused == 1 else RULES.probe_later) * samples
        if not up and not s.fresh and s.steps < RULES.gauged_steps and s.level is not None and s.level - level < 0.04 * abs(level):
            s.fresh, s.next_probe = 1, samples
        s.upward, s.level = not s.upward, level
        return Continue(f"compared on the same batches, {words}", evidence, notable=True)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._state = restored(State, state)

    # --- what the loss says -------------------------------------------------------------------------------------------

    def _probe(self) -> Decision | None:
        s, course, old = self._state, self._state.course, self._state.course.now
        if s.losses.first is None or s.steps < RULES.probe_steps or course.samples < s.next_probe:
            return None
        if s.lr_factor is not None and s.lr_factor < RULES.decayed * s.peak:
            return None
        if s.high and not s.climbed and s.steps <= 2 * RULES.probe_steps and not s.fresh:
            s.fresh = 1
        if s.fresh == 1:
            to = self._settings.fit(old, old.lr / (6.0 if s.high else 10.0), old.batch_size)
            s.probed, s.asked = [old, to], s.high
            evidence = self._evidence("probe", "", None)
            return Probe((old, to), 20 * old.batch_size, "compare with a new beginning", evidence, untrained=True)
        factor = RULES.probe_factor if self._learned() or s.hurt else RULES.probe_factor**2
        s.asked = s.high
        for upward in (False,) if s.high else (s.upward, not s.upward):
            s.upward = upward
            lr = self._below(old.lr * factor, old.batch_size) if upward else old.lr / RULES.probe_factor
            to = self._settings.fit(old, lr, old.batch_size)
            if abs(math.log(to.lr / old.lr)) > math.log(RULES.probe_least):
                s.probed = [old, to]
                steps = max(RULES.probe_steps, RULES.probe_share * s.steps)
                samples = max(round(steps * old.batch_size), RULES.probe_samples)
                return Probe((old, to), samples, "compare", self._evidence("probe", "", None))
        return None

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
        if s.hurt and not s.climbed and RULES.start_steps <= age and s.steps <= RULES.target_step:
            self._cap(s.course.now.lr)
            return self._restart(
                s.course.now.lr / RULES.restart, s.course.now.batch_size, "hurt by its first steps", evidence
            )
        return None

    def _learned(self) -> bool:
        """The loss is clearly below that of untrained weights. True where there is no loss to tell."""
        losses, untrained = self._state.losses, self._state.losses.untrained()
        now = losses.level(RULES.learned_blocks)
        if untrained is None or now is None:
            return untrained is None
        error = losses.error(RULES.learned_blocks)
        return now < untrained - max(RULES.learned_errors * error, RULES.learned * abs(untrained))

    # --- what the gauges say ------------------------------------------------------------------------------------------

    def _spatial(self, reading: Reading) -> Decision | None:
        """The batch: down as soon as it is far too large, since that is dear."""
        s, limits, target, old = self._state, self._settings, self._settings.target, self._state.course.now
        gr_s, error, mu = reading.gr_s, _finite(reading.gr_s_error), reading.noise_scale
        if gr_s is None or not 0.0 < gr_s < math.inf:
            return None
        low = target.gr_s_zone[0]
        if error is None:
            if gr_s > RULES.far_above * low:
                return None
            wanted, interval = old.batch_size * gr_s / target.gr_s, None
        else:
            interval = (gr_s - limits.z * error, gr_s + limits.z * error)
            if interval[1] >= low:
                return None
            known = mu is not None and 0.0 < mu < math.inf
            known = known and (reading.noise_scale_error or math.inf) < RULES.noise_scale_error * (mu or 0.0)
            wanted = batch_for_gr_s(target.gr_s, mu or 0.0) if known else old.batch_size * gr_s / target.gr_s
        wanted = max(wanted, old.batch_size / limits.max_batch_factor**2)
        wanted = max(wanted, min(RULES.young_batch, old.batch_size))
        batch = limits.fit(old, old.lr, wanted).batch_size
        ratio = batch / old.batch_size
        if 1.0 / ratio < RULES.batch_change:
            return None
        lr = old.lr * ratio**limits.coupling
        evidence = self._evidence("batch", "GR_S", gr_s, interval)
        return self._move(self._below(lr, batch), batch, "the batch is larger than it need be", evidence)

    def _temporal(self, reading: Reading, warming: bool) -> Decision | None:
        """The learning rate: up step by step while GR_T is low."""
        s, course, limits, low = self._state, self._state.course, self._settings, self._settings.target.gr_t_zone[0]
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
        s.high = gr_t / reach > limits.target.gr_t_zone[1] and course.age >= RULES.settled_steps
        if (_finite(reading.gr_s) or 0.0) > limits.blind:
            s.high = False
            return None
        if gr_t * reach >= low:
            return None
        patience = RULES.patience + RULES.patience_per_gr_t * gr_t
        trending = reach > RULES.trend and course.age < RULES.trend_steps
        if s.lr_factor is not None and s.lr_factor < RULES.decayed * s.peak:
            return Continue("below the zone, as the schedule decays", evidence)
        if s.hurt or s.steps > RULES.gauged_steps:
            return None
        if len(s.recent) < RULES.least_readings or trending or course.age < patience:
            return Continue("below the zone, waiting", evidence)
        factor = min((limits.target.gr_t / gr_t) ** limits.gain, limits.max_lr_factor)
        lr = self._below(course.now.lr * factor, course.now.batch_size)
        if lr < RULES.least_raise * course.now.lr:
            return None
        batch = min(course.now.batch_size, 32) if s.steps < RULES.young_steps else course.now.batch_size
        return self._move(lr, batch, "the learning rate is too low", evidence)

    # --- moves --------------------------------------------------------------------------------------------------------

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
            s.next_probe = s.course.samples + max(
                RULES.probe_steps * decision.config.batch_size, RULES.probe_samples
            )
            s.refused = 0
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

    def _restart(self, lr: float, batch: float, reason: str, evidence: Evidence) -> Decision:
        """To another configuration from untrained weights."""
        s = self._state
        decision = self._book(lr, batch, reason, evidence, reuse=False)
        if isinstance(decision, Retune):
            course = Course(decision.config, moves=s.course.moves)
            self._state = State(course, peak=s.peak, ceiling=s.ceiling)
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


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
