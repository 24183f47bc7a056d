"""The parameters of one optimizer group that one kernel call updates: their gradients, moments and step counts.

The optimizer's `param_groups` and `state` are the truth. A bucket is a cache of them: as soon as `fits` is False, it is
made again.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import grgauge_kernels as gk

from .._torch_compat import local_shape_and_offset


@dataclass
class BucketSums:
    """What the kernel call of one step has measured in one bucket.

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
    """EMAs of gradients before clipping, m <- beta m + (1 - beta) g.

    state  parameter -> (its EMA, float32 [elements that this rank holds]; number of updates it has had, float32 [])
    """

    beta: float
    state: dict[Tensor, tuple[Tensor, Tensor]]


class StatesAs(NamedTuple):
    """How an optimizer stores the states of its parameters.

    dtype   of both moments, float32 or bfloat16, which is rounded stochastically
    flat    new moments are views of one flat buffer each
    stochastic_rounding  bfloat16 parameters are rounded stochastically, too
    """

    dtype: torch.dtype
    flat: bool
    stochastic_rounding: bool


ALIGN = 8
"""In elements: in a gauge's own states every segment begins at a multiple of it, 32 bytes."""

SHIFTS = {"exp_avg": 256, "exp_avg_sq": 512}
"""In elements: how far flat moments are shifted against flat gradients and each other. Saves 9 % of a step at 1 M."""

PLANS = 16
"""Plans kept, one for each set of parameters without a gradient: experts and heads take turns."""

Gradients = Sequence[Tensor]
"""The gradients of one bucket, as its kernel call takes them. They are not retained after the step."""

_of = {name: operator.itemgetter(name) for name in ("step", "exp_avg", "exp_avg_sq")}


def same(these: Collection[Any], those: Collection[Any]) -> bool:
    """True if both hold the same objects in the same order."""
    return len(these) == len(those) and all(map(operator.is_, these, those))


def takes(group: Mapping[str, Any], dtype: torch.dtype, layout: torch.layout) -> bool:
    """True if the kernels can update such parameters of this group; torch's own AdamW updates the others."""
    plain = not (group["amsgrad"] or group["differentiable"])
    return plain and dtype in gk.DTYPES and layout == torch.strided


