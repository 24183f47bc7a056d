"""The Triton kernels: one visits a chunk, two add up sums. Without Triton they are functions that nobody calls."""

# A kernel's arguments belong to Triton's compiler, which reads tl.float64 where mypy wants a type.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="valid-type"

from __future__ import annotations

from typing import Any

from . import reference

try:
    import triton
    import triton.language as tl

    BROKEN: str | None = None
    """Why Triton cannot be imported; None if it can."""
except ModuleNotFoundError:
    triton = None  # type: ignore[assignment]
    BROKEN = "triton is not installed: pip install triton"
except Exception as error:  # a broken installation raises anything; the other backends must still work
    triton = None  # type: ignore[assignment]
    BROKEN = f"triton cannot be imported ({error}): reinstall it with pip install --force-reinstall triton"

INTERPRETED = triton is not None and triton.knobs.runtime.interpret
"""Triton reads the environment when a kernel is defined: changes after this import have no effect."""

FACTOR1, FACTOR2, GOLDEN = (
    (None, None, None) if triton is None else map(tl.constexpr, (*reference.FACTORS, reference.GOLDEN))
)


def _jit(**options: Any) -> Any:
    """triton.jit; the function itself where triton is missing."""
    return (lambda function: function) if triton is None else triton.jit(**options)


# Singular: Triton's launcher has a variable of its own called `params`, which an argument of that name would lose to.
_POINTERS = [
    "rows", "partials", "table", "grad", "param", "exp_avg", "exp_avg_sq", "ema", "previous",
    "inv_scale", "found_inf", "clip", "step", "lr_tensor", "origins",
]  # fmt: skip


