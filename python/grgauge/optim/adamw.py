"""AdamW whose step also takes the gauges' sums: torch.optim.AdamW's semantics, one kernel call for each bucket."""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim.adam import adam

import grgauge_kernels as gk

from .._torch_compat import (
    disable_dynamo,
    has_step_hooks,
    init_states_like_torch,
    is_profiled,
    keep_in_order,
    unwrapped_step,
)
from .param_bucket import BucketSums, Gradients, ParamBucket, StatesAs, Unclipped, reciprocal, same, takes

ParamGroup = dict[str, Any]
Observer = Callable[[list[BucketSums]], None]

# How the sums of a compiled step reach its observers: an op that the compiler neither traces nor drops nor moves.
_library = torch.library.Library("grgauge", "FRAGMENT")
_library.define("observed(Tensor[] stats, Tensor[] steps, SymInt optimizer) -> ()", tags=(torch.Tag.cudagraph_unsafe,))
_compiled: weakref.WeakValueDictionary[int, AdamW] = weakref.WeakValueDictionary()
_numbers = itertools.count()

_grad_of, _params_of = operator.attrgetter("grad"), operator.itemgetter("params")
_routed_by, _kind_of = operator.itemgetter("amsgrad", "differentiable"), operator.attrgetter("dtype", "layout")


