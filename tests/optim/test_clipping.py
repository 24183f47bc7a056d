"""A gauge on an optimizer that clips: two passes in all, and readings of the gradient as it was before."""

from __future__ import annotations

import copy

import pytest
import torch
from optim.stepping import FLAT, advance, gradients, parameters
from torch import nn

from grgauge import AdamW, Gauge
from grgauge.gauge.sources import ClippingSource, OwnSource
from grgauge_kernels.backends import cpu

NORM = 0.5


def read(optimizer, params, steps, start=0, **settings):
    gauge = Gauge(optimizer, 8, every=1, **settings)
    advance(optimizer, params, steps, start)
    return gauge, gauge.reading()


@FLAT
def test_the_norm_is_read_and_the_emas_are_kept_in_one_pass(flat, monkeypatch):
    passes = []
    for name in ("measure_", "prepare_adamw_"):
        own = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda *a, own=own, name=name, **k: (passes.append(name), own(*a, **k))[1])
    params = parameters()
    optimizer = AdamW(params, max_grad_norm=NORM, flat=flat)
    gauge = Gauge(optimizer, 8, every=1)
    for t in range(3):
        advance(optimizer, params, 1, t)
        assert gauge.reading().step == t + 1
        assert passes == ["measure_", "prepare_adamw_"] * (t + 1)


@FLAT
def test_it_reads_what_a_gauge_without_clipping_does(flat):
    """The gradients do not depend on the weights here, so clipping changes no reading, to the last bit of its sums."""
    readings = []
    for norm in (None, NORM):
        params = parameters()
        optimizer = AdamW(params, max_grad_norm=norm, flat=flat)
        readings.append(read(optimizer, params, 30)[1])
    plain, clipped = readings
    assert clipped.grad_norm == plain.grad_norm > 10 * NORM
    assert clipped.gr_t == pytest.approx(plain.gr_t, rel=1e-6)
    for own, other in zip(clipped.segments, plain.segments, strict=True):
        assert (own.name, own.gr_t or 0.0) == (other.name, pytest.approx(other.gr_t or 0.0, rel=1e-6))


@pytest.mark.filterwarnings("ignore:.*gradients had left the flat buffer")
@FLAT
def test_emas_outlive_what_makes_the_optimizer_lay_its_parameters_out_anew(flat):
    """A gradient that is missing for a while, a loaded state."""

    def run(clipped):
        params = parameters()
        optimizer = AdamW(params, max_grad_norm=NORM if clipped else None, flat=flat)
        gauge, readings = Gauge(optimizer, 8, every=1), []
        for t in range(24):
            for i, (p, g) in enumerate(zip(params, gradients(t, params), strict=True)):
                p.grad = None if i == 1 and 5 <= t < 9 else g
            if t == 12:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer.step()
            readings.append(gauge.reading())
        return readings

    for own, other in zip(run(True), run(False), strict=True):
        assert own.gr_t == pytest.approx(other.gr_t, rel=1e-6)
        assert own.finite_time_factor == other.finite_time_factor


def test_several_dtypes_and_an_added_group_with_which_all_begins_anew():
    params = [nn.Parameter(torch.zeros(300)), nn.Parameter(torch.zeros(500, dtype=torch.bfloat16))]
    optimizer = AdamW(params, max_grad_norm=NORM)
    gauge, _ = read(optimizer, params, 5)
    late = nn.Parameter(torch.zeros(77))
    optimizer.add_param_group({"params": [late]})
    params.append(late)
    advance(optimizer, params, 20, start=5)
    emas = [ema for ema, _ in gauge._source._emas.state.values()]
    assert [len(ema) for ema in emas] == [300, 500, 77]
    for p, ema in zip(params, emas, strict=True):
        expected = torch.zeros(p.numel(), dtype=torch.float64)
        for t in range(6, 25):
            g = gradients(t, params)[next(i for i, q in enumerate(params) if q is p)]
            expected = 0.9 * expected + 0.1 * g.double()
        torch.testing.assert_close(ema.double(), expected, rtol=1e-4, atol=1e-6)
    assert [int(steps) for _, steps in gauge._source._emas.state.values()] == [19] * 3


