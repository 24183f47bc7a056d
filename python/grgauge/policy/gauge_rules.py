"""What the gauges say: GR_S of the batch, GR_T of the learning rate, and where a probe is to tell instead."""

from __future__ import annotations

import math
from dataclasses import replace

from ..reading import Reading
from ..theory import batch_for_gr_s, noise_scale_from_gr_s, uncorrelated
from .decisions import Continue, Decision, Evidence, Probe
from .loss_rules import plateau, rival_further
from .moves import Moves, State
from .rules import RULES
from .watch import signal_of


def batch_size(moves: Moves, reading: Reading) -> Decision | None:
    """Down as soon as it is far too large, since that is dear; up with care."""
    s, limits, old = moves.state, moves.settings, moves.state.course.now
    gr_s, error = reading.gr_s, _finite(reading.gr_s_error)
    if gr_s is None or not 0.0 < gr_s < math.inf:
        return None
    interval = None if error is None else (gr_s - limits.z * error, gr_s + limits.z * error)
    wanted = _wanted_batch(moves, reading, gr_s, interval)
    if wanted is None:
        s.away = s.away if interval is None else 0
        return None
    s.away += 1
    # The first gradients agree at any batch. Small ones, which save samples and no steps, have to be asked for later.
    early = min(old.batch_size, RULES.small_batch) if s.course.age < RULES.target_step else 0
    least = max(old.batch_size / limits.max_batch_factor**2, early)
    batch = limits.fit(old, old.lr, min(max(wanted, least), old.batch_size * limits.max_batch_factor)).batch_size
    ratio = batch / old.batch_size
    needed, checks = (RULES.found_batch_change, RULES.found_checks) if s.found else (RULES.batch_change, 1)
    if max(ratio, 1.0 / ratio) < needed or s.away < checks:
        return None
    evidence = Evidence("batch", s.course.step, "GR_S", gr_s, interval)
    if ratio < 1.0:
        lr = moves.below(old.lr * ratio**limits.coupling, batch)
        return moves.to(lr, batch, "the batch is larger than it need be", evidence)
    if s.found or batch > RULES.small_batch or not s.losses.learned():
        return None  # noise that grows with progress asks for averaging
    # lr up only where GR_T asks for it too: from below.
    low = not s.hurt and bool(s.recent) and max(s.recent) < math.log(limits.target.gr_t_zone[0])
    lr = old.lr * ratio**limits.coupling if low else old.lr
    return moves.to(moves.below(lr, batch), batch, "the batch is too small", evidence)


def _wanted_batch(moves: Moves, reading: Reading, gr_s: float, interval: tuple[float, float] | None) -> float | None:
    """The batch that would bring GR_S into its zone, from its interval and the noise scale; None to leave it."""
    s, target, size = moves.state, moves.settings.target, moves.state.course.now.batch_size
    mu, mu_error, (low, high) = reading.noise_scale, reading.noise_scale_error or math.inf, target.gr_s_zone
    in_proportion = size * gr_s / target.gr_s
    if interval is None:
        return None if s.found or gr_s > RULES.far_above * low else in_proportion
    if interval[1] < low:
        if mu is not None and 0.0 < mu < math.inf and mu_error < RULES.noise_scale_error * mu:
            return batch_for_gr_s(target.gr_s, mu)
        return in_proportion
    if interval[0] > high or (gr_s > high and interval[1] > 1.0 and s.course.age >= RULES.unsure_steps):
        # from below: to the near edge of the zone, as the near end of the interval has it
        near = min(max(interval[0], 1.0 / size), RULES.near_one)
        known = near > high and size > 1  # a batch of 1 reads 1 whatever the noise is
        return batch_for_gr_s(high, noise_scale_from_gr_s(near, size)) if known else math.inf
    return None


def probe(moves: Moves, reading: Reading) -> Decision | None:
    """Noise hides the learning rate from GR_T, at any value: another one is tried beside the present one. Up first, and
    down where that has failed."""
    s = moves.state
    s.aligned = s.aligned + 1 if _aligned(reading, moves.settings.z) else 0
    hidden = (_finite(reading.gr_s) or 0.0) > RULES.probe_gr_s
    evidence = Evidence("probe", s.course.step, "GR_S", reading.gr_s)
    if _decaying(s):
        return None
    untrained = _against_untrained(moves, hidden, evidence)
    if untrained is not None or not hidden:
        return untrained
    return _asked(moves, s.probe_down, "GR_S says that GR_T cannot tell", evidence)


