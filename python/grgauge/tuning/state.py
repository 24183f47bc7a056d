"""All that a training depends on between two steps: taken, and put back.

On several ranks of a sharded model each holds its own; `gather` makes of them what rank 0 saves, `own` what a rank
goes on with.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..optim import is_sharded
from .errors import TrainingError
from .ranks import World, shard, unshard


def random_state() -> tuple[Any, ...]:
    """Of Python's, numpy's and torch's global generators."""
    return (
        random.getstate(),
        np.random.get_state(),  # noqa: NPY002
        torch.get_rng_state(),
        torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    )


def set_random_state(state: tuple[Any, ...]) -> None:
    python, numpy, cpu, cuda = state
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002
    torch.set_rng_state(cpu)
    if cuda and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(cuda)


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


def take(model: nn.Module, optimizer: torch.optim.Optimizer, others: Sequence[Any]) -> dict[str, Any]:
    """The states of what is trained; of a sharded model, what this rank holds."""
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "others": [other.state_dict() for other in others],
    }


def put(state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, others: Sequence[Any]) -> None:
    """Load what `take` has given. Raises TrainingError for another number of others."""
    if len(state["others"]) != len(others):
        raise TrainingError(f"trial.watch() got {len(others)} others; the saved run had {len(state['others'])}")
    if is_spread(model):
        state = {
            **state,
            "model": shard(state["model"], model.state_dict()),
            "optimizer": shard(state["optimizer"], _params_as_moments(state["optimizer"], optimizer)),
            "others": [shard(saved, other.state_dict()) for saved, other in zip(state["others"], others, strict=True)],
        }
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    for other, saved in zip(others, state["others"], strict=True):
        other.load_state_dict(saved)


def gather(state: dict[str, Any], model: nn.Module, world: World) -> dict[str, Any]:
    """The state of all ranks, for rank 0 to save: each one's own parts of it, and one copy of what is alike."""
    sharded = is_spread(model)
    alike = {name: unshard(state[name]) if sharded else state[name] for name in ("model", "optimizer", "others")}
    gauges = world.gather(state["gauge"]) if sharded else [state["gauge"]]
    return {**state, **alike, "gauge": gauges, "random": world.gather(state["random"])}


def own(state: dict[str, Any], world: World) -> dict[str, Any]:
    """What `gather` has made, as this rank's; on another number of ranks random numbers begin anew."""
    gauges = state["gauge"]
    return {
        **state,
        "gauge": gauges[world.rank if len(gauges) == world.size else 0],
        "random": state["random"][world.rank] if len(state["random"]) == world.size else None,
    }


def is_spread(model: nn.Module) -> bool:
    """True if a parameter is sharded over ranks."""
    return any(map(is_sharded, model.parameters()))


def _params_as_moments(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The parameters, in the place of each tensor of an optimizer's state that is sharded as they are."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    indices = [index for group in state["param_groups"] for index in group["params"]]
    return {
        "state": {
            index: {
                name: p
                for name, value in state["state"].get(index, {}).items()
                if isinstance(value, Tensor) and value.shape == p.shape
            }
            for index, p in zip(indices, params, strict=True)
        }
    }
