"""The benchmark tables of rows that are not there yet, or made up: what stands in them, and what is refused."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RATIOS = {"torch": 1.0, "torch_clip": 2.0, "states": 0.7, "clip_states": 1.2, "torch_bf16": 0.6, "stochastic": 0.45}
LOSSES = {"torch": (1.0, 2.0, 3.0), "plain": (1.0, 2.0, 3.0), "states": (1.1, 2.1, 3.4), "torch_bf16": (9.0,)}


@pytest.fixture
def root(tmp_path):
    """A copy of the pages and rows, in which made-up ones stand in place of those of steps that move fewer bytes."""
    for name in ("README.md", "docs/speed.md", "docs/large-models.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "bench" / "results", tmp_path / "bench" / "results")
    own = tmp_path / "bench/results/adamw.csv"
    own.write_text("".join(line for line in own.read_text("utf-8").splitlines(True) if ",mixed," not in line), "utf-8")
    steps = {"date": "2999-01-01", "commit": "abc", "device": "A machine", "torch": "9.9", "dtype": "mixed"}
    steps |= {"numel": "50000000", "tensors": "1", "q50_ms": "12.34"}
    measured = [steps | {"variant": v, "ratio_to_torch_fused": str(ratio)} for v, ratio in RATIOS.items()]
    add(own, [*measured, steps | {"variant": "roof_loop", "ratio_to_torch_fused": "1.0"}])
    task = {"task": "chess", "parameters": "1000", "steps": "10", "batch": "8", "held_bytes": "12", "moved_bytes": "20"}
    trained = [
        task | {"method": method, "seed": str(seed), "train_loss": str(loss), "held_out_loss": "5.0"}
        for method, losses in LOSSES.items()
        for seed, loss in enumerate(losses)
    ]
    add(tmp_path / "bench/results/training.csv", trained)
    return tmp_path


def add(path, rows):
    with path.open("a+", encoding="utf-8", newline="") as file:
        file.seek(0)
        csv.DictWriter(file, file.readline().strip().split(","), lineterminator="\n").writerows(rows)


def tables(root, *options):
    command = [sys.executable, "bench/tables.py", "--root", str(root), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)


def row_of(page, begin):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith(begin)]


def test_fewer_bytes_are_ratios_to_torch_of_the_same_run(root):
    assert tables(root).returncode == 0
    page = (root / "docs/speed.md").read_text("utf-8")
    own = page.split("A machine, torch 9.9, abc, 2999-01-01:")
    assert len(own) == 2  # the other table has no rows of that run
    (row,) = row_of(own[1], "| 50 M | 1 |")
    assert row == ["50 M", "1", "12.3", "0.70", "0.60", "0.60", "–", "0.45", "0.75"]


def test_differences_in_training_are_paired_by_seed(root):
    assert tables(root).returncode == 0
    page = (root / "docs/large-models.md").read_text("utf-8").split("**Chess** (1,000 parameters, 10 steps of 8")[1]
    rows = {row[0]: row[1:] for row in row_of(page, "|")}
    assert rows["`torch.optim.AdamW`, float32"] == ["12", "20", "1.00", "2<br>± 1", "–", "5<br>± 0", "–"]
    assert rows["`grgauge.AdamW`, float32"][4] == "0"
    # 0.1, 0.1 and 0.4: mean 0.2, standard error 0.1, and Student's t for two degrees of freedom is 4.303.
    states = rows["`grgauge.AdamW`, moments in bfloat16"]
    assert states == ["12", "20", "0.70", "2.2<br>± 1.2", "+0.2<br>(-0.23 to +0.63)", "5<br>± 0", "0"]
    assert set(rows["`torch.optim.AdamW`, all bfloat16"]) == {"–"}  # one seed has no spread


def test_a_stale_page_is_named_and_a_fresh_one_is_not(root):
    stale = tables(root, "--check")
    assert stale.returncode == 1
    assert "speed.md is stale" in stale.stderr
    assert "large-models.md is stale" in stale.stderr
    assert tables(root).returncode == 0
    assert tables(root, "--check").returncode == 0


def test_a_page_without_its_markers_is_refused(root):
    page = root / "docs/speed.md"
    page.write_text(page.read_text("utf-8").replace("<!-- /bench:bytes -->", ""), "utf-8")
    refused = tables(root)
    assert refused.returncode == 2
    assert "speed.md: it must hold the lines <!-- bench:bytes -->" in refused.stderr
