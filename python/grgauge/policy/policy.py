"""The policy: readings and losses in, changes of learning rate and batch size out. No torch, no clock, no I/O."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import NormalDist
from typing import Any, Literal

from .._validation import require, require_count
from ..reading import Reading
from ..theory import batch_for_gr_s, noise_scale_from_gr_s, uncorrelated
from .moves import Interval, Moves
from .target import Config, Continue, Decision, Evidence, Retune, Target

LARGEST = 1e30
"""A loss beyond counts as one that is not finite."""


class Policy(Moves):
    """A deterministic machine that reads gauges and decides: `observe` after every step, or at every reading.

    target          where readings should be
    rules           "measured": what measurement shows to be better; "published": the paper's, by the gauges alone
    every           steps between checks
    warm_up, grace  steps of a new run, and after a change of configuration, before its gauges are judged; measured
                    rules judge by intervals instead, and settle on a learning rate no earlier than `grace` steps
    window          relative change of the gradient norm between checks below which the critical period is over, so that
                    nothing changes (published rules)
    lr_bounds       learning rates allowed
    min_batch, max_batch, batch_multiple  batches allowed, in samples: `max_batch` is where memory ends
    max_lr_factor, max_batch_factor       what one move may multiply by, or divide by
    gain            measured rules raise lr by (GR_T*/GR_T)^gain
    coupling        a batch that changes by r changes the learning rate by r^coupling (1/2 for Adam: Malladi et al.)
    confidence      of the intervals that readings are judged by
    blind           GR_S above which GR_T says nothing about the learning rate
    max_moves       changes of configuration, after which the last one stays

    Raises ValueError for a number out of range.

    The measured rules were chosen on six small trainings (character transformer, CNN, two MLPs, GRU, autoencoder) and
    then run from 15 new starts each, log-uniform over lr 1e-5..1 and batch 8..512: 85 of the 90 came within 10 % of the
    loss of the best of a static 8 x 4 grid, all samples counted, at a median 0.5 to 1.2 times the samples of that run
    (worst the GRU, 13 of 15). Without a loss nothing tells a dead network from a healthy one: always give it.
    """

    def __init__(
        self,
        target: Target | None = None,
        *,
        rules: Literal["measured", "published"] = "measured",
        every: int = 5,
        warm_up: int = 20,
        grace: int = 20,
        window: float = 0.01,
        lr_bounds: Interval = (1e-7, 10.0),
        min_batch: int = 1,
        max_batch: int = 1 << 20,
        batch_multiple: int = 1,
        max_lr_factor: float = 4.0,
        max_batch_factor: float = 4.0,
        gain: float = 2.0 / 3.0,
        coupling: float = 0.5,
        confidence: float = 0.9,
        blind: float = 0.95,
        max_moves: int = 40,
    ) -> None:
        super().__init__(lr_bounds, min_batch, max_batch, batch_multiple, coupling, max_moves)
        require(rules in ("measured", "published"), "rules", rules, '"measured" or "published"')
        for name, count, least in (("every", every, 1), ("warm_up", warm_up, 0), ("grace", grace, 0)):
            require_count(name, count, least)
        require(0.0 <= window < math.inf, "window", window, "finite and at least 0")
        require(max_lr_factor > 1.0, "max_lr_factor", max_lr_factor, "above 1")
        require(max_batch_factor > 1.0, "max_batch_factor", max_batch_factor, "above 1")
        require(0.0 < gain <= 1.0, "gain", gain, "in (0, 1]")
        require(0.0 < confidence < 1.0, "confidence", confidence, "inside (0, 1)")
        require(0.0 < blind <= 1.0, "blind", blind, "in (0, 1]")
        self.target, self.rules = target or Target(), rules
        self.every, self.warm_up, self.grace, self.window = every, warm_up, grace, window
        self.max_lr_factor, self.max_batch_factor, self.gain = max_lr_factor, max_batch_factor, gain
        self.confidence, self.blind = confidence, blind
        self._z = NormalDist().inv_cdf(0.5 + 0.5 * confidence)

    @staticmethod
    def paper(**changes: Any) -> Policy:
        """The published rules to the letter; keywords as for `Policy` change single ones.

        Check every 5 steps, warm-up and grace 20; lr (20/GR_T)^(1/3) and B GR_S/0.58, unclamped and uncoupled; weights
        reused, then a restart if the gauges are not back in the zone within the grace period; all of it while the
        gradient norm changes by 1 % or more from check to check.
        """
        published: dict[str, Any] = {
            "rules": "published",
            "max_lr_factor": math.inf,
            "max_batch_factor": math.inf,
            "coupling": 0.0,
            "max_moves": 1_000_000,
        }
        return Policy(**{**published, **changes})

    @staticmethod
    def default(**changes: Any) -> Policy:
        """What measurement shows to be better, `Policy()`; keywords as for `Policy` change single settings."""
        return Policy(**changes)

    def observe(
        self,
        reading: Reading | None,
        config: Config,
        *,
        loss: float | None = None,
        samples: float | None = None,
        lr_factor: float = 1.0,
    ) -> Decision:
        """What to do after this step.

        reading    the newest reading; one already seen, or None, only carries the loss
        config     what this step ran at. The policy follows it where it is not what was proposed
        loss       training loss of this step, or the mean since the last call. The first should be that of untrained
                   weights: an explosion in the first steps is judged by it
        samples    that these weights have been trained on; None: counted from `reading.step` and `config.batch_size`
        lr_factor  what the schedule multiplies config.lr by at this step. While it rises GR_T is not judged

        After a `Retune` call the gauge's `restart`, or make a new one with untrained weights: readings must be those of
        the new configuration. Raises ValueError for samples or lr_factor out of range, and nothing changes.
        """
        require(samples is None or 0.0 <= samples < math.inf, "samples", samples, "None or finite and at least 0")
        require(0.0 <= lr_factor < math.inf, "lr_factor", lr_factor, "finite and at least 0")
        s = self._state
        step = None if reading is None else reading.step
        self._follow(config)
        if loss is not None and abs(loss) < LARGEST:
            s.broken = 0
            s.losses.add(loss)
        elif loss is not None:
            s.broken += 1
        fitted = self._fit(config.lr, config.batch_size)
        if fitted != (config.lr, config.batch_size) and s.moves < self.max_moves:
            return self._move(*fitted, "configuration out of bounds", Evidence("bounds", step))
        if s.broken >= 2 and self.rules == "measured":  # one alone may be an overflow that a gradient scaler skips
            return self._fail("the loss is not finite", Evidence("diverged", step, "loss"))
        if reading is None or 0 <= reading.step - s.step < self.every:
            return Continue("no new reading", Evidence("waiting", step))
        # weights that went back or began anew have a gauge that may have done so too, or not
        turned = reading.step < s.step or (s.step == 0 and s.moves > 0)
        steps = min(reading.step, self.every) if turned else reading.step - s.step
        grown = steps * config.batch_size if samples is None else max(samples - s.samples, 0.0)
        s.step, s.age, s.samples, s.cost = reading.step, s.age + steps, s.samples + grown, s.cost + grown
        if self.rules == "published":
            return self._published(reading)
        warming = s.lr_factor is not None and lr_factor > s.lr_factor
        s.lr_factor, s.peak = lr_factor, max(s.peak, lr_factor)
        s.steps += steps
        if warming:  # nothing that is seen so far is the doing of this learning rate
            s.steps = 0
            self._begin()
        return self._measured(reading, warming)

    # --- the published rules ------------------------------------------------------------------------------------------

    def _published(self, reading: Reading) -> Decision:
        s, target, old = self._state, self.target, self._config
        lr, batch = target.lr_factor(reading), target.batch_factor(reading)
        before, s.grad_norm = s.grad_norm, reading.grad_norm if math.isfinite(reading.grad_norm) else None
        if before and s.grad_norm is not None and abs(reading.grad_norm / before - 1.0) < self.window:
            return Continue("the critical period is over", Evidence("window", s.step, "gradient norm", s.grad_norm))
        if lr is None or batch is None:
            return Continue("a gauge is missing", Evidence("missing", s.step))
        assert reading.gr_t is not None  # else lr were None
        temporal = Evidence("zone", s.step, "GR_T", reading.gr_t / reading.settled, target.gr_t_zone)
        spatial = Evidence("zone", s.step, "GR_S", reading.gr_s, target.gr_s_zone)
        if lr == batch == 1.0:
            back, s.inherited = s.inherited, False
            return Continue("back in the zone within the grace period" if back else "in the zone", temporal)
        if s.age < (self.grace if s.inherited else self.warm_up):
            return Continue("too early to judge", temporal)
        evidence = spatial if lr == 1.0 else temporal
        if s.inherited:
            s.inherited = False
            return self._restart(old.lr, old.batch_size, "not back in the zone within grace", evidence)
        decision = self._move(
            old.lr * min(max(lr, 1.0 / self.max_lr_factor), self.max_lr_factor),
            old.batch_size * min(max(batch, 1.0 / self.max_batch_factor), self.max_batch_factor),
            "out of the zone",
            evidence,
        )
        s.inherited = isinstance(decision, Retune)
        return decision

    # --- the measured rules -------------------------------------------------------------------------------------------

    def _measured(self, reading: Reading, warming: bool) -> Decision:
        s = self._state
        block = s.losses.close(s.samples)
        return (
            self._wrecked(block)
            or self._left()
            or self._tried()
            or self._spatial(reading)
            or self._temporal(reading, warming)
            or Continue("nothing to change", Evidence("steady", s.step))
        )

    def _wrecked(self, block: float | None) -> Decision | None:
        """What the loss says: exploded, dead, or worse than before the newest move."""
        s, losses = self._state, self._state.losses
        if block is None or losses.first is None:
            return None
        first, noise = losses.first, losses.error(1)
        scale = abs(first)
        known = max(first, s.saved[3]) if s.saved else first
        evidence = Evidence("loss", s.step, "loss", block, (known - 3.0 * noise, known + 3.0 * noise))
        recent = losses.level(4, s.start)
        # A learning rate raised against a stall may shake the loss: judged when that is over, unless it doubles.
        doubled = s.test is not None and recent is not None and recent > s.test[2] + abs(s.test[2])
        if block > known + 1.5 * scale + 1e-12 or doubled:
            return self._fail("the loss exploded", replace(evidence, rule="explosion"))
        if block > first + 0.2 * scale:
            s.hurt = True
        # Not for ever: of hundreds of checks one is beyond three standard errors.
        if s.saved and s.raised and s.test is None and 2 * self.every <= s.age <= 100:
            now, error = losses.level(2, s.start), math.hypot(losses.error(2), s.saved[4])
            if now is not None and now > s.saved[3] + 3.0 * error + 0.03 * abs(s.saved[3]):
                reason = "the loss is worse than before the learning rate was raised"
                return self._fail(reason, replace(evidence, rule="worse", value=now))
        if s.hurt and s.age >= 40 and not self._learned():
            return self._fail("the network is dead", replace(evidence, rule="dead"), rollback=False)
        return None

    def _learned(self) -> bool:
        """The loss is clearly below that of untrained weights. True where there is no loss to tell."""
        losses, untrained = self._state.losses, self._state.losses.untrained()
        now = losses.level(5)
        return untrained is None or (
            now is not None and now < untrained - max(2.0 * losses.error(5), 0.02 * abs(untrained))
        )

    def _spatial(self, reading: Reading) -> Decision | None:
        """The batch: down as soon as it is far too large, since that is dear; up with care."""
        s, target, old = self._state, self.target, self._config
        gr_s, error, mu = reading.gr_s, reading.gr_s_error, reading.noise_scale
        if gr_s is None or not 0.0 < gr_s < math.inf:
            return None
        low, high = target.gr_s_zone
        if not _known(error):
            if s.found or gr_s > 0.5 * low:
                return None
            wanted, interval = old.batch_size * gr_s / target.gr_s, None
        else:
            assert error is not None
            interval = (gr_s - self._z * error, gr_s + self._z * error)
            trusted = mu is not None and 0.0 < mu < math.inf and (reading.noise_scale_error or math.inf) < 0.5 * mu
            if interval[1] < low:
                wanted = batch_for_gr_s(target.gr_s, mu or 0.0) if trusted else old.batch_size * gr_s / target.gr_s
            elif interval[0] > high or (gr_s > high and interval[1] > 1.0 and s.age >= 40):
                # from below: to the near edge of the zone, as the near end of the interval has it
                near = min(max(interval[0], 1.0 / old.batch_size), 0.999)
                told = near > high and old.batch_size > 1  # a batch of 1 reads 1 whatever the noise is
                wanted = batch_for_gr_s(high, noise_scale_from_gr_s(near, old.batch_size)) if told else math.inf
            else:
                s.away = 0
                return None
        most = min(2.0, self.max_batch_factor) if s.found else self.max_batch_factor
        wanted = min(max(wanted, old.batch_size / self.max_batch_factor**2), old.batch_size * most)
        s.away += 1
        evidence = Evidence("batch", s.step, "GR_S", gr_s, interval)
        _, batch = self._fit(old.lr, wanted)
        ratio = batch / old.batch_size
        needed, patience = (1.8, 4) if s.found else (1.5, 1)
        if max(ratio, 1.0 / ratio) < needed or s.away < patience:
            return None
        quiet = not s.recent or s.recent[-1] <= math.log(target.gr_t_zone[1])
        if ratio > 1.0 and s.found:
            return self._stall(reading, old.lr, batch, "the batch is too small", evidence) if quiet else None
        if ratio > 1.0 and not self._learned():
            return None
        # Up only where GR_T asks for it too: from below. Later, noise that grows with progress asks for averaging.
        low_lr = not (s.found or s.hurt) and bool(s.recent) and max(s.recent) < math.log(target.gr_t_zone[0])
        lr = old.lr * ratio**self.coupling if ratio < 1.0 or low_lr else old.lr
        reason = "the batch is too small" if ratio > 1.0 else "the batch is larger than it need be"
        return self._move(self._below(lr, batch), batch, reason, evidence)

    def _temporal(self, reading: Reading, warming: bool) -> Decision | None:
        """The learning rate: up step by step while GR_T is low, down where it is high."""
        s, (low, high) = self._state, self.target.gr_t_zone
        if reading.gr_t is None or not (0.0 < reading.gr_t < math.inf and reading.settled > 0.0):
            return None
        if warming:
            return Continue("the schedule is warming up", Evidence("schedule", s.step, "GR_T", reading.gr_t))
        grown = full_grown(max(reading.gr_t, 1.0), reading.settled)
        s.recent = [*s.recent[-2:], math.log(min(grown, LARGEST))]
        error = reading.gr_t_error if _known(reading.gr_t_error) else None
        spread = min(max((error or 0.0) / reading.gr_t, 0.1), 10.0) / math.sqrt(len(s.recent))
        gr_t, reach = math.exp(sum(s.recent) / len(s.recent)), math.exp(self._z * spread)
        evidence = Evidence("learning rate", s.step, "GR_T", gr_t, (gr_t / reach, gr_t * reach))
        if _known(reading.gr_s) and (reading.gr_s or 0.0) > self.blind:
            evidence = replace(evidence, rule="blind")
            return self._plateau() or Continue("GR_S says that GR_T is blind", evidence)
        if gr_t * reach < low:
            return self._too_low(gr_t, reach, evidence)
        wrong = (s.hurt and gr_t > high) or (gr_t > 1.5 * high and self._learned())
        if wrong and not s.climbed and s.age >= 15 and s.steps <= 50:
            # What far too high a learning rate does to fresh weights later gauges do not show: trust no such start.
            self._cap(self._config.lr)
            lr = self._config.lr / (30.0 if s.hurt else 6.0)
            return self._lower(lr, self._config.batch_size, "started too high: again, from below", evidence)
        if gr_t / reach > high:
            return self._plateau() or self._too_high(reading, gr_t, evidence)
        unseen = _known(reading.gr_s_error) and (reading.gr_s or 0.0) + self._z * (reading.gr_s_error or 0.0) > 1.0
        if s.age >= self.grace and self._learned() and not unseen:
            s.found = True
        return self._plateau() or self._behind() or Continue("in the zone", evidence)

    def _too_low(self, gr_t: float, reach: float, evidence: Evidence) -> Decision:
        s, old = self._state, self._config
        # Once: with small batches a first loss low by chance is enough to look hurt.
        if s.hurt and not s.climbed and s.rival_lr is None and s.age >= 15 and s.steps <= 50:
            return self._lower(old.lr / 30.0, old.batch_size, "hurt by its first steps: again, from below", evidence)
        # GR_T climbs with time, and its target belongs to iteration 50: the nearer, the more patience
        patience = 50 if s.found else 8 + 2 * gr_t
        trending = reach > 1.5 and s.age < 30
        if s.lr_factor is not None and s.lr_factor < 0.9 * s.peak:
            return Continue("below the zone, as the schedule decays", evidence)
        if len(s.recent) < 2 or trending or s.age < patience or (s.found and gr_t > 0.4 * self.target.gr_t_zone[0]):
            return Continue("below the zone, waiting", evidence)
        factor = min((self.target.gr_t / gr_t) ** self.gain, self.max_lr_factor)
        lr = self._below(old.lr * factor, old.batch_size)
        if lr < 1.15 * old.lr:
            return self._behind() or Continue("below the zone, just below a learning rate that failed", evidence)
        return self._move(lr, old.batch_size, "the learning rate is too low", evidence)

    def _behind(self) -> Decision | None:
        """Weights abandoned for a learning rate too high were further at equal samples: back towards it."""
        s, old = self._state, self._config
        now, then = s.losses.level(4, s.start), s.rival.at(s.samples)
        if now is None or then is None or s.rival_lr is None:
            return None
        margin = 3.0 * math.hypot(s.losses.error(4), s.rival.error(1)) + 0.05 * abs(then)
        lr = min(2.0 * old.lr, s.rival_lr * old.batch_size**self.coupling)
        if now < then + margin or lr < 1.15 * old.lr:
            return None
        s.ceiling = None
        evidence = Evidence("behind", s.step, "loss", now, (then - margin, then + margin))
        return self._move(lr, old.batch_size, "an earlier trial was further at equal samples", evidence)

    def _too_high(self, reading: Reading, gr_t: float, evidence: Evidence) -> Decision:
        s, old, high = self._state, self._config, self.target.gr_t_zone[1]
        overshot = not s.found and gr_t > 1.5 * high and s.age >= 20 and not _jumps(reading)
        s.found = s.found or (s.age >= self.grace and self._learned())
        factor = max(min((self.target.gr_t / gr_t) ** 0.5, 0.7), 1.0 / self.max_lr_factor)
        if overshot:
            self._cap(old.lr)
            return self._move(old.lr * factor, old.batch_size, "the learning rate is too high", evidence)
        stalled = self._stall(reading, old.lr * factor, old.batch_size, "the learning rate is too high", evidence)
        return stalled or Continue("above the zone, but the loss falls", evidence)

    def _plateau(self) -> Decision | None:
        """Nothing learned, nothing hurt, and noise alone reads GR_T 19 at any learning rate: by the loss, up.

        Not before a fall of 2 % would have been seen, and no nearer than a tenth to a learning rate that failed.
        """
        s, old, losses = self._state, self._config, self._state.losses
        blocks = losses.blocks(s.start)
        now, untrained = losses.level(blocks, s.start), losses.untrained()
        if now is None or untrained is None or s.age < 20 or s.hurt or s.found or self._learned():
            return None
        error, share = losses.error(blocks), 0.01 * abs(untrained)
        if (
            error > share
            or now < untrained - 2.0 * share
            or (losses.fall(blocks, s.start) or 0.0) > 4.0 * error + share / 2
        ):
            return None
        _, batch = self._fit(old.lr, min(old.batch_size, max(32, old.batch_size // 4)))
        lr = old.lr * min(3.0, self.max_lr_factor) * (batch / old.batch_size) ** self.coupling
        if lr > 0.1 * self._below(math.inf, batch):
            return None
        decision = self._move(lr, batch, "the loss does not move", Evidence("plateau", s.step, "loss", now))
        s.groping = s.groping or isinstance(decision, Retune)
        return decision

    def _left(self) -> Decision | None:
        """A plateau is left: one move back, for the learning rate was raised until after it was enough."""
        s, old = self._state, self._config
        if not s.groping or not self._learned():
            return None
        s.groping = False
        evidence = Evidence("plateau", s.step, "loss", s.losses.level(5))
        lr = old.lr / min(3.0, self.max_lr_factor)
        return self._move(lr, old.batch_size, "the plateau is left: one move back", evidence)

    def _stall(self, reading: Reading, lr: float, batch: float, reason: str, evidence: Evidence) -> Decision | None:
        """Against a loss that has not fallen over the last 3/10 of all samples, all of it under this configuration.

        With less noise, at the configuration given; but where GR_T cannot tell, with a higher learning rate, on trial.
        """
        s, old, losses = self._state, self._config, self._state.losses
        since = 0.7 * s.samples
        blocks = losses.blocks(since) // 2 * 2
        level, fall = losses.level(blocks, since), losses.fall(blocks, since)
        if since < s.start or blocks < 20 or level is None or fall is None:
            return None
        error = losses.error(blocks // 2)
        if error > 0.03 * abs(level) or fall > 1.4 * error:
            return None
        higher = self._below(2.0 * old.lr, old.batch_size)
        if not _jumps(reading) or higher < 1.15 * old.lr:
            if lr < old.lr:
                self._cap(old.lr)
            return self._move(lr, batch, reason, evidence)
        evidence = replace(evidence, rule="stall")
        decision = self._move(higher, old.batch_size, "the loss has stalled, and GR_T cannot tell why", evidence)
        s.test = [old.lr, old.batch_size, level, losses.error(blocks)] if isinstance(decision, Retune) else None
        return decision

    def _tried(self) -> Decision | None:
        """What a learning rate raised against a stall has done to the loss."""
        s, losses = self._state, self._state.losses
        if s.test is None:
            return None
        lr, batch, level, before = s.test
        blocks = losses.blocks(s.start) // 2  # the newer half: at first the change itself shows
        now, error = losses.level(blocks, s.start), math.hypot(losses.error(max(blocks, 1)), before)
        unsure = error > 0.015 * abs(level) and s.samples < 1.3 * s.start
        if now is None or blocks < 4 or s.samples < 1.1 * s.start or unsure:
            return Continue("a higher learning rate is on trial", Evidence("stall", s.step))
        margin = max(2.0 * error, 0.01 * abs(level))
        s.test, s.raised = None, False  # no longer in question
        if now < level + margin:
            return None
        self._cap(lr)
        evidence = Evidence("stall", s.step, "loss", now, (level - margin, level + margin))
        return self._move(lr, batch, "the loss is worse than before the learning rate was raised", evidence)


def full_grown(gr_t: float, settled: float) -> float:
    """What a GR_T read after a cold start would become: `theory.steady_signal` solved for the signal, and t -> inf.

    1 stays 1, and what white noise reads by then becomes the 19 that it ends at; above, in proportion.
    """
    white = uncorrelated()
    young = white * settled
    if gr_t >= young:
        return gr_t / settled
    signal = (young - gr_t) / (young * max(gr_t - 1.0, 1e-9))
    return (1.0 + signal) / (signal + 1.0 / white)


def _jumps(reading: Reading) -> bool:
    """GR_T's error is about its own size: it says little of the learning rate, and nothing of noise."""
    return _known(reading.gr_t_error) and (reading.gr_t_error or 0.0) > 0.7 * (reading.gr_t or 0.0)


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
