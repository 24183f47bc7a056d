"""Every private name of torch that grgauge uses: each one here, once, with the reason for it.

All are in torch 2.11 and in 2.13, the versions that the tests have run with. A torch without one of them is refused
with a message that names it. (grgauge_kernels uses a single one, torch._C._len_torch_dispatch_stack, in ops.py, to find
out whether ops are being recorded.)
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def _private(module: str, name: str, reason: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"grgauge needs {module}.{name}, {reason}, and torch {torch.__version__} has none: install a torch that "
            "grgauge is tested with, 2.11 to 2.13, or a newer grgauge"
        ) from error


# The public name, torch.compiler.disable, imports the whole compiler.
disable_dynamo: Callable[[Any], Any] = _private("torch._compile", "_disable_dynamo", "to leave a compiled graph")

# An op that only calls back must neither be dropped from a graph nor moved in it.
_EFFECTS = "torch._higher_order_ops.effects"
_effect_type = _private(_EFFECTS, "_EffectType", "to keep an op in its place in a compiled graph")
_register_effectful_op = _private(_EFFECTS, "_register_effectful_op", "to keep an op in its place in a compiled graph")

# Hooks on every optimizer's step: there is no public way to see whether there are any.
_HOOKS = "torch.optim.optimizer", "to run the hooks of all optimizers"
_global_pre_hooks = _private(_HOOKS[0], "_global_optimizer_pre_hooks", _HOOKS[1])
_global_post_hooks = _private(_HOOKS[0], "_global_optimizer_post_hooks", _HOOKS[1])

# The lazy initialisation of torch's own Adam, for parameters that its code updates.
init_states_like_torch: Callable[..., bool] = _private("torch.optim", "Adam", "to let it update")._init_group


# The argument of DDP's hook, whose annotation must name this very class; None where torch has no distributed package.
GradBucket: Any = getattr(torch.distributed, "GradBucket", None)


def keep_in_order(op: Any) -> None:
    """Register an op that stays where it is in a compiled graph."""
    _register_effectful_op(op, _effect_type.ORDERED)


def has_step_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """True if a step has hooks to run: its optimizer's own, or those of all optimizers."""
    own = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    return bool(own or _global_pre_hooks or _global_post_hooks)


def is_profiled() -> bool:
    """True while torch.profiler is recording: a step then has to name itself."""
    return torch.autograd.profiler._is_profiler_enabled


def unwrapped_step(step: Callable[..., Any]) -> None:
    """Keep Optimizer.__init__ from wrapping this step in bookkeeping for hooks and profiler, a fifth of a small step.

    torch sets `hooked` on a step that is wrapped already.
    """
    step.hooked = True  # type: ignore[attr-defined]


def loss_scale(scaler: torch.amp.GradScaler) -> Tensor | None:
    """The scale as a tensor: get_scale(), the public way, waits for the device."""
    return scaler._scale


def scaling_attempt(scaler: torch.amp.GradScaler) -> object:
    """An object that each update() replaces: two attempts at a step have different ones."""
    return scaler._per_optimizer_states


def has_comm_hook(module: nn.parallel.DistributedDataParallel) -> bool:
    """True if the module has a communication hook; DDP takes only one."""
    return bool(module._comm_hooks)


def reduce_scatter_base() -> type:
    """The base class that FSDP2's set_custom_reduce_scatter expects. Raises ImportError where there is none."""
    base: type = _private("torch.distributed.fsdp._fully_shard._fsdp_api", "ReduceScatter", "to read FSDP2's ranks")
    return base


def fsdp_param_groups(module: Any) -> list[Any]:
    """FSDP2's groups of parameters of one module: a list in newer versions, one in older ones."""
    state = module._get_fsdp_state()
    several: list[Any] | None = getattr(state, "_fsdp_param_groups", None)
    return several or [group for group in [getattr(state, "_fsdp_param_group", None)] if group]


def flattened_group(mesh: Any) -> Any:
    """The process group of all ranks of a mesh of several dimensions."""
    return mesh._flatten().get_group()


def local_shape_and_offset(shape: Any, mesh: Any, placements: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What part of a tensor of this shape a rank of the mesh holds: its shape, and where it begins."""
    module = "torch.distributed.tensor._utils"
    find = _private(module, "compute_local_shape_and_global_offset", "to number the elements of a shard")
    found: tuple[tuple[int, ...], tuple[int, ...]] = find(shape, mesh, placements)
    return found
