"""Ray Tune by gauges: trials that read badly are changed, cloned or stopped. Under a minute on a CPU."""

import tempfile
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune
from torch import nn

import grgauge
from grgauge.integrations.ray import GaugeScheduler, GaugeSearch, metrics

STEPS, TEACHER = 150, torch.linspace(-1, 1, 16)


def train(config: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    batch_size = config["batch_size"]
    net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = grgauge.AdamW(net.parameters(), lr=config["lr"])
    gauge = grgauge.Gauge(optimizer, batch_size)
    first, samples = 1, 0

    if checkpoint := tune.get_checkpoint():
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / "state.pt")
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        gauge.load_state_dict(state["gauge"])
        first, samples = state["step"] + 1, state["samples"]
        if state["config"] != config:  # changed, or cloned from another trial
            optimizer.param_groups[0]["lr"] = config["lr"]
            gauge.batch_size = batch_size
            gauge.restart()

    for step in range(first, STEPS + 1):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(batch_size, 16, generator=generator)
        y = (x @ TEACHER + 0.1 * torch.randn(batch_size, generator=generator)).unsqueeze(1)
        optimizer.zero_grad()
        loss = gauge.split_backward(lambda b: nn.functional.mse_loss(net(b[0]), b[1]), (x, y))
        optimizer.step()
        samples += batch_size
        reading = gauge.reading()
        if reading is not None and reading.step == step:
            with tempfile.TemporaryDirectory() as folder:
                state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "gauge": gauge.state_dict()}
                torch.save({**state, "step": step, "samples": samples, "config": config}, Path(folder) / "state.pt")
                tune.report(metrics(reading, float(loss), samples), checkpoint=tune.Checkpoint.from_directory(folder))


if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    space = {"lr": tune.loguniform(1e-6, 1.0), "batch_size": tune.randint(8, 257)}
    scheduler = GaugeScheduler(space, max_changes=2, seed=0)  # a changed trial takes seconds to start again
    tuner = tune.Tuner(
        train,
        param_space=space,
        tune_config=tune.TuneConfig(search_alg=GaugeSearch(seed=0), scheduler=scheduler, num_samples=3),
        run_config=tune.RunConfig(storage_path=tempfile.mkdtemp(), verbose=0),
    )
    for result in tuner.fit():
        print(f"loss {result.metrics['loss']:.3f} at {result.config}")
    for trial, what, evidence, config in scheduler.changes:
        print(f"{trial}: {what} ({evidence}), now {config}")
