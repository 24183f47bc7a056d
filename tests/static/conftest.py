"""Prints what the static tests have read off the compiled kernels, after their results."""

from __future__ import annotations

import pytest

RECORDS = pytest.StashKey[list[dict]]()


def dtypes(kernel: str) -> tuple[str, str, str]:
    """Of gradients, parameters and moments, by a name as in "adamw bf16/fp32/bf16 flat"; fp32 if unnamed."""
    grad, param, moment = [*kernel.split()[1].rstrip(",").split("/"), "fp32"][:3]
    return grad, param, moment


def elements(kernel: str) -> int:
    """Of AdamW that a thread moves at a time."""
    wide = "fp32" not in dtypes(kernel) and not kernel.endswith(("all options", "states"))
    return 8 if wide else 4


def stored(record) -> float:
    """Bytes an element that an AdamW kernel writes on its path for whole chunks."""
    return (16 * record["stores"].get("128", 0) + 8 * record["stores"].get("64", 0)) / elements(record["kernel"])


@pytest.fixture(name="stored")
def _stored():
    return stored


@pytest.fixture
def by_hand():
    """What AdamW must write an element: parameter and moments; with all options ema, previous and a zeroed gradient."""

    def count(kernel: str, options: bool) -> int:
        grad, param, moment = (4 if dtype == "fp32" else 2 for dtype in dtypes(kernel))
        return param + 2 * moment + (8 + grad if options else 0)

    return count


@pytest.fixture(scope="module")
def seen(request):
    """Takes records in for the table."""
    return request.config.stash.setdefault(RECORDS, []).extend


def pytest_terminal_summary(terminalreporter, config):
    records = config.stash.get(RECORDS, [])
    if not records:
        return
    terminalreporter.section("compiled kernels")
    targets = list(dict.fromkeys(r["target"] for r in records))
    head = f"{'':44} registers{'':{max(0, 7 * len(targets) - 9)}} spills  atomics  16-byte       bytes stored"
    terminalreporter.line(head)
    terminalreporter.line(f"{'kernel':44} {''.join(f'{t:>7}' for t in targets)}{'':9}{'':9}loads stores  an element")
    for kernel in sorted({(r["language"], r["kernel"]) for r in records}):
        own = {r["target"]: r for r in records if (r["language"], r["kernel"]) == kernel}
        first = next(iter(own.values()))
        registers = "".join(f"{own[t]['registers'] if t in own else '-':>7}" for t in targets)
        written = f"{stored(first):g}" if kernel[1].startswith("adamw") else ""
        terminalreporter.line(
            f"{' '.join(kernel):44} {registers} {sum(r['spilled'] for r in own.values()):>6} "
            f"{sum(r['atomics'] for r in own.values()):>8} {first['loads'].get('128', 0):>8} "
            f"{first['stores'].get('128', 0):>6} {written:>11}"
        )
