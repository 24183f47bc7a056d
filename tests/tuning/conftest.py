"""Small real tasks, and tune() in a folder of its own."""

from __future__ import annotations

import shutil

import optuna
import pytest
import torch
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset
from tuning.scripted import SPACE, Scripted

from grgauge import tune


@pytest.fixture(autouse=True, scope="session")
def _quiet():
    optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def digits():
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)
    return TensorDataset(x[:1400], y[:1400]), (x[1400:], y[1400:])


@pytest.fixture
def regression():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 6, generator=generator)
    y = x @ torch.arange(1.0, 7.0) + 0.1 * torch.randn(512, generator=generator)
    return TensorDataset(x, y)


@pytest.fixture(scope="session")
def empty(tmp_path_factory):
    """An SQLite file with Optuna's tables, which take longer to make than most trainings here."""
    path = tmp_path_factory.mktemp("empty") / "run.db"
    optuna.storages.RDBStorage(f"sqlite:///{path}").engine.dispose()
    return path


@pytest.fixture
def go(tmp_path, empty):
    """tune() in a folder of its own."""
    shutil.copy(empty, tmp_path / "run.db")

    def go(train, *, orders=None, scripted=None, **changes):
        made = scripted or (None if orders is None else Scripted(orders))
        settings = {
            "space": SPACE,
            "budget": 1024,
            "storage": tmp_path / "run.db",
            "checkpoint_every": 1000.0,
            **changes,
        }
        if made is not None:
            settings["policy"] = lambda **bounds: made
        return tune(train, **settings)

    return go
