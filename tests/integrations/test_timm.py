"""timm makes our optimizer by its name."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(
        not (find_spec("timm") and find_spec("torchvision")),
        reason="timm imports torchvision, built for one torch: pip install timm torchvision",
    ),
]
EXAMPLE = Path(__file__).parents[2] / "examples" / "timm_optimizer.py"

OPERATORS = """
import torch
# torchvision's compiled operators load with the torch they were compiled for only; timm's optimizers need none of them.
operators = torch.library.Library("torchvision", "DEF")
try:
    import torchvision
except RuntimeError:
    import sys
    for name in [name for name in sys.modules if name.startswith("torchvision")]:
        del sys.modules[name]
    for name in ("nms", "qnms"):
        operators.define(f"{name}() -> ()")
"""
PROGRAM = """
import timm.optim
from timm.layers import create_conv2d
import grgauge
import grgauge.integrations.timm

layers = create_conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(256, 2)
model = torch.nn.Sequential(*layers)
options = {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.8, 0.9)}
for injected in ({}, {"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}):
    optimizer = timm.optim.create_optimizer_v2(model, "grgauge", **options, **injected)
    assert type(optimizer) is grgauge.AdamW
    # timm gives biases and norms a group without weight decay.
    groups = sorted((g["weight_decay"], g["lr"], g["betas"], len(g["params"])) for g in optimizer.param_groups)
    assert groups == [(0.0, 1e-3, (0.8, 0.9), 3), (0.1, 1e-3, (0.8, 0.9), 2)], groups
assert "grgauge" in timm.optim.list_optimizers()

gauge = grgauge.Gauge(optimizer, batch_size=8)
for _ in range(10):
    optimizer.zero_grad()
    gauge.split_backward(lambda x: model(x).square().mean(), torch.randn(8, 3, 8, 8))
    optimizer.step()
print(gauge.reading())
"""


def run(program):
    done = subprocess.run([sys.executable, "-c", OPERATORS + program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_optimizer_by_name_with_injected_arguments_trains_and_is_gauged():
    assert run(PROGRAM).startswith("Reading(step=10, batch_size=8, gr_t=")


def test_a_torchvision_for_another_torch_is_named(tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    broken = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import grgauge.integrations.timm"
    done = subprocess.run([sys.executable, "-c", broken], capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: grgauge.integrations.timm needs timm 1.0.12 or newer, with the torchvision")
    assert "(operator torchvision::nms does not exist)" in last


def test_the_example():
    printed = run(f"import runpy; runpy.run_path({str(EXAMPLE)!r})").splitlines()
    assert [line.split(":")[0] for line in printed] == [f"step {step}" for step in range(10, 51, 10)]
    assert "GR_T" in printed[-1]
    assert "GR_S" in printed[-1]
