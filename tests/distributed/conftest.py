"""Starts the ranks, once for each number of them; every test then judges what they have saved."""

from pathlib import Path

import pytest
import torch
from torchrun import torchrun

RANKS = Path(__file__).parent / "ranks.py"


class Results:
    """results[name]: what each rank's scenario of that name has returned."""

    def __init__(self, folder, world):
        folder.mkdir()
        torchrun(world, RANKS, str(folder))
        self._ranks = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]

    def __getitem__(self, name):
        for rank, (_, raised) in enumerate(self._ranks):
            assert name not in raised, f"rank {rank}:\n{raised[name]}"
        return [results[name] for results, _ in self._ranks]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="session")
def two(folder):
    return Results(folder / "2", 2)


@pytest.fixture(scope="session")
def four(folder, two):
    return Results(folder / "4", 4)
