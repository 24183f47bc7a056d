"""The C++ kernel, through its C ABI: one call a bucket, on torch's own threads."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

ABI = 1

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SUFFIX = {"win32": "grgauge_cpu.dll", "darwin": "libgrgauge_cpu.dylib"}


class _Pass(ctypes.Structure):
    """`grgauge_pass` of csrc/grgauge.h, field by field."""

    _fields_ = [
        ("rows", ctypes.c_void_p),
        ("chunks", ctypes.c_int64),
        ("segments", ctypes.c_int64),
        ("stats", ctypes.c_void_p),
        ("grads", ctypes.c_void_p),
        ("flat", ctypes.c_int32),
        ("grad_dtype", ctypes.c_int32),
        ("ema", ctypes.c_void_p),
        ("previous", ctypes.c_void_p),
        ("beta", ctypes.c_double),
        ("inv_scale", ctypes.c_void_p),
        ("params", ctypes.c_void_p),
        ("exp_avgs", ctypes.c_void_p),
        ("exp_avg_sqs", ctypes.c_void_p),
        ("param_dtype", ctypes.c_int32),
        ("step_per_segment", ctypes.c_int32),
        ("steps", ctypes.c_void_p),
        ("lr", ctypes.c_double),
        ("beta1", ctypes.c_double),
        ("beta2", ctypes.c_double),
        ("eps", ctypes.c_double),
        ("weight_decay", ctypes.c_double),
        ("found_inf", ctypes.c_void_p),
        ("clip", ctypes.c_void_p),
        ("zero_grad", ctypes.c_int32),
        ("maximize", ctypes.c_int32),
    ]


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    name = _SUFFIX.get(sys.platform, "libgrgauge_cpu.so")
    # An editable install has two homes, the sources and the built library's; a wheel has one.
    homes = sys.modules["grgauge_kernels"].__path__
    found = [path for home in homes if (path := Path(home) / "lib" / name).exists()]
    if not found:
        return f"{name} is not built; run `pip install .` with a C++ compiler on the path"
    try:
        library = ctypes.CDLL(str(found[0]))
    except OSError as error:
        return f"{name} cannot be loaded: {error}"
    if library.grgauge_abi() != ABI:
        return f"{name} is of another version (ABI {library.grgauge_abi()}, not {ABI}); run `pip install .` again"
    library.grgauge_cpu_pass.argtypes = [ctypes.POINTER(_Pass), ctypes.c_int]
    library.grgauge_error.restype = library.grgauge_cpu_isa.restype = ctypes.c_char_p
    return library


def unavailable(device: torch.device | None = None) -> str | None:
    if device is not None and device.type != "cpu":
        return f"runs on the CPU, not on {device.type}"
    library = _load()
    return library if isinstance(library, str) else None


def isa(choose: str | None = None) -> str:
    """The instruction set in use: "avx512", "avx2" or "portable". With `choose`, switched to that if it can run."""
    library = _load()
    if isinstance(library, str):
        raise RuntimeError(library)
    return library.grgauge_cpu_isa(choose.encode() if choose else None).decode()


def measure_(
    grads: list[Tensor],
    rows: Tensor,
    segments: int,
    ema: Tensor | None,
    previous: Tensor | None,
    beta: float,
    inv_scale: Tensor | None,
) -> Tensor:
    stats = torch.empty((segments, 6), dtype=torch.float64)
    task = _task(grads, rows, segments, ema, previous, beta, inv_scale)
    task.stats = stats.data_ptr()
    _run("measure_", task)
    return stats


def adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    rows: Tensor,
    segments: int,
    step: Tensor,
    lr: float,
    lr_tensor: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    ema: Tensor | None,
    previous: Tensor | None,
    beta: float,
    inv_scale: Tensor | None,
    found_inf: Tensor | None,
    clip: Tensor | None,
    zero_grad: bool,
    maximize: bool,
    sums: bool,
) -> Tensor:
    stats = torch.empty((segments if sums else 0, 6), dtype=torch.float64)
    task = _task(grads, rows, segments, ema, previous, beta, inv_scale)
    if sums:
        task.stats = stats.data_ptr()
    tables = [_addresses(stream) for stream in (params, exp_avgs, exp_avg_sqs)]
    task.params, task.exp_avgs, task.exp_avg_sqs = map(ctypes.addressof, tables)
    task.param_dtype = _DTYPES[params[0].dtype] if params else 0
    task.step_per_segment = step.numel() > 1
    task.steps = step.data_ptr()
    task.lr = lr if lr_tensor is None else float(lr_tensor)
    task.beta1, task.beta2, task.eps, task.weight_decay = beta1, beta2, eps, weight_decay
    task.found_inf, task.clip = _address(found_inf), _address(clip)
    task.zero_grad, task.maximize = zero_grad, maximize
    _run("adamw_", task)
    return stats


def _task(
    grads: list[Tensor],
    rows: Tensor,
    segments: int,
    ema: Tensor | None,
    previous: Tensor | None,
    beta: float,
    inv_scale: Tensor | None,
) -> _Pass:
    task = _Pass()
    task.rows, task.chunks, task.segments = rows.data_ptr(), rows.shape[0], segments
    task.table = _addresses(grads)  # an attribute, not a field: it must live as long as the task
    task.grads = ctypes.addressof(task.table)
    task.flat = len(grads) == 1
    task.grad_dtype = _DTYPES[grads[0].dtype] if grads else 0
    task.ema, task.previous, task.beta = _address(ema), _address(previous), beta
    task.inv_scale = _address(inv_scale)
    return task


def _addresses(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*map(Tensor.data_ptr, tensors))


def _address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _run(op: str, task: _Pass) -> None:
    library = _load()
    assert not isinstance(library, str)
    code = library.grgauge_cpu_pass(ctypes.byref(task), torch.get_num_threads())
    if code:
        raise RuntimeError(f"{op}: {library.grgauge_error(code).decode()}")
