"""Variants take turns, A B C A B C ...: their times, launches and rows. Needs torch and nothing else."""

from __future__ import annotations

import csv
import gc
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[1]
STEPS = 5
"""Consecutive steps in a turn: a gauge reads every fifth, and a sample must hold its share of that."""
WARM_UP_TURNS = 2
FLUSH = 256 * 2**20
"""Bytes written between turns, outside the clock: more than any GPU's last cache holds."""


@dataclass
class Samples:
    """One variant's turns: milliseconds a step as the device saw it, and as the host did, which need not wait."""

    ms: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)
    launches: float | None = None
    device_ms: float | None = None


class Clock:
    """Times a turn by CUDA events; on a CPU by the host's clock."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self._flushed = torch.empty(FLUSH if self.cuda else 0, dtype=torch.uint8, device=device)

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def turn(self, step: Callable[[], Any]) -> tuple[float, float]:
        """Milliseconds a step, (of the device, of the host), from an idle device on: what the host delays counts."""
        self._flushed.zero_()
        self.synchronize()
        if self.cuda:
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
        start = time.perf_counter()
        for _ in range(STEPS):
            step()
        host = 1e3 * (time.perf_counter() - start)
        if not self.cuda:
            return host / STEPS, host / STEPS
        events[1].record()
        self.synchronize()
        return events[0].elapsed_time(events[1]) / STEPS, host / STEPS

    def launches(self, step: Callable[[], Any]) -> tuple[float | None, float | None]:
        """What the device ran a step, in number and in milliseconds: kernels, copies and memsets. None if unknown."""
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.cuda
        self.synchronize()
        with profile(activities=activities, acc_events=True) as seen:
            for _ in range(STEPS):
                step()
            self.synchronize()
        events = [e for e in seen.events() if e.device_type == DeviceType.CUDA]
        # Ranges like "Optimizer.step#AdamW.step" stand in the device's row too, and are no work of its own.
        events = [e for e in events if not (getattr(e, "is_user_annotation", False) or e.name.startswith("Optimizer."))]
        if not events:
            return None, None
        return len(events) / STEPS, sum(e.time_range.elapsed_us() for e in events) / 1e3 / STEPS


def alternate(
    steps: dict[str, Callable[[], Any]],
    clock: Clock,
    between: Callable[[str], None],
    rounds: int,
    seconds: float,
    count: bool = True,
) -> dict[str, Samples]:
    """Every variant's turns, for at least `rounds` rounds and `seconds` seconds; `between` runs before each turn.

    count   also count launches
    """
    samples = {variant: Samples() for variant in steps}
    gc.collect()
    gc.disable()
    try:
        for _ in range(WARM_UP_TURNS):
            for variant, step in steps.items():
                between(variant)
                clock.turn(step)
        start = time.perf_counter()
        done = 0
        while done < rounds or time.perf_counter() - start < seconds:
            for variant, step in steps.items():
                between(variant)
                ms, host_ms = clock.turn(step)
                samples[variant].ms.append(ms)
                samples[variant].host_ms.append(host_ms)
            done += 1
        for variant, step in steps.items() if count else ():
            samples[variant].launches, samples[variant].device_ms = clock.launches(step)
    finally:
        gc.enable()
    return samples


class Thread:
    """A training that holds the loop itself, in a thread of its own, which goes on for five steps a turn.

    train  called with a function that it must call before each step
    """

    def __init__(self, train: Callable[[Callable[[], None]], object], device: torch.device) -> None:
        self._train, self._clock = train, Clock(device)
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._steps, self._start, self._seconds = 0, 0.0, 0.0
        self._failure: BaseException | None = None
        self._over = False
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._wait()  # for its first step: frameworks share state between trainings while they set them up

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        try:
            self._train(self._before_step)
        except BaseException as error:
            self._failure = error
        finally:
            self._over = True
            self._done.release()

    def _before_step(self) -> None:
        if self._steps % STEPS == 0:
            self._clock.synchronize()
            self._seconds = (time.perf_counter() - self._start) / STEPS
            self._done.release()
            self._go.acquire()
            self._start = time.perf_counter()
        self._steps += 1

    def turn(self) -> float:
        """Take five steps: the seconds of one, with all that is done until the next begins."""
        self._go.release()
        self._wait()
        return self._seconds

    def _wait(self) -> None:
        self._done.acquire()
        if self._failure is not None:
            raise self._failure
        if self._over:
            raise RuntimeError("the training ended before its turns did")

    def close(self) -> None:
        """Let it train to its end."""
        while self._thread.is_alive():
            self._go.release()
            self._thread.join(0.01)
        if self._failure is not None:
            raise self._failure


def ratio(mine: Samples, other: Samples) -> float:
    """Median of the ratios between turns of the same round."""
    return median(a / b for a, b in zip(mine.ms, other.ms, strict=True))


def spread(values: list[float]) -> tuple[float, float, float]:
    """20 % quantile, median, 80 % quantile."""
    low, *_, high = quantiles(values, n=5, method="inclusive")
    return low, median(values), high


def quantile_columns(ms: list[float]) -> dict[str, float]:
    return {f"q{q}_ms": significant(value) for q, value in zip((20, 50, 80), spread(ms), strict=True)}


def ratio_columns(ms: list[float], baseline: list[float]) -> dict[str, float]:
    """Of the ratios between turns of the same round."""
    low, middle, high = spread([a / b for a, b in zip(ms, baseline, strict=True)])
    return {"ratio": significant(middle), "ratio_q20": significant(low), "ratio_q80": significant(high)}


def significant(value: float) -> float:
    return float(f"{value:.4g}")


@cache
def origin(device: torch.device) -> dict[str, Any]:
    """Where and when: the columns that all rows of a run share. Cached, so from before the run's first row."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU x {torch.get_num_threads()} threads"
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = ""
    today = datetime.now(timezone.utc).date().isoformat()
    return {"date": today, "commit": commit(), "device": name, "torch": torch.__version__, "triton": triton}


def commit() -> str:
    """Short hash of HEAD, with a + if the tree differs from it; what benchmarks write and build does not count."""
    status = ["status", "--porcelain", "--", ".", ":!bench/results", ":!README.md", ":!docs", ":!grgauge_kernels/lib"]
    try:
        head, changes = (
            subprocess.run(["git", *args], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
            for args in (["rev-parse", "--short", "HEAD"], status)
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + "+" * bool(changes)


def append(path: Path, columns: str, rows: Iterable[dict[str, Any]]) -> None:
    """Add rows, on disk when this returns; the header too if the file is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8", newline="") as file:
        file.seek(0)
        header = file.readline()
        if header and header.strip() != columns:
            raise RuntimeError(f"{path} has other columns than this benchmark writes: {header.strip()}")
        writer = csv.DictWriter(file, columns.split(","), extrasaction="ignore", lineterminator="\n")
        if not header:
            writer.writeheader()
        writer.writerows(rows)
        file.flush()
        os.fsync(file.fileno())
