"""From construction to removal: what is refused, what is kept, what may be frozen, copied and stored."""

import copy
import dataclasses
import doctest
import gc
import json
import pickle
import tracemalloc

import pytest
import torch
from torch import nn

import grgauge.gauge.gauge
import grgauge.reading
from grgauge import AdamW, Gauge, Reading

OPTIMIZERS = {
    "ours": lambda p: AdamW(p, lr=1e-3),
    "ours, flat": lambda p: AdamW(p, lr=1e-3, flat=True),
    "ours, clipping": lambda p: AdamW(p, lr=1e-3, max_grad_norm=0.3),
    "torch AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-3),
}
EVERY_OPTIMIZER = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


class Run:
    def __init__(self, make, every=1, **options):
        self.params = [nn.Parameter(torch.zeros(70)), nn.Parameter(torch.zeros(9))]
        self.optimizer = make(self.params)
        self.gauge = Gauge(self.optimizer, 8, every=every, **options)
        self.generator = torch.Generator().manual_seed(0)

    def step(self, micro_batches=2):
        self.optimizer.zero_grad()
        for _ in range(micro_batches):
            sum(p @ torch.randn(p.shape, generator=self.generator, dtype=p.dtype) for p in self.params).backward()
            self.gauge.micro_step()
        self.optimizer.step()


@EVERY_OPTIMIZER
def test_far_apart_readings_keep_little_and_say_the_same(make):
    """A reading after 900 steps is that of a gauge which has folded in its steps one by one."""
    run = Run(make, every=900)
    for _ in range(200):
        run.step(1)
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(500):
            run.step(1)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 100_000  # bytes of Python objects; 500 steps kept would be 140 000
    for _ in range(200):
        run.step(1)
    other = Run(make, every=900)
    for t in range(900):
        other.step(1)
        if t % 7 == 0:
            other.gauge.state_dict()  # which folds in what there is
    assert run.gauge.reading() == other.gauge.reading()
    assert run.gauge.reading().segments == other.gauge.reading().segments
    assert run.gauge.reading().step == 900


def test_readings_that_nobody_asks_for_are_made_before_they_are_many():
    run = Run(OPTIMIZERS["SGD"])
    for _ in range(100):
        run.step()
    assert len(run.gauge._windows._in_flight) <= 20
    assert run.gauge._windows.newest is not None
    assert run.gauge.reading().step == 100


def test_nonfinite_elements_are_counted_over_all_steps_since_the_last_reading():
    run = Run(OPTIMIZERS["SGD"], every=200)
    for t in range(200):
        for p in run.params:
            p.grad = torch.ones_like(p)
        if t in (3, 100):
            run.params[0].grad[5] = float("nan")
        run.optimizer.step()
    assert run.gauge.reading().nonfinite == 2


@EVERY_OPTIMIZER
def test_all_frozen_says_so_and_goes_on_when_unfrozen(make):
    run = Run(make)
    for _ in range(25):
        run.step()
    for p in run.params:
        p.requires_grad_(False)
    for _ in range(150):
        run.optimizer.zero_grad()
        for p in run.params:
            p.grad = None
        run.gauge.micro_step()
        if make is not OPTIMIZERS["ours, flat"]:
            run.optimizer.step()
    if make is not OPTIMIZERS["ours, flat"]:
        reading = run.gauge.reading()
        assert (reading.step, reading.gr_t, reading.ready) == (175, None, False)
        assert "GR_T not available: no parameter of the optimizer has a gradient" in reading.notes
    for p in run.params:
        p.requires_grad_(True)
    run.step()
    reading = run.gauge.reading()
    assert reading.gr_t is not None
    assert reading.finite_time_factor > 0.8  # the moments of before go on
    assert reading.gr_s is not None


def test_removing_twice_and_micro_steps_after_that():
    run = Run(OPTIMIZERS["ours"])
    for _ in range(3):
        run.step()
    last = run.gauge.reading()
    run.gauge.remove()
    run.gauge.remove()
    for _ in range(5):
        run.step()
    assert run.gauge.reading() is last
    assert run.gauge._micro.collect().sums == []
    before = run.params[0].grad.clone()
    run.gauge.split_backward(lambda rows: (run.params[0] * rows).mean(), torch.ones(4, 70))
    assert not torch.equal(run.params[0].grad, before)