class _Known(NamedTuple):
    """What the buckets were made from. As soon as the optimizer has something else, they are made again.

    groups     its param_groups, and the parameters and options of each
    state      the keys and values of its state
    outsiders  parameters in no bucket: frozen ones without a state and without a gradient
    others     (group, parameters) that no kernel takes: torch's own AdamW updates them
    """

    groups: list[ParamGroup]
    params: list[list[Tensor]]
    options: list[tuple[Any, ...]]
    state: tuple[list[Tensor], list[dict[str, Any]]]
    outsiders: list[Tensor]
    others: list[tuple[ParamGroup, list[Tensor]]]


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW in one pass over the gradients, which also takes the sums that the gauges need.

    As in torch, `param_groups` and `state` are the truth: whatever a program changes there, or about parameters and
    gradients, the next step follows. The state_dict is torch.optim.AdamW's, in both directions, mid-training.

    The kernels take parameters of float32, bfloat16 and float16. Others, and groups with amsgrad or differentiable, are
    updated by torch's own AdamW, and no sums are taken of them.

    Under torch.compile the step is part of the graph, one op for each bucket, and observers are called as usual. The
    graph ends at a step with a closure, hooks, clipping, sharded parameters or parameters that torch updates, and goes
    on after it. A number as lr becomes a constant of the graph: with a scheduler, use a tensor.

    Args:
        params: As in torch.optim.AdamW.
        lr: As in torch.optim.AdamW.
        betas: As in torch.optim.AdamW.
        eps: As in torch.optim.AdamW.
        weight_decay: As in torch.optim.AdamW.
        amsgrad: As in torch.optim.AdamW, whose code then makes the step.
        maximize: As in torch.optim.AdamW.
        foreach: Accepted for torch's signature; the step is always fused.
        capturable: Accepted for torch's signature; the step is always capturable.
        differentiable: As in torch.optim.AdamW, whose code then makes the step.
        fused: Accepted for torch's signature; the step is always fused.
        max_grad_norm: Clip the gradients of all groups together to this L2 norm, as torch.nn.utils.clip_grad_norm_
            does, in two passes in all: one to read the norm, one to update. `grad_norm` then holds the norm before
            clipping, and p.grad itself is left as it is.
        skip_nonfinite: With max_grad_norm: where the norm is not finite, change nothing at all in that step.
        flat: Place moments in one flat buffer per group, device and dtype, and, from `zero_grad(set_to_none=False)` on,
            gradients too (`grgauge_kernels.FlatBuckets`). Parameters keep their own memory.
        state_dtype: The dtype of both moments, whatever the parameters are: torch.float32, or torch.bfloat16 with
            stochastic rounding, which moves 20 instead of 28 bytes per float32 parameter and step.
        stochastic_rounding: Round bfloat16 parameters stochastically, so that small updates are not lost although there
            is no copy in float32. torch rounds to nearest.
        backend: A name from `grgauge_kernels.backends()`, or None for the best one of each device.

    Attributes:
        grad_norm: float32 [], the norm before clipping in the last step; None before the first, or without clipping.

    Raises:
        ValueError: For what torch.optim.AdamW refuses, and if max_grad_norm, skip_nonfinite or state_dtype is out of
            range.

    Examples:
        >>> import torch, grgauge
        >>> net = torch.nn.Linear(4, 2)
        >>> optimizer = grgauge.AdamW(net.parameters(), lr=1e-3, max_grad_norm=1.0)
        >>> net(torch.ones(3, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> bool(optimizer.grad_norm > 0)
        True
    """

    # GradScaler then leaves unscaling and skipping to step(), by way of the attributes grad_scale and found_inf.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        flat: bool = False,
        state_dtype: torch.dtype = torch.float32,
        stochastic_rounding: bool = False,
        backend: str | None = None,
    ) -> None:
        if state_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"state_dtype is {state_dtype}; it must be torch.float32 or torch.bfloat16")
        if max_grad_norm is not None and not max_grad_norm > 0.0:
            raise ValueError(f"max_grad_norm is {max_grad_norm}; it must be above 0, or None")
        if skip_nonfinite and max_grad_norm is None:
            raise ValueError(
                "skip_nonfinite=True needs max_grad_norm: without it the norm is not known before the step"
            )
        self.max_grad_norm = max_grad_norm
        self.skip_nonfinite = skip_nonfinite
        self._states_as = StatesAs(state_dtype, flat, stochastic_rounding)
        self._backend = backend
        self._begin()
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )

    def _begin(self) -> None:
        """Set what a copy or an unpickled optimizer must not take over from this one."""
        self.grad_norm: Tensor | None = None
        self._observers: list[Observer] = []
        self._unclipped: tuple[Unclipped, Observer] | None = None
        self._buckets: list[ParamBucket] = []
        self._known: _Known | None = None
        self._number = next(_numbers)

    @property
    def sums_all(self) -> bool:
        """True if the kernels take all parameters, so that observers see each gradient."""
        return all(
            takes(group, dtype, layout)
            for group in self.param_groups
            for dtype, layout in set(map(_kind_of, group["params"]))
        )

    @property
    def summed_all(self) -> bool:
        """True if the kernels took all parameters of the last step, so that observers have seen each gradient."""
        return self._known is None or not self._known.others

    def observe(self, observer: Observer) -> Callable[[], None]:
        """Call `observer` with the sums of every step from now on.

        Args:
            observer: Called at the end of each step, with a `BucketSums` for each bucket.

        Returns:
            A function that stops it.
        """
        self._observers.append(observer)
        return lambda: self._observers.remove(observer)

    def observe_unclipped(self, observer: Observer, unclipped: Unclipped) -> Callable[[], None]:
        """The same for gradients before clipping; the pass that reads their norm also keeps their EMAs, in `unclipped`.

        Args:
            observer: Called as for `observe`.
            unclipped: The EMAs, updated in every step.

        Returns:
            A function that stops it.

        Raises:
            ValueError: EMAs are kept for another observer already.
        """
        if self._unclipped is not None:
            raise ValueError("unclipped is the second one: this optimizer keeps EMAs of its gradients already")
        self._unclipped = unclipped, observer

        def end() -> None:
            if self._unclipped is not None and self._unclipped[0] is unclipped:
                self._unclipped = None

        return end

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient; the others are left alone, as in torch.

        Args:
            closure: Computes the loss and the gradients; called first, if given.

        Returns:
            What the closure returned, None without one.

        Raises:
            RuntimeError: For sparse gradients, before anything is changed.
        """
        hooked = has_step_hooks(self)
        if torch.compiler.is_compiling():
            plain = not (hooked or closure or self.max_grad_norm or self._unclipped)
            if not plain:
                return self._untraced_step(closure)
            self._traced_step()
            return None
        if hooked or is_profiled():
            return self._hooked_step(closure)
        return self._step(closure)

    # Optimizer.__init__ would wrap step() in the bookkeeping of hooks and profiler, which costs a fifth of a step at
    # 0.1 M parameters. Marked like this, step() is not wrapped, and goes through that wrapper only where there are
    # hooks or a profiler.
    unwrapped_step(step)

    def _step(self, closure: Callable[[], float] | None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grads = self._collect()
        seen, unclipped = self._update(grads)
        for observer in self._observers:
            observer(seen)
        if self._unclipped is not None:
            self._unclipped[1](unclipped)
        return loss

    def _update(self, grads: list[Gradients]) -> tuple[list[BucketSums], list[BucketSums]]:
        """One update of everything. Returns the sums of each bucket, and those before clipping if they are observed.

        Errors are raised before the first bucket is changed, whichever bucket they concern.
        """
        inv_scale = reciprocal(getattr(self, "grad_scale", None))
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        both, backend = list(zip(self._buckets, grads, strict=True)), self._backend
        clip: Tensor | None = None
        stats: list[Tensor] = []
        unclipped: list[BucketSums] = []
        if self._unclipped is not None:
            emas = self._unclipped[0]
            averages = [bucket.average(emas, own, inv_scale, found_inf, backend) for bucket, own in both]
            stats, unclipped = [average[0] for average in averages], [average[1] for average in averages]
        elif self.max_grad_norm is not None:
            stats = [bucket.measure(own, inv_scale, backend) for bucket, own in both]
        if self.max_grad_norm is not None:
            clip, found_inf = self._clip(self.max_grad_norm, stats, inv_scale, found_inf)
        sums = len(self._observers) > 0  # bool() of a list is more than torch 2.11's compiler can trace
        updates = [bucket.prepare(own, inv_scale, found_inf, clip, sums, backend) for bucket, own in both]
        seen = [bucket.step(*update) for bucket, update in zip(self._buckets, updates, strict=True)]
        if self._known is not None and self._known.others:
            self._update_by_torch(self._known.others, inv_scale, found_inf, clip)
        return seen, unclipped

    def _update_by_torch(
        self,
        others: list[tuple[ParamGroup, list[Tensor]]],
        inv_scale: Tensor | None,
        found_inf: Tensor | None,
        clip: Tensor | None,
    ) -> None:
        if found_inf is not None and found_inf.item():
            return
        for group, params in others:
            with torch.set_grad_enabled(group["differentiable"]):
                lists: Any = [[] for _ in range(6)]
                has_complex = init_states_like_torch(self, {**group, "params": params}, *lists)
                for factor in (inv_scale, clip):
                    if factor is not None:
                        lists[1] = [grad * factor.to(grad.device) for grad in lists[1]]
                options: dict[str, Any] = {name: group[name] for name in PASSED_ON}
                beta1, beta2 = group["betas"]
                options.update(beta1=beta1, beta2=beta2, has_complex=has_complex, decoupled_weight_decay=True)
                adam(*lists, **options)

    def _clip(
        self, max_norm: float, stats: list[Tensor], inv_scale: Tensor | None, found_inf: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The factor that brings the norm of all gradients down to max_norm, and found_inf with `skip_nonfinite`.

        stats  the sums of each bucket
        """
        buckets, others = self._buckets, self._others_grads()
        if not (buckets or others):
            return None, found_inf
        device = buckets[0].device if buckets else others[0].device
        zeros = torch.zeros(len(gk.STATS), dtype=torch.float64, device=device)
        columns = torch.stack([zeros, *(sums.sum(0).to(device) for sums in stats)]).sum(0)
        if buckets and buckets[0].sharded:
            columns = _over_shards(columns, buckets[0].params[0])
        scale = 1.0 if inv_scale is None else inv_scale.to(device)
        rest = torch.nn.utils.get_total_norm(others).to(device).double() * scale if others else zeros[0]
        broken = columns[gk.STATS.index("nonfinite")] > 0
        norm = (columns[gk.STATS.index("grad_sq")] + rest.square()).sqrt()
        if device.type != "cpu":
            norm = norm.where(~broken, torch.nan)
        elif broken:
            # The sums left something out. clip_grad_norm_ treats NaN, infinities and huge numbers differently.
            every = [p.grad for bucket in buckets for p in bucket.params if p.grad is not None]
            total = torch.nn.utils.get_total_norm([*every, *others])
            norm = getattr(total, "full_tensor", lambda: total)().double() * scale
        self.grad_norm = norm.float()
        if self.skip_nonfinite:
            skip = (~norm.isfinite()).float()
            found_inf = skip if found_inf is None else torch.maximum(skip, found_inf.to(device).reshape(()))
        return (max_norm / (norm + 1e-6)).clamp(max=1.0).float(), found_inf

    def _others_grads(self) -> list[Tensor]:
        """The gradients of the parameters that torch's own AdamW updates in this step."""
        others = () if self._known is None else self._known.others
        return [p.grad for _, params in others for p in params if p.grad is not None]

    _hooked_step = torch.optim.Optimizer.profile_hook_step(_step)
    # A graph ends before such a step and continues after it: hooks and closures may do anything, a graph cannot check
    # that parameters and gradients are still in a flat buffer, and clipping stores a tensor on the optimizer.
    _untraced_step = disable_dynamo(_hooked_step)

    def _traced_step(self) -> None:
        """The step as part of a compiled function's graph: one op for each bucket, and one for the observers."""
        self._init_group()
        if self._untraceable:
            self._untraced_step(None)
            return
        with torch.no_grad():
            seen, _ = self._update([bucket.traced_grads() for bucket in self._buckets])
            if self._observers:
                stats, steps = [bucket.stats for bucket in seen], [bucket.steps for bucket in seen]
                torch.ops.grgauge.observed.default(stats, steps, self._number)

    def _init_group(self) -> None:  # type: ignore[override]
        """Everything that a trace cannot follow: torch's compiler runs the method of this name when it traces a step.

        The compiler guards what this method sets: with another set of gradients, for example, it traces again.
        """
        self._collect()
        others = self._known is not None and self._known.others
        self._untraceable = bool(others or any(bucket.sharded or bucket.copied for bucket in self._buckets))
        _compiled[self._number] = self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch. With flat=True, gradients that are kept become views of one flat buffer.

        Args:
            set_to_none: False keeps the gradients, as zeros.
        """
        super().zero_grad(set_to_none)
        if self._states_as.flat and not set_to_none:
            for bucket in self._buckets:
                bucket.flatten_grads()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state_dict of this class or of torch.optim.AdamW; load hooks run as in torch.

        Args:
            state_dict: The state, which shares its tensors with the optimizer as in torch.
        """
        loaded: list[Mapping[str, Any]] = []
        # The last hook before torch's own loading, and the first one after it.
        before = self.register_load_state_dict_pre_hook(lambda _, final: loaded.append(final))
        after = self.register_load_state_dict_post_hook(lambda _: self._keep_float32(loaded[-1]), prepend=True)
        try:
            super().load_state_dict(dict(state_dict))
        finally:
            before.remove()
            after.remove()

    def _keep_float32(self, state_dict: Mapping[str, Any]) -> None:
        """torch has cast moments to the parameters' dtype; where that lost bits, use the saved ones instead."""
        params = [(group, p) for group in self.param_groups for p in group["params"]]
        indices = [i for group in state_dict["param_groups"] for i in group["params"]]
        for index, (group, p) in zip(indices, params, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                rounded = isinstance(value, Tensor) and name != "step" and value.dtype == torch.float32 != p.dtype
                if rounded and takes(group, p.dtype, p.layout):
                    self.state[p][name] = value.detach().to(p.device, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        own = ("max_grad_norm", "skip_nonfinite", "_states_as", "_backend")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_observers" not in self.__dict__:  # copied or unpickled; otherwise a state is being loaded
            self._begin()

    def _collect(self) -> list[Gradients]:
        """This step's gradients of each bucket; buckets that no longer fit are made again."""
        if not self._is_current():
            return self._build()
        collected = [bucket.collect(list(map(_grad_of, bucket.params))) for bucket in self._buckets]
        if any(bucket.joined for bucket in self._buckets):
            self._commit()
        return collected

    def _commit(self) -> None:
        """Put the buckets' moments into `state`, and remember the result."""
        for bucket in self._buckets:
            bucket.commit(self.state)
        assert self._known is not None
        self._known = self._known._replace(state=(list(self.state), list(self.state.values())))

    def _is_current(self) -> bool:
        """True if the optimizer still has what the buckets were made from. All loops run in C code."""
        known = self._known
        return (
            known is not None
            and same(self.param_groups, known.groups)
            and all(map(same, map(_params_of, self.param_groups), known.params))
            and list(map(_routed_by, self.param_groups)) == known.options
            and same(self.state.keys(), known.state[0])
            and same(self.state.values(), known.state[1])
            and not any(map(operator.is_not, map(_grad_of, known.outsiders), itertools.repeat(None)))
            and not any(takes(group, p.dtype, p.layout) for group, params in known.others for p in params)
            and all(map(ParamBucket.fits, self._buckets))
        )

    def _build(self) -> list[Gradients]:
        """Buckets for every parameter that takes part in training; this step's gradients of each."""
        old = {(id(bucket.group), bucket.device, bucket.dtype): bucket for bucket in self._buckets}
        buckets, outsiders, others = list[ParamBucket](), list[Tensor](), list[tuple[ParamGroup, list[Tensor]]]()
        for group in self.param_groups:
            together: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
            rest = list[Tensor]()
            for p in group["params"]:
                if is_lazy(p) or not (p.requires_grad or p.grad is not None or self.state.get(p)):
                    outsiders.append(p)
                elif takes(group, p.dtype, p.layout):
                    together.setdefault((p.device, p.dtype), []).append(p)
                else:
                    rest.append(p)
            if rest:
                others.append((group, rest))
            for key, params in together.items():
                states = [self.state.get(p) for p in params]
                before = old.get((id(group), *key))
                if before and before.is_of(params, states) and before.fits():
                    buckets.append(before)
                else:
                    buckets.append(ParamBucket(group, params, states, self._states_as, seed=len(buckets)))
        if any(p.grad is not None and p.grad.is_sparse for _, params in others for p in params):
            raise RuntimeError("AdamW does not support sparse gradients; consider torch.optim.SparseAdam")
        collected = [bucket.collect([p.grad for p in bucket.params]) for bucket in buckets]
        self._buckets = buckets
        groups = list(self.param_groups)
        known = [list(group["params"]) for group in groups]
        self._known = _Known(groups, known, list(map(_routed_by, groups)), ([], []), outsiders, others)
        self._commit()
        return collected


PASSED_ON = ("amsgrad", "lr", "weight_decay", "eps", "maximize", "foreach", "capturable", "differentiable", "fused")
"""Options of a group that are passed to torch's function unchanged."""


def unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that steps inside the wrappers of Lightning, Fabric and accelerate, which have no step hooks."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer


def _over_shards(sums: Tensor, param: Any) -> Tensor:
    """`total` added up over the ranks that hold the shards of a DTensor."""
    for dim, placement in enumerate(param.placements):
        if placement.is_shard():
            torch.distributed.all_reduce(sums, group=param.device_mesh.get_group(dim))
    return sums


def _observed(stats: list[Tensor], steps: list[Tensor], optimizer: int) -> None:
    """Pass a compiled step's sums to the observers. The graph may reuse their memory, so observers get copies."""
    own = _compiled[optimizer]
    seen = [
        BucketSums(bucket.params, bucket.plan, sums.clone(), count.clone())
        for bucket, sums, count in zip(own._buckets, stats, steps, strict=True)
    ]
    for observer in own._observers:
        observer(seen)


_library.impl("observed", _observed, "CompositeExplicitAutograd")
torch.library.register_fake("grgauge::observed", lambda stats, steps, optimizer: None, lib=_library)
keep_in_order(torch.ops.grgauge.observed.default)
