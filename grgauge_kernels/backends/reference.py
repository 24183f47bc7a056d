"""The formula, in plain torch: what every other backend must compute. Runs on any device, on every dtype.

Elementwise arithmetic is float32, as in the kernels; sums are float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from . import Update

LARGEST = 1e16
"""A gradient element beyond this size counts as non-finite: sums of its square would not survive float32."""

LARGEST_BFLOAT16 = torch.finfo(torch.bfloat16).max


def unavailable(device: torch.device | None = None) -> str | None:
    """None: the reference always runs."""
    return None


@torch.no_grad()
def measure_(
    grads: list[Tensor],
    rows: Tensor,
    segments: int,
    ema: Tensor | None,
    previous: Tensor | None,
    beta: float,
    inv_scale: Tensor | None,
) -> Tensor:
    stats = torch.zeros(segments, 6, dtype=torch.float64, device=rows.device)
    for segment, here, state in _runs(rows):
        g = _stream(grads, segment)[here].float()
        if inv_scale is not None:
            g = g * inv_scale.float()
        stats[segment] += _sums(g, _pick(ema, state), _pick(previous, state), beta)
    return stats


def prepare_adamw_(u: Update) -> Callable[[], Tensor]:
    stats = torch.zeros(u.segments if u.sums else 0, 6, dtype=torch.float64, device=u.rows.device)

    @torch.no_grad()
    def update() -> Tensor:
        if u.found_inf is not None and u.found_inf.item():
            return stats.fill_(torch.nan)
        rate = torch.as_tensor(u.lr if u.lr_tensor is None else u.lr_tensor, dtype=torch.float64, device=u.rows.device)
        steps = u.step.double().expand(u.segments)
        for segment, here, state in _runs(u.rows):
            streams = (u.grads, u.params, u.exp_avgs, u.exp_avg_sqs)
            grad, param, exp_avg, exp_avg_sq = (_stream(tensors, segment)[here] for tensors in streams)
            g = grad.float()
            if u.inv_scale is not None:
                g = g * u.inv_scale.float()
            update = -g if u.maximize else g
            if u.clip is not None:
                update = update * u.clip.float()
            m = exp_avg.float().lerp(update, 1 - u.beta1)
            v = exp_avg_sq.float().mul(u.beta2).addcmul_(update, update, value=1 - u.beta2)
            correction1 = 1 - u.beta1 ** steps[segment]
            correction2 = 1 - u.beta2 ** steps[segment]
            denominator = v.sqrt().div_(correction2.sqrt().float()).add_(u.eps)
            decayed = param.float() * (1 - rate * u.weight_decay).float()
            new = decayed - (rate / correction1).float() * m / denominator
            if u.bfloat16_moments or u.stochastic_rounding:
                begin = here.start - (0 if u.origins is None else int(u.origins[segment]))
                index = torch.arange(begin, begin + len(g), device=g.device)
                of_param, of_m, of_v = random_bits(u.seed, int(steps[segment]), segment, index)
            param.copy_(rounded(new, of_param) if u.stochastic_rounding else new)
            exp_avg.copy_(rounded(m, of_m) if u.bfloat16_moments else m)
            exp_avg_sq.copy_(rounded(v, of_v) if u.bfloat16_moments else v)
            moment = m if u.ema is None else _pick(u.ema, state)
            row = _sums(g, moment, _pick(u.previous, state), u.beta, moment_is_exp_avg=u.ema is None)
            if u.sums:
                stats[segment] += row
            if u.zero_grad:
                grad.zero_()
        return stats

    return update


def rounded(x: Tensor, random: Tensor) -> Tensor:
    """float32 -> bfloat16, to the neighbour away from zero with probability (distance from the other) / (their gap).

    random   int64, 16 random bits for each element, added to the bits that bfloat16 drops: the carry decides

    Right on average, also for subnormals. NaN and infinities stay as they are. A number between the largest bfloat16
    and infinity has no two neighbours to average: it becomes the largest bfloat16, so no finite number turns infinite.
    """
    bits = x.view(torch.int32) + torch.where(x.abs() <= LARGEST_BFLOAT16, random, 0).int()
    return torch.where(x.isnan(), torch.nan, (bits >> 16).short().view(torch.bfloat16))


def random_bits(seed: int, step: int, segment: int, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The 16 bits that round an element's parameter and its two moments: int64, a tensor each, shaped like index.

    index   int64, the element's place in its segment; all arithmetic here is modulo 2^32

    A hash of two rounds, each with a key of its own. With one key, the bits of one step would be those of another step
    in another order.
    """
    first = _mix(_mix(_mix(seed) ^ step) ^ segment)
    second = _mix(first ^ GOLDEN)
    x = (index + first) & _WORD
    x = x ^ (x >> 16)
    x = (x * FACTORS[0]) & _WORD
    x = x ^ (x >> 15) ^ second
    x = (x * FACTORS[1]) & _WORD
    x = x ^ (x >> 16)
    return ((x * GOLDEN) & _WORD) >> 16, x >> 16, x & 0xFFFF


