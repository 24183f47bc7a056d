"""The optimizer steps that bench/gpu.py compares; each variant has tensors of its own, with the same values.

    torch       torch.optim.AdamW(fused=True)
    foreach     torch.optim.AdamW(foreach=True)
    by_hand     torch's fused AdamW, then foreach norms of the gradients, their EMA by foreach, and the norms of that
    torch_clip  clip_grad_norm_(foreach=True), then torch's fused AdamW
    plain       grgauge.AdamW, no gauge
    gauged      grgauge.AdamW with a grgauge.Gauge at its defaults
    sampled     grgauge.AdamW with a gauge that takes a pass of its own over its default sample, 50 M parameters
    clip        grgauge.AdamW(max_grad_norm=1), gauged; a gauge then takes a sampled pass of its own
    states      gauged, with moments in bfloat16; bfloat16 parameters are then rounded stochastically as they are
    clip_states clip, likewise

of three kinds of numbers:

    fp32        everything float32
    bf16        parameters and gradients bfloat16; our moments float32 but for states, torch's bfloat16
    bf16g       gradients bfloat16, parameters and moments float32. torch.nn.Parameter does not take such a gradient, so
                ours are calls of the ops, sums travelling to the host every fifth step; torch's variants first copy
                the gradients to float32 ones, as its users must
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import grgauge
import grgauge_kernels as gk
from grgauge.gauge.transfer import Transfer

SEED = 0
BETA, BETAS, LR, EPS, DECAY = 0.9, (0.9, 0.999), 1e-3, 1e-8, 1e-2
MAX_NORM = 1.0
SAMPLE = 50_000_000
EVERY = 5

TORCHS = ("torch", "foreach", "by_hand", "torch_clip")
STATES = ("states", "clip_states")
CLIPPED = ("clip", "clip_states")
LABELS = ("fp32", "bf16", "bf16g")

# What a step must move: gradients are read, parameters and both moments read and written.
OUR_BYTES = {"fp32": 4 + 3 * 8, "bf16": 2 + 4 + 2 * 8, "bf16g": 2 + 3 * 8}
STATES_BYTES = {"fp32": 4 + 8 + 2 * 4, "bf16": 2 + 4 + 2 * 4, "bf16g": 2 + 8 + 2 * 4}
TORCHS_BYTES = {"fp32": 4 + 3 * 8, "bf16": 2 + 3 * 4, "bf16g": 2 + 4 + 4 + 3 * 8}
"""Per parameter and step."""

HELD_BYTES = {"fp32": 17, "bf16": 13, "bf16g": 19}
"""Per parameter and variant, about: to tell beforehand whether a configuration fits."""


def moved(variant: str, label: str) -> int:
    """Bytes that a step must move per parameter."""
    kinds = TORCHS_BYTES if variant in TORCHS else STATES_BYTES if variant in STATES else OUR_BYTES
    return kinds[label]


def sizes(numel: int, tensors: int) -> list[int]:
    """One tensor, or tensors of many sizes, a few of them holding most elements, as in a model."""
    if tensors == 1:
        return [numel]
    weights = np.random.default_rng(SEED).lognormal(sigma=1.5, size=tensors)
    counts = np.maximum(1, (numel * weights / weights.sum()).astype(int))
    counts[counts.argmax()] += numel - counts.sum()
    return [int(n) for n in counts]


def make(
    variant: str, label: str, numel: int, tensors: int, flat: bool, device: torch.device, backend: str | None = None
) -> Training | Ops:
    shapes = sizes(numel, tensors)
    if variant in TORCHS or label != "bf16g":
        return Training(variant, label, shapes, flat and variant not in TORCHS, device, backend)
    return Ops(variant, shapes, flat, device, backend)


class Training:
    """Parameters, gradients and an optimizer."""

    def __init__(
        self, variant: str, label: str, shapes: list[int], flat: bool, device: torch.device, backend: str | None
    ) -> None:
        self.generator = torch.Generator(device).manual_seed(SEED)
        dtype = torch.bfloat16 if label == "bf16" else torch.float32
        self.params = [
            torch.nn.Parameter(torch.randn(n, device=device, dtype=dtype, generator=self.generator)) for n in shapes
        ]
        for p in self.params:
            p.grad = torch.zeros_like(p)
        cast = label == "bf16g"
        self.sources = [torch.zeros_like(p, dtype=torch.bfloat16) for p in self.params] if cast else []
        self.gauge: grgauge.Gauge | None = None
        self.optimizer: torch.optim.Optimizer
        if variant in TORCHS:
            implementation = {"foreach": True} if variant == "foreach" else {"fused": True}
            self.optimizer = torch.optim.AdamW(self.params, lr=LR, weight_decay=DECAY, **implementation)
        else:
            self.optimizer = grgauge.AdamW(
                self.params,
                lr=LR,
                weight_decay=DECAY,
                flat=flat,
                max_grad_norm=MAX_NORM if variant in CLIPPED else None,
                state_dtype=torch.bfloat16 if variant in STATES else torch.float32,
                stochastic_rounding=variant in STATES,
                backend=backend,
            )
        if variant not in (*TORCHS, "plain"):
            # A beta other than the optimizer's cannot use the optimizer's moment: such a gauge reads a sample instead.
            beta = 0.8 if variant == "sampled" else BETA
            self.gauge = grgauge.Gauge(self.optimizer, 256, every=EVERY, sample=SAMPLE, beta=beta)
        self.step: Callable[[], Any] = {"by_hand": self._by_hand, "torch_clip": self._clipped}.get(
            variant, self._cast if cast else self.optimizer.step
        )
        if variant == "by_hand":
            self.emas = [torch.zeros_like(p, requires_grad=False) for p in self.params]

    def renew(self) -> None:
        """Draw new gradients in place."""
        for grad in self.sources or self._grads():
            grad.normal_(generator=self.generator)

    def finite(self) -> bool:
        read = self.gauge is None or self.gauge.reading() is not None
        return read and all(bool(p[:1000].isfinite().all()) for p in self.params)

    def _grads(self) -> list[Tensor]:
        return [p.grad for p in self.params if p.grad is not None]

    def _cast(self) -> None:
        if self.sources:
            torch._foreach_copy_(self._grads(), self.sources)
        self.optimizer.step()

    def _clipped(self) -> None:
        if self.sources:
            torch._foreach_copy_(self._grads(), self.sources)
        torch.nn.utils.clip_grad_norm_(self.params, MAX_NORM, foreach=True)
        self.optimizer.step()

    def _by_hand(self) -> None:
        self._cast()
        grads = self._grads()
        self.grad_norm = torch.stack(torch._foreach_norm(grads)).norm()
        torch._foreach_lerp_(self.emas, grads, 1 - BETA)
        self.ema_norm = torch.stack(torch._foreach_norm(self.emas)).norm()


class Ops:
    """Our kernels on float32 parameters and bfloat16 gradients, called as an optimizer would."""

    def __init__(self, variant: str, shapes: list[int], flat: bool, device: torch.device, backend: str | None) -> None:
        self.variant, self.backend = variant, backend
        self.generator = torch.Generator(device).manual_seed(SEED)

        def stream(dtype: torch.dtype) -> tuple[list[Tensor], Tensor | None]:
            if not flat:
                return [torch.zeros(n, dtype=dtype, device=device) for n in shapes], None
            starts = np.cumsum([0] + [-(-n // 64) * 64 for n in shapes])
            base = torch.zeros(int(starts[-1]), dtype=dtype, device=device)
            return [base[s : s + n] for s, n in zip(starts.tolist(), shapes, strict=False)], base

        moment = torch.bfloat16 if variant in STATES else torch.float32
        (self.params, param), (self.grads, grad), (firsts, first), (seconds, second) = (
            stream(dtype) for dtype in (torch.float32, torch.bfloat16, moment, moment)
        )
        for p in self.params:
            p.normal_(generator=self.generator)
        loose = (self.params, self.grads, firsts, seconds)
        bases = (param, grad, first, second)
        self.streams = [[base] if base is not None else tensors for tensors, base in zip(loose, bases, strict=True)]
        bucket = gk.Bucket(self.grads, base=grad)
        self.plan = bucket.plan()
        self.steps = torch.zeros(len(shapes), device=device)
        if variant in ("sampled", *CLIPPED):
            self.sample = bucket.plan(sample=SAMPLE)
            self.ema = torch.zeros(self.sample.numel, device=device)
        self.rows: list[Tensor] = []
        self.arrived: Transfer | None = None

    def renew(self) -> None:
        for grad in self.grads:
            grad.normal_(generator=self.generator)

    def finite(self) -> bool:
        read = self.variant == "plain" or self.arrived is not None
        return read and all(bool(p[:1000].isfinite().all()) for p in self.params)

    def step(self) -> None:
        clip, grads, stats = None, self.streams[1], None
        if self.variant in CLIPPED:
            norm = gk.measure_(grads, self.plan, backend=self.backend)[:, 0].sum().sqrt()
            clip = (MAX_NORM / (norm + 1e-6)).clamp(max=1.0).float()
        if self.variant in ("sampled", *CLIPPED):
            stats = gk.measure_(grads, self.sample, ema=self.ema, beta=BETA, backend=self.backend)
        self.steps.add_(1)
        sums = self.variant in ("gauged", "states")
        seen = gk.adamw_(
            *self.streams, self.plan, step=self.steps, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, clip=clip,
            sums=sums, backend=self.backend,
        )  # fmt: skip
        stats = seen if sums else stats
        if stats is not None:
            self.rows.append(stats)
            if len(self.rows) == EVERY:
                self.arrived, self.rows = Transfer([torch.stack(self.rows)]), []


class Roof:
    """A plain copy that moves as many bytes as the step it stands beside; in pieces of at most 2 GiB, twice."""

    def __init__(self, numel: int, label: str, device: torch.device) -> None:
        half = OUR_BYTES[label] * numel // 2
        self.pieces = -(-half // 2**31)
        floats = half // self.pieces // 4
        self.source = torch.randn(floats, device=device)
        self.target = torch.zeros_like(self.source)

    def step(self) -> None:
        for _ in range(self.pieces):
            self.target.copy_(self.source)

    def renew(self) -> None:
        """Nothing: a copy takes as long whatever it copies."""

    def finite(self) -> bool:
        return True
