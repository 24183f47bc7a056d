"""Compile the Triton kernels for GPUs that need not be there, and read off the machine code what matters for speed.

    python tests/static/compile_kernels.py            JSON, one record a kernel and target
    python tests/static/compile_kernels.py --table    the same for people

The ops themselves are called, on CPU tensors, with their launches turned into compilations: every signature, flag and
launch option is the one a GPU would get. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

import grgauge_kernels as gk
from grgauge_kernels.backends import Update
from grgauge_kernels.backends import triton as backend

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

KERNELS = ("visit_kernel", "tile_kernel", "reduce_kernel")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class CompileOnly:
    """What Triton asks of a driver before it launches anything."""

    def __init__(self, target: GPUTarget, index: int) -> None:
        self.target, self.index = target, index

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.index

    def get_current_stream(self, device: int) -> int:
        return 0


class Recorder:
    """Stands in for a kernel: compiles what it is asked to launch."""

    def __init__(self, kernel: Any, compiled: dict[str, Any]) -> None:
        self.kernel, self.compiled = kernel, compiled

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def compile_(*args: Any, **kwargs: Any) -> None:
            self.compiled[self.kernel.__name__] = self.kernel.warmup(*args, grid=grid, **kwargs)

        return compile_


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Name of a specialisation -> the call that asks for it."""
    for dtype in DTYPES:
        yield f"measure {dtype} flat", lambda dtype=dtype: measure(dtype, flat=True)
    yield "measure fp32 loose, all options", lambda: measure("fp32", flat=False, options=True)
    yield "measure bf16 loose, all options", lambda: measure("bf16", flat=False, options=True)
    for grad, param in (("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16"), ("fp16", "fp16")):
        yield f"adamw {grad}/{param} loose", lambda grad=grad, param=param: adamw(grad, param, flat=False)
    for dtype in ("fp32", "bf16"):
        yield f"adamw {dtype}/{dtype} flat", lambda dtype=dtype: adamw(dtype, dtype, flat=True)
    for grad, flat in (("fp32", True), ("bf16", False)):
        name = f"adamw {grad}/fp32 {'flat' if flat else 'loose'}, all options"
        yield name, lambda grad=grad, flat=flat: adamw(grad, "fp32", flat=flat, options=True)
    # With moments in bfloat16; parameters too are then rounded stochastically, where they are in bfloat16.
    for grad, param, flat, options in (("fp32", "fp32", False, False), ("bf16", "bf16", True, False),
                                       ("bf16", "bf16", False, False), ("fp32", "fp32", True, True)):  # fmt: skip
        name = f"adamw {grad}/{param}/bf16 {'flat' if flat else 'loose'}{', all options' if options else ''}"
        yield name, lambda g=grad, p=param, f=flat, o=options: adamw(g, p, flat=f, options=o, moment="bf16")


def tensors(dtype: str, flat: bool) -> list[Tensor]:
    return [torch.empty(64, dtype=DTYPES[dtype]) for _ in range(1 if flat else 2)]


def plan(grads: list[Tensor], flat: bool) -> gk.Plan:
    return gk.Bucket(grads, base=grads[0] if flat else None).plan()


def states(visits: gk.Plan, options: bool) -> dict[str, Tensor]:
    names = ("ema", "previous") if options else ()
    return {name: torch.empty(visits.numel) for name in names}


def measure(dtype: str, flat: bool, options: bool = False) -> None:
    grads = tensors(dtype, flat)
    visits = plan(grads, flat)
    state = states(visits, options)
    inv_scale = torch.ones(1) if options else None
    backend.measure_(grads, visits.rows, visits.segments, state.get("ema"), state.get("previous"), 0.9, inv_scale)


def adamw(grad: str, param: str, flat: bool, options: bool = False, moment: str = "fp32") -> None:
    grads = tensors(grad, flat)
    visits = plan(grads, flat)
    state = states(visits, options)
    scalar = torch.ones(1) if options else None
    small = moment == "bf16"
    update = Update(
        params=tensors(param, flat),
        grads=grads,
        exp_avgs=tensors(moment, flat),
        exp_avg_sqs=tensors(moment, flat),
        rows=visits.rows,
        segments=visits.segments,
        step=torch.ones(visits.segments if options else 1),
        lr=1e-3,
        lr_tensor=scalar,
        beta1=0.9,
        beta2=0.999,
        eps=1e-8,
        weight_decay=0.01,
        ema=state.get("ema"),
        previous=state.get("previous"),
        beta=0.9,
        inv_scale=scalar,
        found_inf=scalar,
        clip=scalar,
        zero_grad=options,
        maximize=options,
        sums=True,
        stochastic_rounding=small and param == "bf16",
        origins=visits.origins if small else None,
    )
    backend.prepare_adamw_(update)()


