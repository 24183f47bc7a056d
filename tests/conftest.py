import os

import pytest
import torch

# Where there is no GPU, Triton kernels run in Triton's interpreter, which must be told before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from grgauge_kernels.backends import cpu


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=["reference", "avx512", "avx2", "portable"])
def backend(request):
    """A backend by name; the CPU kernel once for each instruction set."""
    if request.param == "reference":
        yield "reference"
        return
    usual = cpu.isa()
    if cpu.isa(request.param) != request.param:
        pytest.skip(f"this processor has no {request.param}")
    yield "cpu"
    cpu.isa(usual)
