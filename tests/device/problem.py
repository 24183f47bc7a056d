"""What the device tests run the ops on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import grgauge_kernels as gk
from grgauge_kernels import CHUNK

LAYOUTS = ("loose", "misaligned", "flat")
SIZES = (0, 1, 3, 15, 16, 17, 997, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 513)
PLAIN = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


class Problem:
    """A bucket's random tensors on the device, the same for the same arguments.

    layout   loose: a tensor a segment. misaligned: the same, each off any alignment by one element. flat: views of one
             buffer, in which every segment but the first starts where the one before has left it
    """

    def __init__(
        self,
        sizes: Sequence[int] = SIZES,
        grad: torch.dtype = torch.float32,
        param: torch.dtype = torch.float32,
        layout: str = "loose",
        seed: int = 0,
        **sample: int,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.sizes, self.layout = list(sizes), layout

        def made(dtype: torch.dtype, scale: float = 1.0, positive: bool = False) -> tuple[list[Tensor], list[Tensor]]:
            drawn = [torch.randn(n, generator=generator) * scale for n in sizes]
            return lay([(t.abs() if positive else t).to(dtype) for t in drawn], layout)

        self.grads, self.grad_stream = made(grad)
        self.params, self.param_stream = made(param)
        self.exp_avgs, self.exp_avg_stream = made(torch.float32, 0.1)
        self.exp_avg_sqs, self.exp_avg_sq_stream = made(torch.float32, 0.01, positive=True)
        base = self.grad_stream[0] if layout == "flat" else None
        self.plan = gk.Bucket(self.grads, base=base).plan(**sample)
        self.ema, self.previous = (torch.randn(self.plan.numel, generator=generator).cuda() for _ in range(2))

    def measure(self, backend: str, states: bool = False, **options: Any) -> Tensor:
        return gk.measure_(self.grad_stream, self.plan, backend=backend, **self._states(states), **options)

    def adamw(self, backend: str, states: bool = False, **options: Any) -> Tensor:
        streams = (self.param_stream, self.grad_stream, self.exp_avg_stream, self.exp_avg_sq_stream)
        options = {"step": 3, **PLAIN, **self._states(states), **options}
        return gk.adamw_(*streams, self.plan, backend=backend, **options)

    def _states(self, wanted: bool) -> dict[str, Tensor]:
        return {"ema": self.ema, "previous": self.previous} if wanted else {}

    def states(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """A copy of each segment's (param, exp_avg, exp_avg_sq) on the host."""
        streams = (self.params, self.exp_avgs, self.exp_avg_sqs)
        return [tuple(t.cpu().clone() for t in segment) for segment in zip(*streams, strict=True)]

    def everything(self) -> list[Tensor]:
        """Every tensor that an op may change."""
        streams = (self.param_stream, self.grad_stream, self.exp_avg_stream, self.exp_avg_sq_stream)
        return [t for stream in streams for t in stream] + [self.ema, self.previous]


def lay(made: list[Tensor], layout: str) -> tuple[list[Tensor], list[Tensor]]:
    """Host tensors on the device: (the segments, the stream that an op takes for them)."""
    if layout == "loose":
        loose = [t.cuda() for t in made]
        return loose, loose
    buffer = torch.zeros(sum(t.numel() + 1 for t in made) + 1, dtype=made[0].dtype, device="cuda")
    views, start = [], 1
    for t in made:
        views.append(buffer[start : start + t.numel()].copy_(t))
        start += t.numel() + (1 if layout == "misaligned" else 0)
    return views, views if layout == "misaligned" else [buffer]


def scalar(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((), value, dtype=dtype, device="cuda")


def same_bits(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))
