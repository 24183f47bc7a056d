"""How far a training is and what it runs at: the account that every rule set keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from .._validation import require
from ..reading import Reading
from .decisions import Config, Continue, Decision, Evidence, Retune

Record = TypeVar("Record")


@dataclass
class Course:
    config: Config | None = None  # what training was last seen to run at, or is to run at
    step: int = 0  # of the newest reading that was judged
    age: int = 0  # steps under this configuration
    samples: float = 0.0  # that these weights have been trained on
    start: float = 0.0  # `samples` when this configuration began
    moves: int = 0

    @property
    def now(self) -> Config:
        """The configuration, once one was seen."""
        assert self.config is not None
        return self.config

    def begin(self) -> None:
        """A configuration begins."""
        self.age, self.start = 0, self.samples

    def advance(self, reading: Reading | None, samples: float | None, every: int) -> int | None:
        """Steps since the reading that was judged last; None where this one is not due, and nothing changes."""
        if reading is None or 0 <= reading.step - self.step < every:
            return None
        # weights that went back or began anew have a gauge that may have done so too, or not
        turned = reading.step < self.step or (self.step == 0 and self.moves > 0)
        steps = min(reading.step, every) if turned else reading.step - self.step
        self.samples += steps * self.now.batch_size if samples is None else max(samples - self.samples, 0.0)
        self.step, self.age = reading.step, self.age + steps
        return steps

    def move(
        self, to: Config, most: int, reason: str, evidence: Evidence, *, reuse: bool = True, rollback: bool = False
    ) -> Decision:
        """To another configuration, unless the bounds leave none or `most` moves are made."""
        if to == self.config and reuse and not rollback:
            return Continue(f"{reason}, but the bounds allow no change", evidence)
        if self.moves >= most:
            return Continue(f"{reason}, but all {most} moves are made", evidence)
        self.config, self.moves = to, self.moves + 1
        self.begin()
        return Retune(to, reuse, reason, evidence, rollback)

    @staticmethod
    def from_state(state: Any) -> Course:
        return restored(Course, state, "state['course']", config=lambda config: config and Config(**config))


def restored(record: type[Record], state: Any, name: str, **parts: Callable[[Any], Any]) -> Record:
    """A record from what `asdict` made of it, some of its parts by functions. Raises ValueError if it does not fit."""
    names = sorted(f.name for f in fields(record))  # type: ignore[arg-type]
    given = sorted(state) if isinstance(state, Mapping) else state
    require(given == names, name, given, f"keyed {names}")
    return record(**{**state, **{part: make(state[part]) for part, make in parts.items()}})
