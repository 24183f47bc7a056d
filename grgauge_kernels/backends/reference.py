"""The formula, in plain torch: what every other backend must compute. Runs on any device, on every dtype.

Elementwise arithmetic is float32, as in the kernels; sums are float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

LARGEST = 1e16
"""A gradient element beyond this size counts as non-finite: sums of its square would not survive float32."""


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
    stats = torch.zeros(segments if sums else 0, 6, dtype=torch.float64, device=rows.device)

    @torch.no_grad()
    def update() -> Tensor:
        if found_inf is not None and found_inf.item():
            return stats.fill_(torch.nan)
        rate = torch.as_tensor(lr if lr_tensor is None else lr_tensor, dtype=torch.float64, device=rows.device)
        steps = step.double().expand(segments)
        for segment, here, state in _runs(rows):
            grad, param, m, v = (_stream(list_, segment)[here] for list_ in (grads, params, exp_avgs, exp_avg_sqs))
            g = grad.float()
            if inv_scale is not None:
                g = g * inv_scale.float()
            update = -g if maximize else g
            if clip is not None:
                update = update * clip.float()
            m.lerp_(update, 1 - beta1)
            v.mul_(beta2).addcmul_(update, update, value=1 - beta2)
            correction1 = 1 - beta1 ** steps[segment]
            correction2 = 1 - beta2 ** steps[segment]
            denominator = v.sqrt().div_(correction2.sqrt().float()).add_(eps)
            decayed = param.float() * (1 - rate * weight_decay).float()
            param.copy_(decayed - (rate / correction1).float() * m / denominator)
            moment = m if ema is None else _pick(ema, state)
            row = _sums(g, moment, _pick(previous, state), beta, moment_is_exp_avg=ema is None)
            if sums:
                stats[segment] += row
            if zero_grad:
                grad.zero_()
        return stats

    return update


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


def _stream(tensors: list[Tensor], segment: int) -> Tensor:
    """The elements of one segment in memory order; of the one flat buffer if there is just one tensor."""
    t = tensors[segment if len(tensors) > 1 else 0]
    return t.as_strided((t.numel(),), (1,))


def _pick(state: Tensor | None, where: slice) -> Tensor | None:
    return None if state is None else state[where]
