"""Groups are the micro-batches in the gradient that the step uses, whatever the loop did before; against float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from grgauge import AdamW, Gauge
from grgauge.estimators import two_batch
from grgauge.smoothing import Spatial

BATCH = 64

pytestmark = pytest.mark.filterwarnings("ignore:.*gradients had left the flat buffer:UserWarning")
OPTIMIZERS = {
    "ours": lambda p: AdamW(p, lr=0.0, weight_decay=0.0),
    "ours, flat": lambda p: AdamW(p, lr=0.0, weight_decay=0.0, flat=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.0),
}
EVERY_OPTIMIZER = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


class Loop:
    """A training loop, and beside it the groups of the step in progress in float64."""

    def __init__(self, make):
        self.params = [nn.Parameter(torch.zeros(80)), nn.Parameter(torch.zeros(5))]
        self.optimizer = make(self.params)
        self.gauge = Gauge(self.optimizer, BATCH, every=1)
        self.generator = torch.Generator().manual_seed(0)
        self.mean = torch.randn(85, generator=self.generator)
        self.spatial = Spatial()
        self.gradient = torch.zeros(85, dtype=torch.float64)
        self.start()

    def start(self):
        self.groups, self.base = [], torch.zeros(85, dtype=torch.float64)
        self.begun = self.unknown = self.changed = self.unclaimed = False

    def backward(self):
        g = self.mean + 3 * torch.randn(85, generator=self.generator)
        (self.params[0] @ g[:80] + self.params[1] @ g[80:]).backward()
        self.unknown |= self.changed if self.begun else bool(self.gradient.any())
        self.gradient = self.gradient + g.double()
        self.begun = self.unclaimed = True
        self.changed = False

    def micro_step(self):
        if not self.unclaimed:
            return
        self.gauge.micro_step()
        self.unknown |= self.changed
        self.groups.append(self.gradient - self.base)
        self.base = self.gradient
        self.changed = self.unclaimed = False

    def clear(self, set_to_none):
        for p in self.params:  # as model.zero_grad() does: the optimizer does not know of it
            if p.grad is not None and set_to_none:
                p.grad = None
            elif p.grad is not None:
                p.grad.zero_()
        self.gradient = torch.zeros(85, dtype=torch.float64)
        self.start()

    def scale(self):
        for p in self.params:
            if p.grad is not None:
                p.grad.mul_(0.5)
        self.gradient = 0.5 * self.gradient
        self.changed = bool(self.groups)  # harmless before the first group, which is the whole gradient

    def step(self):
        self.optimizer.step()
        n = len(self.groups)
        good = n >= 2 and not self.unknown and not self.unclaimed
        if good:
            squares = [float((n * g).square().sum()) for g in self.groups]
            self.spatial.update(*two_batch(squares, float(self.base.square().sum()), [BATCH / n] * n, [1 / n] * n))
        reading = self.gauge.reading()
        missing = [note for note in reading.notes if note.startswith(("GR_S skipped", "GR_S not available"))]
        assert bool(missing) == (not good), reading.notes
        if good or reading.gr_s is not None:
            assert reading.gr_s == pytest.approx(self.spatial.gr_s(BATCH), rel=1e-3)
        if good and self.spatial.noise_scale < 1e4:
            assert reading.noise_scale == pytest.approx(self.spatial.noise_scale, rel=1e-2)
        self.start()
        return reading


@EVERY_OPTIMIZER
@settings(max_examples=60)
@given(
    ops=st.lists(st.sampled_from(["backward", "micro", "micro", "batch", "none", "zero", "scale", "step"]), max_size=40)
)
def test_any_order_of_calls_reads_what_float64_does(make, ops):
    loop = Loop(make)
    calls = {
        "backward": loop.backward,
        "micro": loop.micro_step,
        "batch": lambda: (loop.backward(), loop.micro_step()),
        "none": lambda: loop.clear(True),
        "zero": lambda: loop.clear(False),
        "scale": loop.scale,
        "step": loop.step,
    }
    for op in ["batch", "batch", "step", "none", *ops, "step", "none", "batch", "batch", "batch", "step"]:
        calls[op]()


@EVERY_OPTIMIZER
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("abandoned", [1, 3])
def test_an_abandoned_step_reads_as_if_it_had_not_been(make, set_to_none, abandoned):
    readings = []
    for extra in (0, abandoned):
        loop = Loop(make)
        for t in range(12):
            loop.clear(set_to_none)
            state = loop.generator.get_state()
            for _ in range(extra if t % 3 == 1 else 0):
                loop.backward()
                loop.micro_step()
            loop.generator.set_state(state)
            loop.clear(set_to_none)
            for _ in range(4):
                loop.backward()
                loop.micro_step()
            readings.append(loop.step())
    assert readings[:12] == readings[12:]
    assert readings[-1].gr_s is not None


@EVERY_OPTIMIZER
def test_an_exception_in_the_loop(make):
    """The loop catches it, clears and goes on, as after running out of memory."""
    loop = Loop(make)
    for t in range(8):
        try:
            loop.clear(True)
            for k in range(3):
                if t == 5 and k == 2:
                    raise MemoryError
                loop.backward()
                loop.micro_step()
        except MemoryError:
            continue
        reading = loop.step()
    assert reading.step == 7
    assert not any("GR_S skipped" in note for note in reading.notes)


@EVERY_OPTIMIZER
def test_abandoned_micro_batches_that_stay_in_the_gradient_are_groups(make):
    loop = Loop(make)
    for _ in range(2):
        loop.backward()
        loop.micro_step()
    for _ in range(2):  # the loop has said `continue` and not cleared: one step of four micro-batches
        loop.backward()
        loop.micro_step()
    assert loop.step().gr_s is not None
    assert math.isfinite(loop.spatial.noise_scale)


def second_step(loop, ops):
    """GR_S after a step of two micro-batches, and the reading after another one of `ops`: b(ackward), m(icro_step),
    s(cale), and clearing to z(ero) or n(one)."""
    calls = {
        "b": loop.backward,
        "m": loop.micro_step,
        "s": loop.scale,
        "z": lambda: loop.clear(False),
        "n": lambda: loop.clear(True),
    }
    for op in "bmbm":
        calls[op]()
    known = loop.step().gr_s
    loop.clear(True)
    for op in ops.split():
        calls[op]()
    return known, loop.step()


@EVERY_OPTIMIZER
@pytest.mark.parametrize(
    ("ops", "note"),
    [
        ("b m s b m", "GR_S skipped a reading: gradients were changed between two micro-batches"),
        ("b m b s m", "GR_S skipped a reading: gradients were changed between two micro-batches"),
        ("b m b m b", "GR_S skipped a reading: a backward came after the last micro_step()"),
        ("b m b m z", "GR_S skipped a reading: gradients were cleared after the last micro_step()"),
        ("b m z", "GR_S skipped a reading: gradients were cleared after the last micro_step()"),
        ("b m b m n", "GR_S skipped a reading: gradients were cleared after the last micro_step()"),
        ("b m b m z b", "GR_S skipped a reading: gradients were cleared after the last micro_step()"),
    ],
)
def test_what_is_not_known_is_said(make, ops, note):
    known, reading = second_step(Loop(make), ops)
    assert note in reading.notes
    assert reading.gr_s == known  # what earlier readings said holds


@EVERY_OPTIMIZER
@pytest.mark.parametrize(
    "ops",
    [
        "b s b m b m",  # changed before the first group, which is the whole gradient
        "b m s b m z b m b m",  # changed between two, and then abandoned
        "b m b z b m b m",
        "b m b m b n b m b m",
    ],
)
def test_what_harms_no_group_of_the_step_is_not_said(make, ops):
    known, reading = second_step(Loop(make), ops)
    assert not any("skipped" in note for note in reading.notes)
    assert reading.gr_s != known


@EVERY_OPTIMIZER
def test_gradients_that_were_not_cleared_before_the_step(make):
    loop = Loop(make)
    for op in (loop.backward, loop.micro_step, loop.backward, loop.micro_step, loop.step) * 2:
        reading = op() or None
    assert "GR_S skipped a reading: gradients were not cleared before the step" in reading.notes


def test_a_gradient_of_something_else_is_no_micro_batch():
    """torch.autograd.grad runs the hooks of parameters and accumulates nothing."""
    loop = Loop(OPTIMIZERS["SGD"])
    for _ in range(2):
        loop.backward()
        loop.micro_step()
        torch.autograd.grad(loop.params[0].square().sum(), loop.params[0])
    loop.step()


def test_hooks_go_with_the_gauge_and_are_few():
    loop = Loop(OPTIMIZERS["SGD"])
    for _ in range(5):
        loop.clear(True)
        loop.backward()
        loop.micro_step()
        loop.step()
    assert sum(len(p._backward_hooks or ()) for p in loop.params) == 1
    loop.gauge.remove()
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in loop.params)


def test_a_watched_parameter_that_is_frozen_hands_over():
    loop = Loop(OPTIMIZERS["SGD"])
    for _ in range(2):
        loop.backward()
        loop.micro_step()
    loop.step()
    watched = loop.gauge._micro._watched
    assert watched is loop.params[0]  # the other one is too small
    loop.params[0].requires_grad_(False)
    loop.clear(True)
    for _ in range(3):
        (loop.params[1] @ torch.randn(5)).backward()
        loop.gauge.micro_step()
        loop.params[1].grad = None if _ == 0 else loop.params[1].grad  # the first is abandoned
    loop.optimizer.step()
    assert loop.gauge._micro._watched is loop.params[1]
    assert not any("skipped" in note for note in loop.gauge.reading().notes)
