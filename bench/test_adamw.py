"""What one optimizer step costs, with and without the gauge, beside what the machine's memory allows.

Each configuration (size x layout of the tensors) is one run in which all variants take turns, A B C D E F A B C ...:

    torch      torch.optim.AdamW(fused=True)
    plain      grgauge.AdamW, no gauge
    gauged     grgauge.AdamW with a grgauge.Gauge at its defaults
    by_hand    torch's fused AdamW, then foreach norms of the gradients, their EMA by foreach, and the norms of that
    roof       dst.copy_(src), sized to move the 28 bytes a parameter that AdamW moves (reads p g m v, writes p m v)
    roof_rmw   the same 28 bytes as AdamW moves them: torch.sub(g, p, out=p), m.neg_(), v.neg_()

A turn is STEPS consecutive steps, and a sample their mean: the gauge reads every fifth step, so a median over single
steps would leave the reading out. gauged / plain is what the gauge costs, gauged / torch what the user sees. Ratios
are taken between turns of the same round.

Two roofs, because on a CPU a store that misses the cache may read its line first: a copy then moves half as much again
as it is credited with, an in-place update does not, and AdamW can beat the copy roof. Both are the real ceiling only
where buffers outgrow the last cache, as 50 M parameters do; at smaller sizes a turn of several steps may find them in
a cache, roofs and steps alike, and the host work of a step counts for more.

Every variant has its own tensors with the same values, and all four optimizers must end at the same parameters.
In layout `flat`, ours keep their 300 tensors in one flat buffer; torch and by_hand have them loose, as their users do.
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
VARIANTS = ("torch", "plain", "gauged", "by_hand", "roof", "roof_rmw")

SEED = 0
TENSORS = 300
STEPS = 5
WARM_UP_TURNS = 2
MIN_ROUNDS, MIN_SECONDS = 15, 6.0
QUICK_ROUNDS = 3
BYTES = 28
"""Per float32 parameter and step."""
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
    metafunc.parametrize("numel", (QUICK_NUMEL,) if quick else NUMELS)
    metafunc.parametrize("layout", LAYOUTS)
    metafunc.parametrize("variant", VARIANTS)


@pytest.mark.benchmark(timer=replay)
def test_adamw(benchmark: Any, pytestconfig: pytest.Config, numel: int, layout: str, variant: str) -> None:
    quick = pytestconfig.getoption("quick") or not benchmark.enabled
    device = pytestconfig.getoption("bench_device") or ("cuda" if torch.cuda.is_available() else "cpu")
    wanted = pytestconfig.getoption("bench_csv")
    path = Path(wanted) if wanted else None if quick else RESULTS
    samples, figures = measured(numel, layout, device, quick, path)

    benchmark.group = f"AdamW, {numel:,} parameters, tensors: {layout}"
    benchmark.extra_info.update(figures[variant], steps_per_sample=STEPS)
    turns = cycle(samples[variant])

    def rewind() -> tuple[tuple[float], dict[str, Any]]:
        replay.now = 0.0
        return (next(turns),), {}

    benchmark.pedantic(replay.take, setup=rewind, rounds=len(samples[variant]))


@functools.cache
def measured(
    numel: int, layout: str, device: str, quick: bool, path: Path | None
) -> tuple[Samples, dict[str, dict[str, float]]]:
    """Samples and figures of all variants; measured once, when the first variant asks, and written to `path`."""
    rounds, seconds = (QUICK_ROUNDS, 0.0) if quick else (MIN_ROUNDS, MIN_SECONDS)
    samples = alternate(numel, layout, torch.device(device), rounds, seconds)
    figures = summary(samples, numel)
    if path is not None:
        shared = origin(device) | {"numel": numel, "tensors": layout}
        append(path, COLUMNS, [shared | {"variant": v} | figures[v] for v in VARIANTS])
    return samples, figures


def alternate(numel: int, layout: str, device: torch.device, rounds: int, seconds: float) -> Samples:
    """Seconds a step of every variant, turn by turn, for at least `rounds` rounds and `seconds` seconds."""
    gc.collect()  # optimizers and gauges refer to each other, so the last configuration may still hold its memory
    trainings = {v: Training(v, numel, layout, device) for v in ("torch", "plain", "gauged", "by_hand")}
    roofs = Roofs(numel, device)
    steps: dict[str, Callable[[], None]] = {v: training.step for v, training in trainings.items()}
    steps |= {"roof": roofs.copy, "roof_rmw": roofs.read_modify_write}

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
        sync()
        return (time.perf_counter() - start) / STEPS

    samples: Samples = {v: [] for v in VARIANTS}
    gc.disable()
    try:
        for _ in range(WARM_UP_TURNS):
            for v in VARIANTS:
                turn(v)
        start = time.perf_counter()
        while len(samples["torch"]) < rounds or time.perf_counter() - start < seconds:
            for v in VARIANTS:
                samples[v].append(turn(v))
    finally:
        gc.enable()
    for v in ("plain", "gauged", "by_hand"):
        for ours, theirs in zip(trainings[v].params, trainings["torch"].params, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    if trainings["gauged"].gauge.reading() is None:
        raise RuntimeError("the gauge has not read anything: what was measured is not a gauged step")
    return samples


class Training:
    """Parameters, gradients and optimizer of one variant; the same numbers for each of them."""

    def __init__(self, variant: str, numel: int, layout: str, device: torch.device) -> None:
        self.generator = torch.Generator(device).manual_seed(SEED)
        self.params = [
            torch.nn.Parameter(torch.randn(n, device=device, generator=self.generator)) for n in sizes(numel, layout)
        ]
        for p in self.params:
            p.grad = torch.randn(p.shape, device=device, generator=self.generator)
        self.optimizer: torch.optim.Optimizer
        if variant in ("torch", "by_hand"):
            self.optimizer = torch.optim.AdamW(self.params, fused=True)
        else:
            self.optimizer = grgauge.AdamW(self.params, flat=layout == "flat")
        self.step: Callable[[], Any] = self.optimizer.step
        if variant == "gauged":
            self.gauge = grgauge.Gauge(self.optimizer, batch_size=256)
            if STEPS % self.gauge.every:
                raise RuntimeError(f"a turn has {STEPS} steps, no multiple of the gauge's every={self.gauge.every}")
        if variant == "by_hand":
            self.emas = [torch.zeros_like(p, requires_grad=False) for p in self.params]
            self.step = self.step_by_hand

    def renew(self) -> None:
        """Draw new gradients in place."""
        for grad in self.grads():
            grad.normal_(generator=self.generator)

    def grads(self) -> list[Tensor]:
        return [p.grad for p in self.params if p.grad is not None]

    def step_by_hand(self) -> None:
        self.optimizer.step()
        grads = self.grads()
        self.grad_norm = torch.stack(torch._foreach_norm(grads)).norm()
        torch._foreach_lerp_(self.emas, grads, 1 - BETA)
        self.ema_norm = torch.stack(torch._foreach_norm(self.emas)).norm()


class Roofs:
    """The memory traffic of one step and nothing else, twice, in the same two buffers."""

    def __init__(self, numel: int, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(SEED)
        words = BYTES // 4 * numel // 2
        self.source = torch.randn(words, device=device, generator=generator)
        self.target = self.source.clone()
        self.p, self.g, self.m = self.source[: 3 * numel].view(3, numel)
        self.v = self.target[:numel]

    def copy(self) -> None:
        self.target.copy_(self.source)

    def read_modify_write(self) -> None:
        torch.sub(self.g, self.p, out=self.p)  # p swings between two values: nothing overflows, however long it runs
        self.m.neg_()
        self.v.neg_()


def sizes(numel: int, layout: str) -> list[int]:
    """One tensor, or TENSORS of many sizes, a few of them holding most elements, as in a model."""
    if layout == "1":
        return [numel]
    weights = np.random.default_rng(SEED).lognormal(sigma=1.5, size=TENSORS)
    counts = np.maximum(1, (numel * weights / weights.sum()).astype(int))
    counts[counts.argmax()] += numel - counts.sum()
    return [int(n) for n in counts]


def summary(samples: Samples, numel: int) -> dict[str, dict[str, float]]:
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
            "gbps": significant(BYTES * numel / middle / 1e9),
            "roof_gbps": significant(BYTES * numel / roof / 1e9),
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
    return {"date": today, "commit": commit(), "device": name, "torch": torch.__version__, "dtype": "float32"}