# Alignment is checked chunk by chunk, so kernels specialised on the alignment of their arguments would gain nothing.
@_jit(do_not_specialize_on_alignment=_POINTERS)
def visit_kernel(
    rows,
    partials,
    table,
    grad,
    param,
    exp_avg,
    exp_avg_sq,
    ema,
    previous,
    inv_scale,
    found_inf,
    clip,
    step,
    lr_tensor,
    origins,
    seed: tl.uint32,
    lr: tl.float64,
    weight_decay: tl.float64,
    log_beta1: tl.float64,
    log_beta2: tl.float64,
    one_minus_beta1: tl.float32,
    beta2: tl.float32,
    one_minus_beta2: tl.float32,
    eps: tl.float32,
    beta: tl.float32,
    one_minus_beta: tl.float32,
    STEP_PER_SEGMENT: tl.constexpr,
    ZERO_GRAD: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    STOCHASTIC_PARAM: tl.constexpr,
    STOCHASTIC_MOMENTS: tl.constexpr,
    LARGEST: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Visit one chunk: blocks of BLOCK elements if everything in it is aligned, then LANES elements at a time.

    rows     [chunks, 4] as in Plan
    partials float32 [chunks, 8], the six sums of the chunk and two zeros; None: no sums
    table    addresses [segments, streams] of loose tensors; None: offsets count from grad, param, ...
    param    None: measure only
    origins  where segments begin in flat streams; None: offsets count from segments
    """
    chunk = tl.program_id(0).to(tl.int64)
    segment = tl.load(rows + 4 * chunk)
    offset = tl.load(rows + 4 * chunk + 1)
    length = tl.load(rows + 4 * chunk + 2).to(tl.int32)
    state = tl.load(rows + 4 * chunk + 3)
    if found_inf is not None:
        length = tl.where(tl.load(found_inf) != 0, 0, length)
    if inv_scale is not None:
        inv_scale = tl.load(inv_scale)
    if clip is not None:
        clip = tl.load(clip)

    STREAMS: tl.constexpr = 1 if param is None else 4  # type: ignore[assignment]
    grad = _element(grad, table, segment * STREAMS, offset)
    addresses = grad.to(tl.int64)
    decay = None
    rate = None
    root = None
    first = None
    second = None
    if STOCHASTIC_PARAM or STOCHASTIC_MOMENTS:
        count = tl.load(step + segment if STEP_PER_SEGMENT else step).to(tl.uint32)
        first = _mix(_mix(_mix(tl.cast(seed, tl.uint32)) ^ count) ^ segment.to(tl.uint32))
        second = _mix(first ^ GOLDEN)
        place = offset if origins is None else offset - tl.load(origins + segment)
        first += place.to(tl.uint32)  # offsets of the chunk's first element
    if param is not None:
        param = _element(param, table, segment * STREAMS + 1, offset)
        exp_avg = _element(exp_avg, table, segment * STREAMS + 2, offset)
        exp_avg_sq = _element(exp_avg_sq, table, segment * STREAMS + 3, offset)
        addresses |= param.to(tl.int64) | exp_avg.to(tl.int64) | exp_avg_sq.to(tl.int64)
        # float64: 1 - 0.999 is off by 5e-5 in float32.
        t = tl.load(step + segment if STEP_PER_SEGMENT else step).to(tl.float64)
        if lr_tensor is not None:
            lr = tl.load(lr_tensor).to(tl.float64)
        decay = tl.cast(1 - lr * weight_decay, tl.float32)  # type: ignore[operator]
        rate = (lr / (1 - tl.exp(t * log_beta1))).to(tl.float32)
        root = (1 / tl.sqrt(1 - tl.exp(t * log_beta2))).to(tl.float32)
    if ema is not None:
        ema = _element(ema, None, 0, state)
        addresses |= ema.to(tl.int64)
    if previous is not None:
        previous = _element(previous, None, 0, state)
        addresses |= previous.to(tl.int64)

    # One accumulator a thread and sum, carried from block to block: the tree over threads is walked once a chunk.
    zero = tl.zeros((LANES,), tl.float32)
    whole = tl.where(addresses % 16 == 0, length - length % BLOCK, 0)
    grad_sq, ema_sq, grad_abs, delta_sq, delta_abs, nonfinite = _visit(
        0, whole, zero, zero, zero, zero, zero, zero,
        grad, param, exp_avg, exp_avg_sq, ema, previous, inv_scale, clip, decay, rate, root, first, second,
        one_minus_beta1, beta2, one_minus_beta2, eps, beta, one_minus_beta,
        ZERO_GRAD, MAXIMIZE, STOCHASTIC_PARAM, STOCHASTIC_MOMENTS, LARGEST, partials is not None, LANES, BLOCK, True,
    )  # fmt: skip
    grad_sq, ema_sq, grad_abs, delta_sq, delta_abs, nonfinite = _visit(
        whole, length, grad_sq, ema_sq, grad_abs, delta_sq, delta_abs, nonfinite,
        grad, param, exp_avg, exp_avg_sq, ema, previous, inv_scale, clip, decay, rate, root, first, second,
        one_minus_beta1, beta2, one_minus_beta2, eps, beta, one_minus_beta,
        ZERO_GRAD, MAXIMIZE, STOCHASTIC_PARAM, STOCHASTIC_MOMENTS, LARGEST, partials is not None, LANES, LANES, False,
    )  # fmt: skip
    if partials is not None:
        # Each join adds an axis of two after the others, so the first one separates columns 0-3 from 4-7.
        even = tl.join(tl.join(grad_sq, delta_abs), tl.join(grad_abs, zero))
        odd = tl.join(tl.join(ema_sq, nonfinite), tl.join(delta_sq, zero))
        sums = tl.reshape(tl.sum(tl.join(even, odd), axis=0), (8,))
        tl.store(partials + 8 * chunk + tl.arange(0, 8), sums)


@_jit()
def _visit(
    begin,
    end,
    grad_sq,
    ema_sq,
    grad_abs,
    delta_sq,
    delta_abs,
    nonfinite,
    grad,
    param,
    exp_avg,
    exp_avg_sq,
    ema,
    previous,
    inv_scale,
    clip,
    decay,
    rate,
    root,
    first,
    second,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    beta,
    one_minus_beta,
    ZERO_GRAD: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    STOCHASTIC_PARAM: tl.constexpr,
    STOCHASTIC_MOMENTS: tl.constexpr,
    LARGEST: tl.constexpr,
    SUMS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The formula, over elements [begin, end) of a chunk; returns the accumulators.

    Aligned: unmasked 16-byte accesses, and end - begin is a multiple of BLOCK. Else masked, element by element.

    To save registers, a sum is added as soon as its element is known, and a state is stored before the next is loaded.
    """
    for start in range(begin, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        mask = None if ALIGNED else i < end

        grad_at = _at(grad, i, ALIGNED)
        g = _load(grad_at, mask)
        if inv_scale is not None:
            g = g * inv_scale
        finite = tl.abs(g) <= LARGEST
        if SUMS:
            counted = tl.where(finite, g, 0.0)
            grad_sq += _lanes(counted * counted, LANES)
            grad_abs += _lanes(tl.abs(counted), LANES)
            nonfinite += _lanes(tl.where(finite, 0.0, 1.0), LANES)

        if ema is not None:
            ema_at = _at(ema, i, ALIGNED)
            m = _load(ema_at, mask)
            m = tl.where(finite, beta * m + one_minus_beta * g, m)
            tl.store(ema_at, m, mask=mask)
            if SUMS:
                ema_sq += _lanes(_square(m, LARGEST), LANES)

        if previous is not None:
            previous_at = _at(previous, i, ALIGNED)
            before = _load(previous_at, mask)
            delta = tl.where(finite, g - before, 0.0)
            tl.store(previous_at, tl.where(finite, g, before), mask=mask)
            if SUMS:
                delta_sq += _lanes(delta * delta, LANES)
                delta_abs += _lanes(tl.abs(delta), LANES)

        if param is not None:
            param_at = _at(param, i, ALIGNED)
            exp_avg_at = _at(exp_avg, i, ALIGNED)
            exp_avg_sq_at = _at(exp_avg_sq, i, ALIGNED)
            p = _load(param_at, mask)
            m = _load(exp_avg_at, mask)
            v = _load(exp_avg_sq_at, mask)
            update = -g if MAXIMIZE else g
            if clip is not None:
                update = update * clip
            m = m + (update - m) * one_minus_beta1
            v = v * beta2 + update * update * one_minus_beta2
            # Square root and quotient are the fast ones, within 2 ulp: the exact ones cost 18 registers on sm_90.
            p = p * decay - rate * m / (tl.sqrt(v) * root + eps)
            if STOCHASTIC_PARAM or STOCHASTIC_MOMENTS:
                random = _random(i, first, second)
                _store(param_at, p, random * GOLDEN >> 16, STOCHASTIC_PARAM, mask)
                _store(exp_avg_at, m, random >> 16, STOCHASTIC_MOMENTS, mask)
                _store(exp_avg_sq_at, v, random & 0xFFFF, STOCHASTIC_MOMENTS, mask)
            else:
                tl.store(param_at, p, mask=mask)
                tl.store(exp_avg_at, m, mask=mask)
                tl.store(exp_avg_sq_at, v, mask=mask)
            if ZERO_GRAD:
                tl.store(grad_at, tl.zeros_like(g), mask=mask)
            if SUMS and ema is None:
                ema_sq += _lanes(_square(m, LARGEST), LANES)
    return grad_sq, ema_sq, grad_abs, delta_sq, delta_abs, nonfinite


@_jit()
def _element(base, table, place, offset):
    """Pointer to the element `offset` of the tensor whose address stands at `place`, or of the flat `base`.

    Made from an integer in either case: on ROCm, Triton splits pointer arguments and loses the hint of `_at`.
    """
    address = base.to(tl.int64) if table is None else tl.load(table + place)
    return (address + offset * (base.dtype.element_ty.primitive_bitwidth // 8)).to(base.dtype)


@_jit()
def _at(pointer, i, ALIGNED: tl.constexpr):
    """Pointers to a block. The hint is for this block only: elsewhere the same pointer may be misaligned."""
    pointers = pointer + i
    return tl.multiple_of(pointers, 16) if ALIGNED else pointers


@_jit()
def _load(pointers, mask):
    # Zero adds nothing to any sum, so masked elements need no other handling.
    x = tl.load(pointers) if mask is None else tl.load(pointers, mask=mask, other=0.0)
    return x.to(tl.float32)


@_jit()
def _mix(x):
    """One 32-bit word from another, as `reference` does it."""
    x = (x ^ (x >> 16)) * FACTOR1
    x = (x ^ (x >> 15)) * FACTOR2
    return x ^ (x >> 16)


@_jit()
def _random(i, first, second):
    """32 random bits for each element of a chunk: `reference.random_bits` before they are split."""
    x = first + i.to(tl.uint32)
    x = (x ^ (x >> 16)) * FACTOR1
    x = (x ^ (x >> 15) ^ second) * FACTOR2
    return x ^ (x >> 16)


@_jit()
def _store(pointers, x, random, STOCHASTIC: tl.constexpr, mask):
    """Store x as one of its two neighbours in bfloat16, chosen by 16 random bits; see `reference.rounded`."""
    if STOCHASTIC:
        bits = x.to(tl.uint32, bitcast=True)
        bits += tl.where((bits & 0x7FFFFFFF) <= 0x7F7F0000, random, 0)
        x = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    tl.store(pointers, x, mask=mask)


@_jit()
def _square(m, LARGEST: tl.constexpr):
    m = tl.where(tl.abs(m) <= LARGEST, m, 0.0)
    return m * m


@_jit()
def _lanes(x, LANES: tl.constexpr):
    """Add the neighbours that one thread holds: [BLOCK] -> [LANES]."""
    return x if x.shape[0] == LANES else tl.sum(tl.reshape(x, (LANES, x.shape[0] // LANES)), axis=1)


@_jit()
def tile_kernel(partials, tiles, TILE: tl.constexpr):
    """Add up one tile of chunks, whatever segments they belong to: float64 [chunks // TILE, 8]."""
    tile = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, 8)
    total = _add(tl.zeros((TILE, 8), tl.float64), partials, tile * TILE, tile * TILE + TILE, TILE)
    tl.store(tiles + tile * 8 + column, tl.sum(total, axis=0))


@_jit(do_not_specialize=["chunks"])
def reduce_kernel(rows, partials, tiles, found_inf, stats, chunks, TILE: tl.constexpr):
    """Add up the chunks of one segment, in an order that depends on the plan only; 0 for a segment without chunks.

    tiles   what `tile_kernel` wrote; the tiles inside the segment are taken from it. None: chunk by chunk
    """
    segment = tl.program_id(0).to(tl.int64)
    first = _first_chunk(rows, chunks, segment)
    last = _first_chunk(rows, chunks, segment + 1)
    total = tl.zeros((TILE, 8), tl.float64)
    if tiles is not None:
        inner_first = tl.minimum((first + TILE - 1) // TILE * TILE, last)
        inner_last = tl.maximum(last // TILE * TILE, inner_first)
        total = _add(total, partials, first, inner_first, TILE)
        total = _add(total, tiles, inner_first // TILE, inner_last // TILE, TILE)
        total = _add(total, partials, inner_last, last, TILE)
    else:
        total = _add(total, partials, first, last, TILE)
    sums = tl.sum(total, axis=0)
    if found_inf is not None:
        sums = tl.where(tl.load(found_inf) != 0, float("nan"), sums)
    column = tl.arange(0, 8)
    tl.store(stats + segment * 6 + column, sums, mask=column < 6)


@_jit()
def _add(total, source, begin, end, TILE: tl.constexpr):
    """Add rows [begin, end) of `source` [:, 8] to `total` [TILE, 8]."""
    column = tl.arange(0, 8)[None, :]
    for start in range(begin, end, TILE):
        row = start + tl.arange(0, TILE)[:, None]
        total += tl.load(source + row * 8 + column, mask=row < end, other=0.0).to(tl.float64)
    return total


@_jit()
def _first_chunk(rows, chunks, segment):
    """Number of chunks before `segment`, by bisection: rows are in order of their segments."""
    low = tl.full((), 0, tl.int64)
    high = tl.cast(chunks, tl.int64)
    while low < high:
        middle = (low + high) // 2
        before = tl.load(rows + 4 * middle) < segment
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    return low
