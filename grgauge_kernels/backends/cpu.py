"""The C++ kernel, through its C ABI: one call a bucket, on torch's own threads."""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor

from . import native

_NO_SUMS = torch.empty((0, 6), dtype=torch.float64)


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    library = native.load("grgauge_cpu", "a C++ compiler")
    if not isinstance(library, str):
        library.grgauge_cpu_pass.argtypes = [ctypes.POINTER(native.Pass), ctypes.c_int]
        library.grgauge_cpu_isa.restype = ctypes.c_char_p
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
    task = native.Pass(grads, rows, segments, stats, ema, previous, beta, inv_scale)
    table = array("Q", map(Tensor.data_ptr, grads))
    task.grads = table.buffer_info()[0]
    _run("measure_", task)
    return stats


def prepare_adamw_(
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
) -> Callable[[], Tensor]:
    stats = torch.empty((segments, 6), dtype=torch.float64) if sums else _NO_SUMS
    task = native.Pass(grads, rows, segments, stats if sums else None, ema, previous, beta, inv_scale)
    rate = lr if lr_tensor is None else float(lr_tensor)
    task.update(params, step, rate, beta1, beta2, eps, weight_decay, found_inf, clip, zero_grad, maximize)
    table = array("Q", map(Tensor.data_ptr, chain(grads, params, exp_avgs, exp_avg_sqs)))
    start, size = table.buffer_info()[0], table.itemsize * len(grads)
    task.grads, task.params, task.exp_avgs, task.exp_avg_sqs = (start + i * size for i in range(4))
    return functools.partial(_update, task, stats, table)


def _update(task: native.Pass, stats: Tensor, table: array[int]) -> Tensor:
    """`table` has to live as long as the task, which points into it."""
    _run("adamw_", task)
    return stats


def _run(op: str, task: native.Pass) -> None:
    library = _load()
    assert not isinstance(library, str)
    native.check(library, op, library.grgauge_cpu_pass(ctypes.byref(task), torch.get_num_threads()))
