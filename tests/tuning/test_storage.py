"""Storage that is odd, damaged or full, and arguments in forms that are fair."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch
from tuning.scripted import SPACE, linear, retune

from grgauge import Config, TrainingError, tune
from grgauge.tuning.checkpoints import Checkpoints

START = Config(0.01, 32)


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["what?.db", "a%20b.db", "100%.db", "a#b.db", "{x}.db", "a b&c=d.db"])
def test_a_path_is_taken_as_it_is(name, regression, go, tmp_path):
    go(lambda trial: linear(trial, regression), orders={}, start=START, budget=32, storage=tmp_path / name)
    assert (tmp_path / name).is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"run.db", name, f"{name}.checkpoints"}


# --- damage ----------------------------------------------------------------------------------------------------------


def checkpoint(tmp_path, name="last.pt"):
    (path,) = tmp_path.glob(f"run.db.checkpoints/*/{name}")
    return path


def damage_of(kind, path):
    whole = path.read_bytes()
    if kind == "flipped":
        middle = len(whole) // 2
        return whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :]
    if kind == "another state":
        torch.save({"not": "ours"}, path)
        return path.read_bytes()
    return {"empty": b"", "text": b"no checkpoint", "half": whole[: len(whole) // 2]}[kind]


@pytest.mark.parametrize("kind", ["empty", "text", "half", "flipped", "another state"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_gone_on_with(kind, regression, go, tmp_path, caplog):
    seen, stop = [], [512]

    def train(trial):
        model = torch.nn.Linear(6, 1)
        trial.watch(model, torch.optim.SGD(model.parameters(), lr=trial.lr))
        for x, y in trial.batches(regression):
            seen.append(trial.used)
            trial.step(torch.nn.functional.mse_loss(model(x)[:, 0], y))
            if trial.used == stop[0]:
                raise KeyboardInterrupt
        return trial.used

    settings = {"orders": {320: retune(Config(0.02, 32))}, "start": START, "checkpoint_every": 0.0}
    with pytest.raises(KeyboardInterrupt):
        go(train, **settings)
    path = checkpoint(tmp_path)
    path.write_bytes(damage_of(kind, path))
    stop[0] = 0
    seen.clear()
    result = go(train, **settings)
    assert f"{path} is damaged" in caplog.text
    assert 320 < seen[0] < 512
    assert result.used == 1024
    whole = go(train, study_name="whole", **{**settings, "checkpoint_every": 1000.0})
    assert torch.equal(result.model.weight, whole.model.weight)
    assert [(t.lr, t.samples) for t in result.trials] == [(t.lr, t.samples) for t in whole.trials]


def test_a_damaged_checkpoint_right_after_a_change_keeps_the_weights_to_go_back_to(regression, go, tmp_path):
    orders = {
        320: retune(Config(0.05, 32)),
        352: retune(Config(0.02, 32)),
        640: retune(Config(0.01, 32), rollback=True),
    }

    def train(trial):
        return linear(trial, regression)

    def interrupt(trial):
        if trial.used == 352:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(train, orders=orders, start=START, on_step=interrupt)
    path = checkpoint(tmp_path)
    path.write_bytes(b"")
    result = go(train, orders=orders, start=START)
    assert result.used == 1024
    whole = go(train, orders=orders, start=START, study_name="whole")
    assert torch.equal(result.model.weight, whole.model.weight)


def test_both_checkpoints_damaged_are_an_error_with_their_names(regression, go, tmp_path):
    def train(trial):
        return linear(trial, regression)

    go(train, orders={}, start=START, checkpoint_every=0.0)
    for path in checkpoint(tmp_path).parent.glob("*.pt"):
        path.write_bytes(b"")
    with pytest.raises(TrainingError, match=r"last\.pt is damaged.*previous\.pt is damaged.*fresh=True"):
        go(train, orders={}, start=START)
    assert go(train, orders={}, start=START, fresh=True).used == 1024


def test_damaged_weights_to_go_back_to_are_an_error_with_their_name(regression, go, tmp_path):
    def train(trial):
        model = torch.nn.Linear(6, 1)
        trial.watch(model, torch.optim.SGD(model.parameters(), lr=trial.lr))
        for x, y in trial.batches(regression):
            trial.step(torch.nn.functional.mse_loss(model(x)[:, 0], y))
            if trial.used == 480:
                checkpoint(tmp_path, "before-320.pt").write_bytes(b"")

    orders = {320: retune(Config(0.05, 32)), 640: retune(Config(0.02, 32), rollback=True)}
    with pytest.raises(TrainingError, match=r"before-320\.pt is damaged"):
        go(train, orders=orders, start=START)


def test_a_checkpoint_can_be_read_by_torch(regression, go, tmp_path):
    result = go(lambda trial: linear(trial, regression), orders={}, start=START)
    state = torch.load(checkpoint(tmp_path), weights_only=False)
    assert torch.equal(state["live"]["model"]["weight"], result.model.weight)


# --- a full disk -----------------------------------------------------------------------------------------------------


SCRIPT = """\
import resource, sys, torch, torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset
import optuna
from grgauge import Config, TrainingError, tune

