"""The same study again: finished, with something else, begun anew, or by two processes at once."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys

import optuna
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset, TensorDataset
from tuning.scripted import linear

from grgauge import Config, TrainingError
from grgauge.cli import main
from grgauge.tuning.fingerprint import fingerprint

START = Config(0.01, 32)


# --- finished --------------------------------------------------------------------------------------------------------


def test_a_finished_study_says_that_nothing_was_trained(regression, go):
    def train(trial):
        return linear(trial, regression)

    first = go(train, orders={}, start=START)
    again = go(train, orders={}, start=START)
    assert "Nothing was trained" not in first.verdict
    assert again.verdict.startswith(first.verdict)
    assert "Nothing was trained: study 'grgauge' in " in again.verdict
    assert "fresh=True" in again.verdict
    assert again.loss == first.loss


def test_fresh_begins_again_and_keeps_the_study_under_another_name(regression, go, tmp_path):
    seen = []

    def train(trial):
        return linear(trial, regression, seen=seen)

    first = go(train, orders={}, start=START)
    seen.clear()
    second = go(train, orders={}, start=START, fresh=True, seed=1)
    assert sum(size for size, *_ in seen) == 1024
    assert second.loss != first.loss
    assert len(second.trials) == 1
    third = go(train, orders={}, start=START, fresh=True)
    url = f"sqlite:///{tmp_path / 'run.db'}"
    values = {
        name: optuna.load_study(study_name=name, storage=url).trials[0].value
        for name in optuna.get_all_study_names(url)
    }
    assert values == {"grgauge": third.loss, "grgauge-1": first.loss, "grgauge-2": second.loss}
    seen.clear()
    old = go(train, orders={}, start=START, study_name="grgauge-1")  # with its checkpoint
    assert (old.loss, seen) == (first.loss, [])
    assert torch.equal(old.model.weight, first.model.weight)


def test_fresh_without_a_study_begins_one(regression, go):
    assert go(lambda trial: linear(trial, regression), orders={}, start=START, fresh=True).used == 1024


# --- with something else ---------------------------------------------------------------------------------------------


def test_another_function_is_refused_before_it_is_called(regression, go):
    called = []

    def train(trial):
        return linear(trial, regression)

    def other(trial):
        called.append(trial)
        return linear(trial, regression)

    go(train, orders={}, start=START)
    with pytest.raises(ValueError, match=r"train is 'test_again.py:.*other', but study 'grgauge'.*fresh=True"):
        go(other, orders={}, start=START)
    assert called == []
    go(other, orders={}, start=START, fresh=True)
    assert called


def test_another_model_is_refused(regression, go):
    widths = [8]

    def train(trial):
        model = nn.Sequential(nn.Linear(6, widths[0]), nn.Linear(widths[0], 1))
        trial.watch(model, torch.optim.SGD(model.parameters(), lr=trial.lr))
        for x, y in trial.batches(regression):
            trial.step(F.mse_loss(model(x)[:, 0], y))

    go(train, orders={}, start=START)
    widths[0] = 9
    with pytest.raises(TrainingError, match=r"parameter '0.weight' is \[9, 6\].*begun with \[8, 6\].*fresh=True"):
        go(train, orders={}, start=START)
    widths[0] = 8
    assert "Nothing was trained" in go(train, orders={}, start=START).verdict


@pytest.mark.parametrize("change", ["length", "values"])
def test_other_data_are_refused(change, regression, go):
    x, y = regression.tensors
    data = [regression]

    def train(trial):
        return linear(trial, data[0])

    go(train, orders={}, start=START)
    data[0] = TensorDataset(x[:500], y[:500]) if change == "length" else TensorDataset(x, y + 1.0)
    words = r"500 samples.*begun with.* 512" if change == "length" else "other samples"
    with pytest.raises(TrainingError, match=f"{words}.*fresh=True"):
        go(train, orders={}, start=START)
    data[0] = TensorDataset(x.clone(), y.clone())
    assert "Nothing was trained" in go(train, orders={}, start=START).verdict


class Augmented(Dataset):
    def __init__(self, rows, generator=None):
        self.rows, self.generator = rows, generator

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        x, y = self.rows[i]
        return x + 0.01 * torch.randn(6, generator=self.generator), y


@pytest.mark.parametrize("own", [False, True])
def test_augmented_samples_are_not_taken_for_others(own, regression, go):
    def train(trial):
        return linear(trial, Augmented(regression, torch.Generator().manual_seed(os.getpid()) if own else None))

    go(train, orders={}, start=START)
    assert go(train, orders={}, start=START, budget=2048).used == 2048


def test_looking_at_the_data_draws_no_random_numbers(regression):
    before = torch.get_rng_state()
    assert fingerprint(Augmented(regression)).digest is None
    assert fingerprint(regression).digest is not None
    assert torch.equal(torch.get_rng_state(), before)


def test_a_second_phase_with_other_data_goes_on(regression, go):
    x, y = regression.tensors
    phases = [regression, TensorDataset(x[:256], y[:256])]

    def train(trial):
        model = nn.Linear(6, 1)
        trial.watch(model, torch.optim.SGD(model.parameters(), lr=trial.lr))
        for data, until in zip(phases, (512, 1024), strict=True):
            if trial.used >= until:
                continue
            for x, y in trial.batches(data):
                trial.step(F.mse_loss(model(x)[:, 0], y))
                if trial.used == 768 and stop:
                    raise KeyboardInterrupt
                if trial.used >= until:
                    break

    stop = True
    with pytest.raises(KeyboardInterrupt):
        go(train, orders={}, start=START, checkpoint_every=0.0)
    stop = False
    assert go(train, orders={}, start=START).used == 1024


# --- two at once -----------------------------------------------------------------------------------------------------


HOLDER = """\
import sys, time, torch, torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import optuna
from grgauge import Config, tune

