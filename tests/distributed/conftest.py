"""Starts the ranks, once for each number of them; every test then judges what they have saved."""

from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torchrun import torchrun

RANKS = Path(__file__).parent / "ranks.py"


class Results:
    """results[name]: what each rank's scenario of that name has returned."""

    def __init__(self, folder, world):
        folder.mkdir(exist_ok=True)
        with FileLock(folder / "lock"):  # the tests' other process may have started them
            if not (folder / f"{world - 1}.pt").exists():
                torchrun(world, RANKS, str(folder))
        self._ranks = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]

    def __getitem__(self, name):
        for rank, (_, raised) in enumerate(self._ranks):
            assert name not in raised, f"rank {rank}:\n{raised[name]}"
        return [results[name] for results, _ in self._ranks]


@pytest.fixture(scope="session")
def folder(request, tmp_path_factory):
    """One for all processes that run tests, as what the ranks do in it takes minutes."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if hasattr(request.config, "workerinput") else own) / "ranks"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def two(folder):
    return Results(folder / "2", 2)


@pytest.fixture(scope="session")
def four(folder, two):
    return Results(folder / "4", 4)
