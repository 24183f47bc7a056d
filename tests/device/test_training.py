"""grgauge.AdamW and the gauge on the GPU, against torch's fused AdamW and against themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
import truth
from device.problem import same_bits
from torch import Tensor, nn

import grgauge
from grgauge import AdamW
from grgauge_kernels.ops import BACKENDS

FLAT = pytest.mark.parametrize("flat", [False, True], ids=["loose", "flat"])


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(64, 33), (33,), (50_001,), (), (4, 3, 3, 3), (0, 7)]
    return [nn.Parameter(torch.randn(shape, generator=generator).to("cuda", dtype)) for shape in shapes]


def gradients(t: int, like: list[nn.Parameter], scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 + t)
    return [(torch.randn(p.shape, generator=generator) * scale).to("cuda", p.dtype) for p in like]


def give(params: list[nn.Parameter], grads: list[Tensor]) -> None:
    for p, g in zip(params, grads, strict=True):
        if p.grad is None:
            p.grad = g.clone()
        else:
            p.grad.copy_(g)


def advance(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: int, start: int = 0) -> None:
    for t in range(start, start + steps):
        give(params, gradients(t, params))
        optimizer.step()


def assert_close(ours: list[nn.Parameter], theirs: list[nn.Parameter], tolerance: float = 2e-6) -> None:
    for p, q in zip(ours, theirs, strict=True):
        assert truth.relative(p, q) <= tolerance


@FLAT
@pytest.mark.parametrize("options", [{}, {"lr": 1e-2, "weight_decay": 0.1}, {"betas": (0.8, 0.95), "maximize": True}])
def test_a_hundred_steps_end_where_torch_fused_ends(backend, options, flat):
    ours, theirs = parameters(), parameters()
    advance(AdamW(ours, flat=flat, backend=backend, **options), ours, 100)
    advance(torch.optim.AdamW(theirs, fused=True, **options), theirs, 100)
    assert_close(ours, theirs)


@FLAT
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_near_the_truth_as_torch_fused(kernel, dtype, flat):
    ours, theirs = parameters(dtype), parameters(dtype)
    twins = [truth.Adamw(p.detach().double(), *torch.zeros(2, device="cuda").double()) for p in ours]
    options = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    advance(AdamW(ours, flat=flat, backend=kernel, **options), ours, 50)
    advance(torch.optim.AdamW(theirs, fused=True, **options), theirs, 50)
    for t in range(50):
        for twin, g in zip(twins, gradients(t, ours), strict=True):
            twin.step(g, t + 1, **options)
    exact = torch.cat([twin.param.flatten() for twin in twins])
    off, off_torch = (
        float((torch.cat([p.detach().double().flatten() for p in params]) - exact).norm()) for params in (ours, theirs)
    )
    assert off <= 1.05 * off_torch


@FLAT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gauged_plain_and_repeated_runs_end_in_the_same_bits(backend, dtype, flat):
    plain, gauged, again = (parameters(dtype) for _ in range(3))
    advance(AdamW(plain, flat=flat, backend=backend), plain, 25)
    for params in (gauged, again):
        optimizer = AdamW(params, flat=flat, backend=backend)
        gauge = grgauge.Gauge(optimizer, 32)
        advance(optimizer, params, 25)
        torch.cuda.synchronize()
        assert gauge.reading().step == 25
    assert same_bits(plain, gauged)
    assert same_bits(plain, again)


def test_readings_are_those_of_the_cpu(kernel):
    readings = []
    for place, backend in (("cuda", kernel), ("cpu", None)):
        params = [nn.Parameter(p.detach().to(place)) for p in parameters()]
        optimizer = AdamW(params, backend=backend)
        gauge = grgauge.Gauge(optimizer, 32)
        for t in range(25):
            total = [torch.zeros_like(p) for p in params]
            optimizer.zero_grad()
            for micro in range(2):
                for sum_, g in zip(total, gradients(2 * t + micro, params), strict=True):
                    sum_.add_(g.to(place))
                give(params, total)
                gauge.micro_step()
            optimizer.step()
        if place == "cuda":
            torch.cuda.synchronize()
        readings.append(gauge.reading())
    on_gpu, on_cpu = readings
    assert on_gpu.step == on_cpu.step == 25
    assert on_gpu.gr_t == pytest.approx(on_cpu.gr_t, rel=1e-5)
    assert on_gpu.grad_norm == pytest.approx(on_cpu.grad_norm, rel=1e-6)
    assert on_gpu.notes == on_cpu.notes
    if on_cpu.noise_scale is not None:
        assert on_gpu.noise_scale == pytest.approx(on_cpu.noise_scale, rel=1e-3)


@FLAT
@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_clipping_inside_the_step_equals_clip_grad_norm(kernel, max_norm, flat):
    ours, theirs = parameters(), parameters()
    optimizer = AdamW(ours, lr=1e-2, max_grad_norm=max_norm, flat=flat, backend=kernel)
    reference = torch.optim.AdamW(theirs, lr=1e-2, fused=True)
    for t in range(20):
        give(ours, gradients(t, ours, 1.0 + t % 3))
        give(theirs, gradients(t, theirs, 1.0 + t % 3))
        norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        reference.step()
        optimizer.step()
        assert float(optimizer.grad_norm) == pytest.approx(float(norm), rel=1e-5)
    assert_close(ours, theirs)


@FLAT
def test_a_step_whose_norm_is_not_finite_can_be_skipped(kernel, flat):
    params = parameters()
    optimizer = AdamW(params, max_grad_norm=1.0, skip_nonfinite=True, flat=flat, backend=kernel)
    advance(optimizer, params, 3)
    before = snapshot(optimizer, params)
    params[2].grad[7] = float("nan")
    optimizer.step()
    assert same_bits(snapshot(optimizer, params), before)
    advance(optimizer, params, 1, start=3)
    assert {float(s["step"]) for s in optimizer.state.values()} == {4.0}


@FLAT
@pytest.mark.parametrize("explicit_unscale", [False, True])
def test_grad_scaler(backend, flat, explicit_unscale):
    """Scaled, unscaled and skipped steps end where unscaled training ends; a skipped step changes nothing."""

    def train(scaled: bool) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = nn.Linear(6, 4, device="cuda")
        made = AdamW if scaled else torch.optim.AdamW
        optimizer = made(net.parameters(), lr=1e-2, **({"flat": flat, "backend": backend} if scaled else {}))
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**12, growth_interval=3, enabled=scaled)
        for t in range(12):
            x = torch.randn(5, 6, generator=torch.Generator().manual_seed(t)).cuda()
            optimizer.zero_grad()
            scaler.scale(net(x).square().mean()).backward()
            if t in (4, 9):
                if not scaled:
                    continue
                net.weight.grad[1, 2] = float("inf")
            if explicit_unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        return list(net.parameters()), optimizer

    (ours, optimizer), (theirs, _) = train(True), train(False)
    assert_close(ours, theirs)
    assert {float(s["step"]) for s in optimizer.state.values()} == {10.0}


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever waits for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", ["flat", "loose", "clipped", "torch"])
def test_fifty_gauged_steps_never_wait_for_the_device(kernel, kind):
    """Forward, backward, micro-steps, step and readings: of our optimizer, and of the gauge on torch's own."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8)).cuda()
    if kind == "torch":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    else:
        norm = 1.0 if kind == "clipped" else None
        optimizer = AdamW(
            net.parameters(), flat=kind == "flat", backend=kernel, max_grad_norm=norm, skip_nonfinite=norm is not None
        )
    gauge = grgauge.Gauge(optimizer, 32)
    batches = torch.randn(4, 16, 32, device="cuda")

    def step() -> None:
        optimizer.zero_grad()
        for x in batches:
            net(x).square().mean().backward()
            gauge.micro_step()
        optimizer.step()

    def steps(n: int) -> list[int]:
        seen = []
        for _ in range(n):
            step()
            if reading := gauge.reading():
                seen.append(reading.step)
        return seen

    steps(2 * gauge.every)  # everything compiled and allocated, and one reading taken
    with no_waiting():
        seen = steps(50)
    torch.cuda.synchronize()
    assert seen == sorted(seen)
    last = gauge.reading()
    assert last.step == 50 + 2 * gauge.every
    assert last.gr_t > 0
    assert last.noise_scale is not None or any("GR_S" in note for note in last.notes)


