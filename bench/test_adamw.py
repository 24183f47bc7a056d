"""What one optimizer step costs, with and without the gauge, beside what the machine's memory allows.

Each configuration (size x layout of the tensors) is one run in which all variants take turns, A B C D E F A B C ...:

    torch      torch.optim.AdamW(fused=True)
    plain      grgauge.AdamW, no gauge
    gauged     grgauge.AdamW with a grgauge.Gauge at its defaults
    by_hand    torch's fused AdamW, then foreach norms of the gradients, their EMA by foreach, and the norms of that
    torch_clip clip_grad_norm_, then torch's fused AdamW
    clip       grgauge.AdamW(max_grad_norm=1), gauged: the gauge reads the unclipped gradient, in a pass of its own
    roof       dst.copy_(src), sized to move the bytes that AdamW moves (reads p g m v, writes p m v): 28 a parameter
    roof_loop  the same bytes as AdamW moves them, in one loop that torch.compile makes: p = g - p, m = g - m, v = g - v

and with bfloat16, whose rows have "mixed" for a dtype, in one run with torch and torch_clip:

    states       grgauge.AdamW(state_dtype=torch.bfloat16), gauged: 20 bytes a float32 parameter instead of 28
    clip_states  the same with max_grad_norm=1
    torch_bf16   torch's fused AdamW on bfloat16 parameters: its moments are bfloat16 then, all rounded to nearest
    torchao_bf16 torchao's AdamW with bf16_stochastic_round=True on the same; one tensor only, for it compiles each size
    stochastic   grgauge.AdamW(state_dtype=torch.bfloat16, stochastic_rounding=True) on the same, gauged: 14 bytes

A turn is STEPS consecutive steps, and a sample their mean: the gauge reads every fifth step, so a median over single
steps would leave the reading out. After the last of them a gauged variant asks for the reading, within the clock.
gauged / plain is what the gauge costs, gauged / torch what the user sees. Ratios are taken between turns of the same
round.

Two roofs, because on a CPU a store that misses the cache may read its line first: a copy then moves half as much again
as it is credited with, an in-place update does not, and AdamW can beat the copy roof. Both are the real ceiling only
where buffers outgrow the last cache, as 50 M parameters do; at smaller sizes a turn of several steps may find them in
a cache, roofs and steps alike, and the host work of a step counts for more.

Every variant has its own tensors with the same values, and our optimizers must end where torch's do: at the same
parameters, or with bfloat16 as far along torch's way as torch.
In layout `flat`, ours keep moments and gradients of their 300 tensors in flat buffers; torch and by_hand have them
loose, as their users do.
"""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable
from datetime import datetime, timezone
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import cpuinfo
import numpy as np
import pytest
import torch
from torch import Tensor
from turns import append, commit, significant, spread

import grgauge

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "adamw.csv"
COLUMNS = (
    "date,commit,device,torch,dtype,numel,tensors,variant,q20_ms,q50_ms,q80_ms,ratio_to_torch_fused,gbps,roof_gbps"
)

