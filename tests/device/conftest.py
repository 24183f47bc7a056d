"""The device suite: everything here needs a GPU, and is skipped with a reason where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from grgauge_kernels.ops import BACKENDS

HERE = Path(__file__).parent
NAMES = ("reference", "triton", "cuda")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            # What a driver, a compiler or a prototype feature of torch warns of is no failure of ours.
            item.add_marker(pytest.mark.filterwarnings("default"))
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def _runs(name: str, device: torch.device) -> str:
    reason = BACKENDS[name].unavailable(device)
    if reason is not None:
        pytest.skip(f"backend {name!r}: {reason}")
    return name


@pytest.fixture(params=NAMES)
def backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    """Every backend that runs on the GPU, by name."""
    return _runs(request.param, device)


@pytest.fixture(params=[name for name in NAMES if name != "reference"])
def kernel(request: pytest.FixtureRequest, device: torch.device) -> str:
    """The same without the reference, which reads the plan on the host and so waits for the device."""
    return _runs(request.param, device)