def snapshot(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> list[Tensor]:
    states = [t for p in params for t in optimizer.state[p].values()]
    return [t.detach().clone() for t in (*params, *states)]


@contextlib.contextmanager
def no_memory() -> Iterator[None]:
    """The next allocation of up to 1 MiB on the device fails, however small it is."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.0)
    held = []
    try:
        for power in range(20, 8, -1):  # what torch holds in reserve, down to its smallest block
            with contextlib.suppress(torch.OutOfMemoryError):
                while True:
                    held.append(torch.empty(2**power, dtype=torch.uint8, device="cuda"))
        yield
    finally:
        held.clear()
        torch.cuda.set_per_process_memory_fraction(1.0)


@FLAT
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_out_of_memory_names_the_op_and_leaves_the_optimizer_as_it_was(kernel, flat, max_norm):
    params, twins = parameters(), parameters()
    optimizer, untroubled = (AdamW(p, flat=flat, backend=kernel, max_grad_norm=max_norm) for p in (params, twins))
    for o, p in ((optimizer, params), (untroubled, twins)):
        o.observe(lambda _: None)  # sums need memory
        advance(o, p, 3)
    before = snapshot(optimizer, params)
    with no_memory(), pytest.raises(RuntimeError, match="measure_" if max_norm else "adamw_"):
        optimizer.step()
    assert same_bits(snapshot(optimizer, params), before)
    for o, p in ((optimizer, params), (untroubled, twins)):
        advance(o, p, 3, start=3)
    assert same_bits(snapshot(optimizer, params), snapshot(untroubled, twins))


@FLAT
def test_a_kernel_that_fails_leaves_the_optimizer_as_it_was(kernel, flat, monkeypatch):
    params = parameters()
    optimizer = AdamW(params, flat=flat, backend=kernel)
    advance(optimizer, params, 3)
    before = snapshot(optimizer, params)

    def fail() -> Tensor:
        raise RuntimeError("adamw_: invalid configuration argument")

    with monkeypatch.context() as patch:
        patch.setattr(BACKENDS[kernel], "prepare_adamw_", lambda _: fail)
        with pytest.raises(RuntimeError, match="adamw_: invalid configuration"):
            optimizer.step()
    assert same_bits(snapshot(optimizer, params), before)
    optimizer.step()
    assert {float(s["step"]) for s in optimizer.state.values()} == {4.0}
