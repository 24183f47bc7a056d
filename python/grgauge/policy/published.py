"""The paper's rules: the learning rate and the batch by power laws, judged by the gauges alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..reading import Reading
from .course import Course, restored
from .decisions import Config, Continue, Decision, Evidence, Retune
from .settings import Settings


@dataclass
class State:
    course: Course = field(default_factory=Course)
    grad_norm: float | None = None  # at the newest check under this configuration
    inherited: bool = False  # reused weights, whose gauges are not back in the zone yet


class Published:
    """Move by the power laws, keep the weights, and begin again if the gauges are not back in the zone within grace."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._state = settings, State()

    def observe(
        self,
        reading: Reading | None,
        config: Config,
        *,
        loss: float | None = None,
        samples: float | None = None,
        lr_factor: float = 1.0,
    ) -> Decision:
        s, course, limits = self._state, self._state.course, self._settings
        if course.follow(config):
            s.grad_norm = None
        step = None if reading is None else reading.step
        inside = limits.fit(config, config.lr, config.batch_size)
        if inside != config and course.moves < limits.max_moves:
            return self._move(inside, "configuration out of bounds", Evidence("bounds", step))
        if reading is None or course.advance(reading, samples, limits.every) is None:
            return Continue("no new reading", Evidence("waiting", step))
        before, s.grad_norm = s.grad_norm, reading.grad_norm if math.isfinite(reading.grad_norm) else None
        if before and s.grad_norm is not None and abs(s.grad_norm / before - 1.0) < limits.window:
            evidence = Evidence("window", course.step, "gradient norm", s.grad_norm)
            return Continue("the critical period is over", evidence)
        return self._judge(reading)

    def _judge(self, reading: Reading) -> Decision:
        s, course, limits, target = self._state, self._state.course, self._settings, self._settings.target
        lr, batch = target.lr_factor(reading), target.batch_factor(reading)
        if lr is None or batch is None:
            return Continue("a gauge is missing", Evidence("missing", course.step))
        assert reading.gr_t is not None  # else lr were None
        temporal = Evidence("zone", course.step, "GR_T", reading.gr_t / reading.finite_time_factor, target.gr_t_zone)
        if lr == batch == 1.0:
            back, s.inherited = s.inherited, False
            return Continue("back in the zone within the grace period" if back else "in the zone", temporal)
        if course.age < (limits.grace if s.inherited else limits.warm_up):
            return Continue("too early to judge", temporal)
        evidence = Evidence("zone", course.step, "GR_S", reading.gr_s, target.gr_s_zone) if lr == 1.0 else temporal
        old = course.now
        if s.inherited:
            s.inherited = False
            return self._move(old, "not back in the zone within grace", evidence, reuse=False)
        lr = min(max(lr, 1.0 / limits.max_lr_factor), limits.max_lr_factor)
        batch = min(max(batch, 1.0 / limits.max_batch_factor), limits.max_batch_factor)
        decision = self._move(limits.fit(old, old.lr * lr, old.batch_size * batch), "out of the zone", evidence)
        s.inherited = isinstance(decision, Retune)
        return decision

    def _move(self, to: Config, reason: str, evidence: Evidence, *, reuse: bool = True) -> Decision:
        s, most = self._state, self._settings.max_moves
        decision = s.course.move(to, most, reason, evidence, reuse=reuse)
        if isinstance(decision, Retune):
            if not reuse:
                s.course = Course(s.course.config, moves=s.course.moves)
            s.grad_norm = None
        return decision

    def judge(self, losses: tuple[Sequence[float], Sequence[float]]) -> Decision:
        raise ValueError(f"losses must be those of a probe, and the published rules ask for none, got {losses!r}")

    def state_dict(self) -> dict[str, Any]:
        return asdict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._state = restored(State, state)