optuna.logging.set_verbosity(optuna.logging.ERROR)
torch.set_num_threads(1)
x = torch.randn(512, 6, generator=torch.Generator().manual_seed(0))


def train(trial):
    model = nn.Linear(6, 1)
    trial.watch(model, torch.optim.SGD(model.parameters(), lr=trial.lr))
    for x, y in trial.batches(DataLoader(data, 8, num_workers=int(sys.argv[2]))):
        trial.step(F.mse_loss(model(x)[:, 0], y))
        print(trial.used, flush=True)
        if trial.used == 320 and sys.argv[3] == "waits":
            time.sleep(600)


data = TensorDataset(x, x.sum(1))
space = {"lr": (1e-5, 1.0), "batch_size": (8, 512)}
settings = {"budget": 640, "every": 1000, "checkpoint_every": 0.0}  # no reading, so nothing changes
tune(train, space, storage=sys.argv[1], start=Config(1e-3, 32), **settings)
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_a_second_process_is_refused_at_once_and_a_dead_one_holds_no_lock(workers, tmp_path, empty):
    script, storage = tmp_path / "train.py", shutil.copy(empty, tmp_path / "run.db")
    script.write_text(HOLDER)
    command = [sys.executable, str(script), str(storage), str(workers)]
    with subprocess.Popen([*command, "waits"], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert any(line.strip() == "320" for line in holder.stdout)
            second = subprocess.run([*command, "runs"], capture_output=True, text=True, timeout=100, check=False)
            assert second.returncode == 1
            assert second.stderr.splitlines()[-1].startswith("ValueError: study 'grgauge' in ")
            assert "is being trained by another process" in second.stderr.splitlines()[-1]
            assert second.stdout == ""
        finally:
            holder.send_signal(signal.SIGKILL)
    third = subprocess.run([*command, "runs"], capture_output=True, text=True, timeout=100, check=False)
    assert third.returncode == 0, third.stderr
    assert third.stdout.splitlines()[-1] == "640"
    assert int(third.stdout.splitlines()[0]) in (320, 352)  # at most one step is lost
    study = optuna.load_study(study_name="grgauge", storage=f"sqlite:///{storage}")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"]
    assert study.user_attrs["used"] == 640


def test_other_studies_in_the_same_storage_are_free(regression, go):
    def outer(trial):
        inner = go(lambda t: linear(t, regression), orders={}, start=START, study_name="inner", budget=64)
        with pytest.raises(ValueError, match="is being trained by another process"):
            go(outer, orders={}, start=START)
        return linear(trial, regression), inner

    assert go(outer, orders={}, start=START).output[1].used == 64
    go(outer, orders={}, start=START)  # and it is free again


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_begins_again_with_fresh(tmp_path, capsys, monkeypatch):
    (tmp_path / "fit.py").write_text(
        "import torch\nimport torch.nn.functional as F\nfrom torch.utils.data import TensorDataset\n"
        "x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))\ndata = TensorDataset(x, x.sum(1))\n"
        "def train(trial):\n"
        "    model = torch.nn.Linear(6, 1)\n"
        "    trial.watch(model, torch.optim.AdamW(model.parameters(), lr=trial.lr))\n"
        "    for x, y in trial.batches(data):\n"
        "        trial.step(F.mse_loss(model(x)[:, 0], y))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    command = [
        "tune",
        "fit.py:train",
        "--batch",
        "16",
        "--lr",
        "1e-3",
        "--budget",
        "3.2e2",
        "--storage",
        "what? 100%#.db",
    ]
    assert main(command) == 0
    first = capsys.readouterr().out
    assert "320 samples" in first
    assert main(command) == 0
    assert "Nothing was trained" in capsys.readouterr().out
    assert main([*command, "--fresh"]) == 0
    assert capsys.readouterr().out == first
    assert (tmp_path / "what? 100%#.db").is_file()
    assert main(["report", "what? 100%#.db", "--study", "train-1"]) == 0
    assert not (tmp_path / "what").exists()
