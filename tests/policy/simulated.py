"""Training as the theory of the two gauges has it: what an optimum, a noise scale and a critical rate make of a run.

A world has a best learning rate, best at its critical batch and carried to others by sqrt(B / (B + mu)), and a noise
scale that grows with progress. x = lr / (the best at this batch) drives everything: progress per step goes with x up to
2, GR_T rises from its floor for a constant signal through 20 at x = 1, at 3 there is no progress, and from `FATAL` on
the loss explodes and the network is dead: back at the loss it began with, with the gauges of pure noise, which look
healthy.
"""

from __future__ import annotations

import copy
import math
import random
from dataclasses import dataclass, field

from grgauge import Config, Continue, Policy, Reading, Retune, Stop, theory
from grgauge.policy import Probe

EVERY = 5
FATAL = 8.0
GROUPS = 4


@dataclass(frozen=True)
class World:
    """best: learning rate at an infinite batch; mu: noise scale at first, (1 + drift * progress) times that later."""

    best: float = 3e-3
    mu: float = 60.0
    drift: float = 0.5
    first_loss: float = 2.3
    last_loss: float = 0.3
    loss_noise: float = 0.6
    speed: float = 0.008
    reading_noise: float = 0.12

    def noise_scale(self, progress: float) -> float:
        return self.mu * (1.0 + self.drift * progress)

    def best_lr(self, batch: int, progress: float = 0.0) -> float:
        return self.best * math.sqrt(batch / (batch + self.noise_scale(progress)))

    def loss(self, progress: float) -> float:
        return self.last_loss + (self.first_loss - self.last_loss) * math.exp(-progress)


@dataclass
class Training:
    """One line of weights and its gauges, advanced five steps at a time."""

    world: World
    config: Config
    rng: random.Random
    step: int = 0
    progress: float = 0.0
    dead: bool = False
    shock: float = 0.0
    age: int = 0
    log_gr_t: float = 0.0
    s: list[float] = field(default_factory=list)
    g2: list[float] = field(default_factory=list)

    def set(self, config: Config) -> None:
        """Another configuration; the gauges start anew, but for GR_T's first moment."""
        self.config, self.age, self.s, self.g2 = config, 0, [], []

    def untrained_loss(self) -> float:
        return self.world.first_loss + self._noise(1)

    def advance(self, lr_factor: float = 1.0) -> tuple[Reading, float]:
        """Five steps; the reading at their end and their mean loss."""
        w, batch = self.world, self.config.batch_size
        mu = w.noise_scale(self.progress)
        x = lr_factor * self.config.lr / w.best_lr(batch, self.progress)
        self.step, self.age = self.step + EVERY, self.age + EVERY
        if x >= FATAL and not self.dead:
            self.dead, self.progress, self.shock = True, 0.0, w.first_loss * min(x, 100.0)
        if not self.dead and x < 3.0:
            self.progress += EVERY * w.speed * min(x, 2.0) * (3.0 - x) / 2.0 * math.sqrt(batch / (batch + mu))
        self.shock *= 0.3
        return self._reading(x, mu), w.loss(self.progress) + self.shock + self._noise(EVERY)

    def _noise(self, steps: int) -> float:
        return self.rng.gauss(0.0, self.world.loss_noise / math.sqrt(self.config.batch_size * steps))

    def _reading(self, x: float, mu: float) -> Reading:
        batch = self.config.batch_size
        if self.dead:
            mu, level = 1e4, theory.uncorrelated()
        else:
            floor = theory.steady_signal(batch / mu)
            climb = min((self.age / 50.0) ** 0.3, 2.0)
            level = min(floor + (20.0 - floor) * x**1.2 * climb, theory.period2())
        gain = 1.0 - 0.9**EVERY
        target = math.log(level)
        self.log_gr_t = target if self.step == EVERY else self.log_gr_t + gain * (target - self.log_gr_t)
        settled = theory.finite_time_factor(self.step)
        gr_t = max(math.exp(self.log_gr_t + self.rng.gauss(0.0, self.world.reading_noise)) * settled, 1.0)
        # S and G2 of one step, in units of the true |gradient|^2, smoothed over the newest readings
        share = GROUPS / batch
        self.s = [*self.s[-14:], mu * (1.0 + self.rng.gauss(0.0, 0.1))]
        self.g2 = [*self.g2[-14:], 1.0 + (1.0 + mu * share) * self.rng.gauss(0.0, 0.2)]
        n = len(self.s)
        s, g2 = sum(self.s) / n, max(sum(self.g2) / n, 0.0)
        gr_s = (g2 + s) / (batch * g2 + s)
        error = (1.0 + mu * share) * 0.2 / math.sqrt(n) * abs(1.0 - batch * gr_s) / (batch * g2 + s)
        return Reading(
            step=self.step,
            batch_size=batch,
            gr_t=gr_t,
            gr_t_error=self.world.reading_noise * gr_t if self.age >= 3 * EVERY else None,
            finite_time_factor=settled,
            gr_s=gr_s,
            gr_s_error=error if n >= 3 else None,
            noise_scale=s / g2 if g2 > 0.0 else None,
            noise_scale_error=(1.0 + mu * share) * 0.2 / math.sqrt(n) * s / g2**2 if g2 > 0.0 and n >= 3 else None,
            grad_norm=1.0 / (1.0 + self.progress) * math.exp(self.rng.gauss(0.0, 0.1)),
            nonfinite=0,
            ready=self.step >= 20 and n >= 5,
        )


