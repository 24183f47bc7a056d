"""Killed at any moment and started again: tune() goes on and repeats no finished trial."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
import torch
from tuning.scripted import SPACE, Scripted, linear, retune

from grgauge import Config, Policy, TrainingError, tune
from grgauge.tuning.checkpoints import Checkpoints
from grgauge.tuning.study import Trials

SCRIPT = """\
import sys, torch, torch.nn.functional as F
sys.path.insert(0, sys.argv[2])
from torch import nn
from torch.utils.data import TensorDataset
from tuning.scripted import Scripted, retune
from grgauge import Config, tune

torch.set_num_threads(1)
x = torch.randn(512, 6, generator=torch.Generator().manual_seed(0))
data = TensorDataset(x, x.sum(1))


def train(trial):
    model = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.1), nn.ReLU(), nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=trial.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    trial.watch(model, optimizer, scheduler)
    for x, y in trial.batches(data):
        if trial.step(F.mse_loss(model(x)[:, 0], y)):
            scheduler.step()
        print(trial.used, flush=True)
    return float(sum(p.double().sum() for p in model.parameters()))


orders = {320: retune(Config(1e-2, 32)), 960: retune(Config(5e-3, 64)), 1280: retune(Config(3e-3, 32), rollback=True)}
space = {"lr": (1e-5, 1.0), "batch_size": (8, 64)}
start, made = Config(1e-3, 32), Scripted(orders)
every = float(sys.argv[3])
result = tune(
    train, space, budget=1600, storage=sys.argv[1], start=start, checkpoint_every=every, policy=lambda **bounds: made
)
print("sum", result.output)
"""


def finished(storage):
    study = optuna.load_study(study_name="grgauge", storage=f"sqlite:///{storage}")
    return {t.number: (t.params, t.value, t.datetime_complete) for t in study.trials if t.state.is_finished()}


def run(script, storage, kill_at=None):
    """Samples that it says it has used, and its last line; killed when it has printed `kill_at` lines."""
    every = 1000.0 if kill_at is None else 0.0
    command = [sys.executable, str(script), str(storage), str(Path(__file__).parents[1]), str(every)]
    used, last = [], ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            last = line
            used += [int(line)] if line.strip().isdigit() else []
            if len(used) == kill_at:
                process.send_signal(signal.SIGKILL)
                break
        _, err = process.communicate(timeout=60)
    assert process.returncode == (0 if kill_at is None else -signal.SIGKILL), err
    return used, last


def test_kill_9_and_the_same_command_again_end_where_an_undisturbed_run_does(tmp_path, empty):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    whole, storage = (shutil.copy(empty, tmp_path / name) for name in ("whole.db", "killed.db"))
    _, undisturbed = run(script, whole)
    killed, _ = run(script, storage, 22)
    before = finished(storage)
    assert set(before) == {0}
    used, last = run(script, storage)
    assert used[0] <= killed[-1] + 128  # a checkpoint a step: it lost at most that one
    assert last == undisturbed  # bit for bit
    study = optuna.load_study(study_name="grgauge", storage=f"sqlite:///{storage}")
    whole = optuna.load_study(study_name="grgauge", storage=f"sqlite:///{tmp_path / 'whole.db'}")
    assert before.items() <= finished(storage).items()
    assert [trial.params for trial in study.trials] == [trial.params for trial in whole.trials]
    assert [trial.value for trial in study.trials] == [trial.value for trial in whole.trials]
    assert sum(trial.user_attrs["samples"] for trial in study.trials) == study.user_attrs["used"]


# --- every moment, without processes ---------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def orders():
    return {
        96: retune(Config(0.03, 32)),
        160: retune(Config(0.02, 16), rollback=True),
        224: retune(Config(0.01, 32), reuse=False),
        288: retune(Config(0.02, 32)),
    }


def train_once(regression, storage):
    result = tune(
        lambda trial: linear(trial, regression),
        SPACE,
        budget=400,
        storage=storage,
        policy=lambda **bounds: Scripted(orders()),
        start=Config(0.01, 32),
        checkpoint_every=1000.0,
    )
    trials = [(t.number, t.parent, t.state, t.lr, t.batch_size, t.start_samples, t.samples) for t in result.trials]
    return trials, {name: value.tolist() for name, value in result.model.state_dict().items()}


@pytest.mark.parametrize("moments", [(3, 5), pytest.param(range(100), marks=pytest.mark.slow)])
def test_killed_between_two_writes(moments, regression, tmp_path, empty, monkeypatch):
    whole = train_once(regression, shutil.copy(empty, tmp_path / "whole.db"))
    assert [(number, parent) for number, parent, *_ in whole[0]] == [(0, None), (1, 0), (2, 0), (3, None), (4, 3)]
    calls, deadly = itertools.count(), -1

    def dying(method):
        def call(self, *arguments, **named):
            method(self, *arguments, **named)
            if next(calls) == deadly:
                raise Killed

        return call

    for kind, name in ((Trials, "begin"), (Trials, "write"), (Trials, "note"), (Checkpoints, "save")):
        monkeypatch.setattr(kind, name, dying(getattr(kind, name)))
    killed = 0
    for moment in moments:
        calls, deadly = itertools.count(), moment
        storage = shutil.copy(empty, tmp_path / f"{moment}.db")
        try:
            train_once(regression, storage)
        except Killed:
            deadly = -1
            killed += 1
            assert train_once(regression, storage) == whole
        else:
            break  # it has no more writes than that
    assert killed >= min(len(moments), 20)


def test_a_checkpoint_half_written_is_not_read(regression, tmp_path, empty):
    train_once(regression, shutil.copy(empty, tmp_path / "run.db"))
    (checkpoint,) = tmp_path.glob("run.db.checkpoints/*/last.pt")
    checkpoint.with_name("last.pt.part").write_bytes(b"half")
    assert train_once(regression, tmp_path / "run.db")[0]


# --- going on --------------------------------------------------------------------------------------------------------


def test_a_finished_study_trains_nothing_and_gives_its_model_back(regression, go):
    seen = []
    first = go(lambda trial: linear(trial, regression), orders={}, start=Config(0.01, 32))
    again = go(lambda trial: linear(trial, regression, seen=seen), orders={}, start=Config(0.01, 32))
    assert seen == []
    assert (again.used, len(again.trials)) == (first.used, len(first.trials))
    assert torch.equal(again.model.weight, first.model.weight)


def test_a_larger_budget_goes_on_from_the_end(regression, go):
    go(lambda trial: linear(trial, regression), orders={}, start=Config(0.01, 32))
    seen = []
    longer = go(lambda trial: linear(trial, regression, seen=seen), orders={}, start=Config(0.01, 32), budget=2048)
    assert sum(size for size, _, _ in seen) == 1024
    assert [(trial.parent, trial.samples) for trial in longer.trials] == [(None, 1024), (0, 1024)]
    whole = go(
        lambda trial: linear(trial, regression), orders={}, start=Config(0.01, 32), budget=2048, study_name="whole"
    )
    assert torch.equal(longer.model.weight, whole.model.weight)


def test_a_study_is_continued_with_what_it_was_begun_with(regression, go, tmp_path):
    go(lambda trial: linear(trial, regression), orders={})
    with pytest.raises(ValueError, match="seed is 1, but study 'grgauge'"):
        go(lambda trial: linear(trial, regression), orders={}, seed=1)
    with pytest.raises(ValueError, match="checkpoint_dir must be the folder"):
        go(lambda trial: linear(trial, regression), orders={}, checkpoint_dir=tmp_path / "elsewhere")


def test_after_an_error_the_same_call_goes_on(regression, go):
    seen = []
    fails = True

    def train(trial):
        if not fails:
            return linear(trial, regression, seen=seen)
        model = torch.nn.Linear(6, 1)
        trial.watch(model, torch.optim.AdamW(model.parameters(), lr=trial.lr))
        for x, y in trial.batches(regression):
            trial.step(torch.nn.functional.mse_loss(model(x)[:, 0], y))
            if trial.used == 512:
                raise OSError("disk full")

    with pytest.raises(TrainingError, match="OSError in trial 0"):
        go(train, orders={}, start=Config(0.01, 32), checkpoint_every=0.0)
    fails = False
    result = go(train, orders={}, start=Config(0.01, 32))
    assert [trial.state for trial in result.trials] == ["FAIL", "COMPLETE"]
    assert sum(size for size, _, _ in seen) == 544  # the step that it failed after was not yet saved


def test_a_storage_url_keeps_checkpoints_where_asked(regression, go, tmp_path):
    url = f"sqlite:///{tmp_path / 'by-url.db'}"
    go(lambda trial: linear(trial, regression), orders={}, storage=url, checkpoint_dir=tmp_path / "here")
    assert len(list((tmp_path / "here").glob("grgauge-*/last.pt"))) == 1
    assert not (tmp_path / "run.db.checkpoints").exists()


def test_without_optuna_the_message_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"pip install 'grgauge-kernels\[tune\]'"):
        tune(lambda trial: None, SPACE, budget=100, storage=tmp_path / "run.db")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_holds_a_policy_that_json_can_hold():
    json.dumps(Policy.default().state_dict())
