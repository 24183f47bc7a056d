"""The CUDA C++ kernels, compiled for the processor (see cuda_on_cpu/), against the reference and against themselves.

What no GPU is needed for: the arithmetic, every index, the tails, the search for a segment's rows. Needs CUDA's headers
and a C++ compiler on Linux.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from kernels import rounding

import grgauge_kernels as gk
from grgauge_kernels import ops
from grgauge_kernels.backends import cuda, native

HERE = Path(__file__).with_name("cuda_on_cpu")
SOURCES = Path(__file__).parents[2] / "csrc"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# What a float32 update may differ by is a rounding of the result's own dtype.
CLOSE = {"fp32": 2e-6, "bf16": 2**-7, "fp16": 2**-10}


def headers():
    """The folder of cuda_bf16.h."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    folders = (Path(home) / "include" for home in homes if home)
    return next((folder for folder in folders if (folder / "cuda_bf16.h").exists()), None)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which("c++")
    if headers() is None or compiler is None or platform.system() != "Linux" or platform.machine() != "x86_64":
        pytest.skip("needs CUDA's headers and a C++ compiler on Linux, x86-64")
    folder = tmp_path_factory.mktemp("csrc")
    shutil.copy(SOURCES / "grgauge.h", folder)
    shutil.copytree(SOURCES / "cuda", folder / "cuda")
    for source in (folder / "cuda").iterdir():  # a launch is the one thing that C++ cannot read
        text = re.sub(
            r"^(\s*)(\S.*)<<<(.*)>>>\((.*)\);", r"\1::launch(\3, [&] { \2(\4); });", source.read_text(), flags=re.M
        )
        source.write_text(text)
    built = folder / "cuda.so"
    sources = [HERE / "threads.cpp", *(path for path in (folder / "cuda").iterdir() if path.suffix != ".cuh")]
    options = ["-std=c++17", "-O1", "-w", "-mfma", "-ffp-contract=off", "-fPIC", "-shared"]
    includes = [f"-I{HERE}", f"-isystem{headers()}"]
    subprocess.run([compiler, *options, *includes, "-xc++", *sources, "-o", built], check=True)
    library = ctypes.CDLL(str(built))
    library.grgauge_error.restype = ctypes.c_char_p
    pointer = ctypes.c_void_p
    library.grgauge_cuda_pass.argtypes = [
        ctypes.POINTER(native.Pass), pointer, pointer, pointer, ctypes.c_int, pointer
    ]  # fmt: skip
    return library


class Torch:
    """torch, but for its CUDA functions."""

    cuda = SimpleNamespace(
        device_of=lambda t: contextlib.nullcontext(), current_stream=lambda device: SimpleNamespace(cuda_stream=0)
    )

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture
def calls(library, monkeypatch):
    """Calls of the library so far; with this, the backend "cuda" runs on CPU tensors."""
    made = []

    def grgauge_cuda_pass(task, lr_f32, lr_f64, partials, device, stream):
        made.append(device)
        return library.grgauge_cuda_pass(task, lr_f32, lr_f64, partials, device or 0, stream)

    fake = SimpleNamespace(grgauge_cuda_pass=grgauge_cuda_pass, grgauge_error=library.grgauge_error)
    monkeypatch.setattr(cuda, "_load", lambda: fake)
    monkeypatch.setattr(cuda, "unavailable", lambda device=None: None)
    monkeypatch.setattr(cuda, "torch", Torch())
    monkeypatch.setitem(ops.BACKENDS, "cuda", cuda)
    return made


libc = ctypes.CDLL(None)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_memory = []


def guarded(n, dtype, end):
    """n elements with a page behind them (`end`), or before them, whose touch ends the process."""
    page, size = mmap.PAGESIZE, n * dtype.itemsize
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 2) * page)
    _memory.append(memory)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for fence in (base, base + (pages + 1) * page):
        assert libc.mprotect(fence, page, 0) == 0
    start = (pages + 1) * page - size if end else page
    return torch.frombuffer(memory, dtype=dtype, count=n, offset=start) if n else torch.empty(0, dtype=dtype)


