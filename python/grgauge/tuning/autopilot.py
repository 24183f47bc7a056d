"""A run whose learning rate and batch size are changed while it goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._validation import require_count
from ..invariance import Rule
from ..optim.learning_rates import peak_lr
from ..policy import Config, Decision, Policy, Probe, Retune, Stop
from .advisor import figures
from .checkpoints import deserialize, serialize
from .data import Data
from .loop import Loop
from .view import View


class Autopilot(View):
    """Acts within one run: learning rate and batch size change live, each change printed with its reading.

    Loop over `batches(data)` and call `step(loss)` for each. Weights to return to are kept in memory, on the host: as
    they came, and before the newest change. On several ranks all do the same, and rank 0 prints.

    Args:
        model: As for `Trial.watch`.
        optimizer: As for `Trial.watch`; its learning rate is where it begins.
        others: As for `Trial.watch`.
        batch_size: To begin with, in samples.
        budget: Samples to train on, those of abandoned weights included.
        policy: None: `Policy.default()`.
        print: Takes a line.
        micro_batch: As for `grgauge.tune`.
        every: As for `grgauge.tune`.
        seed: As for `grgauge.tune`.
        decay: As for `grgauge.tune`.

    Raises:
        ValueError: A number is out of range, or ranks cannot share the batch size equally.
        TrainingError: As `Trial.watch` does.

    Examples:
        >>> import torch, grgauge
        >>> x = torch.randn(64, 4)
        >>> data = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))
        >>> net = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        >>> autopilot = grgauge.Autopilot(net, optimizer, batch_size=16, budget=160)
        >>> for inputs, wanted in autopilot.batches(data):
        ...     updated = autopilot.step((net(inputs) - wanted).square().mean())
        >>> autopilot.used
        160
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
        config, self.policy = Config(peak_lr(optimizer), batch_size), policy or Policy.default()
        super().__init__(Loop(config, self.policy, micro_batch=micro_batch, every=every, seed=seed, decay=decay))
        self.budget, self.used, self.decisions = budget, 0, list[Retune | Stop]()
        self._print = print
        self._loop.watch(model, optimizer, *others)
        self._saved = self._loop.keep_untrained()

    def batches(self, data: Data) -> Iterator[Any]:
        """As `Trial.batches`."""
        yield from self._loop.batches(self._loop.source(data), self._over, self._after_step, self._act)

    def step(self, loss: Tensor) -> bool:
        """As `Trial.step`."""
        stepped = self._loop.step(loss)
        self.used += self.batch_size if stepped else 0
        return stepped

    def _over(self) -> bool:
        return self.used >= self.budget or any(isinstance(decision, Stop) for decision in self.decisions)

    def _after_step(self) -> Probe | None:
        decision, _ = self._loop.observe()
        if isinstance(decision, Probe):
            refused = self._loop.refused(decision, self.budget - self.used)
            if refused is not None and self._loop.world.rank == 0:
                self._print(f"{self.used} samples: {refused}")
            return None if refused else decision
        if decision is not None:
            self._act(decision, 0)
        return None

    def _act(self, decision: Decision, compared: int) -> None:
        """compared: samples on which averages were, in a probe."""
        loop = self._loop
        self.used += compared
        if isinstance(decision, (Retune, Stop)):
            self.decisions.append(decision)
        said = "no reading" if self.reading is None else figures(self.reading)
        words = ""
        if isinstance(decision, Retune):
            if decision.reuse and not decision.rollback:
                self._saved = serialize(loop.state())
            elif decision.reuse:
                loop.restore(deserialize(self._saved))
            else:
                loop.restore_untrained()
            config, words = loop.decayed(decision.config)
            loop.configure(config)
        if loop.world.rank == 0:
            self._print(f"{self.used} samples, {said}: {decision}. {words}".rstrip())