class ParamBucket:
    """Parameters of one group that share a device and a dtype: one kernel call in each step.

    group   the param_group
    params  the parameters of the group that are in this bucket
    states  for each parameter its dict in the optimizer's state; None if it has none, or an empty one
    states_as  how moments are stored, and which random bits their rounding takes

    Existing moments are used as they are. Only those that a kernel cannot use, because of another dtype or another
    layout than the parameter's, are replaced by copies.

    Raises ValueError for a moment that is not of its parameter's shape, and for sharded parameters with flat moments.
    Nothing is changed before `commit`.
    """

    def __init__(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        states: list[dict[str, Any] | None],
        states_as: StatesAs,
        seed: int,
    ) -> None:
        self.group, self.params, self._states_as, self._seed = group, params, states_as, seed
        # As in torch, a parameter has no state before its first gradient.
        self.pending = {i for i, state in enumerate(states) if not state}
        self.states = [state or {} for state in states]
        self.sharded = any(map(is_sharded, params))
        if self.sharded and states_as.flat:
            raise ValueError("flat=True needs parameters in one piece; these are sharded (DTensor): use flat=False")
        held = [local(p) for p in params]
        # A kernel goes through memory in order. A parameter with gaps is updated in a copy without gaps.
        self.own = gk.Stream(t if gk.is_dense(t) else torch.empty_like(t, requires_grad=False) for t in held)
        self.copied = [(t, own) for t, own in zip(held, self.own, strict=True) if t is not own]
        self.dtype, self.device = self.own[0].dtype, self.own[0].device
        self.bucket = gk.Bucket(self.own)
        self.rows = self.bucket.plan_rows(align=ALIGN)
        self.emas: tuple[Unclipped, Tensor, Tensor] | None = None
        self._plans: dict[tuple[int, ...], tuple[gk.Plan, Tensor]] = {}
        self._flat_grads: gk.FlatBuckets | None = None

        self.steps = _counts([state.get("step", 0.0) for state in self.states], self.device)
        first, second = (self._moments(name) for name in ("exp_avg", "exp_avg_sq"))
        self.exp_avgs, self.exp_avg_sqs = gk.Stream(map(local, first)), gk.Stream(map(local, second))
        self._all = gk.Stream([*held, *self.exp_avgs, *self.exp_avg_sqs])
        self._tensors = dict(zip(_of, (self.steps.unbind(), first, second), strict=True))

    def commit(self, state: dict[Tensor, Any]) -> None:
        """Put moments and step counts into the optimizer's state, for parameters with a state or a gradient."""
        for i, (p, own) in enumerate(zip(self.params, self.states, strict=True)):
            own.update((name, tensors[i]) for name, tensors in self._tensors.items())
            if i in self.pending and i not in self.missing:
                state[p] = own
                self.pending.remove(i)

    def is_of(self, params: list[Tensor], states: list[dict[str, Any] | None]) -> bool:
        """True if the bucket was made from these very parameters and states."""
        own = [None if i in self.pending else state for i, state in enumerate(self.states)]
        return same(self.params, params) and same(own, [state or None for state in states])

    @property
    def joined(self) -> bool:
        """True if a parameter has got its first gradient."""
        return bool(self.pending) and not self.pending.issubset(self.missing)

    def fits(self) -> bool:
        """True if parameters and moments are what and where they were. The optimizer checks their dicts itself.

        All loops run in the interpreter's C code.
        """
        try:
            for name, tensors in self._tensors.items():
                if not all(map(operator.is_, map(_of[name], self.states), tensors)):
                    return False
        except KeyError:
            return False
        now = [*map(local, self.params), *self.exp_avgs, *self.exp_avg_sqs] if self.sharded else None
        return self._all.stands(now)

    def _moments(self, name: str) -> list[Tensor]:
        """One moment of each parameter: the existing one, or zeros."""
        found = [state.get(name) for state in self.states]
        missing = [i for i, moment in enumerate(found) if moment is None]
        dtype = self._states_as.dtype
        if self._states_as.flat:
            new = iter(gk.flat_views([self.own[i] for i in missing], dtype, shift=SHIFTS[name])[1])
        else:
            new = (torch.zeros_like(self._like(i), dtype=dtype, requires_grad=False) for i in missing)
        return [next(new) if moment is None else self._usable(i, name, moment) for i, moment in enumerate(found)]

    def _like(self, i: int) -> Tensor:
        return self.params[i] if is_sharded(self.params[i]) else self.own[i]

    def _usable(self, i: int, name: str, moment: Tensor) -> Tensor:
        like, held = self._like(i), local(moment)
        if moment.shape != like.shape:
            raise ValueError(
                f"state[p][{name!r}] has shape {tuple(moment.shape)} for a parameter of shape {tuple(like.shape)}; it "
                "must have the parameter's"
            )
        dtype = self._states_as.dtype
        placed = held.dtype == dtype and held.device == self.device and held.layout == torch.strided
        if placed and held.stride() == self.own[i].stride():
            return moment
        return torch.zeros_like(like, dtype=dtype, requires_grad=False).copy_(moment)

    def collect(self, grads: Sequence[Tensor | None]) -> Gradients:
        """This step's gradients, one for each parameter, as the kernel takes them; the plan leaves out missing ones.

        Raises RuntimeError for a sparse gradient.
        """
        absent = list(map(operator.is_, grads, repeat(None)))
        missing = tuple([i for i, gone in enumerate(absent) if gone]) if True in absent else ()
        present: list[Any] = list(grads)
        if self.sharded:
            present = [None if grad is None else local(grad) for grad in present]
        for i in missing:
            present[i] = self.own[i]  # a placeholder of the right size, which the plan never visits
        try:
            stream = gk.Stream(present)
            in_order = self.own.in_order and stream.in_order
        except RuntimeError:  # sparse tensors have no address
            in_order = False
        if not in_order:
            stream = gk.Stream([_laid_out_like(p, g) for p, g in zip(self.own, present, strict=True)])
        self._leave_out(missing)
        if self.copied:
            with torch.no_grad():
                for held, own in self.copied:
                    own.copy_(held)
        return stream

    def _leave_out(self, missing: tuple[int, ...]) -> None:
        if missing not in self._plans:
            if len(self._plans) >= PLANS:
                self._plans.pop(next(iter(self._plans)))
            # Whichever gradients are missing, the others keep their places in a state.
            plan = gk.Plan(self.bucket, self.rows[~np.isin(self.rows[:, 0], missing)])
            if self.sharded:
                # Elements are numbered as in the whole tensors, lest all ranks round theirs by the same random bits.
                begins = [-elements_before(p) for p in self.params]
                plan.origins = torch.tensor(begins, dtype=torch.int64, device=self.device)
            present = np.ones(len(self.params), dtype=np.float32)
            present[list(missing)] = 0.0
            self._plans[missing] = plan, torch.from_numpy(present).to(self.device)
        self.plan, self.present = self._plans[missing]
        self.missing = missing

    def traced_grads(self) -> Gradients:
        """What `collect` returned, for use inside a compiled graph: the gradients of the step that runs."""
        grads = [p.grad for p in self.params]
        # Always true. The compiler sees the condition that the plan depends on, and guards it.
        assert self.missing == tuple([i for i, grad in enumerate(grads) if grad is None])
        return [p if grad is None else _laid_out_like(p, grad) for p, grad in zip(self.own, grads, strict=True)]

    def flatten_grads(self) -> None:
        """Make the gradients views of one flat buffer."""
        if self._flat_grads is None:
            self._flat_grads = gk.FlatBuckets(self.params)
        else:
            self._flat_grads.attach()

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
        """As `measure`, and update the EMAs in the same pass. Also returns their sums, NaN if the step is skipped."""
        ema, steps = self._states_of(unclipped)
        ema = ema[: self.plan.states]
        stats, reported = averaged(
            grads, self.plan, ema, unclipped.beta, steps, self.present, inv_scale, found_inf, backend
        )
        return stats, BucketSums(self.params, self.plan, reported, steps)

    def _states_of(self, unclipped: Unclipped) -> tuple[Tensor, Tensor]:
        """The EMA of all parameters, laid out like the plan, and their numbers of updates; the state views both."""
        if self.emas is None or self.emas[0] is not unclipped:
            # A tensor without elements has no rows.
            begin = {segment: int(place) for segment, place in reversed(self.rows[:, [0, 3]].tolist())}
            size = int((self.rows[:, 2] + self.rows[:, 3]).max(initial=0))
            ema = torch.zeros(size, dtype=torch.float32, device=self.device)
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
        """Everything of an update that changes nothing yet. Returns the arguments of `step`."""
        group, device = self.group, self.steps.device
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.device != device:
            lr = float(lr)
        betas: Any = group["betas"]
        if isinstance(betas[0], Tensor) or isinstance(betas[1], Tensor):
            betas = tuple(map(float, betas))
        inv_scale, found_inf = _on(device, inv_scale), _on(device, found_inf)
        counted = self.present if found_inf is None else self.present * (1 - found_inf)
        update = gk.prepare_adamw_(
            self.own,
            grads,
            self.exp_avgs,
            self.exp_avg_sqs,
            self.plan,
            step=self.steps,
            lr=lr,
            betas=betas,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            inv_scale=inv_scale,
            found_inf=found_inf,
            clip=_on(device, clip),
            maximize=group["maximize"],
            sums=sums,
            seed=self._seed,
            stochastic_rounding=self._states_as.stochastic_rounding and self.dtype == torch.bfloat16,
            backend=backend,
        )
        return counted, update

    def step(self, counted: Tensor, update: Callable[[], Tensor]) -> BucketSums:
        self.steps.add_(counted)
        try:
            stats = update()
        except BaseException:
            self.steps.sub_(counted)  # nothing was updated, so nothing is counted
            raise
        if self.copied:
            with torch.no_grad():
                for held, own in self.copied:
                    held.copy_(own)
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
    """One update of an EMA. Returns the sums as measured, and the sums to report: NaN where `found_inf` skips the step.

    steps    numbers of updates, to which `present` is added
    """
    inv_scale, found_inf = _on(steps.device, inv_scale), _on(steps.device, found_inf)
    if found_inf is None:
        stats = gk.measure_(grads, plan, ema=ema, beta=beta, inv_scale=inv_scale, backend=backend)
        steps.add_(present)
        return stats, stats
    skip = found_inf != 0
    # A scale of NaN makes every element non-finite, which leaves the EMA as it is without waiting for the device.
    own = torch.ones((), dtype=torch.float32, device=steps.device) if inv_scale is None else inv_scale
    scale = torch.where(skip, torch.nan, own)
    stats = gk.measure_(grads, plan, ema=ema, beta=beta, inv_scale=scale, backend=backend)
    steps.add_(present * ~skip)
    return stats, torch.where(skip, torch.nan, stats)


