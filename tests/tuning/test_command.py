"""`grgauge tune` as a shell sees it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from grgauge.cli import console, main
from grgauge.cli.commands import tune

FILE = """\
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

x = torch.randn(256, 6, generator=torch.Generator().manual_seed(0))
data = TensorDataset(x, x.sum(1) + torch.randn(256, generator=torch.Generator().manual_seed(1)))


def train(trial):
    print("hello from train")
    model = torch.nn.Linear(6, 1)
    trial.watch(model, torch.optim.AdamW(model.parameters(), lr=trial.lr))
    for x, y in trial.batches(data):
        trial.step(F.mse_loss(model(x)[:, 0], y))


def broken(trial):
    raise RuntimeError("no data")
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "fit.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


ARGUMENTS = [
    "tune",
    "fit.py:train",
    "--lr",
    "1e-5:1",
    "--batch",
    "8:64",
    "--budget",
    "1000samples",
    "--storage",
    "a.db",
]


def test_it_ends_with_the_verdict_in_two_lines_where_there_is_no_terminal(here, capsys):
    assert main(ARGUMENTS) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == "hello from train"
    verdict = out.splitlines()[1:]
    assert verdict[0].startswith("lr ")
    assert len(verdict) == 2
    assert err == ""
    # the same command: it is finished, and says so
    assert main([*ARGUMENTS, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["verdict"].startswith("\n".join(verdict) + " Nothing was trained")
    assert document["used"] >= 1000
    assert sum(trial["samples"] for trial in document["trials"]) == document["used"]
    assert set(document["recommendation"]) == {"lr", "batch_size", "weight_decay"}


def test_the_live_table_shows_trials_and_the_budget(here, capsys, monkeypatch):
    monkeypatch.setattr(console, "on_terminal", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(ARGUMENTS) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("trial", "GR_T", "of 1000 samples", "hello from train"))


def test_a_failing_function_is_exit_code_1_with_its_traceback(here, capsys):
    assert main(["tune", "fit.py:broken", "--budget", "100", "--storage", "a.db"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("grgauge tune: the training function raised RuntimeError in trial 0")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "either FILE:FUNCTION"),
        (["fit.py:train", "--demo"], "either FILE:FUNCTION"),
        (["fit.py:train"], "--budget is missing"),
        (["nowhere.py:train", "--budget", "9"], "nowhere.py is not a file"),
        (["fit.py", "--budget", "9"], "must be FILE:FUNCTION"),
        (["fit.py:nothing", "--budget", "9"], "no function 'nothing'"),
        (["fit.py:train", "--budget", "9", "--start", "2:32"], "start must be"),
        (["fit.py:train", "--budget", "9", "--storage", "nosuch://x"], "storage nosuch://x cannot be opened"),
    ],
)
def test_bad_usage_is_exit_code_2_and_one_line(arguments, complaint, here, capsys):
    assert main(["tune", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("grgauge tune: ")
    assert complaint in err
    assert sorted(path.name for path in here.iterdir() if path.name != "__pycache__") == ["fit.py"]


@pytest.mark.parametrize(
    ("argument", "complaint"),
    [("--lr=0", "no range"), ("--lr=1:0.1", "no range"), ("--batch=8:9.5", "whole numbers"), ("--budget=0", "too few")],
)
def test_a_bad_number_is_refused_by_name(argument, complaint, here, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["tune", "fit.py:train", "--budget", "9", argument])
    assert exit.value.code == 2
    err = capsys.readouterr().err
    assert complaint in err
    assert argument.split("=")[0] in err


def test_without_optuna_it_says_how_to_install_it(here, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(ARGUMENTS) == 2
    assert capsys.readouterr().err == f"grgauge tune: trials are stored with optuna: {tune.INSTALL}\n"


def test_the_demo_interrupted_goes_on_with_the_same_command(tmp_path):
    hears = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # see tests/cli
    early = "from grgauge import Trial; old = Trial.step; "
    early += "Trial.step = lambda self, loss: (old(self, loss), print(self.used, file=sys.stderr))[0]"
    code = f"{hears}; import sys; {early}; from grgauge.cli import main; sys.exit(main())"
    command = [sys.executable, "-u", "-c", code, "tune", "--demo", "--budget", "900", "--checkpoint-every", "0.5"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        assert process.stderr is not None
        assert any(int(line) >= 500 for line in iter(process.stderr.readline, ""))
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "grgauge tune: interrupted"
    assert out == ""
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False)
    assert again.returncode == 0, again.stderr
    assert int(again.stderr.splitlines()[0]) > 64  # the first step of one that begins anew
    assert again.stdout.startswith("lr ")
