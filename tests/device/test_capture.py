"""CUDA graphs: the ops, the step with its sums, and a whole training step, captured once and replayed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from device.problem import Problem, same_bits
from torch import Tensor, nn

from grgauge import AdamW, Gauge

FLAT = pytest.mark.parametrize("flat", [False, True], ids=["loose", "flat"])
LR = 1e-2


def captured(step: Callable[[], None], warm_up: int = 3) -> torch.cuda.CUDAGraph:
    """`step` as a graph, after `warm_up` runs of it on a side stream, as torch's documentation has it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_up):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


@pytest.mark.parametrize("layout", ["loose", "flat"])
def test_the_gauges_states_and_sums_replay(kernel, layout):
    p, eager = Problem(layout=layout), Problem(layout=layout)
    out: list[Tensor] = []
    graph = captured(lambda: out.append(p.measure(kernel, states=True)))
    for _ in range(3):
        eager.measure(kernel, states=True)
    for factor in (2.0, 0.5, 3.0):
        for mine, theirs in zip(p.grad_stream, eager.grad_stream, strict=True):
            mine.mul_(factor)
            theirs.mul_(factor)
        graph.replay()
        assert torch.equal(out[-1], eager.measure(kernel, states=True))
        assert same_bits(p.everything(), eager.everything())


@FLAT
@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("rate", ["number", "tensor"])
def test_a_step_with_its_sums_replays(kernel, flat, max_norm, rate):
    """Replayed steps count, move and are seen as eager ones are, with the gradients of the day."""

    def made() -> tuple[list[nn.Parameter], AdamW, list]:
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(n, generator=generator).cuda()) for n in (5000, 17, 4097)]
        lr = LR if rate == "number" else torch.full((), LR, device="cuda")
        optimizer = AdamW(params, lr=lr, flat=flat, backend=kernel, max_grad_norm=max_norm, capturable=True)
        seen: list = []
        optimizer.observe(seen.append)
        for p in params:
            p.grad = torch.ones_like(p)
        return params, optimizer, seen

    def draw(params: list[nn.Parameter], t: int) -> None:
        generator = torch.Generator().manual_seed(t)
        for p in params:
            p.grad.copy_(torch.randn(p.shape, generator=generator))

    params, optimizer, seen = made()
    twins, eager, eager_seen = made()
    graph = captured(optimizer.step)
    for _ in range(3):
        eager.step()
    for t in range(5):
        draw(params, t)
        draw(twins, t)
        graph.replay()
        eager.step()
        (ours,), (theirs,) = seen[-1], eager_seen[-1]
        assert torch.equal(ours.stats, theirs.stats)
        assert torch.equal(ours.steps, theirs.steps)
        assert same_bits(params, twins)
        if max_norm is not None:
            assert torch.equal(optimizer.grad_norm, eager.grad_norm)
    assert {float(s["step"]) for s in optimizer.state.values()} == {8.0}
    assert len(seen) == 4  # three warm-up steps and the captured one: a replay runs no Python


def test_a_whole_training_step_replays(kernel):
    """Forward, backward into the flat buffer, step and sums in one graph; the loss falls as it does without."""

    def made() -> tuple[nn.Module, AdamW, list, Tensor, list[Tensor]]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8)).cuda()
        optimizer = AdamW(net.parameters(), lr=LR, flat=True, backend=kernel)
        seen: list = []
        optimizer.observe(seen.append)
        x = torch.randn(16, 32, generator=torch.Generator().manual_seed(1)).cuda()
        # The first backward gives gradients memory, and the first step moves them into the flat buffer.
        net(x).square().mean().backward()
        optimizer.step()
        return net, optimizer, seen, x, []

    def step(net: nn.Module, optimizer: AdamW, x: Tensor, losses: list[Tensor]) -> None:
        optimizer.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())

    net, optimizer, seen, x, losses = made()
    twin, eager, eager_seen, x_too, eager_losses = made()
    graph = captured(lambda: step(net, optimizer, x, losses))
    for _ in range(3):
        step(twin, eager, x_too, eager_losses)
    for t in range(10):
        batch = torch.randn(16, 32, generator=torch.Generator().manual_seed(2 + t)).cuda()
        x.copy_(batch)
        x_too.copy_(batch)
        graph.replay()
        step(twin, eager, x_too, eager_losses)
        torch.testing.assert_close(losses[-1], eager_losses[-1], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(seen[-1][0].stats, eager_seen[-1][0].stats, rtol=1e-3, atol=1e-6)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["fused", "clipping", "own pass"])
def test_a_gauge_reads_replayed_steps(kernel, kind):
    """As it reads eager ones, whatever number of them lies between two readings."""

    def made() -> tuple[list[nn.Parameter], torch.optim.Optimizer, Gauge]:
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(n, generator=generator).cuda()) for n in (5000, 17, 4097)]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer: torch.optim.Optimizer
        if kind == "own pass":
            optimizer = torch.optim.AdamW(params, lr=LR, capturable=True)
        else:
            optimizer = AdamW(params, lr=LR, backend=kernel, max_grad_norm=1.0 if kind == "clipping" else None)
        return params, optimizer, Gauge(optimizer, 8, every=4)

    params, optimizer, gauge = made()
    twins, eager, expected = made()
    graph = captured(optimizer.step)
    for _ in range(3):
        eager.step()
    assert gauge.reading() is None  # the captured step was not run, and does not count
    for t in range(29):
        generator = torch.Generator().manual_seed(t)
        for p, q in zip(params, twins, strict=True):
            q.grad.copy_(p.grad.copy_(torch.randn(p.shape, generator=generator)))
        graph.replay()
        gauge.replayed()
        eager.step()
    torch.cuda.synchronize()
    ours, theirs = gauge.reading(), expected.reading()
    assert ours.step == theirs.step == 32
    assert ours.gr_t == pytest.approx(theirs.gr_t, rel=1e-9)
    assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-9)
    assert [s.gr_t for s in ours.segments] == pytest.approx([s.gr_t for s in theirs.segments], rel=1e-9)


def test_micro_steps_between_replays_give_groups(kernel):
    params = [nn.Parameter(torch.zeros(5000, device="cuda"))]
    params[0].grad = torch.ones_like(params[0])
    optimizer = AdamW(params, lr=LR, backend=kernel)
    gauge = Gauge(optimizer, 8, every=2)
    graph = captured(optimizer.step)
    for t in range(21):
        generator = torch.Generator().manual_seed(t)
        params[0].grad.zero_()
        for _ in range(2):
            params[0].grad.add_(torch.randn(5000, generator=generator).cuda() + 0.5)
            gauge.micro_step()
        graph.replay()
        gauge.replayed()
    torch.cuda.synchronize()
    assert gauge.reading().step == 24
    assert gauge.reading().gr_s is not None
    with pytest.raises(RuntimeError, match="micro_step"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        gauge.micro_step()
