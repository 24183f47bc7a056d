"""The C++ kernel, through its C ABI: one call a bucket, on torch's own threads."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..stream import addresses_of
from . import Update, native

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
    """The instruction set in use: "avx512", "avx2" or "portable". With `choose`, that one, if it can run."""
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
    stats = torch.empty(segments, 6, dtype=torch.float64)
    task = native.Pass(grads, rows, segments, stats, ema, previous, beta, inv_scale)
    table = addresses_of(grads)
    task.grads = table.buffer_info()[0]
    _run("measure_", task)
    return stats


def prepare_adamw_(u: Update) -> Callable[[], Tensor]:
    return repeatable(u)(u.grads, u.lr if u.lr_tensor is None else float(u.lr_tensor))


def repeatable(u: Update) -> Callable[[Sequence[Tensor], float], Callable[[], Tensor]]:
    """`prepare_adamw_` of the same update with other gradients, and another number as learning rate."""
    same = native.Pass(u.grads, u.rows, u.segments, None, u.ema, u.previous, u.beta, u.inv_scale)
    same.update(u, u.step, 0.0)
    kept = [addresses_of(tensors) for tensors in (u.params, u.exp_avgs, u.exp_avg_sqs)]
    same.params, same.exp_avgs, same.exp_avg_sqs = [table.buffer_info()[0] for table in kept]
    segments, sums = u.segments, u.sums

    def prepare(grads: Sequence[Tensor], lr: float) -> Callable[[], Tensor]:
        task = native.Pass.from_buffer_copy(same)
        table, stats = addresses_of(grads), _NO_SUMS
        task.grads, task.grad_dtype, task.lr = table.buffer_info()[0], native.DTYPES[grads[0].dtype], lr
        if sums:
            stats = torch.empty(segments, 6, dtype=torch.float64)
            task.stats = stats.data_ptr()
        return functools.partial(_update, task, stats, (table, kept))

    return prepare


def _update(task: native.Pass, stats: Tensor, tables: object) -> Tensor:
    """The tables have to live as long as the task, which points into them."""
    _run("adamw_", task)
    return stats


def _run(op: str, task: native.Pass) -> None:
    library = _load()
    assert not isinstance(library, str)
    native.check(library, op, library.grgauge_cpu_pass(ctypes.byref(task), torch.get_num_threads()))