def test_a_reading_can_be_kept_in_any_form():
    run = Run(OPTIMIZERS["ours"])
    for _ in range(8):
        run.step()
    reading = run.gauge.reading()
    for other in (pickle.loads(pickle.dumps(reading)), copy.deepcopy(reading), copy.copy(reading)):
        assert other == reading
        assert other.segments == reading.segments
    assert dataclasses.asdict(reading) == reading.to_dict()
    assert dataclasses.replace(reading, step=99).step == 99
    for segments in (False, True):
        back = Reading.from_dict(json.loads(json.dumps(reading.to_dict(segments=segments))))
        assert back == reading
        assert back.segments == (reading.segments if segments else ())
    assert reading != dataclasses.replace(reading, gr_t=1.0)
    with pytest.raises(ValueError, match=r"lacks \['step'\] and has \['steps'\] too many"):
        Reading.from_dict({("steps" if k == "step" else k): v for k, v in reading.to_dict().items()})


@pytest.mark.parametrize("how", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_gauge_refuses_to_be_copied_and_says_what_to_do(how):
    with pytest.raises(TypeError, match=r"neither pickled nor copied: save gauge.state_dict\(\)"):
        how(Run(OPTIMIZERS["SGD"]).gauge)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_parameters_of_other_dtypes_are_refused_by_name(dtype):
    good, bad = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3, dtype=dtype))
    optimizer = torch.optim.SGD([("good", good), ("bad", bad)], lr=0.1)
    with pytest.raises(TypeError, match=rf"parameter bad has dtype {dtype}; a gauge reads float32"):
        Gauge(optimizer, 8)
    assert not optimizer._optimizer_step_pre_hooks
    bad.requires_grad_(False)
    Gauge(optimizer, 8)


def test_a_group_of_another_dtype_that_is_added_later_ends_the_step_before_it_starts():
    run = Run(OPTIMIZERS["SGD"])
    run.step()
    run.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3, dtype=torch.float64))]})
    run.params[0].grad = torch.ones(70)
    before = run.params[0].detach().clone()
    with pytest.raises(TypeError, match=r"parameter 1.0 has dtype torch.float64"):
        run.optimizer.step()
    assert torch.equal(run.params[0], before)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
def test_the_default_dtype_does_not_matter(default, fused):
    readings = []
    for dtype in (torch.float32, default):
        params = [nn.Parameter(torch.zeros(70, dtype=torch.float32))]
        torch.set_default_dtype(dtype)
        try:
            optimizer = torch.optim.AdamW(params, lr=1e-3, fused=fused)
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
            gauge = Gauge(optimizer, 8, every=1, scaler=scaler)
            rows = torch.randn(8, 70, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
            for _ in range(6):
                optimizer.zero_grad()
                gauge.split_backward(lambda part: scaler.scale((part @ params[0] - 1).square().mean()), rows)  # noqa: B023
                scaler.step(optimizer)
                scaler.update()
            readings.append(gauge.reading())
        finally:
            torch.set_default_dtype(torch.float32)
    assert readings[0] == readings[1]
    assert readings[0].gr_s is not None


@pytest.mark.parametrize("module", [grgauge.gauge.gauge, grgauge.reading])
def test_examples_in_docstrings_run(module):
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0


@pytest.mark.parametrize("make", [make for name, make in OPTIMIZERS.items() if name.startswith("ours")])
def test_steps_in_which_nothing_is_trained_leave_no_trace(make):
    """Two of three readings see no gradient at all; GR_T is that of the steps that had one."""
    some, all_of_them = Run(make), Run(make)
    for _ in range(25):
        for run in (some, all_of_them):
            run.step()
            run.gauge.reading()
        for _ in range(2):
            some.optimizer.zero_grad(set_to_none=True)
            some.optimizer.step()
            assert some.gauge.reading().gr_t is None
    some.step()
    all_of_them.step()
    ours, theirs = some.gauge.reading(), all_of_them.gauge.reading()
    assert ours.gr_t == pytest.approx(theirs.gr_t, rel=1e-6)
    assert [segment.gr_t for segment in ours.segments] == pytest.approx([s.gr_t for s in theirs.segments], rel=1e-6)
