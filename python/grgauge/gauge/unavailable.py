"""Why a gauge has no reading, in one place and one form."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Unavailable:
    """Takes the place of a quantity that is not available.

    reason     one phrase, without the quantity's name
    transient  True if only this reading is skipped, so that earlier ones still hold
    """

    reason: str
    transient: bool = False

    def note(self, quantity: str) -> str:
        """The line in `Reading.notes`."""
        return f"{quantity} {'skipped a reading' if self.transient else 'not available'}: {self.reason}"


NON_FINITE = Unavailable("non-finite gradients", transient=True)
