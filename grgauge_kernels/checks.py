"""Checks of what the ops are given: an error names the argument, what it was and what it must be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .bucket import DTYPES, Plan, require_dense
from .stream import Stream

MOMENTS = ("exp_avgs", "exp_avg_sqs")
"""Streams that are float32 or bfloat16, both of one dtype, whatever the gradients and parameters are."""

MOMENT_DTYPES, FLOATS = frozenset((torch.float32, torch.bfloat16)), frozenset(DTYPES)


def checked(plan: Plan, traced: bool, **streams: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """The lists, checked: a tensor for each segment, or the one flat buffer, all as the plan and the kernels need."""
    if traced:  # a tracer cannot follow subclasses of tuple
        _explain_all(plan, streams)
        return [list(tensors) for tensors in streams.values()]
    try:
        taken = [tensors if isinstance(tensors, Stream) else Stream(tensors) for tensors in streams.values()]
    except RuntimeError:  # sparse tensors have no address
        _explain_all(plan, streams)
        raise
    for name, stream in zip(streams, taken, strict=True):
        dtypes = _dtypes_of(name)
        if stream.checked_for == (plan, dtypes):  # a stream that is kept from step to step
            continue
        placed = not stream or (stream[0].dtype in dtypes and stream[0].device == plan.rows.device)
        if placed and stream.in_order and stream.sizes == plan.stream_sizes:
            stream.checked_for = plan, dtypes
        else:  # if it is only not row-major, its strides have to be compared with the gradients' every time
            _explain_all(plan, streams)
    return list(taken)


def _dtypes_of(name: str) -> frozenset[torch.dtype]:
    """What the tensors of that name may have."""
    return MOMENT_DTYPES if name in MOMENTS else FLOATS


def _explain_all(plan: Plan, streams: dict[str, Sequence[Tensor]]) -> None:
    for name, tensors in streams.items():
        _explain(plan, name, tensors)
    _check_layout(streams)


def _explain(plan: Plan, name: str, tensors: Sequence[Tensor]) -> None:
    """Raise an error that names what is wrong with a stream; return if it is only not row-major."""
    bucket = plan.bucket
    if plan.flat:
        if len(tensors) != 1 or tensors[0].numel() < bucket.extent or not tensors[0].is_contiguous():
            raise ValueError(f"{name} must be the one flat buffer of {bucket.extent} elements that the plan is for")
    elif len(tensors) != plan.segments:
        raise ValueError(f"{name} has {len(tensors)} tensors, the plan {plan.segments} segments")
    allowed = _dtypes_of(name)
    for i, t in enumerate(tensors):
        if not plan.flat and t.numel() != bucket.sizes[i]:
            raise ValueError(f"{name}[{i}] has {t.numel()} elements, segment {i} has {bucket.sizes[i]}")
        if t.device != plan.rows.device:
            raise ValueError(f"{name}[{i}] is on {t.device}, the plan on {plan.rows.device}")
    dtypes = {t.dtype for t in tensors}
    if len(dtypes) > 1 or not dtypes.issubset(allowed):
        raise TypeError(f"{name} has dtype {_names(dtypes)}; it must be {_names(allowed)}, the same in all tensors")


def _check_layout(streams: dict[str, Sequence[Tensor]]) -> None:
    """Kernels go through memory in order, so all tensors of a segment must be dense and have the same strides."""
    for name, tensors in streams.items():
        for i, (t, grad) in enumerate(zip(tensors, streams["grads"], strict=True)):
            require_dense(t, f"{name}[{i}]")
            if t.stride() != grad.stride() and not (t.is_contiguous() and grad.is_contiguous()):
                raise ValueError(
                    f"{name}[{i}] has strides {t.stride()}, grads[{i}] {grad.stride()}; they must be equal"
                )


def check_states(plan: Plan, ema: Tensor | None, previous: Tensor | None, beta: float) -> None:
    """The gauges' two states, and the smoothing factor of the first."""
    if not 0.0 < beta < 1.0:
        raise ValueError(f"beta is {beta}; it must lie in (0, 1)")
    for name, state in (("ema", ema), ("previous", previous)):
        if state is None:
            continue
        if state.dtype != torch.float32 or state.shape != (plan.states,) or not state.is_contiguous():
            raise ValueError(
                f"{name} is {state.dtype} {tuple(state.shape)}; it must be contiguous float32 [{plan.states}]"
            )
        if state.device != plan.rows.device:
            raise ValueError(f"{name} is on {state.device}, the plan on {plan.rows.device}")


def check_scalar(name: str, value: Tensor, plan: Plan, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> None:
    """A tensor of one element on the plan's device."""
    if value.dtype not in dtypes or value.numel() != 1 or value.device != plan.rows.device:
        raise ValueError(
            f"{name} is {value.dtype} {tuple(value.shape)} on {value.device}; it must hold one {_names(dtypes)} on "
            f"{plan.rows.device}"
        )


def check_adamw(
    plan: Plan,
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: Tensor | int,
    betas: tuple[float, float],
    seed: int,
    stochastic_rounding: bool,
) -> None:
    """What AdamW alone is given: its numbers, and which dtypes of its streams go together."""
    beta1, beta2 = betas
    if not (0.0 <= beta1 < 1.0 and 0.0 <= beta2 < 1.0):
        raise ValueError(f"betas is {betas}; both must lie in [0, 1)")
    if torch.compiler.is_compiling() or not isinstance(step, Tensor):
        pass  # a tracer has symbols for sizes, and cannot put them into a message
    elif step.dtype != torch.float32 or step.numel() not in (1, plan.segments) or step.device != plan.rows.device:
        raise ValueError(
            f"step is {step.dtype} {tuple(step.shape)} on {step.device}; it must be an int, or float32 [] or "
            f"[{plan.segments}] on {plan.rows.device}"
        )
    moment = exp_avgs[0].dtype
    if exp_avg_sqs[0].dtype != moment:
        raise TypeError(
            f"exp_avg_sqs has dtype {_names([exp_avg_sqs[0].dtype])}; it must be exp_avgs' {_names([moment])}"
        )
    if not (isinstance(seed, int) and 0 <= seed < 2**32):
        raise ValueError(f"seed is {seed!r}; it must be an int in [0, 2**32)")
    if stochastic_rounding and params[0].dtype != torch.bfloat16:
        raise TypeError(
            f"params has dtype {_names([params[0].dtype])}; with stochastic_rounding=True it must be bfloat16"
        )


def _names(dtypes: object) -> str:
    return " or ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))  # type: ignore[attr-defined]