def problem(sizes, grad, param, allocate, seed=0):
    """(params, grads, exp_avgs, exp_avg_sqs) of normal numbers, in memory from allocate(n, dtype)."""
    generator = torch.Generator().manual_seed(seed)

    def fill(dtype):
        return [allocate(n, dtype).copy_(torch.randn(n, generator=generator)) for n in sizes]

    params, grads, exp_avgs, exp_avg_sqs = map(fill, (DTYPES[param], DTYPES[grad], torch.float32, torch.float32))
    return params, grads, exp_avgs, [v.abs_() for v in exp_avg_sqs]


SIZES = [1, 3, 4, 5, 8, 0, 127, 129, 513, 4095, 4096, 4097, 12]


@pytest.mark.parametrize("end", [True, False], ids=["fence behind", "fence before"])
@pytest.mark.parametrize(("grad", "param"), [("fp32", "fp32"), ("bf16", "fp32"), ("fp16", "bf16"), ("bf16", "fp16")])
def test_adamw_with_everything_on_is_the_reference_and_touches_nothing_else(calls, grad, param, end):
    found = {}
    for backend in ("cuda", "reference"):
        params, grads, exp_avgs, exp_avg_sqs = problem(SIZES, grad, param, lambda n, dtype: guarded(n, dtype, end))
        plan = gk.Bucket(grads).plan()
        ema, previous = guarded(plan.numel, torch.float32, end).fill_(0.1), torch.full((plan.numel,), 0.2)
        stats = gk.adamw_(
            params, grads, exp_avgs, exp_avg_sqs, plan, step=torch.arange(1.0, len(SIZES) + 1),
            lr=torch.tensor(1e-3, dtype=torch.float64), betas=(0.9, 0.999), eps=1e-3, weight_decay=0.01, ema=ema,
            previous=previous, inv_scale=torch.tensor(0.5), clip=torch.tensor(0.7), zero_grad=True, maximize=True,
            backend=backend,
        )  # fmt: skip
        assert all((g == 0).all() for g in grads)
        found[backend] = stats, torch.cat(params), torch.cat(exp_avgs), torch.cat(exp_avg_sqs), ema, previous
    assert len(calls) == 1
    for i, (ours, theirs) in enumerate(zip(found["cuda"], found["reference"], strict=True)):
        tolerance = {0: 2e-6, 1: CLOSE[param]}.get(i, 1e-6)
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("states", [True, False])
@pytest.mark.parametrize("end", [True, False], ids=["fence behind", "fence before"])
@pytest.mark.parametrize("grad", DTYPES)
def test_sums_are_the_reference_s(calls, grad, end, states):
    _, grads, _, _ = problem(SIZES, grad, grad, lambda n, dtype: guarded(n, dtype, end))
    grads[8][7] = torch.inf
    plan = gk.Bucket(grads).plan()
    stats = [
        gk.measure_(grads, plan, ema=torch.ones(plan.numel) if states else None, backend=backend)
        for backend in ("cuda", "reference")
    ]
    torch.testing.assert_close(*stats, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("grad", "param"), [("fp32", "fp32"), ("bf16", "fp32"), ("fp16", "fp16")])
def test_same_bits_gauged_or_plain_and_aligned_or_not(calls, grad, param):
    def updated(shift, states, sums):
        n = 4500
        streams = problem([n], grad, param, lambda n, dtype: torch.empty(n + 8, dtype=dtype)[shift : shift + n])
        plan = gk.Bucket(streams[1]).plan()
        state = {name: torch.zeros(n) for name in ("ema", "previous")} if states else {}
        gk.adamw_(
            *streams, plan, step=3, lr=torch.tensor(2e-3), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, sums=sums,
            **state, backend="cuda",
        )  # fmt: skip
        return streams

    plain = updated(0, False, False)
    for shift, states, sums in itertools.product((0, 1, 4), (False, True), (False, True)):
        for ours, theirs in zip(updated(shift, states, sums), plain, strict=True):
            assert torch.equal(ours[0], theirs[0])


