"""The measured rules: gauges judged by their intervals, and the loss where gauges cannot tell. Which is asked first.

`gauge_rules` and `loss_rules` are the rules, `moves` what they remember and do, `rules` their numbers with the reasons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..reading import Reading
from . import gauge_rules, loss_rules
from .course import restored
from .decisions import Config, Continue, Decision, Evidence
from .moves import Moves, State
from .rules import RULES
from .settings import Settings


class Measured:
    """Up step by step from below, down by the loss, the batch by its noise scale; see `Policy`."""

    def __init__(self, settings: Settings) -> None:
        self._moves = Moves(settings)

    def observe(
        self,
        reading: Reading | None,
        config: Config,
        *,
        loss: float | None = None,
        samples: float | None = None,
        lr_factor: float = 1.0,
    ) -> Decision:
        moves, s, limits = self._moves, self._moves.state, self._moves.settings
        step = None if reading is None else reading.step
        moves.follow(config)
        if loss is not None and abs(loss) < RULES.largest:
            s.broken = 0
            s.losses.add(loss)
        elif loss is not None:
            s.broken += 1
        inside = limits.fit(config, config.lr, config.batch_size)
        if inside != config and s.course.moves < limits.max_moves:
            return moves.to(inside.lr, inside.batch_size, "configuration out of bounds", Evidence("bounds", step))
        if s.broken >= RULES.max_broken:
            return moves.fail("the loss is not finite", Evidence("diverged", step, "loss"))
        steps = s.course.advance(reading, samples, limits.every)
        if reading is None or steps is None:
            return Continue("no new reading", Evidence("waiting", step))
        warming = s.lr_factor is not None and lr_factor > s.lr_factor
        s.lr_factor, s.peak = lr_factor, max(s.peak, lr_factor)
        s.steps = 0 if warming else s.steps + steps
        if warming:  # nothing that is seen so far is the doing of this learning rate
            moves.begin()
        return (
            loss_rules.wrecked(moves, s.losses.close(s.course.samples))
            or loss_rules.rising(moves)
            or loss_rules.plateau_left(moves)
            or gauge_rules.batch_size(moves, reading)
            or gauge_rules.probe(moves, reading)
            or gauge_rules.learning_rate(moves, reading, warming)
            or Continue("nothing to change", Evidence("steady", s.course.step))
        )

    def judge(self, losses: tuple[Sequence[float], Sequence[float]]) -> Decision:
        other = self._moves.state.probed
        if other is None:
            raise ValueError(f"losses must be those of a probe, and none was asked for, got {losses!r}")
        return loss_rules.judge_probe(self._moves, other, *losses)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self._moves.state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._moves.state = restored(State, state)