def reduce_many() -> None:
    """A plan long enough for the tiles."""
    rows = torch.zeros(backend.TILED + 1, 4, dtype=torch.int64)
    backend.measure_([torch.empty(64)], rows, 1, None, None, 0.9, None)


def compiled(target: str) -> Iterator[tuple[str, Any]]:
    """(name, compiled kernel) of every case."""
    triton.runtime.driver.set_active(CompileOnly(TARGETS[target], list(TARGETS).index(target)))
    backend._options.cache_clear()
    done: dict[str, Any] = {}
    originals = {name: getattr(backend, name) for name in KERNELS}
    try:
        for name, kernel in originals.items():
            setattr(backend, name, Recorder(kernel, done))
        for name, call in cases():
            call()
            yield name, done["visit_kernel"]
        reduce_many()
        yield "tile", done["tile_kernel"]
        yield "reduce", done["reduce_kernel"]
    finally:
        for name, kernel in originals.items():
            setattr(backend, name, kernel)


def inspect(kernel: Any) -> dict[str, Any]:
    """Registers a thread, bytes of spill, shared memory, and how many loads and stores of which width (in bits)."""
    return inspect_cuda(kernel) if "cubin" in kernel.asm else inspect_hip(kernel)


def inspect_cuda(kernel: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run([tool, "-res-usage", path], check=True, capture_output=True, text=True)
        sass = subprocess.run([tool, "-sass", path], check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage.stdout + usage.stderr)
    assert found is not None, usage
    registers, stack, shared, local = map(int, found.groups())
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE)
    assert instructions, sass[:500]
    return {
        "registers": registers,
        "spilled": stack + local + sum(op.startswith(("LDL", "STL")) for op in instructions),
        "shared": shared,
        "loads": widths(op for op in instructions if op.startswith("LDG")),
        "stores": widths(op for op in instructions if op.startswith("STG")),
        "atomics": sum(op.startswith(("RED.", "REDG", "ATOM")) for op in instructions),
        "barriers": sum(op.startswith("BAR") for op in instructions),
        "bf16_rounding": sorted(set(re.findall(r"\bcvt\.(\w+)(?:\.\w+)*\.bf16(?:x2)?\.f32\b", kernel.asm["ptx"]))),
    }


def widths(instructions: Iterator[str]) -> dict[int, int]:
    """LDG.E.128 -> 128, LDG.E.U16 -> 16, LDG.E -> 32."""
    found = (re.search(r"\.[US]?(8|16|64|128)\b", op) for op in instructions)
    return dict(sorted(Counter(int(match[1]) if match else 32 for match in found).items()))


AMD_WIDTHS = {"byte": 8, "ubyte": 8, "short": 16, "ushort": 16, "dword": 32, "dwordx2": 64, "dwordx4": 128}


def inspect_hip(kernel: Any) -> dict[str, Any]:
    text = kernel.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        assert found is not None, name
        return int(found[1])

    accesses = re.findall(r"^\s+(?:global|buffer|flat)_(load|store)_(\w+)", text, re.MULTILINE)
    assert accesses

    def count(kind: str) -> dict[int, int]:
        sizes = (re.sub(r"_.*", "", size) for what, size in accesses if what == kind)
        return dict(sorted(Counter(AMD_WIDTHS[size] for size in sizes).items()))

    return {
        "registers": field("vgpr_count"),
        "spilled": field("vgpr_spill_count") + field("sgpr_spill_count") + field("private_segment_fixed_size"),
        "shared": field("group_segment_fixed_size"),
        "loads": count("load"),
        "stores": count("store"),
        "atomics": len(re.findall(r"^\s+(?:global|buffer|flat|ds)_(?:atomic|add)", text, re.MULTILINE)),
        "barriers": len(re.findall(r"^\s+s_barrier", text, re.MULTILINE)),
    }


def records(targets: list[str]) -> Iterator[dict[str, Any]]:
    for target in targets:
        for name, kernel in compiled(target):
            yield {"kernel": name, "target": target, **inspect(kernel)}


def table(found: list[dict[str, Any]]) -> str:
    def shown(counts: dict[int, int]) -> str:
        return " ".join(f"{width}b x{count}" for width, count in sorted(counts.items(), reverse=True))

    lines = [f"{'kernel':36} {'target':7} {'regs':>4} {'spill':>5} {'bar':>3}  {'loads':32} stores"]
    for r in sorted(found, key=lambda r: r["kernel"]):
        lines.append(
            f"{r['kernel']:36} {r['target']:7} {r['registers']:4} {r['spilled']:5} {r['barriers']:3}  "
            f"{shown(r['loads']):32} {shown(r['stores'])}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print a table instead of JSON")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="one of the targets; default all")
    chosen = parser.parse_args()
    result = list(records(chosen.target or list(TARGETS)))
    print(table(result) if chosen.table else json.dumps(result))
