"""What the compiled backends share: the C ABI of csrc/grgauge.h, and how a library is found and loaded."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch
from torch import Tensor

ABI = 1

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_NAME = {"win32": "{}.dll", "darwin": "lib{}.dylib"}


class Pass(ctypes.Structure):
    """`grgauge_pass`, field by field."""

    _fields_ = [
        ("rows", ctypes.c_void_p),
        ("chunks", ctypes.c_int64),
        ("segments", ctypes.c_int64),
        ("stats", ctypes.c_void_p),
        ("grads", ctypes.c_void_p),
        ("flat", ctypes.c_int32),
        ("grad_dtype", ctypes.c_int32),
        ("ema", ctypes.c_void_p),
        ("previous", ctypes.c_void_p),
        ("beta", ctypes.c_double),
        ("inv_scale", ctypes.c_void_p),
        ("params", ctypes.c_void_p),
        ("exp_avgs", ctypes.c_void_p),
        ("exp_avg_sqs", ctypes.c_void_p),
        ("param_dtype", ctypes.c_int32),
        ("step_per_segment", ctypes.c_int32),
        ("steps", ctypes.c_void_p),
        ("lr", ctypes.c_double),
        ("beta1", ctypes.c_double),
        ("beta2", ctypes.c_double),
        ("eps", ctypes.c_double),
        ("weight_decay", ctypes.c_double),
        ("found_inf", ctypes.c_void_p),
        ("clip", ctypes.c_void_p),
        ("zero_grad", ctypes.c_int32),
        ("maximize", ctypes.c_int32),
    ]

    def __init__(
        self,
        grads: list[Tensor],
        rows: Tensor,
        segments: int,
        stats: Tensor | None,
        ema: Tensor | None,
        previous: Tensor | None,
        beta: float,
        inv_scale: Tensor | None,
    ) -> None:
        """A pass that measures. The addresses of the gradients are left to the backend."""
        super().__init__()
        self.rows, self.chunks, self.segments, self.stats = rows.data_ptr(), rows.shape[0], segments, address(stats)
        self.flat = len(grads) == 1
        self.grad_dtype = DTYPES[grads[0].dtype] if grads else 0
        self.ema, self.previous, self.beta = address(ema), address(previous), beta
        self.inv_scale = address(inv_scale)

    def update(
        self,
        params: list[Tensor],
        step: Tensor,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        found_inf: Tensor | None,
        clip: Tensor | None,
        zero_grad: bool,
        maximize: bool,
    ) -> None:
        """Add AdamW; again without the addresses."""
        self.param_dtype = DTYPES[params[0].dtype] if params else 0
        self.step_per_segment = step.numel() > 1
        self.steps = step.data_ptr()
        self.lr, self.beta1, self.beta2, self.eps, self.weight_decay = lr, beta1, beta2, eps, weight_decay
        self.found_inf, self.clip = address(found_inf), address(clip)
        self.zero_grad, self.maximize = zero_grad, maximize


def address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def load(name: str, compiler: str) -> ctypes.CDLL | str:
    """The library `name` that `compiler` makes, or why there is none."""
    file = _NAME.get(sys.platform, "lib{}.so").format(name)
    # An editable install has two homes, the sources and the built library's; a wheel has one.
    homes = sys.modules["grgauge_kernels"].__path__
    found = [path for home in homes if (path := Path(home) / "lib" / file).exists()]
    if not found:
        return f"{file} is not built; run `pip install .` with {compiler} on the path"
    try:
        library = ctypes.CDLL(str(found[0]))
    except OSError as error:
        return f"{file} cannot be loaded: {error}"
    if library.grgauge_abi() != ABI:
        return f"{file} is of another version (ABI {library.grgauge_abi()}, not {ABI}); run `pip install .` again"
    library.grgauge_error.restype = ctypes.c_char_p
    return library


def check(library: ctypes.CDLL, op: str, code: int) -> None:
    """Raise RuntimeError for a code that is not 0."""
    if code:
        raise RuntimeError(f"{op}: {library.grgauge_error(code).decode()}")