_WORD = 0xFFFFFFFF
GOLDEN = 0x9E3779B1  # the prime next to 2^32 over the golden ratio
FACTORS = (0x7FEB352D, 0x846CA68B)  # found by search for little bias ("lowbias32")


def _mix(x: int) -> int:
    """One 32-bit word from another, each bit of it depending on all of the other's."""
    x &= _WORD
    x ^= x >> 16
    x = (x * FACTORS[0]) & _WORD
    x ^= x >> 15
    x = (x * FACTORS[1]) & _WORD
    return x ^ (x >> 16)


def _sums(g: Tensor, m: Tensor | None, previous: Tensor | None, beta: float, moment_is_exp_avg: bool = False) -> Tensor:
    """Update `m` and `previous` in place; the six sums over g float32 [n] -> float64 [6].

    m         float32 [n], m <- beta m + (1 - beta) g, left alone if it is the optimizer's own first moment
    previous  float32 [n], delta = g - previous; previous <- g
    """
    finite = g.abs() <= LARGEST
    zero = g.new_zeros(())
    delta = zero
    if m is not None and not moment_is_exp_avg:
        m.copy_(torch.where(finite, beta * m + (1 - beta) * g, m))
    if previous is not None:
        delta = torch.where(finite, g - previous, zero)
        previous.copy_(torch.where(finite, g, previous))
    moment = zero if m is None else torch.where(m.abs() <= LARGEST, m, zero)
    g, moment, delta = torch.where(finite, g, zero).double(), moment.double(), delta.double()
    return torch.stack(
        [
            g.square().sum(),
            moment.square().sum(),
            g.abs().sum(),
            delta.square().sum(),
            delta.abs().sum(),
            (~finite).sum().double(),
        ]
    )


def _runs(rows: Tensor) -> Iterator[tuple[int, slice, slice]]:
    """Chunks that follow each other without a gap, joined: (segment, slice of the segment, slice of the states)."""
    begin: tuple[int, int, int] | None = None
    end = 0
    for segment, offset, length, state in rows.tolist():
        if begin is not None and (segment, offset) == (begin[0], end):
            end += length
            continue
        if begin is not None:
            yield begin[0], slice(begin[1], end), slice(begin[2], begin[2] + end - begin[1])
        begin, end = (segment, offset, state), offset + length
    if begin is not None:
        yield begin[0], slice(begin[1], end), slice(begin[2], begin[2] + end - begin[1])


def _stream(tensors: Sequence[Tensor], segment: int) -> Tensor:
    """The elements of one segment in memory order; of the one flat buffer if there is just one tensor."""
    t = tensors[segment if len(tensors) > 1 else 0]
    return t.as_strided((t.numel(),), (1,))


def _pick(state: Tensor | None, where: slice) -> Tensor | None:
    return None if state is None else state[where]
