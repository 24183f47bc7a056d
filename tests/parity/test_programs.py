"""Every row of the table, on torch's AdamW and on ours, loose and flat: the same parameters, states and groups."""

from __future__ import annotations

import warnings

import pytest
import torch
from parity.programs import PROGRAMS

from grgauge import AdamW, Gauge

NO_GAUGE = {"parameters_of_double_and_complex"}
"""Rows whose parameters no gauge reads."""


def run(program, make):
    """What a program can see when it ends: (class of its exception, parameters, gradients, state, groups, the rest)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of lazy layers and of schedulers before the first step
        try:
            optimizer, params, *rest = program(make)
        except Exception as error:
            return {"raised": type(error)}
    groups = optimizer.param_groups
    states = [optimizer.state.get(p) for group in groups for p in group["params"]]
    return {
        "params": [p.detach() for p in params],
        "grads": [p.grad if p.grad is None else p.grad.detach() for p in params],
        "state": [
            own and {name: value.float() if name == "step" else value for name, value in own.items()} for own in states
        ],
        "groups": [
            {name: list(value) if name == "betas" else value for name, value in group.items()} for group in groups
        ],
        "rest": rest,
    }


def alike(ours, theirs, place=""):
    assert type(ours) is type(theirs) or isinstance(ours, torch.Tensor) == isinstance(theirs, torch.Tensor), place
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), place
        for key, value in theirs.items():
            alike(ours[key], value, f"{place}[{key!r}]")
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs), place
        for i, value in enumerate(theirs):
            alike(ours[i], value, f"{place}[{i}]")
    elif isinstance(theirs, torch.Tensor):
        assert ours.shape == theirs.shape, place
        assert ours.dtype == theirs.dtype, place
        torch.testing.assert_close(
            ours.cpu(), theirs.cpu(), rtol=1e-5, atol=2e-6, equal_nan=True, msg=lambda text: f"{place}: {text}"
        )
    else:
        assert ours == theirs, place


@pytest.mark.parametrize("flat", [False, True], ids=["loose", "flat"])
@pytest.mark.parametrize("gauged", [False, True], ids=["plain", "gauged"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_cannot_tell_which_optimizer_it_has(name, gauged, flat):
    gauges = []

    def make(params, **options):
        optimizer = AdamW(params, flat=flat, **options)
        if gauged and name not in NO_GAUGE:
            gauges.append(Gauge(optimizer, 6, every=2))
        return optimizer

    ours, theirs = run(PROGRAMS[name], make), run(PROGRAMS[name], torch.optim.AdamW)
    alike(ours, theirs)
    for gauge in gauges:
        gauge.reading()
