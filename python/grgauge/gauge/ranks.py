"""Ranks as the groups of GR_S: each rank's gradient is measured in the module's own buffers, just before it is reduced.

    DDP      in a communication hook: the flat bucket before the all-reduce, and again after it
    FSDP2    in the reduce-scatter: its input, and its output (with HSDP: after the all-reduce over replicas)

Both times it is the same elements, so that what a sample misses cancels in the difference that the estimator uses. One
small all-reduce for each reading brings the ranks' sums together; other steps communicate nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import grgauge_kernels as gk

from .._torch_compat import GradBucket, flattened_group, fsdp_param_groups, has_comm_hook, reduce_scatter_base
from ..estimators import Groups
from .segments import GRAD_SQ, NONFINITE
from .unavailable import NON_FINITE, Unavailable

CommHook = Callable[[Any, GradBucket], torch.futures.Future[Tensor]]

PARTS = 64
"""Contiguous parts of a bucket. Their plain sums show whether a communication hook has returned the mean."""

LOSSY = 0.1
"""The relative error that those sums may have; |mean|^2 is then off by about its square. Rounding to bf16 gives 0.003,
PowerSGD of rank 1 about 1."""


class Ranks:
    """The gradient of each rank of a DDP or FSDP2 module, and their mean, at the steps that are read.

    module     DistributedDataParallel, or a root module of `fully_shard`
    sample     share of the elements to read, in (0, 1]
    seed       which of them
    due        returns True if the step in progress will be read
    inv_scale  returns the factor that undoes a GradScaler's scale, None without one
    comm_hook, state   DDP: the hook that then reduces, and its state; None is DDP's own all-reduce

    Raises TypeError for another kind of module, ValueError where a communication hook is there already.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        sample: float,
        seed: int,
        due: Callable[[], bool],
        inv_scale: Callable[[], Tensor | None],
        comm_hook: CommHook | None,
        state: Any,
    ) -> None:
        self._sample, self._seed, self._due, self._inv_scale = sample, seed, due, inv_scale
        self._plans: dict[tuple[Any, ...], gk.Plan] = {}
        self._checked = comm_hook is not None
        self.forget()
        self.params = {id(p) for p in module.parameters()}
        if isinstance(module, DistributedDataParallel):
            if has_comm_hook(module):
                raise ValueError(
                    "module has a communication hook already, and DDP takes only one: make it again, and pass the "
                    "hook to attach(module, comm_hook=..., state=...)"
                )
            self.group: Any = module.process_group
            self.replicas = self.size = dist.get_world_size(self.group)
            then = comm_hook or allreduce_hook
            module.register_comm_hook(self.group if comm_hook is None else state, self._measured(then))
        elif isinstance(module, FSDPModule):
            if comm_hook is not None:
                raise ValueError("comm_hook is for DDP; an FSDP2 module reduces by reduce-scatter")
            self._attach_fsdp(module)
        else:
            raise TypeError(
                f"module is {type(module).__name__}; it must be a DistributedDataParallel or a module that "
                "torch.distributed.fsdp.fully_shard has been applied to"
            )
        self.rank = dist.get_rank(self.group)

    @property
    def sharded(self) -> bool:
        """True if parameters are sharded, so that a step's sums are this rank's part only."""
        return self.replicas < self.size

    def forget(self) -> None:
        """Drop what has been seen of the step in progress."""
        self._samples = self._weight = 0.0
        # By buffer, to be added up in a fixed order: buffers may come back in any order, and in several threads.
        self._local: dict[tuple[Any, ...], Tensor] = {}
        self._mean: dict[tuple[Any, ...], Tensor] = {}
        self._calls: dict[tuple[Any, ...], int] = {}

    def count(self, samples: float | None, weight: float | None) -> None:
        """Add to this rank's share of the step."""
        self._samples += samples or 0.0
        self._weight += weight or 0.0

    def remove(self) -> None:
        """Stop measuring. The hooks stay, because neither DDP nor FSDP2 lets one be removed."""
        self._due = lambda: False

    def collect(self, device: torch.device) -> tuple[Tensor, int]:
        """This rank's row of the step's table, ready to be added up over ranks; and how often gradients were reduced.

        float64 [4 * ranks + 1]: for each rank sum g^2, non-finite elements, samples, weight; then its part of |mean|^2.
        With a comm_hook 2 * PARTS more: sums of parts of the mean of the ranks' gradients, and of the hook's result.
        """
        calls = max(self._calls.values(), default=0)
        table = torch.zeros(4 * self.size + 1 + 2 * PARTS * self._checked, dtype=torch.float64, device=device)
        if self._local and self._mean:
            local, mean = (torch.stack([seen[k] for k in sorted(seen)]).sum(0) for seen in (self._local, self._mean))
            own = table[4 * self.rank : 4 * self.rank + 4]
            own[0] = local[GRAD_SQ]
            own[1] = local[NONFINITE] + mean[NONFINITE]  # a sum in low precision may overflow by itself
            own[2], own[3] = self._samples, self._weight  # fills: they wait for nothing
            table[4 * self.size] = mean[GRAD_SQ] / self.replicas
            table[4 * self.size + 1 :] = torch.cat([local[len(gk.STATS) :], mean[len(gk.STATS) :]]) / self.size
        self.forget()
        return table, calls

    def groups(self, table: list[float], batch_size: float, calls: int) -> Groups | Unavailable:
        """The groups in a table that has been added up over ranks, or why there are none."""
        if self.size < 2:
            return Unavailable("there is one rank, and GR_S needs at least two")
        if calls == 0:
            return Unavailable("no gradients were reduced in the step")
        if calls > 1:
            return Unavailable(
                f"gradients were reduced {calls} times in the step; keep all micro-batches but the "
                "last from it (no_sync() of DDP, set_requires_gradient_sync(False) of FSDP2)"
            )
        squares, nonfinite, samples, weights = (table[k : 4 * self.size : 4] for k in range(4))
        mean_sq, parts = table[4 * self.size], table[4 * self.size + 1 :]
        if any(nonfinite) or not math.isfinite(mean_sq):
            return NON_FINITE
        if math.dist(parts[:PARTS], parts[PARTS:]) > LOSSY * math.hypot(*parts[:PARTS]):
            return Unavailable("comm_hook does not return the mean of the ranks' gradients, or not precisely enough")
        if (any(samples) and not all(samples)) or (any(weights) and not all(weights)):
            return Unavailable("micro_step() was given samples or weight on some ranks only")
        n = self.size
        sizes = samples if all(samples) else [batch_size / n] * n
        shares = [w / sum(weights) for w in weights] if all(weights) else [1.0 / n] * n
        # A mean over ranks: rank i brings n p_i G_i.
        return Groups([sq / (n * p) ** 2 for sq, p in zip(squares, shares, strict=True)], mean_sq, sizes, shares)

    def _measure(self, key: tuple[Any, ...], flat: Tensor, shards: int = 1) -> Tensor:
        """The six sums of a flat buffer of `shards` equal parts, scaled up from the sample."""
        key = (*key, flat.numel(), flat.dtype, flat.device, shards)
        if key not in self._plans:
            self._plans[key] = _plan(flat, self._sample, self._seed, shards)
        plan = self._plans[key]
        return gk.measure_([flat], plan, inv_scale=self._inv_scale())[0] * float(plan.scale[0])

    def _take_local(self, key: tuple[Any, ...], sums: Tensor) -> None:
        self._calls[key] = self._calls.get(key, 0) + 1
        self._local[key] = sums

    def _measured(self, then: CommHook) -> CommHook:
        """DDP's communication hook `then`, with the bucket measured before and after it."""

        def measured(key: tuple[Any, ...], flat: Tensor) -> Tensor:
            sums = self._measure(key, flat)
            return torch.cat([sums, _sums_of_parts(flat).to(sums.device)]) if self._checked else sums

        def hook(state: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
            if not self._due():
                return then(state, bucket)
            key = ("ddp", bucket.index())
            self._take_local(key, measured(key, bucket.buffer()))

            def after(future: torch.futures.Future[Any]) -> Tensor:
                value = future.value()
                reduced: Tensor = value[0] if isinstance(value, list) else value
                self._mean[key] = measured(key, reduced)
                return reduced

            return then(state, bucket).then(after)

        # DDP compares annotations with the types themselves, and postponed annotations are strings.
        hook.__annotations__ = {"bucket": GradBucket, "return": torch.futures.Future[Tensor]}
        return hook

    def _attach_fsdp(self, root: torch.nn.Module) -> None:
        modules = [m for m in root.modules() if isinstance(m, FSDPModule)]
        mesh = next(p.device_mesh for p in root.parameters() if isinstance(p, DTensor))
        if mesh.ndim > 2:
            raise ValueError(f"module is sharded over a mesh of {mesh.ndim} dimensions; data parallelism has 1 or 2")
        shard_group = mesh.get_group(mesh.ndim - 1)
        self.size, self.replicas = mesh.size(), mesh.size() // dist.get_world_size(shard_group)
        if self.replicas == self.size > 1:
            raise ValueError("module is replicated only, each of its shards on one rank; use DistributedDataParallel")
        self.group = shard_group if mesh.ndim == 1 else flattened_group(mesh)
        for m in modules:
            for group in fsdp_param_groups(m):
                if isinstance(group._reduce_scatter_comm, _MeasuredReduceScatter) or group._all_reduce_hook is not None:
                    raise ValueError("module has a gauge or an all-reduce hook already, and FSDP2 takes only one")
        for i, m in enumerate(modules):
            for group in fsdp_param_groups(m):
                comm = _MeasuredReduceScatter(self, ("fsdp", i), group._reduce_scatter_comm)
                m.set_custom_reduce_scatter(comm)
                m.set_all_reduce_hook(comm.after)


class _MeasuredReduceScatter(reduce_scatter_base()):  # type: ignore[misc]
    """FSDP2's reduce-scatter of one module, measured before it, and after it or the all-reduce that may follow."""

    def __init__(self, ranks: Ranks, key: tuple[Any, ...], inner: Any) -> None:
        self._ranks, self._key, self._inner = ranks, key, inner
        self._mean = 1.0  # the factor that makes the reduced gradient the mean of the inputs

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self._inner.allocate(size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        if self._ranks._due():
            if op not in (dist.ReduceOp.AVG, dist.ReduceOp.SUM):
                raise RuntimeError(
                    f"GR_S needs gradients reduced by AVG or SUM, not by {op} (a gradient divide factor)"
                )
            self._mean = 1.0 if op == dist.ReduceOp.AVG else 1.0 / self._ranks.size
            shards = dist.get_world_size(group)
            self._ranks._take_local(self._key, self._ranks._measure(self._key, input_tensor, shards))
        return self._inner(output_tensor, input_tensor, group, op, async_op)

    def after(self, reduced: Tensor) -> None:
        if self._ranks._due():
            self._ranks._mean[self._key] = self._ranks._measure(self._key, reduced) * self._mean**2


def _sums_of_parts(flat: Tensor) -> Tensor:
    """Sums of PARTS contiguous parts of a flat buffer, float64 [PARTS]."""
    size = max(flat.numel() // PARTS, 1)
    sums = torch.zeros(PARTS, dtype=torch.float64, device=flat.device)
    whole = flat[: PARTS * size].view(-1, size).sum(1, dtype=torch.float64)
    sums[: len(whole)] = whole
    return sums


def _plan(flat: Tensor, share: float, seed: int, shards: int) -> gk.Plan:
    """A sample of a flat buffer of `shards` equal parts: the same places in each, so that a shard can be read alone."""
    size = flat.numel() // shards
    rows = gk.Bucket([flat[:size]]).plan_rows(max(1, round(share * size)), seed)
    visited = int(rows[:, 2].sum())
    parts = [rows + np.array([0, size, 0, visited]) * r for r in range(shards)]
    return gk.Plan(gk.Bucket([flat]), np.concatenate(parts))
