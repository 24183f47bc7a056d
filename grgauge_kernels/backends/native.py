"""What the compiled backends share: the C ABI of csrc/grgauge.h, and how a library is found and loaded."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import Update

ABI = 3

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
        ("moment_dtype", ctypes.c_int32),
        ("stochastic_rounding", ctypes.c_int32),
        ("seed", ctypes.c_uint32),
        ("origins", ctypes.c_void_p),
    ]

    def __init__(
        self,
        grads: Sequence[Tensor],
        rows: Tensor,
        segments: int,
        stats: Tensor | None,
        ema: Tensor | None,
        previous: Tensor | None,
        beta: float,
        inv_scale: Tensor | None,
    ) -> None:
        """A pass that measures. The backend adds the addresses of the gradients."""
        self.rows, self.chunks, self.segments = rows.data_ptr(), rows.shape[0], segments
        self.flat = len(grads) == 1
        self.grad_dtype = DTYPES[grads[0].dtype] if grads else 0
        self.beta = beta
        # Fields that are not set stay null.
        if stats is not None:
            self.stats = stats.data_ptr()
        if ema is not None:
            self.ema = ema.data_ptr()
        if previous is not None:
            self.previous = previous.data_ptr()
        if inv_scale is not None:
            self.inv_scale = inv_scale.data_ptr()

    def update(self, u: Update, step: Tensor, lr: float) -> None:
        """Add AdamW, without addresses as well."""
        self.param_dtype = DTYPES[u.params[0].dtype]
        self.moment_dtype = DTYPES[u.exp_avgs[0].dtype]
        self.step_per_segment = step.numel() > 1
        self.steps = step.data_ptr()
        self.lr, self.beta1, self.beta2, self.eps, self.weight_decay = lr, u.beta1, u.beta2, u.eps, u.weight_decay
        self.zero_grad, self.maximize = u.zero_grad, u.maximize
        self.stochastic_rounding, self.seed = u.stochastic_rounding, u.seed
        if u.found_inf is not None:
            self.found_inf = u.found_inf.data_ptr()
        if u.clip is not None:
            self.clip = u.clip.data_ptr()
        if u.origins is not None:
            self.origins = u.origins.data_ptr()


def address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def load(name: str, compiler: str) -> ctypes.CDLL | str:
    """The library `name` that `compiler` makes, or why there is none."""
    file = _NAME.get(sys.platform, "lib{}.so").format(name)
    # An editable install has two folders, one of the sources and one of the built library; a wheel has one.
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
