"""grgauge.AdamW and its gauge under torch.compile: one graph, and the same numbers."""

from __future__ import annotations

import copy
import shutil
import warnings

import pytest
import torch
from optim.stepping import FLAT, assert_close, gradients, two_dtypes
from torch import nn
from torch._dynamo.utils import counters

import grgauge
from grgauge import AdamW


@FLAT
def test_a_compiled_training_function_trains_alike(flat):
    def train(compiled):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 3))
        optimizer = AdamW(net.parameters(), flat=flat)
        gauge = grgauge.Gauge(optimizer, 16)

        def step(x):
            optimizer.zero_grad()
            loss = net(x).square().mean()
            loss.backward()
            optimizer.step()
            return loss

        run = torch.compile(step, backend="aot_eager") if compiled else step
        for t in range(6):
            run(torch.randn(16, 10, generator=torch.Generator().manual_seed(t)))
        return list(net.parameters()), gauge.reading()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        ours, reading = train(compiled=True)
    plain, expected = train(compiled=False)
    assert_close(ours, plain)
    assert reading.gr_t == pytest.approx(expected.gr_t, rel=1e-4)


COMPILERS = pytest.mark.parametrize(
    "compiler",
    [
        "aot_eager",
        pytest.param(
            "inductor", marks=pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
        ),
    ],
)


@pytest.mark.filterwarnings("default")  # the compiler's own
@COMPILERS
@pytest.mark.parametrize("rate", [1e-2, torch.tensor(1e-2)], ids=["number", "tensor"])
def test_a_compiled_step_is_one_graph_with_the_same_bits(compiler, rate):
    def train(compiled):
        torch._dynamo.reset()
        counters.clear()
        params, groups = two_dtypes()
        optimizer = AdamW(groups, lr=rate)
        gauge, seen = grgauge.Gauge(optimizer, 16), []
        optimizer.observe(seen.append)
        step = torch.compile(optimizer.step, backend=compiler, fullgraph=True) if compiled else optimizer.step
        for t in range(7):
            for p, g in zip(params, gradients(t, params), strict=True):
                p.grad = g
            step()
        return params, optimizer, gauge.reading(), seen

    (ours, optimizer, reading, seen), graphs = train(compiled=True), counters["stats"]["unique_graphs"]
    plain, eager, expected, expected_seen = train(compiled=False)
    assert graphs == 1
    assert all(map(torch.equal, ours, plain))
    for p, q in zip(ours, plain, strict=True):
        assert all(torch.equal(value, eager.state[q][name]) for name, value in optimizer.state[p].items())
    assert {float(s["step"]) for s in optimizer.state.values()} == {7.0}
    assert reading == expected
    for step, expected_step in zip(seen, expected_seen, strict=True):
        assert [b.stats.tolist() for b in step] == [b.stats.tolist() for b in expected_step]
        assert [b.params[0].dtype for b in step] == [torch.float32, torch.bfloat16]


@pytest.mark.filterwarnings("default")
@COMPILERS
def test_forward_and_step_are_one_graph(compiler):
    """The backward is outside; what comes after the step sees the new weights, what comes before it the old ones."""

    def train(compiled):
        torch._dynamo.reset()
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 3))
        optimizer = AdamW(net.parameters(), lr=1e-2)
        gauge = grgauge.Gauge(optimizer, 16, every=2)

        def step(x):
            before = net(x).square().mean().detach()
            optimizer.step()
            return before, net(x).square().mean()

        run = torch.compile(step, backend=compiler, fullgraph=True) if compiled else step
        net(torch.ones(16, 10)).square().mean().backward()
        losses = []
        for t in range(6):
            before, loss = run(torch.randn(16, 10, generator=torch.Generator().manual_seed(t)))
            optimizer.zero_grad()
            loss.backward()
            losses += [before, loss.detach()]
        return list(net.parameters()), losses, gauge.reading().gr_t

    ours, plain = train(compiled=True), train(compiled=False)
    assert_close(ours[0], plain[0])
    torch.testing.assert_close(ours[1], plain[1], rtol=1e-5, atol=1e-7)
    assert ours[2] == pytest.approx(plain[2], rel=1e-5)


@pytest.mark.filterwarnings("default")
def test_a_compiled_step_follows_what_changes_between_steps():
    """Gradients that come and go, a new rate, a loaded state, a thawed parameter, a new group, eager steps between."""

    def train(compiled):
        torch._dynamo.reset()
        params = [nn.Parameter(torch.randn(50, generator=torch.Generator().manual_seed(i))) for i in range(4)]
        params[3].requires_grad_(False)
        optimizer = AdamW(params, lr=1e-2)
        gauge = grgauge.Gauge(optimizer, 8, every=1)
        run = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True) if compiled else optimizer.step
        readings = []
        for t in range(14):
            if t == 6:
                optimizer.param_groups[0]["lr"] = 1e-3
            if t == 8:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            if t == 10:
                params[3].requires_grad_(True)
            if t == 12:
                params.append(nn.Parameter(torch.ones(50)))
                optimizer.add_param_group({"params": params[4:]})
            for i, (p, g) in enumerate(zip(params, gradients(t, params), strict=True)):
                # Parameters of one size: which of them the plan leaves out shows in no shape.
                p.grad = g if i != t // 2 % 3 and p.requires_grad else None
            (optimizer.step if t in (5, 9) else run)()
            readings.append(gauge.reading())
        return params, [float(s["step"]) for s in optimizer.state.values()], readings

    ours, plain = train(compiled=True), train(compiled=False)
    assert all(map(torch.equal, ours[0], plain[0]))
    assert ours[1:] == plain[1:]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("options", [{}, {"flat": True}, {"max_grad_norm": 1.0}], ids=["plain", "flat", "clipping"])
def test_a_compiled_training_function_has_no_more_graph_breaks_than_torchs_own(options):
    """Torch itself breaks at zero_grad(), at backward() and, in its own AdamW, twice in step()."""

    def breaks(make):
        torch._dynamo.reset()
        counters.clear()
        net = nn.Linear(10, 3)
        optimizer = make(net.parameters())

        def train(x):
            optimizer.zero_grad()
            loss = net(x).square().mean()
            loss.backward()
            optimizer.step()
            return loss

        run = torch.compile(train, backend="aot_eager")
        for _ in range(3):
            run(torch.ones(16, 10))
        return sum(counters["graph_break"].values())

    ours = breaks(lambda p: AdamW(p, **options))
    assert ours <= breaks(torch.optim.AdamW)
    assert ours <= breaks(lambda p: torch.optim.AdamW(p, fused=True))
    assert breaks(AdamW) < breaks(torch.optim.AdamW)
