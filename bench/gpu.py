"""The GPU benchmark: build, run the device tests, measure, and say which targets are met. Needs no network.

    python bench/gpu.py                  on a machine with a GPU; rows go to bench/results/gpu.csv and gpt.csv
    python bench/gpu.py --dry            on any CPU, tiny: everything runs once, rows go to a temporary folder
    python bench/gpu.py --only kernels   one part: tests, kernels or gpt

What is measured stands in variants.py, how in turns.py. The most telling configurations come first, and what does not
fit into --minutes is left out and named. A configuration's rows are on disk when its line appears.

q20, q50, q80_ms    a step's time by CUDA events around five of them, begun on an idle device: the host's delays count
host_us             what the host spends on a step, without waiting for the device
launches, device_ms what the device ran a step, in number and in time, counted once by the profiler
ratio_to_torch_fused  median of the ratios between turns of the same round, to torch's fused AdamW in the same run
gbps, roof_gbps     the bytes that a step must move over its time; the same of a copy of as many bytes

Gradients are drawn anew before each turn, outside the clock, and 256 MiB are written to push older data out of the last
cache. Within a turn of five steps nothing is flushed: from 1e8 parameters on a step's own buffers do that; at 1e7 they
are 160 MB, a few times the last cache, and a part of them may still be found there, by all variants alike.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HOMES = (ROOT, ROOT / "python", ROOT / "bench")

COLUMNS = (
    "date,commit,device,torch,dtype,numel,tensors,variant,q20_ms,q50_ms,q80_ms,ratio_to_torch_fused,gbps,roof_gbps,"
    "triton,backend,host_us,launches,device_ms"
)
GPT_COLUMNS = (
    "date,commit,device,torch,triton,dtype,model,parameters,tokens,micro_batches,variant,q20_ms,q50_ms,q80_ms,"
    "ratio_to_torch_fused,tokens_per_s"
)

GROUPS = {
    "step": ("torch", "plain", "gauged", "roof"),
    "clip": ("torch", "torch_clip", "clip", "sampled"),
    "states": ("torch", "torch_clip", "states", "clip_states", "roof"),
    "foreach": ("torch", "foreach", "by_hand"),
}
"""Variants that take turns in one run. Not all at once: a billion parameters each must fit into 80 GB."""

LAYOUTS = {"1": (1, False), "300": (300, False), "3000": (3000, False), "flat": (300, True), "flat3000": (3000, True)}
"""Number of tensors, and whether ours have them in one flat buffer; torch's have them loose, as their users do."""

MICRO_BATCHES = 4
TARGETS = {
    "gauged/torch": 0.80,
    "of copy roof": 0.90,
    "gauged/plain": 1.01,
    "clip/torch_clip": 0.65,
    "states/torch": 0.75,
    "clip_states/torch_clip": 0.70,
    "all bf16/torch in bf16": 0.90,
    "GPT": 1.00,
}


@dataclass
class Job:
    """Something to measure, if there is time left for it."""

    name: str
    guess: float
    """Seconds it takes at most, about."""
    run: Callable[[], str]
    kind: str = ""


