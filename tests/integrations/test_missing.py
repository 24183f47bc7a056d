"""A framework that is missing or too old is named in one sentence, with what to install."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel

from grgauge import AdamW, Gauge

pytestmark = pytest.mark.engines

ROOT = Path(__file__).parents[2]

BLOCKED = """
import sys
sys.modules[{framework!r}] = None  # as if it were not installed: importing it raises
import grgauge.integrations.{framework}
"""


def oldest(framework):
    """What the framework's extra asks for."""
    found = re.search(
        rf'^\w+ = \["{framework}(?:\[\w+\])?>=([\d.]+)', (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    )
    return found.group(1)


@pytest.mark.parametrize(
    ("framework", "extra"),
    [
        ("transformers", "transformers"),
        ("lightning", "lightning"),
        ("optuna", "tune"),
        ("ray", "ray"),
        ("timm", "timm"),
    ],
)
def test_a_missing_framework(framework, extra):
    run = subprocess.run([sys.executable, "-c", BLOCKED.format(framework=framework)], capture_output=True, text=True)
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: grgauge.integrations.{framework} needs {framework}")
    assert last.endswith(f"pip install 'grgauge-kernels[{extra}]'")


@pytest.mark.parametrize(
    ("framework", "version"),
    [("transformers", "5.9.0"), ("lightning", "2.4.0"), ("optuna", "3.6.2"), ("ray", "2.43.0")],
)
def test_a_framework_that_is_too_old(framework, version, monkeypatch):
    monkeypatch.setattr(pytest.importorskip(framework), "__version__", version)
    monkeypatch.delitem(sys.modules, f"grgauge.integrations.{framework}", raising=False)
    with pytest.raises(ImportError, match=rf"needs {framework} {oldest(framework)} or newer, not {version}$"):
        importlib.import_module(f"grgauge.integrations.{framework}")


@pytest.mark.parametrize("framework", ["transformers", "lightning", "optuna", "ray", "timm"])
def test_the_page_names_the_oldest_version(framework):
    page = (ROOT / f"docs/integrations/{framework}.md").read_text()
    assert re.search(rf"It needs {framework}( Tune)? {oldest(framework)} or newer", page, re.IGNORECASE)


def test_the_oldest_version_itself_is_new_enough():
    from grgauge.integrations.versions import require_version

    for version in ("2.4.0", "2.4.0rc1", "2.10", "3.0.0"):
        require_version("lightning", version, (2, 4))


@pytest.mark.filterwarnings("ignore:.*FSDP:FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_fsdp1_is_refused():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        module = FullyShardedDataParallel(torch.nn.Linear(4, 4), device_id=torch.device("cpu"))
        with pytest.raises(TypeError, match=r"module is FullyShardedDataParallel; it must be .*\.fully_shard"):
            Gauge(AdamW(module.parameters()), 8).attach(module)
    finally:
        dist.destroy_process_group()
