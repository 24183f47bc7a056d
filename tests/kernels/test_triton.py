"""The Triton backend against float64 and against the reference: on a GPU, or in Triton's interpreter without one."""

from __future__ import annotations

import pytest
import torch
import truth
from kernels import rounding
from kernels.triton_problem import DEVICE, HYPER, LAYOUTS, Problem, needs_triton, same_bits, scalar

from grgauge_kernels import CHUNK

pytestmark = pytest.mark.usefixtures("numpy_keeps_quiet")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = [0, 1, 2, 997, CHUNK - 1, CHUNK, CHUNK + 1]
FEW_SIZES = [0, 1, 997, CHUNK + 1]  # the interpreter takes its time


@needs_triton
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_measure_matches_float64(dtype, layout):
    p = Problem(SIZES, dtype, layout)
    ema, previous, scale = p.ema.clone(), p.previous.clone(), 0.375
    stats = p.measure(beta=0.9, inv_scale=scalar(scale))
    assert stats.shape == (len(SIZES), 6)
    assert stats.dtype == torch.float64
    states = (t.split(SIZES) for t in (ema, previous, p.ema, p.previous))
    for row, g, ema_was, was, m, new in zip(stats, p.segments, *states, strict=True):
        g = g.float() * scale
        assert truth.relative(m, 0.9 * ema_was.double() + 0.1 * g.double()) < 2e-7
        assert new.equal(g)
        # The sums are judged on the float32 states and differences that they are sums of.
        expected = truth.sums(g.double().cpu(), m.cpu(), (g - was).double().cpu(), truth.finite(g).cpu())
        torch.testing.assert_close(row, expected, rtol=1e-6, atol=0)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_measure_without_states(dtype, layout):
    p = Problem([1100, 5], dtype, layout)
    stats = p.measure(states=False)
    for row, g in zip(stats, p.segments, strict=True):
        expected = truth.sums(g.double().cpu(), None, None, truth.finite(g).cpu())
        torch.testing.assert_close(row, expected, rtol=1e-6, atol=0)


@needs_triton
@pytest.mark.parametrize(
    ("dtype", "bad"),
    [
        (torch.float32, float("nan")),
        (torch.float32, float("inf")),
        (torch.float32, 3e16),
        (torch.bfloat16, -float("inf")),
        (torch.float16, float("nan")),
    ],
)
def test_nonfinite_elements_are_counted_and_left_out(dtype, bad):
    p = Problem([CHUNK + 700], dtype)
    where = torch.tensor([0, 511, 512, 1023, CHUNK - 1, CHUNK, CHUNK + 512, CHUNK + 699])
    p.segments[0][where] = bad
    g, ema, previous = p.segments[0].float(), p.ema.clone(), p.previous.clone()
    stats = p.measure()
    finite = truth.finite(g)
    assert stats[0, 5] == len(where)
    assert p.ema[where].equal(ema[where])
    assert p.previous[where].equal(previous[where])
    assert p.previous[finite].equal(g[finite])
    expected = truth.sums(g.double().cpu(), p.ema.cpu(), (g - previous).double().cpu(), finite.cpu())
    torch.testing.assert_close(stats[0], expected, rtol=1e-6, atol=0)


@needs_triton
@pytest.mark.parametrize(
    ("dtype", "param_dtype", "layout"),
    [
        *((torch.float32, torch.float32, layout) for layout in LAYOUTS),
        (torch.bfloat16, torch.float32, "loose"),
        (torch.bfloat16, torch.float32, "misaligned"),
        (torch.bfloat16, torch.bfloat16, "flat"),
        (torch.bfloat16, torch.bfloat16, "misaligned"),
        (torch.float16, torch.float16, "loose"),
    ],
)
def test_adamw_matches_float64(dtype, param_dtype, layout):
    p = Problem(FEW_SIZES, dtype, layout, param_dtype)
    exact = [
        truth.Adamw(*(t.double() for t in tensors))
        for tensors in zip(p.params_of, p.exp_avgs_of, p.exp_avg_sqs_of, strict=True)
    ]
    for step in (1.0, 2.0):
        # A parameter of two bytes is rounded in each step; the interpreter cuts bfloat16 off instead of rounding it.
        rounding = 1e-6 if param_dtype == torch.float32 else step * torch.finfo(param_dtype).eps
        stats = p.adamw(step)
        for i, truly in enumerate(exact):
            truly.step(p.segments[i], step, **HYPER)
            assert truth.relative(p.params_of[i], truly.param) < rounding
            assert truth.relative(p.exp_avgs_of[i], truly.exp_avg) < 1e-6
            assert truth.relative(p.exp_avg_sqs_of[i], truly.exp_avg_sq) < 1e-6
            g = p.segments[i].double().cpu()
            expected = truth.sums(g, p.exp_avgs_of[i].cpu(), None, truth.finite(g))
            torch.testing.assert_close(stats[i], expected, rtol=1e-6, atol=0)


