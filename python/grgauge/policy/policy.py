"""The policy: readings and losses in, changes of learning rate and batch size out. No torch, no clock, no I/O."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from .._validation import require
from ..reading import Reading
from .decisions import Config, Decision
from .measured import Measured
from .published import Published
from .settings import Settings


class RuleSet(Protocol):
    """What a policy of one's own must have. It decides what to do about readings and losses, the same for the same."""

    def observe(
        self,
        reading: Reading | None,
        config: Config,
        *,
        loss: float | None = None,
        samples: float | None = None,
        lr_factor: float = 1.0,
    ) -> Decision:
        """What to do after a step; see `Policy.observe`."""

    def judge(self, losses: tuple[Sequence[float], Sequence[float]]) -> Decision:
        """What to do after a `Probe`; see `Policy.judge`. Raises ValueError where none was asked for."""

    def state_dict(self) -> dict[str, Any]:
        """All that decisions depend on but the arguments of the constructor, as plain values ready for JSON."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken, bit for bit. Raises ValueError if it does not fit; nothing changes."""


RULE_SETS: dict[str, Callable[[Settings], RuleSet]] = {"measured": Measured, "published": Published}


class Policy(Settings):
    """A deterministic machine that reads gauges and decides: `observe` after every step, or at every reading.

    The measured rules were chosen on seven small trainings (character transformer, CNN, two MLPs, GRU, autoencoder,
    ResNet). What they arrive at, from how many starts and at what cost, is in docs/tuning.md. Without a loss nothing
    tells a dead network from a healthy one: always give it.

    Args:
        target: Where readings should be.
        rules: "measured": what measurement shows to be better; "published": the paper's, by the gauges alone.
        every: Steps between checks.
        warm_up: Steps of a new run before its gauges are judged (published rules).
        grace: Steps after a change of configuration before gauges are judged (published rules), or before a learning
            rate counts as found (measured ones).
        window: Relative change of the gradient norm between checks below which the critical period is over, so that
            nothing changes (published rules).
        lr_bounds: Learning rates allowed. The usual one lies at 4/9 of their range in logarithms: early readings of a
            small batch raise it no higher, and a run that has exploded begins again at no more.
        min_batch: Smallest batch allowed, in samples.
        max_batch: Largest batch allowed, in samples: where memory ends.
        batch_multiple: Batches are multiples of it.
        max_lr_factor: What one move may multiply the learning rate by, or divide it by.
        max_batch_factor: The same for the batch.
        gain: Measured rules raise the learning rate by (GR_T*/GR_T)^gain.
        coupling: A batch that is cut by r changes the learning rate by r^coupling (1/2 for Adam: Malladi et al.).
        confidence: Of the intervals that readings are judged by.
        blind: GR_S above which GR_T says nothing about the learning rate.
        max_moves: Changes of configuration, after which the last one stays.

    Raises:
        ValueError: A number is out of range.

    Examples:
        >>> import grgauge
        >>> policy = grgauge.Policy(max_batch=512)
        >>> config = grgauge.Config(lr=1e-3, batch_size=64)
        >>> print(policy.observe(None, config, loss=2.3))  # untrained weights
        go on: no new reading (waiting)
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._rules: RuleSet = RULE_SETS[self.rules](self)

    @staticmethod
    def paper(**changes: Any) -> Policy:
        """The published rules to the letter; keywords as for `Policy` change single ones.

        Check every 5 steps, warm-up and grace 20; lr (20/GR_T)^(1/3) and B GR_S/0.58, unclamped and uncoupled; weights
        reused, then a restart if the gauges are not back in the zone within the grace period; all of it while the
        gradient norm changes by 1 % or more from check to check.
        """
        unclamped: dict[str, Any] = {"max_lr_factor": math.inf, "max_batch_factor": math.inf, "max_moves": 1_000_000}
        return Policy(**{"rules": "published", "coupling": 0.0, **unclamped, **changes})

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

        After a `Retune` call the gauge's `restart`, or make a new one with untrained weights: readings must be those of
        the new configuration.

        Args:
            reading: The newest reading; one already seen, or None, only carries the loss.
            config: What this step ran at. The policy follows it where it is not what was proposed.
            loss: Training loss of this step, or the mean since the last call. The first should be that of untrained
                weights: an explosion in the first steps is judged by it.
            samples: That these weights have been trained on; None: counted from `reading.step` and the batch.
            lr_factor: What the schedule multiplies config.lr by at this step. While it rises GR_T is not judged.

        Returns:
            `Continue`, `Retune` to another configuration, `Probe` of another one, or `Stop`, with the evidence. A probe
                may be left out; it is then asked for again much later.

        Raises:
            ValueError: samples or lr_factor is out of range, and nothing changes.
        """
        require(samples is None or 0.0 <= samples < math.inf, "samples", samples, "None or finite and at least 0")
        require(0.0 <= lr_factor < math.inf, "lr_factor", lr_factor, "finite and at least 0")
        return self._rules.observe(reading, config, loss=loss, samples=samples, lr_factor=lr_factor)

    def judge(self, losses: tuple[Sequence[float], Sequence[float]]) -> Decision:
        """What to do after the probe that was asked for last.

        Args:
            losses: Of the averaged weights of each of its two configurations, batch by batch, on the same batches.

        Returns:
            `Retune` to the other configuration, with the weights that were trained at it, or `Continue` with those of
                the present one.

        Raises:
            ValueError: There was no probe, or losses are not two times the same number, of at least two.
        """
        first, second = losses
        require(len(first) == len(second) > 1, "losses", losses, "two times the same number, of at least two")
        return self._rules.judge(losses)

    def state_dict(self) -> dict[str, Any]:
        """All that decisions depend on but the arguments of `Policy`, as plain values ready for JSON."""
        return {"rules": self.rules, **self._rules.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken, bit for bit. Raises ValueError if it does not fit; nothing changes."""
        require(state.get("rules") == self.rules, "state['rules']", state.get("rules"), f"{self.rules!r}, as here")
        self._rules.load_state_dict({name: value for name, value in state.items() if name != "rules"})
