"""How many rules the state machine runs: `pytest tests/parity --rules 20000`. All of it is small: one thread does."""

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--rules", type=int, default=1200, help="rules that tests/parity's state machine runs in all")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
