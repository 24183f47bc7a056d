"""What two ranks do in test_ranks.py: torchrun starts this file once, and the tests judge what each rank has saved."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from tuning.scripted import SPACE, Probing, Scripted, retune

from grgauge import Advisor, Autopilot, Config, Gauge, Stop, TrainingError, tune
from grgauge.policy import Evidence

SAMPLES, BUDGET, START = 500, 1600, Config(1e-3, 32)


def dataset():
    """Rows [7] of which the first is their number, which no model sees."""
    x = torch.randn(SAMPLES, 6, generator=torch.Generator().manual_seed(0))
    y = x.sum(1, keepdim=True) + 0.1 * torch.randn(SAMPLES, 1, generator=torch.Generator().manual_seed(1))
    return TensorDataset(torch.cat([torch.arange(SAMPLES)[:, None].float(), x], 1), y)


def net():
    return nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.1), nn.ReLU(), nn.Linear(16, 1))


def weights(model):
    return torch.cat([getattr(p, "full_tensor", lambda p=p: p)().detach().flatten() for p in model.parameters()])


def orders():
    """Going on, back to saved weights, and once more from untrained ones; never where the newest checkpoint is."""
    return {
        320: retune(Config(1e-2, 32)),
        960: retune(Config(5e-3, 64), rollback=True),
        1088: retune(Config(2e-2, 64), reuse=False),
        1280: retune(Config(1e-2, 32)),
    }


def tuned(storage, seen=None, wrap=DistributedDataParallel, budget=BUDGET, scripted=None, die_at=None, **changes):
    """`tune` with those orders on the ranks there are; rows seen go into `seen`."""
    data, made = dataset(), Scripted(orders() if scripted is None else scripted)

    def train(trial):
        model = wrap(net())
        optimizer = torch.optim.AdamW(model.parameters(), lr=trial.lr)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
        trial.watch(model, optimizer, scheduler)
        for x, y in trial.batches(data):
            if die_at is not None:
                die_at(trial)
            if seen is not None:
                seen.append(x[:, 0].tolist())
            if trial.step(F.mse_loss(model(x[:, 1:]), y)):
                scheduler.step()
        return weights(model)

    settings = {"budget": budget, "storage": storage, "start": START, "checkpoint_every": 1000.0, **changes}
    return tune(train, SPACE, policy=lambda **bounds: made, **settings)


def summary_of(result):
    return {
        "config": result.config,
        "used": result.used,
        "verdict": result.verdict,
        "loss": result.loss,
        "weights": result.output,
        "trials": [
            (t.number, t.parent, t.state, t.lr, t.batch_size, t.start_samples, t.samples) for t in result.trials
        ],
        "losses": [trial.losses for trial in result.trials],
    }


# --- scenarios -------------------------------------------------------------------------------------------------------


def autopilot(folder, wrap=DistributedDataParallel, budget=4000):
    """From far too low a learning rate."""
    torch.manual_seed(0)
    model = wrap(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    lines, rows, losses = [], [], []
    pilot = Autopilot(model, optimizer, batch_size=64, budget=budget, micro_batch=20, print=lines.append)
    for x, y in pilot.batches(dataset()):
        rows.append((pilot.samples, pilot.batch_size, x[:, 0].tolist()))
        if pilot.step(F.mse_loss(model(x[:, 1:]), y)):
            losses.append(pilot.loss)
    return {
        "decisions": [f"{decision}" for decision in pilot.decisions],
        "config": pilot.config,
        "weights": weights(model),
        "readings": pilot.reading.to_dict(),
        "losses": losses,
        "lines": lines,
        "rows": rows,
    }


def sharded_autopilot(folder):
    return autopilot(folder, fully_shard, 2500)


def probed(folder, wrap=DistributedDataParallel):
    """A run without a probe, with one that is refused, and with one that is taken."""
    results = {}
    for take in (None, False, True):
        torch.manual_seed(0)
        model = wrap(net())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        policy, lines = Scripted({}) if take is None else Probing(take), []
        budget = 1600 if take is None else 1600 + 96 + 2 * 4 * 16
        pilot = Autopilot(model, optimizer, batch_size=16, budget=budget, policy=policy, print=lines.append)
        for x, y in pilot.batches(dataset()):
            pilot.step(F.mse_loss(model(x[:, 1:]), y))
        results[take] = {
            "weights": weights(model),
            "config": pilot.config,
            "used": (pilot.samples, pilot.used),
            "lines": lines,
            "judged": getattr(policy, "losses", None),
        }
    return results


def sharded_probed(folder):
    return probed(folder, fully_shard)


def rank_0_stops(folder):
    """A policy that only rank 0's process would stop by."""
    model = DistributedDataParallel(net())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scripted = Scripted({320: Stop("enough", Evidence("script"))} if dist.get_rank() == 0 else {})
    pilot = Autopilot(model, optimizer, batch_size=32, budget=10_000, policy=scripted, print=lambda line: None)
    for x, y in pilot.batches(dataset()):
        pilot.step(F.mse_loss(model(x[:, 1:]), y))
    return {"used": pilot.used, "decisions": pilot.decisions, "asked": len(scripted.seen)}


