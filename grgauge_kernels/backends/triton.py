"""The GPU kernels in Triton: one launch for the whole plan, then one or two tiny ones that add up the sums.

Compiled for CUDA and ROCm devices; with TRITON_INTERPRET=1 in the environment the same code runs on CPU tensors.
Both ops can be captured in a CUDA graph after one warm-up call outside the capture with the same tensors: the first
call compiles the kernels and, if tensors are loose, uploads their addresses.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..stream import addresses_of
from . import Update
from .addresses import on_device
from .reference import LARGEST
from .triton_kernels import BROKEN, INTERPRETED, reduce_kernel, tile_kernel, visit_kernel

THREADS = 128
"""Threads per program. One visits one chunk, so several share a multiprocessor and hide each other's loads."""

REGISTERS = 64
"""A thread may have while eight programs share a multiprocessor.

Asked for at eight elements a thread, where sm_100 takes 66 and needs no more than 63. At four the compiler keeps to it
unasked, and asked spills a kernel with every option.
"""

TILE = 256
"""Rows of sums that are added at once."""

TILED = 4096
"""Above this many rows, whole tiles are added up first: one program would take long for all rows of a large segment."""


def unavailable(device: torch.device | None = None) -> str | None:
    """None if the kernels run on `device` (on any device here, if None), else why they do not and what to do."""
    if BROKEN is not None:
        return BROKEN
    if INTERPRETED:
        if device is None or device.type == "cpu":
            return None
        return "TRITON_INTERPRET is set, and Triton's interpreter runs on CPU tensors only: unset it"
    if device is not None and device.type == "cpu":
        return "runs on a GPU, or on the CPU in Triton's interpreter (TRITON_INTERPRET=1)"
    if device is not None and device.type != "cuda":
        return f"runs on CUDA and ROCm devices, not on {device.type}"
    return _gpu_unavailable(device)


@functools.lru_cache
def _gpu_unavailable(device: torch.device | None) -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"needs compute capability 8.0, this device has {capability[0]}.{capability[1]}: use another backend"
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
    return _prepared([grads], rows, segments, ema, previous, beta, inv_scale)()


def prepare_adamw_(u: Update) -> Callable[[], Tensor]:
    streams = [u.grads, u.params, u.exp_avgs, u.exp_avg_sqs]
    return _prepared(streams, u.rows, u.segments, u.ema, u.previous, u.beta, u.inv_scale, u)


def _prepared(
    streams: Sequence[Sequence[Tensor]],
    rows: Tensor,
    segments: int,
    ema: Tensor | None,
    previous: Tensor | None,
    beta: float,
    inv_scale: Tensor | None,
    u: Update | None = None,
) -> Callable[[], Tensor]:
    """The launches of a pass whose memory is all allocated: running out of memory must not leave anything changed."""
    sums = u is None or u.sums
    chunks = rows.shape[0]
    stats = rows.new_empty((segments if sums else 0, 6), dtype=torch.float64)
    partials = rows.new_empty((chunks, 8), dtype=torch.float32) if sums else None
    tiles = _tiles(rows) if sums else None
    device = torch.cuda.device_of(rows) if rows.is_cuda else contextlib.nullcontext()
    with device:
        # Addresses of loose tensors, segment by segment.
        table = (
            on_device(tuple(chain.from_iterable(zip(*map(addresses_of, streams), strict=True))), rows.device)
            if chunks and len(streams[0]) > 1
            else None
        )

    def launch() -> Tensor:
        with device:
            count = None if u is None else u.step.contiguous()  # read only now: it may have been incremented since
            if chunks:
                # One tensor of each list gives the kernel the dtype, which an address does not have.
                bases: list[Tensor | None] = [tensors[0] for tensors in streams]
                elements = _elements(streams, ema, previous)
                visit_kernel[(chunks,)](
                    rows,
                    partials,
                    table,
                    *(bases + [None] * (4 - len(bases))),
                    ema,
                    previous,
                    inv_scale,
                    None if u is None else u.found_inf,
                    None if u is None else u.clip,
                    count,
                    None if u is None else u.lr_tensor,
                    None if u is None else u.origins,
                    *_scalars(u),
                    beta,
                    1 - beta,
                    STEP_PER_SEGMENT=count is not None and count.numel() > 1,
                    ZERO_GRAD=u is not None and u.zero_grad,
                    MAXIMIZE=u is not None and u.maximize,
                    STOCHASTIC_PARAM=u is not None and u.stochastic_rounding,
                    STOCHASTIC_MOMENTS=u is not None and u.bfloat16_moments,
                    LARGEST=LARGEST,
                    LANES=THREADS,
                    BLOCK=THREADS * elements,
                    **_options(rows.device, REGISTERS if elements == 8 else None),
                )
            if partials is not None:
                _reduce(rows, partials, tiles, None if u is None else u.found_inf, stats)
        return stats

    return launch


def _scalars(u: Update | None) -> tuple[float, ...]:
    """AdamW's numbers as `visit_kernel` takes them."""
    if u is None:
        return (0,) + 8 * (0.0,)
    log_beta1, log_beta2 = (math.log(beta) if beta else -math.inf for beta in (u.beta1, u.beta2))
    return u.seed, u.lr, u.weight_decay, log_beta1, log_beta2, 1 - u.beta1, u.beta2, 1 - u.beta2, u.eps


def _elements(streams: Sequence[Sequence[Tensor]], ema: Tensor | None, previous: Tensor | None) -> int:
    """Elements that a thread moves at once: 16 bytes.

    Two-byte streams beside float32 ones get 8 bytes, still 256 in a row for a warp: with 16, Triton sends every float32
    store through shared memory, and needs 64 to 102 registers on sm_90 where it now needs 40.
    """
    sizes = {tensors[0].element_size() for tensors in streams}
    return 8 if sizes == {2} and ema is None and previous is None else 4


def _tiles(rows: Tensor) -> Tensor | None:
    """Memory for the sums of whole tiles, float64 [tiles, 8]; None where there are too few chunks for tiles to pay."""
    return rows.new_empty((len(rows) // TILE, 8), dtype=torch.float64) if len(rows) > TILED else None


def _reduce(rows: Tensor, partials: Tensor, tiles: Tensor | None, found_inf: Tensor | None, stats: Tensor) -> None:
    """Chunks' sums float32 [chunks, 8] -> segments' sums float64 [segments, 6], added in a fixed order."""
    chunks, segments = len(rows), len(stats)
    if not segments:
        return
    options = _options(rows.device)
    if tiles is not None:
        tile_kernel[(len(tiles),)](partials, tiles, TILE=TILE, **options)
    reduce_kernel[(segments,)](rows, partials, tiles, found_inf, stats, chunks, TILE=TILE, **options)


@functools.lru_cache
def _options(device: torch.device, registers: int | None = None) -> dict[str, Any]:
    """Launch options: as many warps as make THREADS on this device, and a * b + c in one instruction.

    registers   that a thread may have; left to the compiler on AMD's devices, where it would spill
    """
    if INTERPRETED:
        return {}
    from triton.runtime import driver

    target = driver.active.get_current_target()
    options = {"num_warps": THREADS // target.warp_size, "enable_fp_fusion": True}
    return options | ({"maxnreg": registers} if registers and target.backend == "cuda" else {})
