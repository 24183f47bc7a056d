"""Why a gauge has nothing to say, in one place and one form."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Unavailable:
    """Stands where a quantity would.

    reason     in words, without the quantity's name
    transient  True if only this reading is skipped, so that what earlier ones said still holds
    """

    reason: str
    transient: bool = False

    def note(self, quantity: str) -> str:
        """The line in `Reading.notes`."""
        return f"{quantity} {'skipped a reading' if self.transient else 'not available'}: {self.reason}"


NON_FINITE = Unavailable("non-finite gradients", transient=True)