def advised(folder):
    model = DistributedDataParallel(net())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    gauge, lines, said = Gauge(optimizer, 64), [], []
    gauge.attach(model)
    advisor = Advisor(gauge, optimizer, every=20, print=lines.append)
    for t in range(60):
        x, y = dataset()[torch.arange(64 * t, 64 * t + 64)[dist.get_rank() :: 2] % SAMPLES]
        optimizer.zero_grad()
        loss = F.mse_loss(model(x[:, 1:]), y)
        loss.backward()
        optimizer.step()
        said.append(f"{advisor.step(loss)}")
    return {"lines": lines, "said": said}


def undisturbed(folder):
    seen = []
    return {**summary_of(tuned(folder / "whole.db", seen)), "seen": seen}


def killed_before(folder):
    """Goes on where a job of two ranks was killed."""
    seen = []
    return {**summary_of(tuned(folder / "kill.db", seen)), "seen": seen}


def sharded(folder):
    """FSDP2, with weights that go back; stopped half-way, at a step that is read, and gone on with."""
    scripted = {160: retune(Config(1e-2, 32)), 256: retune(Config(5e-3, 32), rollback=True)}
    straight = tuned(folder / "straight.db", wrap=fully_shard, scripted=scripted, budget=640)
    tuned(folder / "halves.db", wrap=fully_shard, scripted=scripted, budget=416)
    again = tuned(folder / "halves.db", wrap=fully_shard, budget=640)
    return {"straight": summary_of(straight), "again": summary_of(again)}


def begun_by_one(folder):
    """One process has trained half of it, without ranks."""
    seen = []
    return {**summary_of(tuned(folder / "one.db", seen, scripted={})), "seen": seen}


def loaders(folder):
    """Other kinds of data: one that a DataLoader reads, and what a function makes of a batch size."""
    results = {}

    def loader(batch_size):
        results["asked"] = batch_size
        return DataLoader(dataset(), batch_size)

    for name, data in (("DataLoader", DataLoader(dataset(), 8, shuffle=True)), ("function", loader)):
        model = DistributedDataParallel(net())
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        pilot = Autopilot(model, optimizer, batch_size=50, budget=500, policy=Scripted({}), print=lambda line: None)
        results[name] = []
        for x, y in pilot.batches(data):
            results[name] += x[:, 0].tolist()
            pilot.step(F.mse_loss(model(x[:, 1:]), y))
    return results


def refusals(folder):
    messages = {}
    plain, module = net(), DistributedDataParallel(net())

    def refused(name, error, call):
        with pytest.raises(error) as caught:
            call()
        messages[name] = str(caught.value)

    def pilot(model, batch_size=32, **options):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        return Autopilot(model, optimizer, batch_size=batch_size, budget=100, **options)

    def odd():
        flown = pilot(module, policy=Scripted({32: retune(Config(1e-3, 33))}), print=lambda line: None)
        for x, y in flown.batches(dataset()):
            flown.step(F.mse_loss(module(x[:, 1:]), y))

    def out_of_memory(trial):
        raise torch.OutOfMemoryError("CUDA out of memory (a test's)")

    storage, never = folder / "refused.db", folder / "never.db"
    refused("plain module", TrainingError, lambda: pilot(plain))
    refused("odd batch", ValueError, lambda: pilot(module, 33))
    refused("a batch of 1", ValueError, lambda: pilot(module, 1))
    refused("odd retune", TrainingError, odd)
    refused("odd start", ValueError, lambda: tuned(never, start=Config(1e-3, 33)))
    refused("no even batch", ValueError, lambda: tune(print, {**SPACE, "batch_size": (9, 9)}, budget=9, storage=never))
    assert not never.exists()
    refused("plain module to tune", TrainingError, lambda: tuned(storage, wrap=lambda model: model))
    refused("no storage", (ValueError, TrainingError), lambda: tuned("nosuch://x", checkpoint_dir=folder))
    refused("out of memory", TrainingError, lambda: tuned(storage, study_name="memory", die_at=out_of_memory))
    return messages


SCENARIOS = (
    autopilot,
    sharded_autopilot,
    probed,
    sharded_probed,
    rank_0_stops,
    advised,
    undisturbed,
    killed_before,
    sharded,
    begun_by_one,
    loaders,
    refusals,
)


def main(folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    results = {}
    for scenario in SCENARIOS:
        results[scenario.__name__] = scenario(folder)
        dist.barrier()
    torch.save(results, folder / f"{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
