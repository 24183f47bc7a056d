"""AdamW whose step also reads the gauges: torch.optim.AdamW's semantics, one kernel call a bucket."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch._higher_order_ops.effects import _EffectType, _register_effectful_op
from torch.autograd import profiler
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

import grgauge_kernels as gk
from grgauge_kernels.bucket import DTYPES, require_dense
from grgauge_kernels.flat import require_disjoint

from .part import BucketSums, Gradients, Part, Unclipped, is_sharded

ParamGroup = dict[str, Any]
Observer = Callable[[list[BucketSums]], None]

# How the sums of a compiled step reach its observers: an op that the compiler neither looks into nor drops nor moves.
_library = torch.library.Library("grgauge", "FRAGMENT")
_library.define("observed(Tensor[] stats, Tensor[] steps, SymInt optimizer) -> ()", tags=(torch.Tag.cudagraph_unsafe,))
_compiled: weakref.WeakValueDictionary[int, AdamW] = weakref.WeakValueDictionary()
_numbers = itertools.count()


class AdamW(torch.optim.Optimizer):
    """torch.optim.AdamW in one pass over the gradients, which also takes the sums that the gauges need.

    Parameters are float32, bfloat16 or float16; both moments are float32 whatever the parameters are. The state_dict is
    torch.optim.AdamW's, in both directions, mid-training.

    Under torch.compile the step is part of the graph, as one op per bucket, and observers are called as ever. A step
    with a closure, hooks, clipping, flat=True or sharded parameters ends the graph, and another begins after it. A
    learning rate that is a number is compiled in: let a scheduler change a tensor.

    Args:
        params: As in torch.optim.AdamW.
        lr: As in torch.optim.AdamW, or a tensor of one element.
        betas: As in torch.optim.AdamW.
        eps: As in torch.optim.AdamW.
        weight_decay: As in torch.optim.AdamW.
        amsgrad: Not supported; must be False.
        maximize: As in torch.optim.AdamW.
        foreach: Accepted for torch's signature; the step is always fused.
        capturable: Accepted for torch's signature; the step can always be captured in a CUDA graph.
        differentiable: Not supported; must be False.
        fused: Accepted for torch's signature; the step is always fused.
        max_grad_norm: Clip the gradients of all param_groups together to this L2 norm, as
            torch.nn.utils.clip_grad_norm_ does, but without a pass of its own: one pass reads the norm, one updates.
            `grad_norm` then holds the norm before clipping. p.grad itself is not changed.
        skip_nonfinite: With max_grad_norm: if the norm is not finite, change nothing in that step.
        flat: Keep parameters and gradients as views of one flat buffer per param_group, device and dtype, so that the
            host's work in a step does not grow with their number (`grgauge_kernels.FlatBuckets`).
        backend: A name from `grgauge_kernels.backends()`, or None for the best one of each device.

    Raises:
        ValueError: For `amsgrad=True` or `differentiable=True`, for numbers out of range, and for parameters with gaps
            between their elements.
        TypeError: For other parameter dtypes.

    Examples:
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = AdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0)
        >>> model(torch.ones(2, 4)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.grad_norm
        tensor(4.4721)
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
        backend: str | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": (float(betas[0]), float(betas[1])),
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": True,
        }
        if max_grad_norm is not None and not max_grad_norm > 0.0:
            raise ValueError(f"max_grad_norm is {max_grad_norm}; it must be above 0, or None")
        if skip_nonfinite and max_grad_norm is None:
            raise ValueError(
                "skip_nonfinite=True needs max_grad_norm: without it the norm is not known before the step"
            )
        self.max_grad_norm = max_grad_norm
        self.skip_nonfinite = skip_nonfinite
        self.grad_norm: Tensor | None = None
        self._flat = flat
        self._backend = backend
        self._observers: list[Observer] = []
        self._unclipped: tuple[Unclipped, Observer] | None = None
        self._parts: list[Part] | None = None
        self._outsiders: list[Tensor] = []  # frozen parameters without a gradient
        self._number = next(_numbers)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a param_group, as in torch; its options and parameters are checked before anything changes."""
        _check_options({**self.defaults, **param_group})
        params = param_group["params"]
        if isinstance(params, Iterable) and not isinstance(params, (Tensor, set)):  # those two are torch's to answer
            param_group["params"] = params = list(params)
            _check_params(params)
        super().add_param_group(param_group)
        self._parts = None

    def observe(self, observer: Observer) -> Callable[[], None]:
        """Call `observer` with the sums of every step from now on; call what this returns to end it."""
        self._observers.append(observer)
        return lambda: self._observers.remove(observer)

    def observe_unclipped(self, observer: Observer, unclipped: Unclipped) -> Callable[[], None]:
        """Call `observer` with the sums before clipping; the pass that reads the norm keeps EMAs in `unclipped`.

        Raises:
            ValueError: If EMAs of this optimizer's gradients are being kept already.
        """
        if self._unclipped is not None:
            raise ValueError("unclipped is the second one: EMAs of this optimizer's gradients are being kept already")
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

        Raises:
            RuntimeError: For sparse gradients, before anything is changed.
        """
        hooks = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
        hooked = hooks or _global_optimizer_pre_hooks or _global_optimizer_post_hooks
        if torch.compiler.is_compiling():
            plain = not (hooked or closure or self._flat or self.max_grad_norm or self._unclipped)
            if not plain:
                return self._untraced_step(closure)
            self._traced_step()
            return None
        if hooked or profiler._is_profiler_enabled:
            return self._hooked_step(closure)
        return self._step(closure)

    # Optimizer.__init__ would wrap step() in the bookkeeping of hooks and profiler, which costs a fifth of a step at
    # 0.1 M parameters. So marked, step() stays as it is, and goes through that wrapper only with hooks or a profiler.
    step.hooked = True  # type: ignore[attr-defined]

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
        """One update of every part: its sums, and those before clipping, if they are observed.

        What is refused, in whichever part, is refused before the first is changed.
        """
        parts = self._parts or []
        inv_scale = _reciprocal(getattr(self, "grad_scale", None))
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        both, backend = list(zip(parts, grads, strict=True)), self._backend
        clip, unclipped = None, []
        if self._unclipped is not None:
            emas = self._unclipped[0]
            averages = [part.average(emas, own, inv_scale, found_inf, backend) for part, own in both]
            stats, unclipped = [average[0] for average in averages], [average[1] for average in averages]
        elif self.max_grad_norm is not None:
            stats = [part.measure(own, inv_scale, backend) for part, own in both]
        if self.max_grad_norm is not None and parts:
            clip, found_inf = self._clip(self.max_grad_norm, parts, stats, inv_scale, found_inf)
        sums = bool(self._observers)
        updates = [part.prepare(own, inv_scale, found_inf, clip, sums, backend) for part, own in both]
        return [part.step(*update) for part, update in zip(parts, updates, strict=True)], unclipped

    def _clip(
        self,
        max_norm: float,
        parts: list[Part],
        stats: list[Tensor],
        inv_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The factor that brings the norm of all gradients down to max_norm, and found_inf with `skip_nonfinite`.

        stats  the sums of each part
        """
        device = parts[0].steps.device
        columns = torch.stack([sums.sum(0).to(device) for sums in stats]).sum(0)
        if parts[0].sharded:
            columns = _over_shards(columns, parts[0].params[0])
        broken = columns[gk.STATS.index("nonfinite")] > 0
        norm = columns[gk.STATS.index("grad_sq")].sqrt()
        if device.type != "cpu":
            norm = norm.where(~broken, torch.nan)
        elif broken:
            # The sums left something out: NaN, an infinity or a huge number, which clip_grad_norm_ tells apart.
            every = [p.grad for part in parts for p in part.params if p.grad is not None]
            total = torch.nn.utils.get_total_norm(every)
            norm = getattr(total, "full_tensor", lambda: total)().double() * (1.0 if inv_scale is None else inv_scale)
        self.grad_norm = norm.float()
        if self.skip_nonfinite:
            skip = (~norm.isfinite()).float()
            found_inf = skip if found_inf is None else torch.maximum(skip, found_inf.to(device).reshape(()))
        return (max_norm / (norm + 1e-6)).clamp(max=1.0).float(), found_inf

    _hooked_step = torch.optim.Optimizer.profile_hook_step(_step)
    # A graph ends before such a step, and another begins after it: hooks and closures may do anything, no graph can
    # tell if parameters and gradients still are in a flat buffer, and clipping leaves a tensor with the optimizer.
    _untraced_step = _disable_dynamo(_hooked_step)

    def _traced_step(self) -> None:
        """The step as part of a compiled function's graph: an op a bucket, and one for the observers."""
        self._init_group()
        parts = self._parts or []
        for part in parts:
            if part.sharded:
                self._untraced_step(None)
                return
        with torch.no_grad():
            seen, _ = self._update([part.traced_grads() for part in parts])
            if self._observers:
                stats, steps = [bucket.stats for bucket in seen], [bucket.steps for bucket in seen]
                torch.ops.grgauge.observed.default(stats, steps, self._number)

    def _init_group(self) -> None:
        """Whatever a trace cannot follow: torch's compiler runs the method of this name when it traces a step.

        What it leaves is guarded: another set of gradients, say, is traced anew.
        """
        self._collect()
        _compiled[self._number] = self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch. With flat=True gradients are zeroed in place, whatever `set_to_none` says: they stay views."""
        if not self._flat or self._parts is None:
            super().zero_grad(set_to_none)
            return
        for part in self._parts:
            assert part.flat is not None
            part.flat.zero_grad()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state_dict of this class or of torch.optim.AdamW; nothing is shared with it afterwards.

        Raises:
            ValueError: If it was made with amsgrad=True, or for other groups, before anything is changed.
        """
        for group in state_dict["param_groups"]:
            _check_options({**self.defaults, **group})
        super().load_state_dict(dict(state_dict))
        # torch has cast the moments to the parameters' dtype; ours are float32, so take the saved ones as they are.
        params = [p for group in self.param_groups for p in group["params"]]
        indices = [i for group in state_dict["param_groups"] for i in group["params"]]
        for index, p in zip(indices, params, strict=True):
            if index in state_dict["state"]:
                saved = state_dict["state"][index]
                self.state[p] = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in saved.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # An unpickled or copied optimizer has only what torch keeps: it goes on with loose tensors.
        unset = {"max_grad_norm": None, "skip_nonfinite": False, "grad_norm": None, "_flat": False, "_backend": None}
        for name, value in unset.items():
            self.__dict__.setdefault(name, value)
        self.__dict__.setdefault("_observers", [])
        self.__dict__.setdefault("_unclipped", None)
        self._number = next(_numbers)
        self._parts = None
        for group in self.param_groups:
            for key, default in self.defaults.items():
                group.setdefault(key, default)

    def _collect(self) -> list[Gradients]:
        """This step's gradients of each part; the parts are made anew where they no longer fit."""
        current = self._parts is not None and self._parts_state is self.state and len(self.state) > 0
        if not current or _any_grad(self._outsiders):
            return self._build_parts()
        collected = []
        for part in self._parts or ():
            grads = part.collect()
            if grads is None:
                return self._build_parts()
            collected.append(grads)
        return collected

    def _build_parts(self) -> list[Gradients]:
        """Parts for every parameter that takes part in training, with the state they have so far."""
        if self._flat:
            params = [p for group in self.param_groups for p in group["params"]]
            if any(map(is_sharded, params)):
                raise ValueError("flat=True needs parameters in one piece; these are sharded (DTensor): use flat=False")
            require_disjoint(params)
        for part in self._parts or ():
            if part.flat is not None:
                part.flat.detach()
        parts, self._outsiders = [], []
        for group in self.param_groups:
            alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
            for p in group["params"]:
                if p.requires_grad or p.grad is not None:
                    alike.setdefault((p.device, p.dtype), []).append(p)
                else:
                    self._outsiders.append(p)
            parts += [Part(group, params, self.state, self._flat) for params in alike.values()]
        collected = []
        for part in parts:
            grads = part.collect()
            if grads is None:
                raise TypeError("a gradient has another dtype or device than its parameter; AdamW needs them alike")
            collected.append(grads)
        self._parts, self._parts_state = parts, self.state
        return collected


def unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that steps inside the wrappers of Lightning, Fabric and accelerate, which have no step hooks."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer


def _over_shards(sums: Tensor, param: Any) -> Tensor:
    """Added up over the ranks that hold the shards of a DTensor."""
    for dim, placement in enumerate(param.placements):
        if placement.is_shard():
            torch.distributed.all_reduce(sums, group=param.device_mesh.get_group(dim))
    return sums


def _any_grad(params: list[Tensor]) -> bool:
    return any(p.grad is not None for p in params)


def _reciprocal(scale: Tensor | None) -> Tensor | None:
    return None if scale is None else scale.float().reciprocal()


def _check_options(group: Mapping[str, Any]) -> None:
    """Raise ValueError for an option that torch.optim.AdamW refuses too, or that this class does not support."""
    lr, betas = group["lr"], group["betas"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr is a tensor of {lr.numel()} elements; it must hold one")
    if not float(lr) >= 0.0:
        raise ValueError(f"lr is {float(lr)}; it must be at least 0")
    if len(betas) != 2 or not all(0.0 <= float(beta) < 1.0 for beta in betas):
        raise ValueError(f"betas is {betas}; it must hold two numbers in [0, 1)")
    for name in ("eps", "weight_decay"):
        if not group[name] >= 0.0:
            raise ValueError(f"{name} is {group[name]}; it must be at least 0")
    for name in ("amsgrad", "differentiable"):
        if group[name]:
            raise ValueError(f"{name}=True is not supported; use torch.optim.AdamW for it")


def _check_params(params: list[Any]) -> None:
    for i, entry in enumerate(params):
        p = entry[1] if isinstance(entry, tuple) else entry
        if isinstance(p, Tensor):
            require_dense(p, f"params[{i}]")
            if p.dtype not in DTYPES:
                raise TypeError(f"params[{i}] has dtype {p.dtype}; it must be float32, bfloat16 or float16")


def _observed(stats: list[Tensor], steps: list[Tensor], optimizer: int) -> None:
    """Tell the observers of a compiled step's sums. Its memory is the graph's to reuse, so they get copies."""
    own = _compiled[optimizer]
    parts = own._parts or []
    seen = [
        BucketSums(part.params, part.plan, sums.clone(), count.clone())
        for part, sums, count in zip(parts, stats, steps, strict=True)
    ]
    for observer in own._observers:
        observer(seen)


_library.impl("observed", _observed, "CompositeExplicitAutograd")
torch.library.register_fake("grgauge::observed", lambda stats, steps, optimizer: None, lib=_library)
_register_effectful_op(torch.ops.grgauge.observed.default, _EffectType.ORDERED)
