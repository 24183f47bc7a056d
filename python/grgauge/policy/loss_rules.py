"""What the training loss says: weights that are lost, a raise that made it worse, a loss that stands still, a probe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, stdev

from .decisions import Config, Continue, Decision, Evidence, Retune
from .losses import loss_at
from .moves import Moves
from .rules import RULES

WORSE = "the loss is worse than before the learning rate was raised"


def wrecked(moves: Moves, block: float | None) -> Decision | None:
    """Exploded, worse than before the newest raise, or dead: asked in this order."""
    s, first = moves.state, moves.state.losses.first
    if block is None or first is None:
        return None
    known, scale, noise = max(first, s.saved.loss) if s.saved else first, abs(first), _noise(moves)
    evidence = Evidence("explosion", s.course.step, "loss", block, (known - noise, known + noise))
    decision = _exploded(moves, block, known + RULES.exploded * scale + noise, evidence)
    if decision is not None:
        return decision
    if block > first + RULES.hurt * scale + noise and not _at_usual_lr(moves):
        s.hurt = True
    return _worse(moves, evidence) or _dead(moves, evidence)


def _at_usual_lr(moves: Moves) -> bool:
    """At the usual learning rate or below it."""
    return moves.state.course.now.lr <= (1.0 + RULES.same_lr) * moves.settings.usual_lr


def _noise(moves: Moves) -> float:
    """By how much the newest block and the first loss may differ by chance."""
    # The first loss is low by chance in one of many trainings. Above the usual learning rate there is no time to lose,
    # and noise is what was seen before the newest block: an explosion looks like it.
    losses = moves.state.losses
    variance = losses.variance_before
    if variance is None:
        variance = losses.variance if _at_usual_lr(moves) else 0.0
    return RULES.judged_errors * math.sqrt(variance * (1.0 + 1.0 / losses.size))


def _exploded(moves: Moves, block: float, high: float, evidence: Evidence) -> Decision | None:
    """The newest losses are above `high`."""
    s, losses = moves.state, moves.state.losses
    if block <= high or not (losses.above(high, 2) if _at_usual_lr(moves) else losses.stays_above(high)):
        return None
    lowest = s.course.now.lr <= moves.settings.lr_bounds[0]
    if lowest and s.saved is None and not losses.above(high, RULES.lost_blocks):
        return Continue("the loss exploded at the lowest learning rate allowed, and may recover", evidence)
    return moves.fail("the loss exploded", evidence)


def _worse(moves: Moves, evidence: Evidence) -> Decision | None:
    """The newest move raised the learning rate, and the loss has been worse since."""
    s, losses, saved, blocks = moves.state, moves.state.losses, moves.state.saved, RULES.recent_blocks
    soon = blocks * moves.settings.every <= s.course.age <= RULES.worse_steps
    if saved is None or not saved.raised or not soon:
        return None
    now, error = losses.level(blocks, s.course.start), math.hypot(losses.error(blocks), saved.loss_error)
    if now is None or now <= saved.loss + RULES.judged_errors * error + RULES.worse * abs(saved.loss):
        return None
    return moves.fail(WORSE, replace(evidence, rule="worse", value=now))


def _dead(moves: Moves, evidence: Evidence) -> Decision | None:
    """Weights that were hurt have learned nothing in the time that they had."""
    s = moves.state
    if not s.hurt or s.course.age < RULES.dead_steps or s.losses.learned():
        return None
    return moves.fail("the network is dead", replace(evidence, rule="dead"), rollback=False)


def rising(moves: Moves) -> Decision | None:
    """The loss has been clearly lower under this configuration: its learning rate drives the weights away."""
    s, losses, start, blocks = moves.state, moves.state.losses, moves.state.course.start, RULES.rising_blocks
    now, lowest, untrained = losses.level(blocks, start), losses.lowest(blocks, start), losses.untrained()
    if now is None or lowest is None or untrained is None:
        return None
    margin = RULES.rising_errors * losses.error(blocks) + RULES.rising * max(abs(lowest), abs(untrained))
    if now <= lowest + margin:
        return None
    old = s.course.now
    moves.cap(old.lr)
    evidence = Evidence("rising", s.course.step, "loss", now, (lowest - margin, lowest + margin))
    return moves.to(RULES.failed * old.lr, old.batch_size, "the loss rises", evidence)


def rival_further(moves: Moves) -> Decision | None:
    """Weights abandoned for a learning rate too high were further at equal samples: back towards it."""
    s, old, rival = moves.state, moves.state.course.now, moves.state.rival
    now = s.losses.level(RULES.level_blocks, s.course.start)
    then = None if rival is None else loss_at(rival.losses.curve, s.course.samples)
    if rival is None or now is None or then is None:
        return None
    error = math.hypot(s.losses.error(RULES.level_blocks), rival.losses.error(1))
    margin = RULES.judged_errors * error + RULES.rival * abs(then)
    lr = min(RULES.rival_raise * old.lr, rival.lr * old.batch_size**moves.settings.coupling)
    if now < then + margin or lr < RULES.least_raise * old.lr:
        return None
    s.ceiling = None
    evidence = Evidence("behind", s.course.step, "loss", now, (then - margin, then + margin))
    return moves.to(lr, old.batch_size, "an earlier trial was further at equal samples", evidence)


def plateau(moves: Moves) -> Decision | None:
    """Nothing learned and nothing hurt, where noise alone reads GR_T 19 at any learning rate: by the loss, up."""
    s, course, losses, limits = moves.state, moves.state.course, moves.state.losses, moves.settings
    old, blocks = course.now, losses.blocks(course.start)
    now, untrained = losses.level(blocks, course.start), losses.untrained()
    wait = RULES.plateau_steps if _waited_for(moves, old.lr) else RULES.settled_steps
    if now is None or untrained is None or course.age < wait or s.hurt or s.found or s.patient or losses.learned():
        return None
    error, scale = losses.error(blocks), abs(untrained)
    least_fall = RULES.plateau_errors * error + RULES.plateau_slope * scale
    falls = now < untrained - RULES.plateau_fall * scale or (losses.fall(blocks, course.start) or 0.0) > least_fall
    if falls or error > RULES.plateau_error * scale:
        return None
    cheap = min(old.batch_size, max(RULES.cheap_batch, old.batch_size // RULES.cheap_share))
    batch = limits.fit(old, old.lr, cheap).batch_size
    lr = old.lr * min(RULES.plateau_raise, limits.max_lr_factor) * (batch / old.batch_size) ** limits.coupling
    if lr > RULES.plateau_below * moves.below(math.inf, batch):
        return None
    evidence = Evidence("plateau", course.step, "loss", now)
    if s.on_plateau and lr > RULES.plateau_most * limits.usual_lr:
        return moves.start_patiently("no learning rate moves the loss: again, and wait", evidence)
    decision = moves.to(lr, batch, "the loss does not move", evidence)
    s.on_plateau = s.on_plateau or isinstance(decision, Retune)
    return decision


def plateau_left(moves: Moves) -> Decision | None:
    """One move back, for the learning rate was raised until after it was enough; not where each was waited for."""
    s, old = moves.state, moves.state.course.now
    if not s.on_plateau or not s.losses.learned():
        return None
    s.on_plateau = False
    evidence = Evidence("plateau", s.course.step, "loss", s.losses.level(RULES.learned_blocks))
    lr = old.lr / min(RULES.plateau_raise, moves.settings.max_lr_factor)
    if _waited_for(moves, lr):
        return Continue("the plateau is left", evidence)
    return moves.to(lr, old.batch_size, "the plateau is left: one move back", evidence)


def _waited_for(moves: Moves, lr: float) -> bool:
    """From the usual learning rate on a plateau is given its time; below, a higher one is tried soon."""
    return lr > (1.0 - RULES.same_lr) * moves.settings.usual_lr


def judge_probe(moves: Moves, other: Config, here: Sequence[float], there: Sequence[float]) -> Decision:
    """What losses `here`, and at the `other` learning rate, say of that."""
    s = moves.state
    level, difference, error = fmean(here), math.inf, 0.0
    if all(map(math.isfinite, (*here, *there))):
        differences = [after - before for before, after in zip(here, there, strict=True)]
        difference, error = fmean(differences), stdev(differences) / math.sqrt(len(differences))
    margin = error + RULES.probe_better * abs(level)
    evidence = Evidence("probe", s.course.step, "loss", level + difference, (level - margin, level + margin))
    old, s.probed = s.course.now, None
    down = other.lr < old.lr
    if s.untrained:
        if difference < -margin:
            return moves.caught_up(other, "untrained weights have overtaken these at it", evidence)
        return Continue(f"untrained weights have not overtaken these at lr {other.lr:.2e}", evidence, notable=True)
    if difference < -margin:
        s.next_probe = s.course.samples
        if down:
            moves.cap(old.lr)
        which = "lower" if down else "higher"
        return moves.to(other.lr, other.batch_size, f"a {which} learning rate has a lower loss", evidence)
    s.probe_down, s.next_probe = not down, RULES.probe_again * s.course.samples
    if not (down or difference <= RULES.probe_edge * abs(level)):
        s.next_probe = s.course.samples  # so near the edge that the present one may be beyond it
    if not (down or difference <= abs(level)):
        moves.cap(RULES.failed * other.lr)
    return Continue(f"lr {other.lr:.2e} has no lower loss", evidence, notable=True)