NUMELS = (100_000, 1_000_000, 50_000_000)
QUICK_NUMEL = 10_000
LAYOUTS = ("flat", "1", "300")
VARIANTS = ("torch", "plain", "gauged", "by_hand", "torch_clip", "clip", "roof", "roof_loop")
MIXED = (
    "torch",
    "torch_clip",
    "states",
    "clip_states",
    "torch_bf16",
    "torchao_bf16",
    "stochastic",
    "roof",
    "roof_loop",
)
ROOFS = ("roof", "roof_loop")
READ = ("gauged", "clip", "states", "clip_states", "stochastic")
ALIKE = {"plain": "torch", "gauged": "torch", "by_hand": "torch", "clip": "torch_clip"}
"""Variant -> the one of torch's whose parameters it must end at, if both are float32."""
AS_FAR = {"states": "torch", "clip_states": "torch_clip", "stochastic": "torch"}
"""Variant -> the one of torch's that it must have gone as far as, but for what rounding adds at right angles."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "mixed": torch.float32}
"""Of parameters and gradients, but for variants of IN_BFLOAT16; moments are float32 unless said otherwise."""
IN_BFLOAT16 = ("torch_bf16", "torchao_bf16", "stochastic")

SEED = 0
TENSORS = 300
STEPS = 5
WARM_UP_TURNS = 2
MIN_ROUNDS, MIN_SECONDS = 15, 6.0
QUICK_ROUNDS = 3
BYTES = {"float32": 28, "bfloat16": 22, "mixed": 28}
"""That our step must move, per parameter."""
OWN_BYTES = {"states": 20, "clip_states": 20, "torch_bf16": 14, "torchao_bf16": 14, "stochastic": 14}
"""The same of variants that keep less."""
MAX_NORM = 1.0
RENEWED = 1_000_000
"""Parameters up to which gradients are drawn anew before each turn, outside the clock; at 50 M that would take longer
than the turn."""
BETA = 0.9

Samples = dict[str, list[float]]


class Replay:
    """A timer that pytest-benchmark reads before and after a call of `take`, which lets the given time pass.

    pytest-benchmark times one function a test, and cannot alternate between tests. So the turns are timed in one go,
    and each test hands over those of its variant through the `timer` option: both then report the same samples.
    """

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def __repr__(self) -> str:
        return "alternating perf_counter"

    def take(self, seconds: float) -> None:
        self.now += seconds


replay = Replay()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = metafunc.config.getoption("quick")
    numels = (QUICK_NUMEL,) if quick else NUMELS
    configurations = [(numel, layout, "float32") for numel in numels for layout in LAYOUTS]
    if not quick:
        configurations += [(sum(MODELS[model]()), model, "float32") for model in MODELS]
    configurations.append((numels[-1], "1", "bfloat16"))
    configurations += [(numels[-1], layout, "mixed") for layout in ("1", "300")]
    cases = [(*configuration, v) for configuration in configurations for v in variants(*configuration[1:])]
    metafunc.parametrize(("numel", "layout", "dtype", "variant"), cases)


def variants(layout: str, dtype: str) -> tuple[str, ...]:
    """Those that take turns."""
    if dtype != "mixed":
        return VARIANTS
    return MIXED if layout == "1" else tuple(v for v in MIXED if v != "torchao_bf16")


@pytest.mark.filterwarnings("ignore")  # of torch.compile, about itself
@pytest.mark.benchmark(timer=replay)
def test_adamw(benchmark: Any, pytestconfig: pytest.Config, numel: int, layout: str, dtype: str, variant: str) -> None:
    quick = pytestconfig.getoption("quick") or not benchmark.enabled
    device = pytestconfig.getoption("bench_device") or ("cuda" if torch.cuda.is_available() else "cpu")
    wanted = pytestconfig.getoption("bench_csv")
    path = Path(wanted) if wanted else None if quick else RESULTS
    samples, figures = measured(numel, layout, dtype, device, quick, path)

    benchmark.group = f"AdamW, {numel:,} {dtype} parameters, tensors: {layout}"
    benchmark.extra_info.update(figures[variant], steps_per_sample=STEPS)
    turns = cycle(samples[variant])

    def rewind() -> tuple[tuple[float], dict[str, Any]]:
        replay.now = 0.0
        return (next(turns),), {}

    benchmark.pedantic(replay.take, setup=rewind, rounds=len(samples[variant]))


@functools.cache
def measured(
    numel: int, layout: str, dtype: str, device: str, quick: bool, path: Path | None
) -> tuple[Samples, dict[str, dict[str, float]]]:
    """Samples and figures of all variants; measured once, when the first variant asks, and written to `path`."""
    rounds, seconds = (QUICK_ROUNDS, 0.0) if quick else (MIN_ROUNDS, MIN_SECONDS)
    samples = alternate(numel, layout, dtype, torch.device(device), rounds, seconds)
    figures = summary(samples, {v: numel * OWN_BYTES.get(v, BYTES[dtype]) for v in samples})
    if path is not None:
        shared = origin(device) | {"dtype": dtype, "numel": numel, "tensors": layout}
        append(path, COLUMNS, [shared | {"variant": v} | figures[v] for v in samples])
    return samples, figures


def alternate(numel: int, layout: str, dtype: str, device: torch.device, rounds: int, seconds: float) -> Samples:
    """Seconds a step of every variant, turn by turn, for at least `rounds` rounds and `seconds` seconds."""
    gc.collect()  # optimizers and gauges refer to each other, so the last configuration may still hold its memory
    order = variants(layout, dtype)
    trainings = {v: Training(v, numel, layout, DTYPES[dtype], device) for v in order if v not in ROOFS}
    roofs = Roofs(numel, DTYPES[dtype], device)
    steps: dict[str, Callable[[], None]] = {v: training.step for v, training in trainings.items()}
    steps |= {"roof": roofs.copy, "roof_loop": roofs.read_modify_write}

    def sync() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def turn(variant: str) -> float:
        if variant in trainings and numel <= RENEWED:
            trainings[variant].renew()
        step = steps[variant]
        sync()
        start = time.perf_counter()
        for _ in range(STEPS):
            step()
        if variant in READ:
            trainings[variant].gauge.reading()
        sync()
        return (time.perf_counter() - start) / STEPS

    samples: Samples = {v: [] for v in order}
    gc.disable()
    try:
        for _ in range(WARM_UP_TURNS):
            for v in order:
                turn(v)
        start = time.perf_counter()
        while len(samples["torch"]) < rounds or time.perf_counter() - start < seconds:
            for v in order:
                samples[v].append(turn(v))
    finally:
        gc.enable()
    for v, other in ALIKE.items() if dtype == "float32" else ():  # torch's bfloat16 moments make other parameters
        for ours, theirs in zip(trainings[v].params, trainings[other].params, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    for v, other in AS_FAR.items() if dtype == "mixed" else ():
        ours, theirs = trainings[v].moved(), trainings[other].moved()
        share = float(ours @ theirs / (theirs @ theirs))
        if not abs(share - 1) < 0.05:
            raise RuntimeError(f"{v} has gone {share:.3f} of {other}'s way: what was measured is not the same step")
    if any(training.gauge.reading() is None for v, training in trainings.items() if v in READ):
        raise RuntimeError("the gauge has not read anything: what was measured is not a gauged step")
    return samples


class Training:
    """Parameters, gradients and optimizer of one variant; the same numbers for each of them."""

    def __init__(self, variant: str, numel: int, layout: str, dtype: torch.dtype, device: torch.device) -> None:
        self.generator = torch.Generator(device).manual_seed(SEED)

        if variant in IN_BFLOAT16:
            dtype = torch.bfloat16

        def normal(n: int) -> Tensor:
            return torch.randn(n, device=device, generator=self.generator).to(dtype)

        self.params = [torch.nn.Parameter(normal(n)) for n in sizes(numel, layout)]
        for p in self.params:
            p.grad = normal(p.numel())
        self.start = self.sample()
        self.optimizer: torch.optim.Optimizer
        if variant in ("torch", "by_hand", "torch_clip", "torch_bf16"):
            self.optimizer = torch.optim.AdamW(self.params, fused=True)
        elif variant == "torchao_bf16":
            from torchao.optim import _AdamW

            self.optimizer = _AdamW(self.params, bf16_stochastic_round=True)
        else:
            self.optimizer = grgauge.AdamW(
                self.params,
                flat=layout == "flat",
                max_grad_norm=MAX_NORM if variant in ("clip", "clip_states") else None,
                state_dtype=torch.bfloat16 if variant in OWN_BYTES else torch.float32,
                stochastic_rounding=variant == "stochastic",
            )
        self.step: Callable[[], Any] = self.optimizer.step
        if variant in READ:
            self.gauge = grgauge.Gauge(self.optimizer, batch_size=256)
            if STEPS % self.gauge.every:
                raise RuntimeError(f"a turn has {STEPS} steps, no multiple of the gauge's every={self.gauge.every}")
        if variant == "by_hand":
            self.emas = [torch.zeros_like(p, requires_grad=False) for p in self.params]
            self.step = self.step_by_hand
        if variant == "torch_clip":
            self.step = self.step_clipped
        # Gradients that are kept: with flat=True they become views of one buffer here.
        self.step()
        self.optimizer.zero_grad(set_to_none=False)
        self.renew()

    def renew(self) -> None:
        """Draw new gradients in place."""
        for grad in self.grads():
            grad.copy_(torch.randn(grad.shape, device=grad.device, generator=self.generator))

    def sample(self) -> Tensor:
        """The first elements of every parameter, float64."""
        return torch.cat([p.detach()[:10_000].double() for p in self.params])

    def moved(self) -> Tensor:
        return self.sample() - self.start

    def grads(self) -> list[Tensor]:
        return [p.grad for p in self.params if p.grad is not None]

    def step_clipped(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.params, MAX_NORM)
        self.optimizer.step()

    def step_by_hand(self) -> None:
        self.optimizer.step()
        grads = self.grads()
        self.grad_norm = torch.stack(torch._foreach_norm(grads)).norm()
        torch._foreach_lerp_(self.emas, grads, 1 - BETA)
        self.ema_norm = torch.stack(torch._foreach_norm(self.emas)).norm()


class Roofs:
    """The memory traffic of one step and nothing else."""

    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(SEED)
        self.p, self.g = (torch.randn(numel, device=device, generator=generator).to(dtype) for _ in range(2))
        self.m, self.v = (torch.randn(numel, device=device, generator=generator) for _ in range(2))
        traffic = (2 * self.p.nbytes + self.g.nbytes + 2 * self.m.nbytes + 2 * self.v.nbytes) // 2
        self.source = torch.zeros(traffic // 4, device=device).normal_(generator=generator)
        self.target = self.source.clone()
        self.in_one_loop = torch.compile(in_one_loop)

    def copy(self) -> None:
        self.target.copy_(self.source)

    def read_modify_write(self) -> None:
        self.in_one_loop(self.p, self.g, self.m, self.v)


def in_one_loop(p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> None:
    """Each value swings between two: nothing overflows, however long it runs."""
    p.copy_(g - p)
    m.copy_(g - m)
    v.copy_(g - v)


def sizes(numel: int, layout: str) -> list[int]:
    """One tensor, or TENSORS of many sizes, a few of them holding most elements, as in a model; or a model's own."""
    if layout == "1":
        return [numel]
    if layout in MODELS:
        return MODELS[layout]()
    weights = np.random.default_rng(SEED).lognormal(sigma=1.5, size=TENSORS)
    counts = np.maximum(1, (numel * weights / weights.sum()).astype(int))
    counts[counts.argmax()] += numel - counts.sum()
    return [int(n) for n in counts]


