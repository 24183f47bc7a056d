"""Where a gauge's sums come from: an optimizer's own step, or a pass of the gauge's own over the gradients."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from itertools import chain, compress
from typing import Any

import numpy as np
import torch
from torch import Tensor

import grgauge_kernels as gk

from ..optim import ALIGN, AdamW, BucketSums, Unclipped, averaged, local, reciprocal
from .unavailable import Unavailable

OnStep = Callable[[list[BucketSums]], None]

_trained = operator.attrgetter("requires_grad")


class FusedSource:
    """Sums of `grgauge.AdamW`'s step itself: its first moment is m, if its betas[0] is the gauge's beta."""

    def __init__(self, optimizer: AdamW, beta: float, on_step: OnStep) -> None:
        self._optimizer, self._beta = optimizer, beta
        self.remove = optimizer.observe(on_step)

    @staticmethod
    def fits(optimizer: torch.optim.Optimizer, beta: float) -> bool:
        """With clipping inside the step, the first moment is one of clipped gradients; the gauge needs raw ones."""
        raw = isinstance(optimizer, AdamW) and optimizer.sums_all and optimizer.max_grad_norm is None
        return raw and _all_have(optimizer, beta)

    def problem(self) -> Unavailable | None:
        """Why there is no GR_T after the step just done."""
        if not self._optimizer.summed_all:
            reason = "torch's own code now updates some parameters, and takes no sums"
        elif self._optimizer.max_grad_norm is not None:
            reason = "gradients are now clipped, and so is their first moment"
        elif not _all_have(self._optimizer, self._beta):
            betas = [group["betas"][0] for group in self._optimizer.param_groups]
            reason = f"betas[0] is now {betas}, the gauge's beta {self._beta}"
        else:
            return None
        return Unavailable(f"{reason}; make a new Gauge")

    def restart(self) -> None:
        """m belongs to the optimizer and carries over."""

    def state_dict(self) -> dict[str, Any]:
        return {"kind": "fused"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _require_kind(state, "fused")


def _all_have(optimizer: torch.optim.Optimizer, beta: float) -> bool:
    """True if every first moment has that decay."""
    return all(group["betas"][0] == beta for group in optimizer.param_groups)


class ClippingSource:
    """Sums of the pass in which `grgauge.AdamW` reads the norm for clipping: m is an EMA kept in the same pass."""

    def __init__(self, optimizer: AdamW, beta: float, on_step: OnStep) -> None:
        self._optimizer, self._on_step = optimizer, on_step
        self._emas = Unclipped(beta, {})
        self.remove = optimizer.observe_unclipped(on_step, self._emas)

    @staticmethod
    def fits(optimizer: AdamW, share: float) -> bool:
        """With a sample, a small pass of the gauge's own costs less than an EMA of everything in the other pass."""
        free = optimizer.sums_all and optimizer._unclipped is None
        return optimizer.max_grad_norm is not None and share == 1.0 and free

    def problem(self) -> Unavailable | None:
        return None

    def restart(self) -> None:
        for ema, steps in self._emas.state.values():
            ema.zero_()
            steps.zero_()

    def state_dict(self) -> dict[str, Any]:
        known = [self._emas.state.get(p) for p in self._params()]
        return {"kind": "clipping", "emas": [None if own is None else tuple(t.clone() for t in own) for own in known]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _require_kind(state, "clipping")
        params, emas = self._params(), state["emas"]
        sizes = [None if own is None else own[0].numel() for own in emas]
        if len(emas) != len(params) or any(
            size not in (None, local(p).numel()) for size, p in zip(sizes, params, strict=True)
        ):
            raise ValueError("the state is of other parameters than this gauge's")
        saved = {p: (own[0].clone(), own[1].clone()) for p, own in zip(params, emas, strict=True) if own is not None}
        self.remove()  # so that the optimizer drops its old EMAs
        self._emas = Unclipped(self._emas.beta, saved)
        self.remove = self._optimizer.observe_unclipped(self._on_step, self._emas)

    def _params(self) -> list[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]


class OwnSource:
    """An EMA of the gauge's own over sampled parameters, for any optimizer, by way of its step hooks."""

    def __init__(self, optimizer: torch.optim.Optimizer, sample: Sample, beta: float, on_step: OnStep) -> None:
        self._optimizer, self._sample, self._beta, self._on_step = optimizer, sample, beta, on_step
        self._emas: list[Tensor] = []
        self._steps: list[Tensor] = []
        self._buckets: list[SampledBucket] = []
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def problem(self) -> Unavailable | None:
        return None

    def restart(self) -> None:
        for tensor in (*self._emas, *self._steps):
            tensor.zero_()

    def state_dict(self) -> dict[str, Any]:
        return {
            "kind": "own",
            "emas": [torch.cat(view) for view in self._packed()],
            "steps": [steps.clone() for steps in self._steps],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _require_kind(state, "own")
        emas, steps = state["emas"], state["steps"]
        if not emas:
            return
        fits = [len(own) for own in steps] == [len(bucket.params) for bucket in self._sample.buckets()]
        if fits:
            self._allocate(self._sample.buckets())
        if not fits or [len(ema) for ema in emas] != [bucket.plan.numel for bucket in self._buckets]:
            raise ValueError("the state is of other parameters or of another sample than this gauge's")
        for views, ema in zip(self._packed(), emas, strict=True):
            for view, part in zip(views, ema.split([len(view) for view in views]), strict=True):
                view.copy_(part)
        for own, saved in zip(self._steps, steps, strict=True):
            own.copy_(saved)

    def _packed(self) -> list[list[Tensor]]:
        """The EMAs without the gaps that keep them aligned."""
        return [bucket.plan.packed(ema) for bucket, ema in zip(self._buckets, self._emas, strict=True)]

    def _allocate(self, buckets: list[SampledBucket]) -> None:
        if buckets and buckets is not self._buckets:
            self._buckets = buckets
            self._emas = [_zeros(b.plan.states, b) for b in buckets]
            self._steps = [_zeros(len(b.params), b) for b in buckets]

    # A closure computes the gradients inside the step, so they are read after it; otherwise before the optimizer runs.

    def _before_step(self, _: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not _has_closure(args, kwargs):
            self._read()

    def _after_step(self, _: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _has_closure(args, kwargs):
            self._read()

    @torch.no_grad()
    def _read(self) -> None:
        buckets = self._sample.buckets()
        if not buckets:
            self._on_step([])
            return
        self._allocate(buckets)
        # What a GradScaler sets on an optimizer that unscales and skips inside its step.
        inv_scale = reciprocal(getattr(self._optimizer, "grad_scale", None))
        found_inf: Tensor | None = getattr(self._optimizer, "found_inf", None)
        sums = []
        for bucket, ema, steps in zip(self._buckets, self._emas, self._steps, strict=True):
            grads, plan = bucket.grads(), bucket.plan
            _, stats = averaged(grads, plan, ema, self._beta, steps, 1, inv_scale, found_inf)
            sums.append(BucketSums(bucket.params, plan, stats, steps))
        self._on_step(sums)


class Sample:
    """The parameters that a pass of the gauge's own reads, as sampled plans over buckets of loose gradients."""

    def __init__(self, optimizer: torch.optim.Optimizer, sample: int, seed: int) -> None:
        self._optimizer, self._size, self._seed = optimizer, sample, seed
        self._key: list[tuple[int, torch.dtype, torch.device]] | None = None
        self._buckets: list[SampledBucket] = []
        self._certain: list[list[list[int]]] = []
        self._previous: list[Tensor] = []

    def buckets(self) -> list[SampledBucket]:
        """The same list as before, unless parameters have come, gone, moved or been frozen.

        Empty while all are frozen; what was there before is kept for when they no longer are.

        Raises TypeError for a parameter of a dtype that the kernels do not read.
        """
        params = [p for group in self._optimizer.param_groups for p in group["params"] if p.requires_grad]
        if not params:
            return []
        key = [(id(p), p.dtype, p.device) for p in params]
        if key != self._key:
            require_readable(self._optimizer)
            together: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
            for p in params:
                together.setdefault((p.dtype, p.device), []).append(p)
            known = self._certain if len(self._certain) == len(together) else [None] * len(together)
            self._buckets = [
                SampledBucket(same, self.share, self._seed, certain)
                for same, certain in zip(together.values(), known, strict=True)
            ]
            self._certain, self._previous = [], []
            self._key = key
        return self._buckets

    def state_dict(self) -> dict[str, Any]:
        """The blocks that are visited in any case; the rest of a sample follows from its seed."""
        chosen = [bucket.certain for bucket in self._buckets]
        return {"certain": [[blocks.tolist() for blocks in bucket] for bucket in chosen if bucket is not None]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._certain, self._key = state["certain"], None

    @property
    def share(self) -> float:
        """Share of the elements that is read, in (0, 1]."""
        params = list(chain.from_iterable(group["params"] for group in self._optimizer.param_groups))
        total = sum(map(Tensor.numel, compress(params, map(_trained, params))))
        return min(1.0, self._size / max(total, 1))

    @torch.no_grad()
    def difference(self, inv_scale: Tensor | None = None) -> list[BucketSums]:
        """Sums of the gradients, and of their growth since the last call."""
        buckets = self.buckets()
        if not self._previous:
            self._previous = [_zeros(b.plan.states, b) for b in buckets]
        sums = []
        for bucket, previous in zip(buckets, self._previous, strict=True):
            scale = None if inv_scale is None else inv_scale.to(previous.device)
            stats = gk.measure_(bucket.grads(), bucket.plan, previous=previous, inv_scale=scale)
            sums.append(BucketSums(bucket.params, bucket.plan, stats, _zeros(0, bucket)))
        return sums


class SampledBucket:
    """Parameters of one dtype and device, and the plan over them, made from the first gradient.

    A few blocks may hold most of a gradient, such as those of the embeddings of frequent words. A sample by hash alone
    misses them or overrates them (GR_T of a sixteenth of an embedding-heavy model: 35 % off, against 2.4 %; see
    bench/sampling.py), so the heaviest blocks of the first gradient are visited in any case.
    """

    def __init__(self, params: list[Tensor], share: float, seed: int, certain: list[list[int]] | None) -> None:
        self.params = params
        self._own = [local(p) for p in params]
        self._bucket = gk.Bucket(self._own)
        self._sample, self._seed = max(1, round(share * self._bucket.numel)), seed
        self._zeros: dict[int, Tensor] = {}
        self.certain = None if certain is None else [np.array(blocks, dtype=np.int64) for blocks in certain]

    @functools.cached_property
    def plan(self) -> gk.Plan:
        if self.certain is None:
            self.certain = self._bucket.heavy_blocks(self._grads(), self._sample)
        return self._bucket.plan(self._sample, self._seed, replicates=gk.REPLICATES, certain=self.certain, align=ALIGN)

    def grads(self) -> Sequence[Tensor]:
        """The gradients as the plan needs them; zeros for a parameter without gradient."""
        return self.plan.spread(self._grads())

    def _grads(self) -> list[Tensor]:
        return [self._zero(i) if p.grad is None else local(p.grad) for i, p in enumerate(self.params)]

    def _zero(self, i: int) -> Tensor:
        if i not in self._zeros:
            self._zeros[i] = torch.zeros_like(self._own[i], requires_grad=False)
        return self._zeros[i]


def require_readable(optimizer: torch.optim.Optimizer) -> None:
    """Raise TypeError if a parameter that is trained has a dtype that the kernels do not read."""
    names = names_of(optimizer)
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.requires_grad and p.dtype not in gk.DTYPES:
                raise TypeError(
                    f"parameter {names[id(p)]} has dtype {p.dtype}; a gauge reads float32, bfloat16 and float16 "
                    "(parameters with requires_grad=False may have any)"
                )


def names_of(optimizer: torch.optim.Optimizer) -> dict[int, str]:
    """id of each parameter -> its name if the optimizer knows it, else "group.index"."""
    return {
        id(p): name
        for g, group in enumerate(optimizer.param_groups)
        for p, name in zip(
            group["params"],
            group.get("param_names") or [f"{g}.{i}" for i in range(len(group["params"]))],
            strict=True,
        )
    }


def _zeros(size: int, bucket: SampledBucket) -> Tensor:
    return torch.zeros(size, dtype=torch.float32, device=bucket.plan.rows.device)


def _has_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return (args[1] if len(args) > 1 else kwargs.get("closure")) is not None


def _require_kind(state: dict[str, Any], kind: str) -> None:
    if state["kind"] != kind:
        raise ValueError(f"the state's m is of kind {state['kind']!r}, this gauge's of kind {kind!r}: other optimizers")
