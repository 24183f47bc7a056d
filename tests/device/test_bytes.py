"""Moments in bfloat16 and bfloat16 parameters, rounded stochastically on the GPU."""

from __future__ import annotations

import pytest
import torch
from device.problem import Problem, same_bits
from device.test_capture import captured
from device.test_training import FLAT, advance, give, gradients, parameters
from kernels import rounding
from torch import nn

import grgauge
from grgauge import AdamW

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BF16 = {"state_dtype": torch.bfloat16}
ALL_BF16 = {"stochastic_rounding": True, **BF16}


@pytest.mark.parametrize("param", DTYPES, ids=str)
@pytest.mark.parametrize("grad", DTYPES, ids=str)
@pytest.mark.parametrize("flat", [False, True], ids=["loose", "flat"])
def test_moments_are_rounded_by_the_definition(backend, grad, param, flat):
    rounding.check_moments(backend, grad, param, flat, device="cuda")


@pytest.mark.parametrize("options", [{"zero_grad": True}, {"ema": ...}, {"previous": ...}, {"sums": False}], ids=str)
def test_no_option_changes_the_draw(backend, options):
    rounding.check_moments(backend, torch.bfloat16, torch.bfloat16, False, device="cuda", **options)


def test_subnormal_infinite_and_huge_moments(backend):
    rounding.check_edges(backend, device="cuda")


@pytest.mark.parametrize("moment", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grad", DTYPES, ids=str)
def test_parameters_are_rounded_by_the_definition(backend, moment, grad):
    rounding.check_params(backend, moment, grad, device="cuda")


def test_layout_never_changes_the_draw(backend):
    """An element's random bits do not depend on where in a vector, a chunk or a buffer it sits."""
    ended = []
    for layout in ("loose", "misaligned", "flat"):
        p = Problem(grad=torch.bfloat16, layout=layout)
        moments = [[t.bfloat16() for t in stream] for stream in (p.exp_avg_stream, p.exp_avg_sq_stream)]
        p.exp_avg_stream, p.exp_avg_sq_stream = moments
        p.adamw(backend, seed=5)
        ends = p.plan.bucket.offsets
        for stream in moments:
            whole = stream[0]
            ended += [stream if layout != "flat" else [whole[o : o + n] for o, n in zip(ends, p.sizes, strict=True)]]
    assert same_bits([*ended[0], *ended[1]], [*ended[2], *ended[3]])
    assert same_bits([*ended[0], *ended[1]], [*ended[4], *ended[5]])


@FLAT
def test_training_goes_where_float32_moments_lead(backend, flat):
    ours, theirs = parameters(), parameters()
    begun = [p.detach().clone() for p in theirs]
    optimizer = AdamW(ours, lr=1e-2, flat=flat, backend=backend, **BF16)
    advance(optimizer, ours, 60)
    advance(torch.optim.AdamW(theirs, lr=1e-2, fused=True), theirs, 60)
    assert {s[name].dtype for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")} == {torch.bfloat16}
    for p, q, before in zip(ours, theirs, begun, strict=True):
        assert (p - q).norm() <= 0.02 * (q - before).norm()


def test_small_updates_of_bfloat16_parameters_are_not_lost(kernel):
    p = nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16, device="cuda"))
    optimizer = AdamW([p], lr=4e-4, weight_decay=0.0, backend=kernel, **ALL_BF16)
    for _ in range(100):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert float(p.detach().double().mean()) == pytest.approx(1.0 - 100 * 4e-4, abs=2e-3)


@FLAT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gauged_plain_and_repeated_runs_end_in_the_same_bits(kernel, dtype, flat):
    plain, gauged, again = (parameters(dtype) for _ in range(3))
    advance(AdamW(plain, flat=flat, backend=kernel, **ALL_BF16), plain, 25)
    for params in (gauged, again):
        optimizer = AdamW(params, flat=flat, backend=kernel, **ALL_BF16)
        gauge = grgauge.Gauge(optimizer, 32)
        advance(optimizer, params, 25)
        torch.cuda.synchronize()
        assert gauge.reading().step == 25
    assert same_bits(plain, gauged)
    assert same_bits(plain, again)


@FLAT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_replayed_steps_draw_anew_as_eager_ones_do(kernel, dtype, flat):
    """The random bits come from the step's number on the device, which a replay counts on."""
    params, twins = parameters(dtype), parameters(dtype)
    replayed, eager = (AdamW(p, flat=flat, backend=kernel, capturable=True, **ALL_BF16) for p in (params, twins))
    for p in (params, twins):
        give(p, gradients(0, p))
    graph = captured(replayed.step)
    for _ in range(3):
        eager.step()
    for t in range(1, 6):
        for p in (params, twins):
            give(p, gradients(t, p))
        graph.replay()
        eager.step()
    assert same_bits(params, twins)
    moments = [[o.state[p][name] for p in own for name in ("exp_avg", "exp_avg_sq")]
               for o, own in ((replayed, params), (eager, twins))]  # fmt: skip
    assert same_bits(*moments)