@needs_triton
@pytest.mark.skipif(DEVICE.type == "cuda", reason="tests/device has it on the GPU")
@pytest.mark.parametrize("flat", [False, True], ids=["loose", "flat"])
@pytest.mark.parametrize(
    ("dtype", "param_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)],
)
def test_moments_are_rounded_by_the_definition(dtype, param_dtype, flat):
    rounding.check_moments("triton", dtype, param_dtype, flat, rounding.FEW_SIZES)


@needs_triton
@pytest.mark.skipif(DEVICE.type == "cuda", reason="tests/device has it on the GPU")
def test_no_state_changes_the_draw():
    rounding.check_moments("triton", torch.bfloat16, torch.bfloat16, False, rounding.FEW_SIZES, ema=...)
    rounding.check_edges("triton")


@needs_triton
@pytest.mark.skipif(DEVICE.type == "cuda", reason="tests/device has it on the GPU")
@pytest.mark.parametrize("moment", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_are_rounded_by_the_definition(dtype, moment):
    rounding.check_params("triton", moment, dtype, rounding.FEW_SIZES)


@needs_triton
@pytest.mark.parametrize("step", [1.0, 2.0, 1000.0, 1e7])
def test_bias_correction_keeps_its_digits(step):
    """From zeros, so that what is compared is the update and nothing cancels: 1 - 0.999 in float32 is off by 5e-5."""
    p = Problem([100], torch.float32)
    for t in (*p.params, *p.exp_avgs, *p.exp_avg_sqs):
        t.zero_()
    exact = truth.Adamw(*(t[0].double() for t in (p.params, p.exp_avgs, p.exp_avg_sqs)))
    p.adamw(step, lr=1.0)
    exact.step(p.grads[0], step, **HYPER | {"lr": 1.0})
    torch.testing.assert_close(p.params[0].double(), exact.param, rtol=1e-6, atol=0)


@needs_triton
def test_a_hundred_steps_of_torch_adamw():
    p = Problem([100], torch.float32)
    for state in (*p.exp_avgs, *p.exp_avg_sqs):
        state.zero_()
    param = p.params[0].clone().requires_grad_()
    optimizer = torch.optim.AdamW([param], **HYPER)
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 101):
        p.grads[0].copy_(torch.randn(100, generator=generator))
        param.grad = p.grads[0].clone()
        optimizer.step()
        p.adamw(float(step), sums=False)
    assert truth.relative(p.params[0], param) < 1e-6


@needs_triton
@pytest.mark.parametrize("layout", LAYOUTS)
def test_adamw_with_every_option_matches_the_reference(layout):
    ours, theirs = (Problem(FEW_SIZES, torch.bfloat16, layout) for _ in range(2))
    for i, (a, b) in enumerate(zip(ours.segments, theirs.segments, strict=True)):
        if a.numel() > 600:  # planted where a block ends and where a chunk ends
            a[[511, 512, -1]] = b[[511, 512, -1]] = float("inf") if i % 2 else 2e17
    for step in (1.0, 2.0):
        options = {
            "states": True,
            "inv_scale": scalar(0.25),
            "clip": scalar(0.5),
            "found_inf": scalar(0.0),
            "lr": scalar(3e-3, torch.float32 if step == 1.0 else torch.float64),
            "step": torch.arange(len(FEW_SIZES), device=DEVICE).float() + step,
            "zero_grad": step == 2.0,
            "maximize": True,
        }
        stats, expected = ours.adamw(**options), theirs.adamw(backend="reference", **options)
        torch.testing.assert_close(stats, expected, rtol=1e-6, atol=0)
    for a, b in zip(ours.everything(), theirs.everything(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-7, equal_nan=True)
    for g in ours.segments:
        assert not g.any()


@needs_triton
@pytest.mark.parametrize("name", ["inv_scale", "clip", "maximize", "zero_grad"])
def test_each_option_alone_matches_the_reference(name):
    value = True if name in ("maximize", "zero_grad") else scalar(0.3)
    ours, theirs = (Problem([700], torch.float32) for _ in range(2))
    stats, expected = ours.adamw(**{name: value}), theirs.adamw(backend="reference", **{name: value})
    torch.testing.assert_close(stats, expected, rtol=1e-6, atol=0)
    for a, b in zip(ours.everything(), theirs.everything(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@needs_triton
@pytest.mark.parametrize("betas", [(0.0, 0.999), (0.9, 0.0)])
def test_a_beta_of_zero(betas):
    ours, theirs = (Problem([700], torch.float32) for _ in range(2))
    ours.adamw(3.0, betas=betas)
    theirs.adamw(3.0, backend="reference", betas=betas)
    for a, b in zip(ours.everything(), theirs.everything(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@needs_triton
@pytest.mark.parametrize("found", [1.0, float("nan")])
def test_found_inf_leaves_everything_as_it_was(found):
    p = Problem([CHUNK + 3, 0, 9], torch.float16)
    before = [t.clone() for t in p.everything()]
    stats = p.adamw(states=True, found_inf=scalar(found), zero_grad=True)
    assert stats.shape == (3, 6)
    assert stats.isnan().all()
    assert same_bits(before, p.everything())


@needs_triton
def test_without_sums_the_update_is_the_same():
    a, b = (Problem([CHUNK + 3, 9], torch.bfloat16) for _ in range(2))
    a.adamw(states=True)
    assert b.adamw(states=True, sums=False).shape == (0, 6)
    assert same_bits(a.everything(), b.everything())


@needs_triton
def test_a_nan_gradient_reaches_the_parameter_but_not_the_sums():
    p = Problem([1000], torch.float32)
    p.grads[0][7] = float("nan")
    stats = p.adamw()
    assert p.params[0].isnan().nonzero().tolist() == [[7]]
    assert stats.isfinite().all()
    assert stats[0, 5] == 1
    m = p.exp_avgs[0].double()
    torch.testing.assert_close(stats[0, 1], m[~m.isnan()].square().sum().cpu(), rtol=1e-6, atol=0)


@needs_triton
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_every_run(layout):
    runs = []
    for _ in range(2):
        p = Problem([CHUNK + 997, 13], torch.bfloat16, layout)
        runs.append([p.adamw(states=True), *p.everything()])
    assert same_bits(*runs)