def resnet18() -> list[int]:
    """torchvision's: 62 tensors, 11.7 M parameters."""
    stages, inputs = [64 * 3 * 49, 64, 64], 64
    for width in (64, 128, 256, 512):
        for block in range(2):
            stages += [width * inputs * 9, width, width, width * width * 9, width, width]
            stages += [width * inputs, width, width] if block == 0 and inputs != width else []
            inputs = width
    return [*stages, 1000 * 512, 1000]


def gpt2() -> list[int]:
    """GPT-2 124M: 148 tensors, 124.4 M parameters."""
    d = 768
    block = [d, d, d * 3 * d, 3 * d, d * d, d, d, d, d * 4 * d, 4 * d, 4 * d * d, d]
    return [50257 * d, 1024 * d, *(block * 12), d, d]


def llama_lora() -> list[int]:
    """LoRA of rank 8 on q, k, v and o of a Llama of 1.1 B (TinyLlama's shapes): 176 tensors, 2.3 M parameters."""
    d, kv, rank = 2048, 256, 8
    return [size for out in (d, kv, kv, d) for size in (rank * d, out * rank)] * 22


MODELS: dict[str, Callable[[], list[int]]] = {"ResNet-18": resnet18, "GPT-2 124M": gpt2, "Llama + LoRA": llama_lora}
"""Lists of parameters that users recognise."""