@dataclass
class Outcome:
    cost: float
    reached: bool
    config: Config
    training: Training
    decisions: list[tuple[int, Continue | Retune | Stop | Probe]]

    @property
    def moves(self) -> list[Retune]:
        return [decision for _, decision in self.decisions if isinstance(decision, Retune)]


@dataclass
class Loop:
    """Policy and training in a closed loop."""

    policy: Policy
    world: World
    config: Config
    seed: int = 0
    with_loss: bool = True

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.training = Training(self.world, self.config, self.rng)
        self.saved = self.training
        self.decisions: list[tuple[int, Continue | Retune | Stop | Probe]] = []
        self.cost, self.fresh = 0.0, True

    def turn(self, lr_factor: float = 1.0) -> Continue | Retune | Stop | Probe:
        """Tell the first loss of fresh weights, or train for five steps and tell what they read."""
        if self.fresh:
            reading, loss = None, self.training.untrained_loss()
        else:
            reading, loss = self.training.advance(lr_factor)
            self.cost += EVERY * self.config.batch_size
        self.fresh = False
        decision = self.policy.observe(reading, self.config, loss=loss if self.with_loss else None, lr_factor=lr_factor)
        self.decisions.append((self.training.step, decision))
        if isinstance(decision, Probe):
            decision = self.probe(decision)
            self.decisions.append((self.training.step, decision))
        if isinstance(decision, Retune):
            self.config = decision.config
            if not decision.reuse:
                self.training, self.fresh = Training(self.world, self.config, self.rng), True
            elif decision.rollback:
                self.training = copy.copy(self.saved)
                # its gauge goes on counting where it was
            else:
                self.saved = copy.copy(self.training)
            self.training.set(self.config)
        return decision

    def probe(self, probe: Probe) -> Continue | Retune | Stop | Probe:
        """Train at both from here on, and go on with what the policy decides for."""
        ends, losses = [], []
        for config in probe.configs:
            end = copy.copy(self.training)
            if config != self.config:
                end = Training(self.world, config, self.rng) if probe.untrained else end
                end.set(config)
            samples = 0 if probe.untrained and config == self.config else probe.samples
            for _ in range(samples // (EVERY * config.batch_size)):
                end.advance()
            self.cost += samples
            ends.append(end)
            losses.append([end.advance()[1] if end.dead else self.world.loss(end.progress) for _ in range(4)])
        decision = self.policy.judge((losses[0], losses[1]))
        self.training = ends[isinstance(decision, Retune)]
        return decision

    def run(self, samples: float, progress: float = math.inf) -> Outcome:
        """Until so many samples, so much progress, or a Stop."""
        while self.cost < samples and self.training.progress < progress:
            if isinstance(self.turn(), Stop):
                break
        reached = self.training.progress >= progress
        return Outcome(self.cost, reached, self.config, self.training, self.decisions)


def ideal_cost(world: World, progress: float) -> float:
    """Samples for training that is always at the batch of GR_S 0.58 and at the fastest learning rate, x = 1.5."""
    cost, parts = 0.0, 200
    for i in range(parts):
        mu = world.noise_scale((i + 0.5) / parts * progress)
        batch = theory.batch_for_gr_s(0.58, mu)
        cost += batch * progress / parts / (world.speed * 1.125 * math.sqrt(batch / (batch + mu)))
    return cost