@pytest.mark.parametrize("flat", [False, True], ids=["loose", "flat"])
@pytest.mark.parametrize(("grad", "param"), [("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16"), ("bf16", "fp32")])
def test_moments_are_rounded_by_the_definition(calls, grad, param, flat):
    rounding.check_moments("cuda", DTYPES[grad], DTYPES[param], flat)
    assert len(calls) == 1


@pytest.mark.parametrize("states", [{}, {"ema": ..., "previous": ...}], ids=["plain", "states"])
def test_bfloat16_moments_stay_inside_their_memory(calls, states):
    """The wide accesses of all two-byte streams, and the ends of what they cannot take."""
    n = 4096 + 13
    for end in (True, False):
        streams = [[guarded(n, torch.bfloat16, end).fill_(0.5)] for _ in range(4)]
        plan = gk.Bucket(streams[1]).plan()
        kept = {name: guarded(n, torch.float32, end).zero_() for name in states}
        gk.adamw_(
            *streams, plan, step=3, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, seed=1,
            stochastic_rounding=True, zero_grad=True, **kept, backend="cuda",
        )  # fmt: skip
        assert not streams[1][0].any()
        assert (streams[0][0] < 0.5).any()


def test_subnormal_infinite_and_huge_moments(calls):
    rounding.check_edges("cuda")


@pytest.mark.parametrize("moment", ["fp32", "bf16"])
@pytest.mark.parametrize("grad", DTYPES)
def test_parameters_are_rounded_by_the_definition(calls, grad, moment):
    rounding.check_params("cuda", DTYPES[moment], DTYPES[grad])


@pytest.mark.parametrize("bad", [1.0, float("nan")])
def test_found_inf_changes_nothing_and_sums_are_nan(calls, bad):
    streams = problem([5, 4100], "fp32", "fp32", lambda n, dtype: torch.empty(n, dtype=dtype))
    before = [[t.clone() for t in stream] for stream in streams]
    plan = gk.Bucket(streams[1]).plan()
    stats = gk.adamw_(
        *streams, plan, step=1, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, zero_grad=True,
        found_inf=torch.tensor([bad]), backend="cuda",
    )  # fmt: skip
    assert stats.isnan().all()
    for stream, old in zip(streams, before, strict=True):
        assert all(map(torch.equal, stream, old))


@pytest.mark.parametrize(("segments", "rows"), [(1, 1), (1, 600), (2, 257), (7, 100), (30, 2)])
def test_rows_are_found_and_added_up(calls, segments, rows):
    """One element a row, so that there are many rows; segments 3, 8, ... have none."""
    total = segments * rows
    base = torch.randn(total, generator=torch.Generator().manual_seed(0))
    place = np.arange(total)
    table = np.stack([place // rows, place, np.ones(total), place], axis=1).astype(np.int64)
    table = table[table[:, 0] % 5 != 3]
    plan = gk.Plan(gk.Bucket(list(base.split(rows)), base=base), table)
    ours, theirs = (gk.measure_([base], plan, backend=backend) for backend in ("cuda", "reference"))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert torch.equal(ours, gk.measure_([base], plan, backend="cuda"))


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("value", [0.1, 0.3, 0.7])
def test_equal_elements_do_not_add_up_their_roundings(calls, value, shift):
    g = torch.full((4096 + shift,), value)[shift:]
    stats = gk.measure_([g], gk.Bucket([g]).plan(), backend="cuda")
    torch.testing.assert_close(stats[0, 0], g.double().square().sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(stats[0, 2], g.double().sum(), rtol=1e-6, atol=0)


def test_a_plan_without_chunks_has_zero_sums(calls):
    grads = [torch.randn(5), torch.randn(3)]
    stats = gk.measure_(grads, gk.Bucket(grads).plan(skip=[0, 1]), backend="cuda")
    assert torch.equal(stats, torch.zeros(2, 6, dtype=torch.float64))


def test_an_error_has_cuda_s_own_words(library):
    task = native.Pass([], torch.empty(0, 4, dtype=torch.int64), 0, None, None, None, 0.9, None)
    code = library.grgauge_cuda_pass(ctypes.byref(task), None, None, None, -1, None)
    with pytest.raises(RuntimeError, match="adamw_: invalid device ordinal"):
        native.check(library, "adamw_", code)
