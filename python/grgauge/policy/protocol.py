"""What every rule set has, and what a policy of one's own must have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from ..reading import Reading
from .decisions import Config, Decision


class RuleSet(Protocol):
    """Decides what to do about readings and losses, the same for the same.

    One that asks for a `Probe` has `judge` too; see `Policy.judge`.
    """

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
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that decisions depend on but the arguments of the constructor, as plain values ready for JSON."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken, bit for bit. Raises ValueError if it does not fit; nothing changes."""
        ...