optuna.logging.set_verbosity(optuna.logging.ERROR)
torch.set_num_threads(1)
x = torch.randn(512, 6, generator=torch.Generator().manual_seed(0))


def train(trial):
    model = nn.Sequential(nn.Linear(6, 64), nn.Linear(64, 1))
    trial.watch(model, torch.optim.AdamW(model.parameters(), lr=trial.lr))
    for x, y in trial.batches(data):
        trial.step(F.mse_loss(model(x)[:, 0], y))
        if trial.used == 512 and sys.argv[2] != "room":
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
        print(trial.used, flush=True)
    return float(sum(p.detach().double().sum() for p in model.parameters()))


data = TensorDataset(x, x.sum(1))
space = {"lr": (1e-5, 1.0), "batch_size": (8, 512)}
try:
    settings = {"budget": 1024, "every": 1000, "checkpoint_every": 0.0}  # no reading, so nothing changes
    result = tune(train, space, storage=sys.argv[1], start=Config(1e-3, 32), **settings)
except TrainingError as error:
    sys.exit(f"{type(error).__name__}: {error}")
print("sum", result.output)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no RLIMIT_FSIZE")
@pytest.mark.parametrize("room", [1000, 20_000])
def test_a_full_disk_is_one_sentence_and_loses_nothing(room, tmp_path, empty):
    """With the smaller limit neither the checkpoint nor the database can be written."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)

    def run(storage, room):
        command = [sys.executable, str(script), str(storage), str(room)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
        return done, [int(line) for line in done.stdout.splitlines() if line.isdigit()]

    storage = shutil.copy(empty, tmp_path / "run.db")
    full, used = run(storage, room)
    assert full.returncode == 1
    assert len(full.stderr.splitlines()) == 1, full.stderr
    assert "cannot be written" in full.stderr
    assert "the same call goes on from the newest checkpoint" in full.stderr
    assert used[-1] == 512
    assert not list(tmp_path.glob("run.db.checkpoints/*/*.part"))
    again, used = run(storage, "room")
    assert again.returncode == 0, again.stderr
    assert used[0] in (512, 544)
    whole, _ = run(shutil.copy(empty, tmp_path / "whole.db"), "room")
    assert again.stdout.splitlines()[-1] == whole.stdout.splitlines()[-1]


def test_what_is_written_is_whole_or_not_there(tmp_path):
    kept = Checkpoints(tmp_path)
    kept.save("last.pt", {"a": torch.ones(3)})
    assert torch.equal(kept.load("last.pt")["a"], torch.ones(3))
    (tmp_path / "other.pt.part").mkdir()
    with pytest.raises(TrainingError, match=r"cannot be written.*Is a directory"):
        kept.save("other.pt", {"a": 1})
    assert kept.load("other.pt") is None


# --- fair forms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"budget": 1e3},
        {"space": {"lr": (1e-5, 1.0), "batch_size": 32}},
        {"space": {"lr": 0.01, "batch_size": 32}},
        {"space": {"lr": 0.01, "batch_size": (8, 512)}},
        {"space": {"lr": 0.01, "batch_size": 32.0}},
    ],
)
def test_whole_floats_and_fixed_numbers_are_accepted(changes, regression, go):
    result = go(lambda trial: linear(trial, regression), orders={}, start=START, **changes)
    assert result.config.batch_size == 32
    assert result.used == 1024


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"budget": 10.5}, "budget must be a whole number of at least 1, got 10.5"),
        ({"budget": float("inf")}, "budget must be"),
        ({"budget": "many"}, "budget must be"),
        ({"space": {"lr": -1.0, "batch_size": 32}}, r"space\['lr'\] must be"),
        ({"space": {"lr": 1e-3, "batch_size": 32.5}}, r"space\['batch_size'\] must be"),
        ({"space": {"lr": "1e-3", "batch_size": 32}}, r"space\['lr'\] must be"),
    ],
)
def test_others_are_refused_by_name(changes, complaint, tmp_path):
    settings = {"space": SPACE, "budget": 100, "storage": tmp_path / "run.db", **changes}
    with pytest.raises(ValueError, match=complaint):
        tune(lambda trial: None, **settings)
    assert list(tmp_path.iterdir()) == []
