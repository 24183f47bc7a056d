"""The weight matrices that GradES monitors: which ones a model has, and how training of one stops and resumes."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Scale = Literal["level", "element", "matrix"]

LEVEL_READINGS = 5
"""How many readings make a matrix's early level, their mean: single ones scatter by a few per cent."""

LORA = re.compile(r"lora_([ab])(?=\.|$)", re.IGNORECASE)
WRAPPERS = frozenset(("_orig_mod", "_checkpoint_wrapped_module"))
"""What wrappers for torch.compile and activation checkpointing add to the names of modules."""


@dataclass
class Matrix:
    """One weight matrix or LoRA pair.

    params  its parameters
    owners  the modules that hold them, with the names there; several where weights are tied
    frozen  the step whose reading froze it
    below   readings in a row below tau
    early   the readings whose mean is its level
    """

    name: str
    params: list[nn.Parameter] = field(default_factory=list)
    owners: list[tuple[nn.Module, str]] = field(default_factory=list)
    frozen: int | None = None
    below: int = 0
    early: list[float] = field(default_factory=list)
    _halted: bool = False
    _detours: list[Any] = field(default_factory=list)

    @property
    def numel(self) -> int:
        return sum(p.numel() for p in self.params)

    @property
    def level(self) -> float | None:
        return sum(self.early) / LEVEL_READINGS if len(self.early) == LEVEL_READINGS else None

    def in_units_of(self, scale: Scale, value: float) -> float:
        """A mean over elements, in the units of tau; NaN before there is a level."""
        if scale == "level":
            return value / self.level if self.level else math.nan
        return value if scale == "element" else value * self.numel

    def drop_gradients(self) -> None:
        for p in self.params:
            p.grad = None

    def thaw(self) -> None:
        """Train on. In this step only some ways of freezing have a gradient, so it is dropped."""
        self.frozen, self.below = None, 0
        self.drop_gradients()

    def halt(self, detour: bool | None = None) -> None:
        """Stop computing the gradient, from the next forward on."""
        if self._halted:
            return
        self._halted = True
        if detour is None:
            # FSDP2 looks at requires_grad in every forward, DDP only once, and a module cannot know that it is in DDP.
            detour = _many_ranks() and not any(hasattr(p, "device_mesh") for p in self.params)
        if detour:
            self._detours = [hook for owner in self.owners for hook in _detour(*owner)]
            return
        for p in self.params:
            p.requires_grad_(False)

    def resume(self) -> None:
        """Resume computing the gradient."""
        if not self._halted:
            return
        self._halted = False
        for hook in self._detours:
            hook.remove()
        self._detours = []
        for p in self.params:
            p.requires_grad_(True)


def monitored(model: nn.Module, optimizer: torch.optim.Optimizer, modules: str) -> list[Matrix]:
    """The matrices that `modules` names. Raises ValueError if there is none."""
    model = model.module if isinstance(model, DistributedDataParallel) else model
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, p in module.named_parameters(recurse=False):
            owners.setdefault(id(p), []).append((module, attribute))
    trained = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    inside = _inside_blocks(model)
    matrices: dict[str, Matrix] = {}
    automatic: set[str] = set()
    for qualified, p in model.named_parameters():
        if id(p) not in trained or p.dim() < 2 or p.numel() == 0:
            continue
        parts = [part for part in qualified.split(".") if part not in WRAPPERS]
        name = LORA.sub("lora", ".".join(parts)).removesuffix(".weight")
        matrix = matrices.setdefault(name, Matrix(name))
        matrix.params.append(p)
        matrix.owners += owners[id(p)]
        if p.dim() == 2 and all(
            id(module) in inside
            and not isinstance(module, (nn.Embedding, nn.EmbeddingBag))
            and (attribute.endswith("weight") or LORA.fullmatch(attribute))
            for module, attribute in owners[id(p)]
        ):
            automatic.add(name)
    if modules == "auto":
        found = [matrix for name, matrix in matrices.items() if name in automatic]
    else:
        try:
            found = [matrix for name, matrix in matrices.items() if re.search(modules, name)]
        except re.error as error:
            raise ValueError(f"modules is {modules!r}; it must be 'auto' or a regular expression: {error}") from error
    if not found:
        names = ", ".join(matrices) or "none"
        hint = "no 2-D weights inside repeated blocks; give a regular expression" if modules == "auto" else "no matrix"
        raise ValueError(f"modules is {modules!r} and matches {hint}. The matrices that the optimizer trains: {names}")
    return found


def _inside_blocks(model: nn.Module) -> set[int]:
    """ids of all modules inside repeated blocks."""
    inside: set[int] = set()
    for container in model.modules():
        if isinstance(container, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            blocks = [child for child in container.children() if any(True for _ in child.children())]
            kinds = Counter(map(type, blocks))
            for block in blocks:
                # A list of modules is always a sequence of blocks; other containers only with at least two of a kind.
                if isinstance(container, nn.ModuleList) or kinds[type(block)] > 1:
                    inside.update(map(id, block.modules()))
    return inside


class _Touch(torch.autograd.Function):
    """x, with an edge to a weight that carries an undefined gradient: DDP then counts the weight as ready."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _detour(module: nn.Module, name: str) -> tuple[Any, Any]:
    """Make a module compute with a detached weight; return the two hooks that do it."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        values = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point()]
        if not values:
            return None
        weight = module._parameters[name]
        assert weight is not None
        module.__dict__[name] = weight.detach()  # an attribute is found before the parameter, which stays registered
        x = values[0]
        touched = _Touch.apply(x, weight)
        # Self-attention recognises by identity that query, key and value are the same.
        args = tuple(touched if v is x else v for v in args)
        return args, {key: touched if v is x else v for key, v in kwargs.items()}

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        module.__dict__.pop(name, None)

    return (
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, always_call=True),
    )


def _many_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