@dataclass
class Run:
    """This run of the script: what it was told, and what it has found."""

    device: Any
    dry: bool
    deadline: float
    folder: Path
    figures: list[tuple[str, str, float]] = field(default_factory=list)
    """(target, configuration, figure)"""
    left_out: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def work_off(self, jobs: Iterable[Job]) -> None:
        longest: dict[str, float] = {}
        for job in jobs:
            guess = max(job.guess, longest.get(job.kind, 0.0))
            if guess > self.left:
                self.left_out.append(job.name)
                continue
            start = time.monotonic()
            try:
                line = job.run()
            except Exception as error:  # one configuration that fails must not cost the others
                self.failed.append(job.name)
                line = f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            seconds = time.monotonic() - start
            longest[job.kind] = max(longest.get(job.kind, 0.0), seconds)
            say(f"{job.name:<34} {line}  [{seconds:.1f} s, {max(self.left, 0) / 60:.1f} min left]")
            empty(self.device)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="on the CPU, 1e5 parameters, every measurement once")
    parser.add_argument("--only", choices=("tests", "kernels", "gpt"), help="run one part")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all of it (default: 8)")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    parts = (options.only,) if options.only else ("tests", "kernels", "gpt")

    missing = [name for name in ("torch", "numpy") if importlib.util.find_spec(name) is None]
    if missing:
        say(f"not installed here: {', '.join(missing)}")
        return 2
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or torch's profiler says something at each start and stop
    import torch

    if not options.dry and not torch.cuda.is_available():
        say("no CUDA device: nothing to measure. --dry runs everything once on the CPU")
        return 2
    device = torch.device("cpu") if options.dry else torch.device("cuda", torch.cuda.current_device())
    try:
        version = importlib.metadata.version("grgauge-kernels")
        say(f"using the installed grgauge-kernels {version}")
    except importlib.metadata.PackageNotFoundError:
        build(device)
    sys.path[:0] = [str(home) for home in HOMES]
    from turns import origin

    import grgauge_kernels as gk

    folder = Path(tempfile.mkdtemp(prefix="grgauge-bench-")) if options.dry else ROOT / "bench" / "results"
    run = Run(device, options.dry, deadline, folder)
    say(" | ".join(str(value) for value in origin(device).values()))
    for name, found in gk.backends().items():
        say(f"backend {name}: {'runs' if found is True else found}")

    tests = "not asked for"
    if "tests" in parts:
        tests = run_tests(seconds=min(200.0, 0.4 * run.left))
    first, later = kernel_jobs(run) if "kernels" in parts else ([], [])
    gpts = gpt_jobs(run) if "gpt" in parts else []
    run.work_off([*first, *gpts[:2], *later, *gpts[2:]])

    say(f"\nrows are in {folder}")
    if run.left_out:
        say(f"left out, {options.minutes:g} minutes being over: {'; '.join(run.left_out)}")
    if run.failed:
        say(f"failed: {'; '.join(run.failed)}")
    say(f"device tests: {tests}")
    verdict(run)
    return int(bool(run.failed) or tests.startswith("FAILED"))


def say(line: str) -> None:
    print(line, flush=True)


def empty(device: Any) -> None:
    """Give back what the last configuration held: optimizers and gauges refer to each other."""
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


# Build and test


