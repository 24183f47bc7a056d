"""What the Triton backend is tested on: random tensors, laid out in three ways, on a GPU or in the interpreter."""

from __future__ import annotations

import pytest
import torch

import grgauge_kernels as gk
from grgauge_kernels.backends import triton as backend

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
UNAVAILABLE = backend.unavailable(DEVICE)
needs_triton = pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))

LAYOUTS = ("loose", "misaligned", "flat")
HYPER = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def lay(tensors, layout):
    """Tensors -> (the segments, laid out as told; the list that an op takes; the flat buffer or None)."""
    if layout == "loose":
        return tensors, tensors, None
    pad = 8 if layout == "flat" else 1  # in a flat buffer segments start aligned; else one element off
    starts, extent = [], pad
    for t in tensors:
        starts.append(extent)
        extent += -(-t.numel() // 8) * 8 + pad
    buffer = tensors[0].new_zeros(extent)
    views = [buffer[s : s + t.numel()].copy_(t) for s, t in zip(starts, tensors, strict=True)]
    return views, (views if layout == "misaligned" else [buffer]), (None if layout == "misaligned" else buffer)


class Problem:
    """Random gradients, parameters and states of `sizes`, and a plan over them; the same for the same arguments."""

    def __init__(self, sizes, dtype, layout="loose", param_dtype=torch.float32, seed=0, **sample):
        generator = torch.Generator().manual_seed(seed)

        def made(dtype, scale=1.0):
            tensors = [(torch.randn(n, generator=generator) * scale).to(DEVICE, dtype) for n in sizes]
            return lay(tensors, layout)

        self.segments, self.grads, base = made(dtype)
        self.params_of, self.params, _ = made(param_dtype)
        self.exp_avgs_of, self.exp_avgs, _ = made(torch.float32, 0.1)
        self.exp_avg_sqs_of, self.exp_avg_sqs, _ = made(torch.float32, 0.1)
        for v in self.exp_avg_sqs:
            v.abs_()
        self.plan = gk.Bucket(self.segments, base=base).plan(**sample)
        self.ema, self.previous = (torch.randn(self.plan.numel, generator=generator).to(DEVICE) for _ in range(2))

    def measure(self, backend="triton", states=True, **options):
        if states:
            options |= {"ema": self.ema, "previous": self.previous}
        return gk.measure_(self.grads, self.plan, backend=backend, **options).cpu()

    def adamw(self, step=1.0, backend="triton", states=False, **options):
        if states:
            options |= {"ema": self.ema, "previous": self.previous}
        if isinstance(step, float):
            step = scalar(step)
        streams = (self.params, self.grads, self.exp_avgs, self.exp_avg_sqs)
        return gk.adamw_(*streams, self.plan, step=step, backend=backend, **{**HYPER, **options}).cpu()

    def everything(self):
        """Every tensor that an op may change."""
        return [*self.params, *self.grads, *self.exp_avgs, *self.exp_avg_sqs, self.ema, self.previous]


def scalar(value, dtype=torch.float32):
    return torch.tensor(value, dtype=dtype, device=DEVICE)


def same_bits(a, b):
    return len(a) == len(b) and all(x.equal(y) for x, y in zip(a, b, strict=True))
