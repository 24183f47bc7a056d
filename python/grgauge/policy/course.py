"""How far a training is and what it runs at: the account that every rule set keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any, TypeVar, get_args, get_type_hints

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

    def follow(self, config: Config) -> bool:
        """Take up what training runs at; True where that is another configuration than before."""
        changed = config != self.config
        if changed:
            self.config = config
            self.begin()
        return changed

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
        self,
        to: Config,
        most: int,
        reason: str,
        evidence: Evidence,
        *,
        reuse: bool = True,
        rollback: bool = False,
        probed: bool = False,
    ) -> Decision:
        """To another configuration, unless the bounds leave none or `most` moves are made."""
        if to == self.config and reuse and not rollback:
            return Continue(f"{reason}, but the bounds allow no change", evidence)
        if self.moves >= most:
            return Continue(f"{reason}, but all {most} moves are made", evidence)
        self.config, self.moves = to, self.moves + 1
        self.begin()
        return Retune(to, reuse, reason, evidence, rollback, probed)


def restored(record: type[Record], state: Any, name: str = "state") -> Record:
    """A record, and the records in it, from what `asdict` made of it. Raises ValueError if it does not fit."""
    kinds = get_type_hints(record)
    given = sorted(state) if isinstance(state, Mapping) else state
    require(given == sorted(kinds), name, given, f"keyed {sorted(kinds)}")
    return record(**{key: _part(kind, state[key], f"{name}[{key!r}]") for key, kind in kinds.items()})


def _part(kind: Any, value: Any, name: str) -> Any:
    """The value of a field of that type; a list is copied."""
    if isinstance(value, list):
        return [_part(kind, item, name) for item in value]
    record: Any = next((one for one in (kind, *get_args(kind)) if is_dataclass(one)), None)
    return value if value is None or record is None else restored(record, value, name)
