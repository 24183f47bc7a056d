"""How many rules the state machine runs: `pytest tests/parity --rules 20000`."""


def pytest_addoption(parser):
    parser.addoption("--rules", type=int, default=1200, help="rules that tests/parity's state machine runs in all")
