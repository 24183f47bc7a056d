"""What the CUDA C++ kernels were compiled to: registers, spills and widths of accesses, read from the built library.

In a process of its own, as for Triton's: here, Triton may have been imported as an interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from static.conftest import dtypes
from static.conftest import elements as moved

import grgauge_kernels as gk

pytest.importorskip("triton")  # its cuobjdump, where the CUDA toolkit has none

SCRIPT = Path(__file__).with_name("read_cuda.py")


@pytest.fixture(scope="module", params=["sm_80", "sm_90", "sm_100"])
def records(request, seen):
    """Kernel -> what was read off its machine code, for one architecture."""
    if not any((Path(home) / "lib" / "libgrgauge_cuda.so").exists() for home in gk.__path__):
        pytest.skip("libgrgauge_cuda.so is not built: no nvcc on the path when the package was installed")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(Path(gk.__file__).parents[1])
    done = subprocess.run([sys.executable, SCRIPT, "--target", request.param], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {r["kernel"]: r for r in json.loads(done.stdout)}
    if not found:
        pytest.skip(f"libgrgauge_cuda.so was built without {request.param}")
    # AdamW for 3 gradients, 4 kinds of parameters and 2 of moments, twice where all are narrow; measure; the sums.
    assert len(found) == 3 * 4 * 2 + 2 * 3 + 3 * 2 + 1
    seen({**r, "language": "CUDA"} for r in found.values())
    return found


def test_nothing_is_spilled(records):
    assert {name: r["spilled"] for name, r in records.items() if r["spilled"]} == {}


def test_at_most_64_registers(records):
    """8 chunks of 128 threads on a multiprocessor, with every state and option in."""
    assert {name: r["registers"] for name, r in records.items() if r["registers"] > 64} == {}


def test_float32_streams_move_16_bytes_at_a_time(records):
    for name, r in records.items():
        if not name.startswith("adamw"):
            continue
        if moved(name) == 8:
            assert (r["loads"]["128"], r["stores"]["128"]) == (4, 4), name  # all streams, of two bytes each
            continue
        grad, param, moment = dtypes(name)
        streams = 2 + 2 * (moment == "fp32") + (grad == "fp32") + (param == "fp32")  # with ema and previous
        assert (r["loads"]["128"], r["stores"]["128"]) == (streams, streams), name


def test_gradients_of_every_dtype_are_measured_16_bytes_at_a_time(records):
    for dtype in ("fp32", "bf16", "fp16"):
        assert records[f"measure {dtype}"]["loads"]["128"] == 1


def test_two_byte_streams_beside_float32_move_8_bytes_at_a_time(records):
    """Stores only: among the loads there are addresses, which are as wide."""
    for name, r in records.items():
        if name.startswith("adamw") and moved(name) == 4:
            grad, param, moment = dtypes(name)
            narrow = (grad != "fp32") + (param != "fp32") + 2 * (moment != "fp32")
            assert r["stores"].get("64", 0) == narrow, name


def test_every_access_knows_that_its_address_is_global(records):
    assert {name: r["generic"] for name, r in records.items() if r["generic"]} == {}


def test_no_atomics(records):
    assert {name: r["atomics"] for name, r in records.items() if r["atomics"]} == {}


def test_no_barriers_but_those_of_the_scalars_and_the_sums(records):
    assert all(r["barriers"] == 2 for name, r in records.items() if name != "sums")


def test_adamw_writes_what_the_hand_count_says(records, stored, by_hand):
    adamw = {name: r for name, r in records.items() if name.startswith("adamw")}
    expected = {n: by_hand(n, True) - (8 if moved(n) == 8 else 0) for n in adamw}  # without ema and previous
    assert {n: stored(r) for n, r in adamw.items()} == expected
