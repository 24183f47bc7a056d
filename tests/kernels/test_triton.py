"""The Triton backend against float64 and against the reference: on a GPU, or in Triton's interpreter without one."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import truth
from kernels import rounding

import grgauge_kernels as gk
from grgauge_kernels import CHUNK
from grgauge_kernels.backends import addresses, reference
from grgauge_kernels.backends import triton as backend

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
UNAVAILABLE = backend.unavailable(DEVICE)
needs_triton = pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))
needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda" or UNAVAILABLE is not None, reason="no GPU")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("loose", "misaligned", "flat")
SIZES = [0, 1, 2, 997, CHUNK - 1, CHUNK, CHUNK + 1]
FEW_SIZES = [0, 1, 997, CHUNK + 1]  # the interpreter takes its time
HYPER = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def _numpy_keeps_quiet():
    """The interpreter computes in numpy, which warns of NaN and overflow where a GPU does not."""
    with np.errstate(all="ignore"):
        yield


def lay(tensors, layout):
    """Tensors -> (the segments, laid out as told; the list that an op takes; the flat buffer or None)."""
    if layout == "loose":
        return tensors, tensors, None
    pad = 8 if layout == "flat" else 1  # in a flat buffer segments start aligned; else one element off
    starts, extent = [], pad
    for t in tensors:
        starts.append(extent)
        extent += -(-t.numel() // 8) * 8 + pad
    buffer = tensors[0].new_zeros(extent)
    views = [buffer[s : s + t.numel()].copy_(t) for s, t in zip(starts, tensors, strict=True)]
    return views, (views if layout == "misaligned" else [buffer]), (None if layout == "misaligned" else buffer)


class Problem:
    """Random gradients, parameters and states of `sizes`, and a plan over them; the same for the same arguments."""

    def __init__(self, sizes, dtype, layout="loose", param_dtype=torch.float32, seed=0, **sample):
        generator = torch.Generator().manual_seed(seed)

        def made(dtype, scale=1.0):
            tensors = [(torch.randn(n, generator=generator) * scale).to(DEVICE, dtype) for n in sizes]
            return lay(tensors, layout)

        self.segments, self.grads, base = made(dtype)
        self.params_of, self.params, _ = made(param_dtype)
        self.exp_avgs_of, self.exp_avgs, _ = made(torch.float32, 0.1)
        self.exp_avg_sqs_of, self.exp_avg_sqs, _ = made(torch.float32, 0.1)
        for v in self.exp_avg_sqs:
            v.abs_()
        self.plan = gk.Bucket(self.segments, base=base).plan(**sample)
        self.ema, self.previous = (torch.randn(self.plan.numel, generator=generator).to(DEVICE) for _ in range(2))

    def measure(self, backend="triton", states=True, **options):
        if states:
            options |= {"ema": self.ema, "previous": self.previous}
        return gk.measure_(self.grads, self.plan, backend=backend, **options).cpu()

    def adamw(self, step=1.0, backend="triton", states=False, **options):
        if states:
            options |= {"ema": self.ema, "previous": self.previous}
        if isinstance(step, float):
            step = scalar(step)
        streams = (self.params, self.grads, self.exp_avgs, self.exp_avg_sqs)
        return gk.adamw_(*streams, self.plan, step=step, backend=backend, **{**HYPER, **options}).cpu()

    def everything(self):
        """Every tensor that an op may change."""
        return [*self.params, *self.grads, *self.exp_avgs, *self.exp_avg_sqs, self.ema, self.previous]


def scalar(value, dtype=torch.float32):
    return torch.tensor(value, dtype=dtype, device=DEVICE)


def same_bits(a, b):
    return len(a) == len(b) and all(x.equal(y) for x, y in zip(a, b, strict=True))


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
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sampled_plan_touches_only_its_elements(layout):
    p = Problem([20_000, 100, 12_000], torch.bfloat16, layout, sample=8_000, seed=3)
    before = [t.clone() for t in p.params_of]
    stats = p.adamw(states=True)
    visited = [torch.zeros(g.numel(), dtype=torch.bool) for g in p.segments]
    for segment, offset, length, _ in p.plan.rows.tolist():
        begin = offset - p.plan.bucket.offsets[segment]
        visited[segment][begin : begin + length] = True
    assert 0 < sum(int(v.sum()) for v in visited) < 12_000
    for row, g, old, new, mask in zip(stats, p.segments, before, p.params_of, visited, strict=True):
        torch.testing.assert_close(row[0], g.cpu()[mask].double().square().sum(), rtol=1e-6, atol=0)
        assert ((old != new).cpu() == mask).all()


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
@pytest.mark.parametrize("sizes", [[0], [0, 0], [5, 7]])
def test_a_plan_without_rows(sizes):
    p = Problem(sizes, torch.float32, skip=range(len(sizes)))
    before = [t.clone() for t in p.everything()]
    assert p.plan.rows.shape[0] == 0
    assert p.measure().equal(torch.zeros(len(sizes), 6, dtype=torch.float64))
    assert p.adamw().equal(torch.zeros(len(sizes), 6, dtype=torch.float64))
    assert p.adamw(found_inf=scalar(1.0)).isnan().all()
    assert same_bits(before, p.everything())


@needs_triton
def test_a_bucket_without_segments():
    rows = torch.empty(0, 4, dtype=torch.int64, device=DEVICE)
    assert backend.measure_([torch.empty(0, device=DEVICE)], rows, 0, None, None, 0.9, None).shape == (0, 6)


@needs_triton
def test_skipped_segments_read_zero():
    p = Problem([300, CHUNK, 50, 70], torch.float32, skip=(0, 2))
    stats = p.measure()
    assert not stats[[0, 2]].any()
    assert (stats[[1, 3]][:, :5] > 0).all()


@needs_triton
def test_memory_order_of_a_transposed_tensor():
    g = torch.randn(40, 30, device=DEVICE).t()
    plan = gk.Bucket([g]).plan()
    previous = torch.zeros(plan.numel, device=DEVICE)
    gk.measure_([g], plan, previous=previous, backend="triton")
    assert previous.equal(g.t().reshape(-1))


@needs_triton
def test_offsets_beyond_32_bits():
    """A tensor of which only one chunk is ever touched, so that it takes up hardly any memory on a CPU."""
    start = 2**31 + 8
    huge = torch.empty(start + CHUNK, dtype=torch.bfloat16, device=DEVICE)
    huge[start:] = 2.0
    rows = torch.tensor([[1, start, CHUNK, 0]], device=DEVICE)
    stats = backend.measure_([huge[:1], huge], rows, 2, None, None, 0.9, None)
    assert stats[1].tolist() == [4.0 * CHUNK, 0, 2.0 * CHUNK, 0, 0, 0]


@needs_triton
@pytest.mark.parametrize("chunks", [1, backend.TILE, backend.TILED, backend.TILED + 1, backend.TILED + 777])
def test_reduction_of_many_chunks(chunks):
    """Segments of every size around a tile, some empty, one of them nearly everything."""
    sizes = [0, 1, 0, backend.TILE - 1, backend.TILE, backend.TILE + 1, 2 * backend.TILE, 3, 0]
    while sum(sizes) > chunks:
        sizes[sizes.index(max(sizes))] = 0
    sizes.insert(4, chunks - sum(sizes))
    segment = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    rows = torch.zeros(chunks, 4, dtype=torch.int64)
    rows[:, 0] = segment
    partials = torch.rand(chunks, 8, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(len(sizes), 6, dtype=torch.float64).index_add(0, segment, partials[:, :6].double())
    stats = torch.full_like(expected, torch.nan).to(DEVICE)
    rows = rows.to(DEVICE)
    backend._reduce(rows, partials.to(DEVICE), backend._tiles(rows), None, stats)
    torch.testing.assert_close(stats.cpu(), expected, rtol=1e-13, atol=0)


@needs_triton
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_every_run(layout):
    runs = []
    for _ in range(2):
        p = Problem([CHUNK + 997, 13], torch.bfloat16, layout)
        runs.append([p.adamw(states=True), *p.everything()])
    assert same_bits(*runs)


@needs_triton
def test_addresses_are_uploaded_once():
    p = Problem([10, 20], torch.float32)
    p.measure()
    uploads = addresses._upload.cache_info().misses
    p.measure()
    assert addresses._upload.cache_info().misses == uploads
    p.grads[1] = p.grads[1].clone()
    p.measure()
    assert addresses._upload.cache_info().misses == uploads + 1


@needs_gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_captured_graph_replays_the_step(layout):
    captured, plain = (Problem([CHUNK + 997, 13], torch.bfloat16, layout) for _ in range(2))
    for p in (captured, plain):
        p.adamw(scalar(1.0), states=True)
    graph, step = torch.cuda.CUDAGraph(), scalar(2.0)
    streams = (captured.params, captured.grads, captured.exp_avgs, captured.exp_avg_sqs)
    with torch.cuda.graph(graph):
        stats = gk.adamw_(*streams, captured.plan, step=step, ema=captured.ema, previous=captured.previous, **HYPER)
    graph.replay()
    assert plain.adamw(2.0, states=True).equal(stats.cpu())
    assert same_bits(captured.everything(), plain.everything())


@needs_gpu
def test_capture_before_the_first_call_says_what_to_do():
    p = Problem([10, 20], torch.float32)
    Problem([10, 20], torch.float32, seed=1).measure()
    with (
        pytest.raises(RuntimeError, match="before the CUDA graph is captured"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        gk.measure_(p.grads, p.plan, backend="triton")


def reasons(setup, *devices, **environment):
    """What `unavailable` says of `devices` in a new Python, after `setup`; TRITON_INTERPRET only as told."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(Path(gk.__file__).parents[1]), **environment}
    code = f"""{setup}
import json, torch
import grgauge_kernels as gk
from grgauge_kernels.backends import triton
print(json.dumps([triton.unavailable(name and torch.device(name)) for name in {devices}]))
"""
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@needs_triton
def test_unavailable_says_what_to_do():
    cpu, mps, cuda, anywhere = reasons("", "cpu", "mps", "cuda", None)
    assert "TRITON_INTERPRET=1" in cpu
    assert "not on mps" in mps
    assert cuda == anywhere == (None if torch.cuda.is_available() else "no CUDA device")


@needs_triton
def test_unavailable_in_the_interpreter():
    cpu, anywhere, cuda = reasons("", "cpu", None, "cuda", TRITON_INTERPRET="1")
    assert cpu is anywhere is None
    assert "unset it" in cuda


def test_unavailable_without_triton():
    assert reasons("import sys; sys.modules['triton'] = None", None) == ["triton is not installed: pip install triton"]


def test_unavailable_with_a_broken_triton(tmp_path):
    (tmp_path / "triton.py").write_text("raise OSError('libtriton.so: no such file')")
    (reason,) = reasons(f"import sys; sys.path.insert(0, {str(tmp_path)!r})", None)
    assert "libtriton.so: no such file" in reason


def test_the_backend_has_the_signatures_of_the_reference():
    for name in ("unavailable", "measure_", "prepare_adamw_"):
        assert inspect.signature(getattr(backend, name)) == inspect.signature(getattr(reference, name))
