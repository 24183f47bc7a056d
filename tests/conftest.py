import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch

# Where there is no GPU, Triton kernels run in Triton's interpreter, which must be told before triton is imported. Tests
# are small there: one thread does, here and in the processes that they start. A second one would mostly spin.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)

from grgauge_kernels import stream
from grgauge_kernels.backends import cpu

with suppress(ImportError):  # pytest may be all that a machine with a GPU has
    from hypothesis import settings

    settings.register_profile("no deadline", deadline=None)  # a machine that others use too may pause for a second
    settings.load_profile("no deadline")

TESTS = Path(__file__).parent

MARKS = {
    "ranks": ("distributed/*", "*ranks*.py"),
    "engines": ("engines/*", "integrations/*"),
    "static": ("static/*", "kernels/test_cuda_on_cpu.py"),
    "simulated": ("policy/test_simulated.py", "tuning/*", "judge/*", "cli/test_demo.py", "cli/test_report*.py"),
    "pages": ("docs/*",),
    "device": ("device/*",),
}
"""Marker -> the folders and files of tests that have it; `make test-fast` goes by them."""


def pytest_collection_modifyitems(config, items):
    for item in items:
        path = item.path.relative_to(TESTS) if item.path.is_relative_to(TESTS) else item.path
        for mark, patterns in MARKS.items():
            if any(path.match(pattern) for pattern in patterns):
                item.add_marker(mark)
    items.sort(key=lambda item: not any(item.get_closest_marker(mark) for mark in MARKS))  # the long ones first


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


@pytest.fixture(params=["compiled", "python"])
def lookup(request, monkeypatch):
    """How the facts of a `Stream` are looked up: by the compiled library, or in Python where it is not built."""
    if request.param == "python":
        monkeypatch.setattr(stream, "_through_dlpack", lambda: None)
    elif stream._through_dlpack() is None:
        pytest.skip("libgrgauge_cpu is not built")
    return request.param
