"""A run whose learning rate and batch size are advised on, or changed while it goes on.

Advisor    prints what gauges and policy say about a run, and acts on nothing
Autopilot  acts within one run
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._validation import require_count
from ..gauge import Gauge
from ..invariance import Rule
from ..policy import Config, Continue, Decision, Policy, Retune, Stop, verdict
from ..reading import Reading
from .learning_rates import highest_lr, peak_lr
from .ranks import World
from .training import Training, frozen, thawed


class Advisor:
    """Prints what gauges and policy say about a run every so often, and acts on nothing.

    gauge      the gauge of the run
    optimizer  whose learning rate is advised on, the highest of its groups
    policy     None: `Policy.default()`
    every      steps between two lines
    print      takes a line

    With a gauge that is attached to a module, call `step` on all ranks: they hear the same, and rank 0 prints. Raises
    ValueError for a number out of range.
    """

    def __init__(
        self,
        gauge: Gauge,
        optimizer: torch.optim.Optimizer,
        policy: Policy | None = None,
        *,
        every: int = 100,
        print: Callable[[str], object] = print,
    ) -> None:
        require_count("every", every, 1)
        self.policy, self.every = policy or Policy.default(), every
        self._gauge, self._optimizer, self._print = gauge, optimizer, print
        self._steps = 0
        self._seen: Reading | None = None
        self._advice: Decision | None = None

    def step(self, loss: float | Tensor | None = None) -> Decision | None:
        """Call after each `optimizer.step()`; returns the newest decision, None before the first reading.

        loss  training loss of this step, on several ranks of each one's part. Without it the policy cannot tell a
              network that has been hurt
        """
        self._steps += 1
        reading = self._gauge.reading()
        peak, now = peak_lr(self._optimizer), highest_lr(self._optimizer)
        config = Config(peak, max(round(self._gauge.batch_size), 1))
        before = self.policy.state_dict()
        value = None if loss is None else self._mean(loss)
        decision = self.policy.observe(reading, config, loss=value, lr_factor=now / peak)
        if not isinstance(decision, Continue):
            self.policy.load_state_dict(before)  # nobody acts on it, so for the policy it has not been made
        if reading is not None and reading is not self._seen:
            self._seen, self._advice = reading, decision
        printing = self._steps % self.every == 0 and (self._gauge._ranks is None or self._gauge._ranks.rank == 0)
        if reading is not None and printing:
            self._print(f"{_figures(reading)} — {verdict(reading, self.policy.target)}; {self._advice}")
        return self._advice

    def _mean(self, loss: float | Tensor) -> float:
        """The loss, its mean over the ranks that the gauge is attached to."""
        if self._gauge._ranks is None:
            return float(loss)
        device = self._optimizer.param_groups[0]["params"][0].device
        return World(self._gauge._ranks.group).mean(torch.as_tensor(loss, dtype=torch.float64, device=device).detach())


class Autopilot(Training):
    """Acts within one run: learning rate and batch size change live, each change printed with its reading.

    model, optimizer, others   as for `Training.watch`; the optimizer's learning rate is where it begins
    batch_size   to begin with, in samples
    budget       samples to train on, those of abandoned weights included
    policy       None: `Policy.default()`
    print        takes a line
    micro_batch, every, seed, decay   as for `grgauge.tune`

    Loop over `batches(data)` and call `step(loss)` for each. Weights to return to are kept in memory, on the host: as
    they came, and before the newest change. On several ranks all do the same, and rank 0 prints.

    Raises ValueError for a number out of range, and for a batch size that ranks cannot share equally; TrainingError as
    `watch` does.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *others: Any,
        batch_size: int,
        budget: int,
        policy: Policy | None = None,
        print: Callable[[str], object] = print,
        micro_batch: int | None = None,
        every: int = 5,
        seed: int = 0,
        decay: Rule = "decay",
    ) -> None:
        require_count("budget", budget, 1)
        config, policy = Config(peak_lr(optimizer), batch_size), policy or Policy.default()
        super().__init__(config, policy, micro_batch=micro_batch, every=every, seed=seed, decay=decay)
        self.budget, self.used, self.decisions = budget, 0, list[Retune | Stop]()
        self._print = print
        self.watch(model, optimizer, *others)
        self._first = self._saved = frozen(self._state())

    def _over(self) -> bool:
        return self.used >= self.budget or any(isinstance(decision, Stop) for decision in self.decisions)

    def _between(self) -> None:
        self.used += self.config.batch_size
        decision, _ = self._observe()
        if decision is None:
            return
        if not isinstance(decision, Continue):
            self.decisions.append(decision)
        figures = "no reading" if self.reading is None else _figures(self.reading)
        words = ""
        if isinstance(decision, Retune):
            if decision.reuse and not decision.rollback:
                self._saved = frozen(self._state())
            else:
                self._restore(thawed(self._saved if decision.reuse else self._first))
            words = self._configure(decision.config)
        if self.world.rank == 0:
            self._print(f"{self.used} samples, {figures}: {decision}. {words}".rstrip())


def _figures(reading: Reading) -> str:
    values = (("GR_T", reading.gr_t, reading.gr_t_error, ".1f"), ("GR_S", reading.gr_s, reading.gr_s_error, ".2f"))
    told = [
        f"{name} –" if value is None else f"{name} {value:{spec}}" + ("" if error is None else f"±{error:{spec}}")
        for name, value, error, spec in values
    ]
    return f"step {reading.step}, {', '.join(told)}"
