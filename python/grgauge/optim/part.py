"""The parameters of one optimizer group that one kernel call updates: their gradients, moments and step counts."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import grgauge_kernels as gk
from grgauge_kernels.flat import FlatBucket
from grgauge_kernels.ops import prepare_adamw_


@dataclass
class BucketSums:
    """What one step's kernel call saw of one bucket.

    params  the parameters
    plan    the chunks visited
    stats   float64 [segments of the plan, 6], the columns named by grgauge_kernels.STATS; NaN if the step was skipped
    steps   float32 [parameters], number of updates each parameter has had; changes in place with the next step
    """

    params: list[Tensor]
    plan: gk.Plan
    stats: Tensor
    steps: Tensor


@dataclass
class Unclipped:
    """EMAs of gradients as they are before clipping, m <- beta m + (1 - beta) g.

    state  parameter -> (its EMA, float32 [elements that this rank holds]; number of updates it has had, float32 [])
    """

    beta: float
    state: dict[Tensor, tuple[Tensor, Tensor]]


ALIGN = 8
"""Elements: 32 bytes of a gauge's own states."""

Gradients = Sequence[Tensor]
"""Of one part, as its kernel call is given them. Nobody keeps them beyond the step: set to None, they are gone."""


class Part:
    """The parameters of one group that share a device and a dtype: one kernel call a step.

    flat is None for loose tensors. `collect` must come before each step.
    """

    def __init__(self, group: dict[str, Any], params: list[Tensor], state: dict[Tensor, Any], flat: bool) -> None:
        self.group = group
        self.params = params
        self.sharded = any(map(is_sharded, params))
        self.own = [local(p) for p in params]
        first = self.own[0]
        self.dtype, self.device = first.dtype, first.device
        self.flat = FlatBucket(params) if flat else None
        self.bucket = self.flat.bucket if self.flat is not None else gk.Bucket(self.own)
        self.plans: dict[tuple[int, ...], tuple[gk.Plan, Tensor]] = {}
        self.rows = self.bucket.plan_rows(align=ALIGN)
        self.emas: tuple[Unclipped, Tensor, Tensor] | None = None

        saved = [state.get(p) or {"step": 0.0} for p in params]
        self.steps = torch.tensor([float(s["step"]) for s in saved], device=first.device)
        self.param_stream = self._stream(self.own, None if self.flat is None else self.flat.param)
        self.exp_avgs, first_moments = self._moments([s.get("exp_avg") for s in saved])
        self.exp_avg_sqs, second_moments = self._moments([s.get("exp_avg_sq") for s in saved])
        for i, p in enumerate(params):
            state[p] = {"step": self.steps[i], "exp_avg": first_moments[i], "exp_avg_sq": second_moments[i]}

    @staticmethod
    def _stream(loose: list[Tensor], flat: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(loose) if flat is None else (flat,)

    def _moments(self, saved: list[Tensor | None]) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """float32 moments holding what was saved: the stream for the kernel, and a tensor for each parameter."""
        if self.flat is None:
            flat = None
            tensors = [torch.zeros_like(p, dtype=torch.float32, requires_grad=False) for p in self.params]
        else:
            flat = torch.zeros_like(self.flat.param, dtype=torch.float32)
            tensors = self.flat.views(flat)
        for tensor, old in zip(tensors, saved, strict=True):
            if old is not None:
                tensor.copy_(old)
        return self._stream([local(t) for t in tensors], flat), tensors

    def collect(self) -> Gradients | None:
        """This step's gradients. None if the parameters have changed dtype or device: then build anew.

        Raises RuntimeError for a sparse gradient.
        """
        if self.flat is not None:
            if not self.flat.intact():
                if not self.flat.movable():
                    return None
                _say_taken_back(*self.flat.attach())
            grads: list[Any] = [self.flat.grad]
            missing = self.flat.missing
        else:
            if self.sharded and any(
                local(p).data_ptr() != o.data_ptr() for p, o in zip(self.params, self.own, strict=True)
            ):
                return None
            grads = list(map(_grad_of, self.params))
            missing = tuple([i for i, grad in enumerate(grads) if grad is None])
            if self.sharded:
                grads = [None if grad is None else local(grad) for grad in grads]
            for i in missing:
                grads[i] = self.own[i]  # a stand-in of the right size, which the plan never visits
            if {*map(_dtype_of, grads)} != {self.dtype} or {*map(_device_of, grads)} != {self.device}:
                return None
            if {*map(_layout_of, grads)} != {torch.strided}:
                raise RuntimeError("AdamW does not support sparse gradients; consider torch.optim.SparseAdam")
            if not all(map(Tensor.is_contiguous, grads)) or not all(map(Tensor.is_contiguous, self.own)):
                grads = [_laid_out_like(p, g) for p, g in zip(self.own, grads, strict=True)]
        if missing not in self.plans:
            # Whatever is missing, the others keep their places in a state.
            plan = gk.Plan(self.bucket, self.rows[~np.isin(self.rows[:, 0], missing)])
            present = torch.tensor([float(i not in missing) for i in range(len(self.params))])
            self.plans = {missing: (plan, present.to(self.steps.device))}
        self.plan, self.present = self.plans[missing]
        self.missing = missing
        return grads

    def traced_grads(self) -> Gradients:
        """What `collect` returned, in a compiled graph: the gradients of the day."""
        grads = [p.grad for p in self.params]
        # Always true; it is here for the compiler, which sees that the plan rests on it and guards it.
        assert self.missing == tuple([i for i, grad in enumerate(grads) if grad is None])
        return [p if grad is None else _laid_out_like(p, grad) for p, grad in zip(self.own, grads, strict=True)]

    def measure(self, grads: Gradients, inv_scale: Tensor | None, backend: str | None) -> Tensor:
        return gk.measure_(grads, self.plan, inv_scale=_on(self.steps.device, inv_scale), backend=backend)

    def average(
        self,
        unclipped: Unclipped,
        grads: Gradients,
        inv_scale: Tensor | None,
        found_inf: Tensor | None,
        backend: str | None,
    ) -> tuple[Tensor, BucketSums]:
        """As `measure`, and in the same pass the EMAs: their sums, which are NaN if the step is to be skipped."""
        ema, steps = self._states_of(unclipped)
        ema = ema[: self.plan.states]
        stats, told = averaged(
            grads, self.plan, ema, unclipped.beta, steps, self.present, inv_scale, found_inf, backend
        )
        return stats, BucketSums(self.params, self.plan, told, steps)

    def _states_of(self, unclipped: Unclipped) -> tuple[Tensor, Tensor]:
        """The EMA of all parameters, laid out as the plan is, and their numbers of updates; the state views both."""
        if self.emas is None or self.emas[0] is not unclipped:
            # Of a tensor without elements there are no rows.
            begin = {segment: int(place) for segment, place in reversed(self.rows[:, [0, 3]].tolist())}
            ema = torch.zeros(int((self.rows[:, 2] + self.rows[:, 3]).max(initial=0)), device=self.steps.device)
            steps = torch.zeros_like(self.steps)
            for i, p in enumerate(self.params):
                place = begin.get(i, 0)
                own = ema[place : place + self.own[i].numel()], steps[i]
                for new, old in zip(own, unclipped.state.get(p, ()), strict=False):
                    new.copy_(old)
                unclipped.state[p] = own
            self.emas = unclipped, ema, steps
        return self.emas[1:]

    def prepare(
        self,
        grads: Gradients,
        inv_scale: Tensor | None,
        found_inf: Tensor | None,
        clip: Tensor | None,
        sums: bool,
        backend: str | None,
    ) -> tuple[Tensor, Callable[[], Tensor]]:
        """All of an update but what changes something: the arguments of `step`."""
        group, device = self.group, self.steps.device
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.device != device:
            lr = float(lr)
        inv_scale, found_inf = _on(device, inv_scale), _on(device, found_inf)
        counted = self.present if found_inf is None else self.present * (1 - found_inf)
        update = prepare_adamw_(
            self.param_stream,
            grads,
            self.exp_avgs,
            self.exp_avg_sqs,
            self.plan,
            step=self.steps,
            lr=lr,
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            inv_scale=inv_scale,
            found_inf=found_inf,
            clip=_on(device, clip),
            maximize=group["maximize"],
            sums=sums,
            backend=backend,
        )
        return counted, update

    def step(self, counted: Tensor, update: Callable[[], Tensor]) -> BucketSums:
        self.steps.add_(counted)
        try:
            stats = update()
        except BaseException:
            self.steps.sub_(counted)  # no update was made, so none may be counted
            raise
        if self.flat is not None:
            # The op has told autograd that the buffer changed; the parameters count their versions for themselves.
            torch.autograd.graph.increment_version(self.params)
        return BucketSums(self.params, self.plan, stats, self.steps)


def averaged(
    grads: Gradients,
    plan: gk.Plan,
    ema: Tensor,
    beta: float,
    steps: Tensor,
    present: Tensor | int,
    inv_scale: Tensor | None,
    found_inf: Tensor | None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One update of an EMA: the sums as measured, and as they are told, which is NaN where `found_inf` skips the step.

    steps    numbers of updates, to which `present` is added
    """
    inv_scale, found_inf = _on(steps.device, inv_scale), _on(steps.device, found_inf)
    if found_inf is None:
        stats = gk.measure_(grads, plan, ema=ema, beta=beta, inv_scale=inv_scale, backend=backend)
        steps.add_(present)
        return stats, stats
    skip = found_inf != 0
    # NaN makes every element non-finite, which leaves the EMA as it is, without asking the device.
    own = torch.ones((), device=steps.device) if inv_scale is None else inv_scale
    scale = torch.where(skip, torch.nan, own)
    stats = gk.measure_(grads, plan, ema=ema, beta=beta, inv_scale=scale, backend=backend)
    steps.add_(present * ~skip)
    return stats, torch.where(skip, torch.nan, stats)


def is_sharded(t: Tensor) -> bool:
    """True for a DTensor, as FSDP2 makes of parameters: what it holds here is part of it."""
    return hasattr(t, "to_local")


def local(t: Tensor) -> Tensor:
    """The part of a sharded tensor that this rank holds; any other tensor is its own."""
    if not is_sharded(t):
        return t
    with torch.no_grad():  # else a copy's worth of autograd comes along
        return t.to_local()  # type: ignore[attr-defined]


_grad_of, _dtype_of, _device_of, _layout_of = map(operator.attrgetter, ("grad", "dtype", "device", "layout"))


def _laid_out_like(p: Tensor, grad: Tensor) -> Tensor:
    """The gradient in the memory order of its parameter; a copy only where autograd chose another."""
    if grad.stride() == p.stride() or (grad.is_contiguous() and p.is_contiguous()):
        return grad
    return torch.empty_like(p, requires_grad=False).copy_(grad.detach())


def _on(device: torch.device, value: Tensor | None) -> Tensor | None:
    return value if value is None or value.device == device else value.to(device, non_blocking=True)


def _say_taken_back(values: int, grads: int) -> None:
    if values:
        warnings.warn(
            f"{values} parameters had been given memory outside the flat buffer (p.data = ..., model.to(...)); "
            "their values were copied back in",
            stacklevel=4,
        )
    if grads:
        warnings.warn(
            f"{grads} gradients had left the flat buffer (model.zero_grad() sets them to None); they were copied back "
            "in. Call optimizer.zero_grad() instead and no copy is needed",
            stacklevel=4,
        )