def _against_untrained(moves: Moves, hidden: bool, evidence: Evidence) -> Probe | None:
    """A probe of the usual learning rate, from untrained weights: those at hand began far above it, and first steps
    that were too high leave weights that no lower learning rate mends, and no gauge shows. Later only where noise hides
    the learning rate."""
    s, course, old, limits = moves.state, moves.state.course, moves.state.course.now, moves.settings
    again = s.next_untrained > 0.0
    least = RULES.untrained_again if again else 1.0 + RULES.same_lr
    far = s.begun[-1].lr > RULES.probe_factor * limits.usual_lr and old.lr > least * limits.usual_lr
    due = s.steps >= RULES.probe_steps and course.samples >= s.next_untrained and (hidden or not again)
    if not (far and due) or course.moves >= limits.max_moves or s.losses.first is None:
        return None
    to = limits.fit(old, limits.usual_lr, old.batch_size)
    s.probed, s.untrained, s.next_untrained = to, True, RULES.probe_again * course.samples
    return Probe((old, to), round(course.samples), "the start was far above the usual", evidence, untrained=True)


def _asked(moves: Moves, down: bool, reason: str, evidence: Evidence) -> Probe | None:
    """A probe of a higher or a lower learning rate, if it is time for one and there is room."""
    s, course, old, limits = moves.state, moves.state.course, moves.state.course.now, moves.settings
    near = abs(math.log(old.lr / limits.usual_lr)) < 0.5 * math.log(RULES.probe_factor)
    usual = near or (s.climbed and old.lr > limits.usual_lr)
    good = usual and s.aligned < RULES.readings
    begun = s.steps >= RULES.probe_steps * (RULES.probe_usual if good else 1.0)
    due = begun and course.age >= RULES.settled_steps and course.samples >= s.next_probe
    if not due or course.moves >= limits.max_moves or s.losses.first is None:
        return None
    first = limits.usual_lr if old.lr < limits.usual_lr and not near else math.inf  # from below, the usual one first
    higher = moves.below(min(RULES.probe_factor * old.lr, first), old.batch_size)
    down = down or higher < RULES.least_raise * old.lr
    to = limits.fit(old, old.lr / RULES.probe_factor if down else higher, old.batch_size)
    if max(to.lr / old.lr, old.lr / to.lr) < RULES.least_raise:
        return None
    s.probed, s.untrained, s.next_probe = to, False, RULES.probe_again * course.samples
    steps = max(RULES.probe_steps, RULES.probe_share * s.steps)
    return Probe((old, to), round(steps * old.batch_size), reason, evidence)


def learning_rate(moves: Moves, reading: Reading, warming: bool) -> Decision | None:
    """Up step by step while GR_T is low, down where it is high."""
    s, course, limits = moves.state, moves.state.course, moves.settings
    low, high = limits.target.gr_t_zone
    if reading.gr_t is None or not (0.0 < reading.gr_t < math.inf and reading.finite_time_factor > 0.0):
        return None
    if warming:
        return Continue("the schedule is warming up", Evidence("schedule", course.step, "GR_T", reading.gr_t))
    grown = full_grown(max(reading.gr_t, 1.0), reading.finite_time_factor)
    s.recent = [*s.recent[1 - RULES.readings :], math.log(min(grown, RULES.largest))]
    error = (_finite(reading.gr_t_error) or 0.0) / reading.gr_t
    spread = min(max(error, RULES.least_error), RULES.most_error) / math.sqrt(len(s.recent))
    gr_t, reach = math.exp(sum(s.recent) / len(s.recent)), math.exp(limits.z * spread)
    evidence = Evidence("learning rate", course.step, "GR_T", gr_t, (gr_t / reach, gr_t * reach))
    gr_s, gr_s_error = _finite(reading.gr_s) or 0.0, _finite(reading.gr_s_error)
    if gr_s > limits.blind:
        return plateau(moves) or Continue("GR_S says that GR_T is blind", replace(evidence, rule="blind"))
    if gr_t * reach < low:
        return _too_low(moves, gr_t, reach, evidence)
    too_high = gr_t / reach > high
    shows = (s.hurt and gr_t > high) or (too_high and gr_t > RULES.overshot * high and s.losses.learned())
    if shows and _begun_badly(s):
        # What far too high a learning rate does to fresh weights later gauges do not show: trust no such start.
        moves.cap(course.now.lr)
        lr = course.now.lr / (RULES.restart if s.hurt else RULES.restart_high)
        return moves.start_lower(lr, "started too high: again, from below", evidence)
    if too_high:
        return plateau(moves) or _too_high(moves, reading, gr_t, evidence)
    unseen = gr_s_error is not None and (reading.gr_s or 0.0) + limits.z * gr_s_error > 1.0
    if course.age >= limits.grace and s.losses.learned() and not unseen:
        s.found = True
    return plateau(moves) or rival_further(moves) or Continue("in the zone", evidence)


