"""A run whose learning rate and batch size are advised on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._validation import require_count
from ..gauge import Gauge
from ..optim.learning_rates import highest_lr, peak_lr
from ..policy import Config, Decision, Policy, Retune, Stop
from ..reading import Reading
from .ranks import World


class Advisor:
    """Prints what gauges and policy say about a run every so often, and acts on nothing.

    With a gauge that is attached to a module, call `step` on all ranks: all get the same decision, and rank 0 prints.

    Args:
        gauge: The gauge of the run.
        optimizer: Whose learning rate is advised on, the highest of its groups.
        policy: None: `Policy.default()`.
        every: Steps between two lines.
        print: Takes a line.

    Raises:
        ValueError: A number is out of range.

    Examples:
        >>> import torch, grgauge
        >>> net = torch.nn.Linear(4, 1)
        >>> optimizer = grgauge.AdamW(net.parameters(), lr=1e-4)
        >>> gauge = grgauge.Gauge(optimizer, batch_size=64)
        >>> lines = []
        >>> advisor = grgauge.Advisor(gauge, optimizer, every=30, print=lines.append)
        >>> def loss_fn(x):
        ...     return (net(x) - x.sum(1, keepdim=True)).square().mean()
        >>> for _ in range(60):
        ...     optimizer.zero_grad()
        ...     loss = gauge.split_backward(loss_fn, torch.randn(64, 4))
        ...     optimizer.step()
        ...     advice = advisor.step(loss)
        >>> len(lines)
        2
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
        self._loss: Tensor | float = 0.0  # the sum since the policy was asked last, where it is: no step waits for it
        self._count = 0
        self._seen: Reading | None = None
        self._advice: Decision | None = None

    def step(self, loss: float | Tensor | None = None) -> Decision | None:
        """Call after each `optimizer.step()`.

        Args:
            loss: Training loss of this step, on several ranks that of each one's part. Without it the policy cannot
                tell that weights were damaged.

        Returns:
            The newest decision, None before the first reading.
        """
        self._steps += 1
        reading = self._gauge.reading()
        if loss is not None:
            self._loss = self._loss + (loss.detach() if isinstance(loss, Tensor) else loss)
            self._count += 1
        if self._steps == 1 or reading is not self._seen:
            decision = self._ask(reading)
            if reading is not None:
                self._seen, self._advice = reading, decision
        printing = self._steps % self.every == 0 and (self._gauge._ranks is None or self._gauge._ranks.rank == 0)
        if reading is not None and printing:
            self._print(f"{figures(reading)} — {self._gauge.advice(target=self.policy.target)}; {self._advice}")
        return self._advice

    def _ask(self, reading: Reading | None) -> Decision:
        """What the policy says to a new reading, and to the mean loss since the one before."""
        peak, now = peak_lr(self._optimizer), highest_lr(self._optimizer)
        config = Config(peak, max(round(self._gauge.batch_size), 1))
        loss = self._mean(self._loss / self._count) if self._count else None
        self._loss, self._count = 0.0, 0
        before = self.policy.state_dict()
        decision = self.policy.observe(reading, config, loss=loss, lr_factor=now / peak)
        if isinstance(decision, (Retune, Stop)):
            self.policy.load_state_dict(before)  # nobody acts on it: to the policy it was never made
        return decision

    def _mean(self, loss: float | Tensor) -> float:
        """The loss, its mean over the ranks that the gauge is attached to."""
        if self._gauge._ranks is None:
            return float(loss)
        device = self._optimizer.param_groups[0]["params"][0].device
        return World(self._gauge._ranks.group).mean(torch.as_tensor(loss, dtype=torch.float64, device=device).detach())


def figures(reading: Reading) -> str:
    """Its step and gauges, with their standard errors."""
    values = (("GR_T", reading.gr_t, reading.gr_t_error, ".1f"), ("GR_S", reading.gr_s, reading.gr_s_error, ".2f"))
    shown = [
        f"{name} –" if value is None else f"{name} {value:{spec}}" + ("" if error is None else f"±{error:{spec}}")
        for name, value, error, spec in values
    ]
    return f"step {reading.step}, {', '.join(shown)}"
