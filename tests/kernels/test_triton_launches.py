"""What the Triton backend launches: over which chunks, with which addresses, in a CUDA graph, and where it cannot."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernels.triton_problem import DEVICE, HYPER, LAYOUTS, UNAVAILABLE, Problem, needs_triton, same_bits, scalar

import grgauge_kernels as gk
from grgauge_kernels import CHUNK
from grgauge_kernels.backends import addresses, reference
from grgauge_kernels.backends import triton as backend

pytestmark = pytest.mark.usefixtures("numpy_keeps_quiet")

needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda" or UNAVAILABLE is not None, reason="no GPU")


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
