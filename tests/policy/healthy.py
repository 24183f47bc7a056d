"""A reading that is in order, and a policy that is shown many like it."""

from __future__ import annotations

from dataclasses import replace

from policy.simulated import EVERY

from grgauge import Config, Continue, Reading
from grgauge.policy import Probe

READING = Reading(
    step=50,
    batch_size=64,
    gr_t=20.0,
    gr_t_error=1.0,
    finite_time_factor=1.0,
    gr_s=0.58,
    gr_s_error=0.02,
    noise_scale=86.0,
    noise_scale_error=5.0,
    grad_norm=1.0,
    nonfinite=0,
    ready=True,
)
CONFIG = Config(1e-3, 64, 0.01)


def watch(policy, config=CONFIG, checks=20, losses=None, lr_factors=None, first=EVERY, **quantities):
    """Up to `checks` readings alike, until something other than Continue; probes end undecided."""
    for i in range(checks):
        reading = replace(READING, step=first + EVERY * i, grad_norm=1.1**i, **quantities)
        loss = None if losses is None else losses[i]
        decision = policy.observe(reading, config, loss=loss, lr_factor=1.0 if lr_factors is None else lr_factors[i])
        if isinstance(decision, Probe):
            decision = policy.judge(((1.0, 1.0), (1.0, 1.0)))
        if not isinstance(decision, Continue):
            return decision
    return decision