def test_a_sample_has_a_small_pass_of_its_own():
    params = [nn.Parameter(torch.zeros(100_000))]
    sources = {}
    for sample in (10_000, 50_000_000):
        optimizer = AdamW(params, max_grad_norm=NORM)
        sources[sample] = type(Gauge(optimizer, 8, sample=sample)._source)
    assert sources == {10_000: OwnSource, 50_000_000: ClippingSource}


def test_a_second_gauge_has_emas_of_its_own_and_a_removed_one_leaves_none():
    params = parameters()
    optimizer = AdamW(params, max_grad_norm=NORM)
    first, second = Gauge(optimizer, 8, every=1), Gauge(optimizer, 8, every=1, beta=0.5)
    assert [type(gauge._source) for gauge in (first, second)] == [ClippingSource, OwnSource]
    advance(optimizer, params, 6)
    alone = Gauge(AdamW(others := parameters()), 8, every=1)
    advance(alone._optimizer, others, 6)
    assert first.reading().gr_t == pytest.approx(alone.reading().gr_t, rel=1e-6)
    assert second.reading().gr_t != pytest.approx(first.reading().gr_t, rel=1e-2)
    first.remove()
    advance(optimizer, params, 1, start=6)
    assert first.reading().step == 6
    assert second.reading().step == 7
    third = Gauge(optimizer, 8)
    assert type(third._source) is ClippingSource
    first.remove()  # twice, and behind the third's back
    assert optimizer._unclipped[0] is third._source._emas
    with pytest.raises(ValueError, match="unclipped is the second one"):
        optimizer.observe_unclipped(print, first._source._emas)


def test_clipping_may_end_under_way():
    params = parameters()
    optimizer = AdamW(params, max_grad_norm=NORM)
    gauge, _ = read(optimizer, params, 5)
    optimizer.max_grad_norm = None
    advance(optimizer, params, 5, start=5)
    others = parameters()
    _, expected = read(AdamW(others), others, 10)
    assert gauge.reading().step == 10
    assert gauge.reading().gr_t == pytest.approx(expected.gr_t, rel=1e-6)


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_a_step_that_a_scaler_skips_leaves_the_emas(found):
    params = parameters()
    optimizer = AdamW(params, max_grad_norm=NORM)
    gauge, before = read(optimizer, params, 3)
    emas = [ema.clone() for ema, _ in gauge._source._emas.state.values()]
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(found)
    advance(optimizer, params, 1, start=3, scale=4.0)
    kept = all(torch.equal(ema, old) for (ema, _), old in zip(gauge._source._emas.state.values(), emas, strict=True))
    assert kept == bool(found)
    assert {int(steps) for _, steps in gauge._source._emas.state.values()} == {4 - int(found)}
    assert gauge.reading().grad_norm == pytest.approx(before.grad_norm, rel=0.2) or found


def test_a_state_of_other_parameters_is_refused_and_nothing_changes():
    params = parameters()
    gauge, reading = read(AdamW(params, max_grad_norm=NORM), params, 5)
    others = parameters()[:3]
    other, _ = read(AdamW(others, max_grad_norm=NORM), others, 5)
    plain, _ = read(AdamW(parameters()), [], 0)
    before = gauge.state_dict()
    with pytest.raises(ValueError, match="other parameters"):
        gauge.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="kind 'fused', this gauge's of kind 'clipping'"):
        gauge.load_state_dict(plain.state_dict())
    assert gauge.reading() is reading
    for own, old in zip(gauge.state_dict()["source"]["emas"], before["source"]["emas"], strict=True):
        assert all(map(torch.equal, own, old))


def test_what_a_part_of_no_elements_holds_is_nothing():
    params = [nn.Parameter(torch.zeros(0, 7)), nn.Parameter(torch.zeros(5))]
    optimizer = AdamW(params, max_grad_norm=NORM)
    gauge, reading = read(optimizer, params, 4)
    assert reading.gr_t is not None
    assert [len(ema) for ema, _ in gauge._source._emas.state.values()] == [0, 5]
