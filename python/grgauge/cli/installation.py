"""What this installation has to work with: versions, devices, backends, and what to do where one is missing."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import grgauge_kernels as gk


def examine() -> dict[str, Any]:
    """Everything that `grgauge doctor` says, as plain values. `ok`: the training device has a native backend."""
    backends = gk.backends()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    native = [name for name in gk.PREFERRED_BACKENDS[device] if name != "reference"]
    working = [name for name in native if backends[name] is True]
    return {
        "versions": {
            "grgauge-kernels": metadata.version("grgauge-kernels"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "numpy": _version("numpy"),
        },
        "cpu": {
            "model": _cpu_model(),
            "threads": torch.get_num_threads(),
            "instruction_set": gk.cpu_isa() if backends["cpu"] is True else None,
        },
        "cuda": [_cuda(index) for index in range(torch.cuda.device_count())],
        "backends": {
            name: {"available": state is True, "reason": None if state is True else state}
            for name, state in backends.items()
        },
        "device": device,
        "ok": bool(working),
        "conclusion": (
            f"{device} runs the native backend {working[0]!r}."
            if working
            else f"{device} has no native backend and runs the slow reference. "
            + "; ".join(f"{name}: {backends[name]}" for name in native)
        ),
    }


def lines(facts: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(section, name, value) of everything in `examine`'s answer but its conclusion."""
    processor = facts["cpu"]
    isa = processor["instruction_set"] or "unknown instruction set: backend 'cpu' is missing"
    rows = [("versions", name, version or "not installed") for name, version in facts["versions"].items()]
    rows.append(("devices", "cpu", f"{processor['model']}, {processor['threads']} threads, {isa}"))
    rows += [
        (
            "devices",
            f"cuda:{index}",
            f"{gpu['name']}, compute capability {gpu['capability']}, {gpu['memory'] / 2**30:.0f} GiB",
        )
        for index, gpu in enumerate(facts["cuda"])
    ]
    if not facts["cuda"]:
        rows.append(("devices", "cuda", "none"))
    rows += [
        ("backends", name, "works" if state["available"] else f"missing: {state['reason']}")
        for name, state in facts["backends"].items()
    ]
    return rows


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cuda(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory": properties.total_memory,
    }


def _cpu_model() -> str:
    """The processor's name, which platform.processor() does not know on Linux."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    elif sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or platform.machine()
    return platform.processor() or platform.machine()
