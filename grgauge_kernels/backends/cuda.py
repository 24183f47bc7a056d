"""The CUDA C++ kernels, through their C ABI: two launches a bucket, one for the chunks and one for the sums.

Both ops can be captured in a CUDA graph. With loose tensors, call them once with the same tensors before the capture:
that call uploads their addresses.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor

from ..stream import addresses_of
from . import Update, native
from .addresses import on_device


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    library = native.load("grgauge_cuda", "nvcc (CUDA toolkit 11.8 or newer)")
    if not isinstance(library, str):
        pointer = ctypes.c_void_p
        library.grgauge_cuda_pass.argtypes = [
            ctypes.POINTER(native.Pass), pointer, pointer, pointer, ctypes.c_int, pointer
        ]  # fmt: skip
    return library


def unavailable(device: torch.device | None = None) -> str | None:
    """None if the kernels run on `device` (on the current one, if None), else why they do not and what to do."""
    if device is not None and device.type != "cuda":
        return f"runs on CUDA devices, not on {device.type}"
    return _gpu_unavailable(device)


@functools.lru_cache
def _gpu_unavailable(device: torch.device | None) -> str | None:
    if torch.version.hip is not None:
        return "runs on NVIDIA GPUs, and this torch is made for AMD's: use another backend"
    if not torch.cuda.is_available():
        return "no CUDA device"
    library = _load()
    if isinstance(library, str):
        return library
    with torch.cuda.device(device):
        code = library.grgauge_cuda_check(torch.cuda.current_device())
    if code:
        return (
            f"the CUDA library does not run on this GPU ({library.grgauge_error(code).decode()}): build it here with "
            "`pip install . -C cmake.define.CMAKE_CUDA_ARCHITECTURES=native`, or use another backend"
        )
    return None


def measure_(
    grads: list[Tensor],
    rows: Tensor,
    segments: int,
    ema: Tensor | None,
    previous: Tensor | None,
    beta: float,
    inv_scale: Tensor | None,
) -> Tensor:
    stats = rows.new_empty((segments, 6), dtype=torch.float64)
    task = native.Pass(grads, rows, segments, stats, ema, previous, beta, inv_scale)
    _prepared("measure_", task, rows, [grads])()
    return stats


def prepare_adamw_(u: Update) -> Callable[[], Tensor]:
    stats = u.rows.new_empty((u.segments if u.sums else 0, 6), dtype=torch.float64)
    task = native.Pass(u.grads, u.rows, u.segments, stats if u.sums else None, u.ema, u.previous, u.beta, u.inv_scale)
    launch = _prepared("adamw_", task, u.rows, [u.grads, u.params, u.exp_avgs, u.exp_avg_sqs], u.lr_tensor)

    def update() -> Tensor:
        count = u.step.contiguous()  # read only now: it may have been incremented since
        task.update(u, count, u.lr)
        launch()
        return stats

    return update


def _prepared(
    op: str, task: native.Pass, rows: Tensor, streams: Sequence[Sequence[Tensor]], lr_tensor: Tensor | None = None
) -> Callable[[], None]:
    """The launch of a pass whose memory is all allocated."""
    library = _load()
    assert not isinstance(library, str)
    with torch.cuda.device_of(rows):
        _place(task, streams, rows.device)
        # Freed while the kernels may still be running: the allocator gives it to later work of this stream.
        partials = rows.new_empty((6, task.chunks), dtype=torch.float32) if task.stats else None
    lr = native.address(lr_tensor)
    double = lr_tensor is not None and lr_tensor.dtype == torch.float64

    def launch() -> None:
        with torch.cuda.device_of(rows):
            code = library.grgauge_cuda_pass(
                ctypes.byref(task),
                None if double else lr,
                lr if double else None,
                native.address(partials),
                rows.device.index,
                torch.cuda.current_stream(rows.device).cuda_stream,
            )
        native.check(library, op, code)

    return launch


def _place(task: native.Pass, streams: Sequence[Sequence[Tensor]], device: torch.device) -> None:
    """Give the pass the addresses of its streams."""
    segments = len(streams[0])
    if segments <= 1:
        places = [stream[0].data_ptr() if stream else None for stream in streams]
    else:
        table = on_device(tuple(chain.from_iterable(map(addresses_of, streams))), device)
        task.table = table  # an attribute, not a field: it must live as long as the task
        places = [table.data_ptr() + table.itemsize * segments * i for i in range(len(streams))]
    task.grads = places[0]
    if len(places) > 1:
        task.params, task.exp_avgs, task.exp_avg_sqs = places[1:]
