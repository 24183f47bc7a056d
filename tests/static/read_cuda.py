"""Read off the built CUDA library what matters for speed.

    python tests/static/read_cuda.py            JSON, one record a kernel and architecture
    python tests/static/read_cuda.py --table    the same for people

The library is taken from where the package was installed; no GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compile_kernels import table, widths

import grgauge_kernels

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")

DTYPES = {"float": "fp32", "__nv_bfloat16": "bf16", "sbf16": "bf16", "__half": "fp16"}


def library() -> Path | None:
    homes = (Path(home) / "lib" / "libgrgauge_cuda.so" for home in grgauge_kernels.__path__)
    return next((path for path in homes if path.exists()), None)


def disassembler() -> str | None:
    """cuobjdump from the CUDA toolkit, else the one that Triton brings along."""
    try:
        import triton

        packaged = triton.knobs.nvidia.cuobjdump.path
    except Exception:
        packaged = None
    return shutil.which("cuobjdump") or packaged


def demangled(name: str) -> str:
    return subprocess.run(["c++filt", name], check=True, capture_output=True, text=True).stdout.strip()


def kernel_name(mangled: str) -> str | None:
    """ "adamw bf16/fp32" and the like; None for a kernel of someone else."""
    if re.search(r"\d3addE", mangled):
        return "sums"
    found = re.search(r"visit_chunk<(.*)>", demangled(mangled))
    if not found:
        return None
    grad, param, moment, adamw, states, _ = (part.split(")")[-1].split("::")[-1] for part in found[1].split(", "))
    with_states = ", states" if states == "true" else ""
    if adamw == "false":
        return f"measure {DTYPES[grad]}{with_states}"
    moments = "" if moment == "float" else "/bf16"
    stochastic = ", stochastic" if param == "sbf16" else ""
    # There are two kernels, with states and without, only where all streams are two bytes wide.
    narrow = grad != "float" and param != "float" and moments
    return f"adamw {DTYPES[grad]}/{DTYPES[param]}{moments}{stochastic}{with_states if narrow else ''}"


def records(architecture: str) -> Iterator[dict[str, Any]]:
    def dump(what: str) -> list[str]:
        tool, path = disassembler(), library()
        assert tool is not None
        assert path is not None
        command = [tool, "--gpu-architecture", architecture, what, path]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return re.split(r"^\s*Function\s*:?\s+", text, flags=re.MULTILINE)[1:]

    code = {function.split()[0]: function for function in dump("-sass")}
    for function in dump("-res-usage"):
        mangled = function.split()[0].rstrip(":")
        name = kernel_name(mangled)
        usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", function)
        if name is None or usage is None:
            continue
        registers, stack, shared, local = map(int, usage.groups())
        found = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code[mangled], re.MULTILINE)
        yield {
            "kernel": name,
            "target": architecture,
            "registers": registers,
            "spilled": stack + local + sum(op.startswith(("LDL", "STL")) for op in found),
            "shared": shared,
            "loads": widths(op for op in found if op.startswith("LDG")),
            "stores": widths(op for op in found if op.startswith("STG")),
            "generic": sum(op.split(".")[0] in ("LD", "ST") for op in found),
            "atomics": sum(op.startswith(("RED.", "REDG", "ATOM")) for op in found),
            "barriers": sum(op.startswith("BAR") for op in found),
        }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print a table instead of JSON")
    parser.add_argument("--target", action="append", choices=ARCHITECTURES, help="one of them; default all")
    chosen = parser.parse_args()
    if library() is None or disassembler() is None:
        sys.exit("no libgrgauge_cuda.so was built" if library() is None else "no cuobjdump: pip install triton")
    result = [record for target in chosen.target or ARCHITECTURES for record in records(target)]
    print(table(result) if chosen.table else json.dumps(result))
