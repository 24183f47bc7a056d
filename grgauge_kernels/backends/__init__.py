"""One module a backend, all with the same three functions: unavailable(), measure_() and prepare_adamw_().

prepare_adamw_() allocates all the memory that it needs, and returns the call that does the rest and returns the sums:
when a step over several buckets runs out of memory, nothing has been changed yet.

`ops` documents what they must do, and is the only module that chooses among them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Update(NamedTuple):
    """What one call of `adamw_` is given: the arguments of `torch.ops.grgauge.adamw_`, by name and in its order.

    lr is not used where there is an lr_tensor. origins: int64 [segments], where each segment begins in the one flat
    buffer; None if offsets count from the segments themselves.
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    exp_avgs: Sequence[Tensor]
    exp_avg_sqs: Sequence[Tensor]
    rows: Tensor
    segments: int
    step: Tensor
    lr: float
    lr_tensor: Tensor | None
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    ema: Tensor | None
    previous: Tensor | None
    beta: float
    inv_scale: Tensor | None
    found_inf: Tensor | None
    clip: Tensor | None
    zero_grad: bool
    maximize: bool
    sums: bool
    backend: str | None = None
    seed: int = 0
    stochastic_rounding: bool = False
    origins: Tensor | None = None

    @property
    def bfloat16_moments(self) -> bool:
        """True if the moments are stored in bfloat16, and therefore rounded stochastically."""
        return self.exp_avgs[0].dtype == torch.bfloat16


class Repeated(NamedTuple):
    """A checked update, to be repeated with other gradients and another learning rate.

    tensors, step, numbers   what it was given: objects, the address of the step counts, and values
    update   without gradients; it holds the tensors, of which `prepare` has addresses only
    """

    tensors: tuple[object, ...]
    step: int
    numbers: tuple[object, ...]
    update: Update
    prepare: Callable[[Sequence[Tensor], float], Callable[[], Tensor]]

    def is_of(self, tensors: tuple[object, ...], numbers: tuple[object, ...]) -> bool:
        """True if these are the same objects, where they were, and equal numbers."""
        same = all(map(operator.is_, tensors, self.tensors)) and numbers == self.numbers
        return same and self.update.step.data_ptr() == self.step