def is_sharded(t: Tensor) -> bool:
    """True for a DTensor, which FSDP2 makes of each parameter: this rank holds only a part of it."""
    return hasattr(t, "to_local")


def local(t: Tensor) -> Tensor:
    """The part of a sharded tensor that this rank holds; any other tensor unchanged."""
    if not is_sharded(t):
        return t
    with torch.no_grad():  # otherwise autograd records it
        return t.to_local()  # type: ignore[attr-defined]


def elements_before(t: Any) -> int:
    """Elements of a DTensor in the shards before this rank's; as many on all ranks that hold the same shard.

    Sharded along its first dimension, as FSDP2 does it, that is where the shard begins in the whole tensor.
    """
    shape, offset = local_shape_and_offset(t.shape, t.device_mesh, t.placements)
    return sum(n * math.prod(shape[:d]) * math.prod(t.shape[d + 1 :]) for d, n in enumerate(offset))


def _laid_out_like(p: Tensor, grad: Tensor) -> Tensor:
    """The gradient in the memory order of its parameter; a copy only where autograd chose another order."""
    if grad.layout != torch.strided:
        raise RuntimeError("AdamW does not support sparse gradients; consider torch.optim.SparseAdam")
    if grad.stride() == p.stride() or (grad.is_contiguous() and p.is_contiguous()):
        return grad
    return torch.empty_like(p, requires_grad=False).copy_(grad.detach())


def _counts(steps: Iterable[Tensor | float], device: torch.device) -> Tensor:
    """Step counts as float32 [parameters] on the device, without waiting for it."""
    counts = [torch.as_tensor(step, dtype=torch.float32).reshape(()).to(device, non_blocking=True) for step in steps]
    return torch.stack(counts)


def reciprocal(scale: Tensor | None) -> Tensor | None:
    """The factor that undoes a loss scale. A tensor, because reading its value would wait for the device."""
    return None if scale is None else scale.float().reciprocal()


def _on(device: torch.device, value: Tensor | None) -> Tensor | None:
    return value if value is None or value.device == device else value.to(device, non_blocking=True)