def _too_low(moves: Moves, gr_t: float, reach: float, evidence: Evidence) -> Decision:
    """The rule that raises the learning rate: by (GR_T*/GR_T)^gain, once GR_T has had its time to rise."""
    s, limits, old = moves.state, moves.settings, moves.state.course.now
    # Once: with small batches a first loss low by chance is enough to look hurt.
    if s.hurt and s.rival is None and _begun_badly(s):
        return moves.start_lower(old.lr / RULES.restart, "hurt by its first steps: again, from below", evidence)
    reason = _not_yet(moves, gr_t, reach)
    if reason is not None:
        return Continue(f"below the zone, {reason}", evidence)
    factor = min((limits.target.gr_t / gr_t) ** limits.gain, limits.max_lr_factor)
    batch = old.batch_size if s.steps > RULES.young_steps else min(old.batch_size, RULES.cheap_batch)
    wanted = moves.below(old.lr * factor, batch)
    lr = min(wanted, max(limits.usual_lr, old.lr)) if _early(s) else wanted
    if lr < RULES.least_raise * old.lr:
        if lr < wanted:
            return Continue("below the zone, but early", evidence)
        return rival_further(moves) or Continue("below the zone, just below a learning rate that failed", evidence)
    unclear = gr_t * reach > RULES.clearly_low * limits.target.gr_t_zone[0]
    if unclear and s.losses.learned() and old.batch_size <= RULES.cheap_batch:
        probe = _asked(moves, False, "GR_T may be too low", evidence)
        return probe or Continue("below the zone, but not clearly", evidence)
    return moves.to(lr, batch, "the learning rate is too low", evidence)


def _not_yet(moves: Moves, gr_t: float, reach: float) -> str | None:
    """Why a GR_T below the zone says nothing yet; None if it does."""
    s, age = moves.state, moves.state.course.age
    if _decaying(s):
        return "as the schedule decays"
    if _early(s) and s.losses.first is not None and s.losses.learned(RULES.recent_blocks):
        return "but early, and the loss has fallen"
    patience = RULES.target_step if s.found else RULES.patience + RULES.patience_per_gr_t * gr_t
    trending = reach > RULES.trend and age < RULES.trend_steps
    good = s.found and gr_t > RULES.far_below * moves.settings.target.gr_t_zone[0]
    return "waiting" if len(s.recent) < RULES.least_readings or trending or age < patience or good else None


def _too_high(moves: Moves, reading: Reading, gr_t: float, evidence: Evidence) -> Decision:
    """The rule that lowers the learning rate: by (GR_T*/GR_T)^(1/2), if far too high before it was found good."""
    s, age, limits, old = moves.state, moves.state.course.age, moves.settings, moves.state.course.now
    beyond = gr_t > RULES.overshot * limits.target.gr_t_zone[1]
    overshot = not s.found and beyond and age >= RULES.settled_steps and not _jumps(reading)
    s.found = s.found or (age >= limits.grace and s.losses.learned())
    if not overshot:
        return Continue("above the zone: averaging the weights does for it", evidence)
    factor = min((limits.target.gr_t / gr_t) ** RULES.lower_power, RULES.least_lowered)
    moves.cap(old.lr)
    lr = old.lr * max(factor, 1.0 / limits.max_lr_factor)
    return moves.to(lr, old.batch_size, "the learning rate is too high", evidence)


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


def _aligned(reading: Reading, z: float) -> bool:
    """Gradients without their noise agree more than at any good learning rate, by the interval of GR_T without it."""
    known = [x for x in (reading.gr_t_error, reading.gr_s, reading.gr_s_error) if x is not None]
    sound = min(reading.gr_t or 0.0, reading.finite_time_factor) > 1.0 / RULES.largest
    if not sound or not all(map(math.isfinite, (reading.gr_t or 0.0, *known))):
        return False
    signal, error = signal_of(reading)
    return signal + z * error < math.log10(RULES.probe_signal)


def _begun_badly(s: State) -> bool:
    """The learning rate that untrained weights began at is still what shows."""
    return not s.climbed and s.course.age >= RULES.start_steps and s.steps <= RULES.target_step


def _early(s: State) -> bool:
    """So few steps, and so few samples in each, that GR_T is low at good learning rates too."""
    return s.course.age < RULES.target_step and s.course.now.batch_size <= RULES.cheap_batch


def _decaying(s: State) -> bool:
    """The schedule is clearly below its peak."""
    return s.lr_factor is not None and s.lr_factor < RULES.decayed * s.peak


def _jumps(reading: Reading) -> bool:
    """GR_T's error is about its own size: it says little of the learning rate, and nothing of noise."""
    return (_finite(reading.gr_t_error) or 0.0) > RULES.jumps * (reading.gr_t or 0.0)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