def build(device: Any) -> None:
    """Compile the native libraries in place, into grgauge_kernels/lib; what cannot be built is done without."""
    import torch

    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    if shutil.which("nvcc") is None and (toolkit / "nvcc").exists():
        os.environ["PATH"] += os.pathsep + str(toolkit)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    start = time.monotonic()
    if shutil.which("cmake"):
        folder = ROOT / "build" / "gpu"
        architectures = [f"-DCMAKE_CUDA_ARCHITECTURES={capability[0]}{capability[1]}-real"] if capability else []
        commands = [
            ["cmake", "-S", str(ROOT), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release", *architectures],
            ["cmake", "--build", str(folder), "--parallel"],
            ["cmake", "--install", str(folder), "--prefix", str(ROOT)],
        ]
    else:
        say("no cmake here: calling the compilers directly")
        commands = list(direct(capability))
    for command in commands:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            tail = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
            say(f"{' '.join(command[:3])} ... failed, so what it builds is done without:\n{tail}")
    built = sorted(path.name for path in (ROOT / "grgauge_kernels" / "lib").glob("*grgauge_*"))
    say(f"built {', '.join(built) or 'nothing'} in {time.monotonic() - start:.0f} s")


def direct(capability: tuple[int, int] | None) -> Iterator[list[str]]:
    """What CMakeLists.txt says, without CMake: the CPU library, and the CUDA library where there is nvcc."""
    library = ROOT / "grgauge_kernels" / "lib"
    objects = ROOT / "build" / "gpu"
    for folder in (library, objects):
        folder.mkdir(parents=True, exist_ok=True)
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or "c++"
    flags = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
    wide = {
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
    }
    x86 = os.uname().machine in ("x86_64", "AMD64")
    names = ["pass", "parallel", "portable", *(wide if x86 else ())]
    for name in names:
        source, target = ROOT / "csrc" / "cpu" / f"{name}.cpp", objects / f"{name}.o"
        yield [compiler, *flags, *wide.get(name, []), "-c", str(source), "-o", str(target)]
    linked = [str(objects / f"{name}.o") for name in names]
    yield [compiler, "-shared", *linked, "-o", str(library / "libgrgauge_cpu.so"), "-pthread", "-ldl"]
    sources = sorted(str(path) for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
    if sources and capability and shutil.which("nvcc"):
        number = f"{capability[0]}{capability[1]}"
        yield [
            "nvcc", "-std=c++17", "-O3", "-fmad=false", "-shared", "-cudart", "static", "--threads", "0",
            "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xlinker", "--exclude-libs,ALL",
            "-gencode", f"arch=compute_{number},code=sm_{number}", *sources,
            "-o", str(library / "libgrgauge_cuda.so"),
        ]  # fmt: skip


def run_tests(seconds: float) -> str:
    """The device tests in a process of their own, at most so long; what came of them in one line."""
    if importlib.util.find_spec("pytest") is None:
        return "not run, for pytest is not installed here: pip install pytest, then make bench-gpu again"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}
    command = [sys.executable, "-m", "pytest", "tests/device", "-rs", "--durations=5", "-p", "no:cacheprovider"]
    say(f"device tests, for {seconds:.0f} s at most")
    start = time.monotonic()
    try:
        code = subprocess.run(command, cwd=ROOT, env=environment, timeout=seconds, check=False).returncode
    except subprocess.TimeoutExpired:
        return f"FAILED: not done after {seconds:.0f} s"
    took = f"in {time.monotonic() - start:.0f} s"
    return f"passed {took}" if code == 0 else f"FAILED, pytest's exit status is {code}, {took}"


# Kernels


def kernel_jobs(run: Run) -> tuple[list[Job], list[Job]]:
    """All configurations, the most telling first: those to measure before the GPTs, and those after them."""
    sizes = (100_000,) if run.dry else (100_000_000, 1_000_000_000)
    labels = ("fp32", "bf16", "bf16g")

    def jobs(groups: Iterable[str], layouts: Iterable[str], numels: Iterable[int] = sizes) -> list[Job]:
        wanted = product(groups, layouts, numels, labels)
        return [kernel_job(run, group, numel, label, layout) for group, layout, numel, label in wanted]

    first = jobs(("step", "states", "clip"), ("300",))
    later = jobs(("step", "states", "clip"), ("flat",))
    later += [backend_job(run, sizes[0], label) for label in labels]
    later += jobs(("step", "states", "clip"), ("1",)) + jobs(("foreach",), ("300",))
    if not run.dry:
        later += jobs(("step", "clip", "foreach"), ("300", "flat", "1"), (10_000_000,))
    later += jobs(("step", "clip"), ("3000", "flat3000")) + jobs(("foreach",), ("1", "3000"))
    if not run.dry:
        later += jobs(("step", "clip", "foreach"), ("3000", "flat3000"), (10_000_000,))
    return first, later


def kernel_job(run: Run, group: str, numel: int, label: str, layout: str) -> Job:
    name = f"{numel:.0e} {label} {layout}: {group}".replace("e+0", "e")
    specs = {variant: (variant, None) for variant in GROUPS[group]}
    return Job(name, 2.0 if numel < 10**9 else 6.0, lambda: kernels(run, specs, numel, label, layout), f"{numel}")


def backend_job(run: Run, numel: int, label: str) -> Job:
    """The gauged step by each backend that runs here."""

    def measure() -> str:
        from grgauge_kernels.ops import BACKENDS

        names = [n for n, module in BACKENDS.items() if n != "reference" and module.unavailable(run.device) is None]
        specs: dict[str, tuple[str, str | None]] = {"torch": ("torch", None)}
        specs |= {f"gauged_{name}": ("gauged", name) for name in names}
        return kernels(run, specs, numel, label, "300")

    return Job(f"{numel:.0e} {label} 300: backends".replace("e+0", "e"), 3.0, measure, f"{numel}")


def kernels(run: Run, specs: dict[str, tuple[str, str | None]], numel: int, label: str, layout: str) -> str:
    """Measure the variants of one configuration, name -> (variant, backend); append their rows; one line of result."""
    import torch
    import variants as v
    from turns import Clock, alternate, append, median, origin, quantile_columns, ratio, significant

    tensors, flat = LAYOUTS[layout]
    if run.dry:
        tensors = min(tensors, 30)
    if run.device.type == "cuda":
        free = torch.cuda.mem_get_info()[0]
        need = v.HELD_BYTES[label] * numel * sum(name != "roof" for name in specs)
        if need > free:
            return f"left out: it may need {need / 1e9:.0f} GB of device memory, {free / 1e9:.0f} are free"
    made: dict[str, Any] = {}
    for name, (variant, backend) in specs.items():
        if variant == "roof":
            made[name] = v.Roof(numel, label, run.device)
        else:
            made[name] = v.make(variant, label, numel, tensors, flat, run.device, backend)
    rounds, seconds = (2, 0.0) if run.dry else (11, 0.4)
    steps = {name: one.step for name, one in made.items()}
    samples = alternate(steps, Clock(run.device), lambda name: made[name].renew(), rounds, seconds)
    for name, one in made.items():
        if not one.finite():
            raise RuntimeError(f"{name} has read nothing or ends in numbers that are not finite")
    require_same_end(made, label)

    roof = v.OUR_BYTES[label] * numel / median(samples["roof"].ms) / 1e6 if "roof" in samples else None
    shared = origin(run.device) | {"dtype": label, "numel": numel, "tensors": layout}
    rows = []
    for name, seen in samples.items():
        if name == "torch" and "plain" not in specs:
            continue  # its row is the one beside plain and gauged; here it is what the ratios are to
        columns = quantile_columns(seen.ms)
        rows.append(
            shared
            | columns
            | {
                "variant": name,
                "backend": specs[name][1] or "",
                "ratio_to_torch_fused": significant(ratio(seen, samples["torch"])),
                "gbps": significant(v.moved(specs[name][0], label) * numel / columns["q50_ms"] / 1e6),
                "roof_gbps": "" if roof is None else significant(roof),
                "host_us": significant(1e3 * median(seen.host_ms)),
                "launches": "" if seen.launches is None else significant(seen.launches),
                "device_ms": "" if seen.device_ms is None else significant(seen.device_ms),
            }
        )
    append(run.folder / "gpu.csv", COLUMNS, rows)

    where = f"{numel:.0e} {label}, tensors: {layout}".replace("e+0", "e")
    if "states" in samples:
        target = "all bf16/torch in bf16" if label == "bf16" else "states/torch"
        run.figures.append((target, where, ratio(samples["states"], samples["torch"])))
        run.figures.append(("clip_states/torch_clip", where, ratio(samples["clip_states"], samples["torch_clip"])))
    step = next((name for name in ("gauged", "states") if name in samples), None)
    if roof is not None and step is not None and (run.dry or numel >= 10**8):
        share = next(r["gbps"] for r in rows if r["variant"] == step) / roof
        run.figures.append(("of copy roof", f"{where}, {step}", share))
    if "plain" in samples:
        if run.dry or numel >= 10**8:
            run.figures.append(("gauged/torch", where, ratio(samples["gauged"], samples["torch"])))
        run.figures.append(("gauged/plain", where, ratio(samples["gauged"], samples["plain"])))
    if "clip" in samples:
        run.figures.append(("clip/torch_clip", where, ratio(samples["clip"], samples["torch_clip"])))
    torchs = f"torch {median(samples['torch'].ms):.3g} ms, "
    return torchs + ", ".join(
        f"{name} {ratio(seen, samples['torch']):.2f}" for name, seen in samples.items() if name != "torch"
    )


def require_same_end(made: dict[str, Any], label: str) -> None:
    """Raise RuntimeError unless our optimizers and torch's, having seen the same gradients, end alike."""
    import variants as v

    for name, one in made.items():
        if name in v.STATES and label == "bf16":
            continue  # rounded stochastically it goes where torch's bfloat16, which loses small updates, does not
        if not name.startswith(("plain", "gauged", *v.CLIPPED, *v.STATES)):
            continue
        tolerance = 1e-2 if name in v.STATES else 1e-3
        tolerance = 5e-2 if label == "bf16" else tolerance  # a bfloat16 parameter has steps of 2^-7 around 1
        other = "torch_clip" if name in v.CLIPPED else "torch"
        for ours, theirs in zip(one.params, made[other].params, strict=True):
            apart = float((ours.detach()[:1000].float() - theirs.detach()[:1000].float()).abs().max())
            if not apart <= tolerance:
                raise RuntimeError(f"{name} and {other} end {apart:.2g} apart: what was measured is not the same step")


# Training


def gpt_jobs(run: Run) -> list[Job]:
    if run.dry:
        return [Job(f"GPT tiny {label}", 1.0, lambda label=label: gpt(run, "tiny", label)) for label in ("amp", "bf16")]
    wanted = (("124M", "amp", 35.0), ("350M", "amp", 60.0), ("124M", "bf16", 30.0), ("350M", "bf16", 50.0))
    return [
        Job(f"GPT {model} {label}", guess, lambda model=model, label=label: gpt(run, model, label))
        for model, label, guess in wanted
    ]


def gpt(run: Run, model: str, label: str) -> str:
    """A training step of four micro-batches: zero_grad, forward, backward, step; everything a gauge can read, read.

    amp    float32 parameters under bfloat16 autocast
    bf16   bfloat16 parameters
    """
    import torch
    from gpt import CONFIGS, GPT
    from turns import WARM_UP_TURNS, Clock, alternate, append, median, origin, quantile_columns, ratio, significant

    import grgauge

    config, device = CONFIGS[model], run.device
    generator = torch.Generator(device).manual_seed(0)
    shape = (config.micro_batch, config.context + 1)
    batches = [
        torch.randint(config.vocabulary, shape, device=device, generator=generator) for _ in range(MICRO_BATCHES)
    ]
    tokens = MICRO_BATCHES * config.micro_batch * config.context
    gauges: dict[str, Any] = {}
    losses: dict[str, Any] = {}

    def training(variant: str) -> tuple[Callable[[], None], int]:
        torch.manual_seed(0)
        with torch.device(device):
            net = GPT(config).to(torch.bfloat16 if label == "bf16" else torch.float32)
        if variant == "torch":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(net.parameters(), lr=3e-4, fused=True)
        else:
            optimizer = grgauge.AdamW(net.parameters(), lr=3e-4, flat=variant == "gauged_flat")
        gauge = None
        if variant.startswith("gauged"):
            gauge = gauges[variant] = grgauge.Gauge(optimizer, MICRO_BATCHES * config.micro_batch)

        def step() -> None:
            optimizer.zero_grad()
            for batch in batches:
                with torch.autocast(device.type, torch.bfloat16, enabled=label == "amp"):
                    loss = net(batch[:, :-1], batch[:, 1:]) / MICRO_BATCHES
                loss.backward()
                if gauge is not None:
                    gauge.micro_step()
            optimizer.step()
            if gauge is not None:
                gauge.reading()
            losses[variant] = loss.detach()

        return step, sum(p.numel() for p in net.parameters())

    names = ("torch", "plain", "gauged", "gauged_flat")
    made = {name: training(name) for name in names}
    rounds = 2 if run.dry else max(3, min(9, int(0.5 * run.left / 10)))
    seconds = 0.0
    samples = alternate(
        {name: step for name, (step, _) in made.items()}, Clock(device), lambda _: None, rounds, seconds
    )
    ends = {name: MICRO_BATCHES * float(loss) for name, loss in losses.items()}
    if not all(abs(end - ends["torch"]) < 0.05 * abs(ends["torch"]) + 0.05 for end in ends.values()):
        raise RuntimeError(f"losses differ after {WARM_UP_TURNS + rounds} turns: {ends}")
    readings = {name: gauge.reading() for name, gauge in gauges.items()}
    if not all(reading is not None and reading.gr_t is not None for reading in readings.values()):
        raise RuntimeError("a gauge has not read anything: what was measured is not a gauged step")

    shared = origin(device) | {"dtype": label, "model": model, "parameters": made["torch"][1], "tokens": tokens}
    shared |= {"micro_batches": MICRO_BATCHES}
    rows = [
        shared
        | quantile_columns(seen.ms)
        | {
            "variant": name,
            "ratio_to_torch_fused": significant(ratio(seen, samples["torch"])),
            "tokens_per_s": significant(1e3 * tokens / median(seen.ms)),
        }
        for name, seen in samples.items()
    ]
    append(run.folder / "gpt.csv", GPT_COLUMNS, rows)
    for name in gauges:
        run.figures.append(("GPT", f"{model} {label}, {name}", ratio(samples[name], samples["torch"])))
    figures = ", ".join(f"{name} {ratio(samples[name], samples['torch']):.3f}" for name in names[1:])
    return f"torch {median(samples['torch'].ms):.4g} ms, {figures}"


def verdict(run: Run) -> None:
    """Every figure beside its target."""
    say("\ntargets" + (" (a dry run: the figures mean nothing)" if run.dry else ""))
    for target, bound in TARGETS.items():
        at_least = target == "of copy roof"
        figures = [(where, figure) for name, where, figure in run.figures if name == target]
        if not figures:
            say(f"----  {target}: not measured")
        for where, figure in figures:
            met = figure >= bound if at_least else figure <= bound
            say(f"{'PASS' if met else 'MISS'}  {target} {figure:.3f} ({'≥' if at_least else '≤'} {bound:.2f})  {where}")
    if any("bf16," in where for _, where, _ in run.figures):
        say(
            "In bf16 torch moves 14 bytes a parameter, its moments being bfloat16; so do ours in states, else 22 bytes."
        )


if __name__ == "__main__":
    sys.exit(main())