def summary(samples: Samples, traffic: dict[str, int]) -> dict[str, dict[str, float]]:
    """The figures of each variant, named as the columns of the CSV are, and the quantiles of the ratio."""
    roof = median(samples["roof"])
    figures = {}
    for variant, seconds in samples.items():
        low, middle, high = spread(seconds)
        ratios = [mine / torchs for mine, torchs in zip(seconds, samples["torch"], strict=True)]
        ratio_low, ratio, ratio_high = spread(ratios)
        figures[variant] = {
            "q20_ms": significant(1e3 * low),
            "q50_ms": significant(1e3 * middle),
            "q80_ms": significant(1e3 * high),
            "ratio_to_torch_fused": significant(ratio),
            "ratio_q20": significant(ratio_low),
            "ratio_q80": significant(ratio_high),
            "gbps": significant(traffic[variant] / middle / 1e9),
            "roof_gbps": significant(traffic["roof"] / roof / 1e9),
        }
    return figures


@functools.cache
def origin(device: str) -> dict[str, Any]:
    """Where and when: the columns that all rows of a run share. Cached, so from before the run's first row."""
    if device == "cpu":
        name = f"{cpuinfo.get_cpu_info().get('brand_raw', 'unknown CPU')} x {torch.get_num_threads()} threads"
    else:
        name = torch.cuda.get_device_name(device)
    today = datetime.now(timezone.utc).date().isoformat()
    return {"date": today, "commit": commit(), "device": name, "torch": torch.__version__}
