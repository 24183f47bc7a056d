"""What a gauge costs on other optimizers: `python bench/hooks.py`, some ten minutes on two cores.

A training step of a 124 M GPT with a gauge at its defaults on the optimizer's hooks: a pass over 5e7 sampled parameters
before every step. Hooks run in the order of their making, so one made before the gauge and one behind it time the gauge
alone: the difference of whole training steps would drown in their noise. Its share is of all the rest of the step.

Rows go to bench/results/hooks.csv: median, 20 and 80 % quantile of the share, and seconds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from gpt import CONFIGS, GPT
from rich.progress import track
from turns import append, origin, significant, spread

import grgauge

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results" / "hooks.csv"
COLUMNS = "date,commit,device,torch,model,optimizer,sample,tokens,step_s,gauge_q20,gauge_q50,gauge_q80"
SAMPLE = 50_000_000


def optimizers(params: list[torch.nn.Parameter]) -> dict[str, Callable[[], torch.optim.Optimizer]]:
    from torchao.optim import AdamW8bit

    return {
        "SGD": lambda: torch.optim.SGD(params, lr=1e-3),
        "Adam beta1=0.8": lambda: torch.optim.Adam(params, lr=1e-5, betas=(0.8, 0.999), fused=True),
        "Muon (matrices)": lambda: torch.optim.Muon([p for p in params if p.ndim == 2], lr=1e-4),
        "AdamW8bit of torchao": lambda: AdamW8bit(params, lr=1e-5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, no rows: does it run?")
    parser.add_argument("--tokens", type=int, default=1024, help="in a step, in sequences of 256")
    options = parser.parse_args()
    name, steps = ("tiny", 6) if options.quick else ("124M", 10)
    config = CONFIGS[name]
    length = min(256, config.context)
    batch = max(1, options.tokens // length)

    torch.manual_seed(0)
    model = GPT(config)
    params = list(model.parameters())
    words = torch.randint(config.vocabulary, (batch, length + 1))
    rows = []
    for kind, make in optimizers(params).items():
        optimizer = make()
        clock = [0.0, 0.0]
        optimizer.register_step_pre_hook(lambda *_, clock=clock: clock.__setitem__(0, time.perf_counter()))
        gauge = grgauge.Gauge(optimizer, batch_size=batch, sample=SAMPLE)
        optimizer.register_step_pre_hook(lambda *_, clock=clock: clock.__setitem__(1, time.perf_counter()))
        shares, seconds = [], []
        for step in track(range(steps + 1), description=kind):
            start = time.perf_counter()
            model.zero_grad()
            model(words[:, :-1], words[:, 1:]).backward()
            optimizer.step()
            taken, gauges = time.perf_counter() - start, clock[1] - clock[0]
            if step:  # the first makes states and plans
                shares.append(gauges / (taken - gauges))
                seconds.append(taken - gauges)
        if gauge.reading() is None:
            raise RuntimeError("the gauge has not read anything: what was measured is not its cost")
        low, share, high = spread(shares)
        step_s = spread(seconds)[1]
        print(f"{kind}: step {step_s:.2f} s, gauge {share:.2%} of it ({low:.2%} to {high:.2%})")
        figures = {"step_s": step_s, "gauge_q20": low, "gauge_q50": share, "gauge_q80": high}
        labels = {"model": name, "optimizer": kind, "sample": SAMPLE, "tokens": batch * length}
        rows.append(origin(torch.device("cpu")) | labels | {k: significant(v) for k, v in figures.items()})
    if not options.quick:
        append(RESULTS, COLUMNS, rows)


if __name__ == "__main__":
    main()
