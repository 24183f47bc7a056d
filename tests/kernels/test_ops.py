"""The ops as torch sees them, and what they refuse."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

import grgauge_kernels as gk

PLAIN = {"step": 1, "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def bucket_of(*sizes, dtype=torch.float32):
    grads = [torch.randn(n).to(dtype) for n in sizes]
    return grads, gk.Bucket(grads).plan()


@pytest.mark.parametrize("with_states", [False, True])
def test_opcheck_measure(with_states):
    grads, plan = bucket_of(5000, 0, 17)
    states = (torch.zeros(plan.numel), torch.zeros(plan.numel)) if with_states else (None, None)
    torch.library.opcheck(torch.ops.grgauge.measure_.default, (grads, plan.rows, plan.segments, *states, 0.9, None))
    if not with_states:
        torch.library.opcheck(torch.ops.grgauge.measure.default, (grads, plan.rows, plan.segments, None))


@pytest.mark.parametrize("sums", [False, True])
def test_opcheck_adamw(sums):
    grads, plan = bucket_of(5000, 17)
    params, first, second = ([torch.rand_like(g) for g in grads] for _ in range(3))
    ema, previous = torch.zeros(plan.numel), torch.zeros(plan.numel)
    args = (params, grads, first, second, plan.rows, plan.segments, torch.tensor(1.0), 1e-3, None, 0.9, 0.999, 1e-8)
    tail = (0.1, ema, previous, 0.9, torch.tensor(1.0), torch.tensor(0.0), torch.tensor(1.0), True, False, sums)
    torch.library.opcheck(torch.ops.grgauge.adamw_.default, (*args, *tail))


def test_compiles_without_a_graph_break():
    grads, plan = bucket_of(5000, 17)
    params, first, second = ([torch.rand_like(g) for g in grads] for _ in range(3))

    def step(params, grads, first, second):
        stats = gk.adamw_(params, [g * 2 for g in grads], first, second, plan, **{**PLAIN, "step": torch.tensor(1.0)})
        return stats.sum(0)

    clones = [[t.clone() for t in stream] for stream in (params, grads, first, second)]
    expected = step(*clones)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(params, grads, first, second), expected)
    assert all(map(torch.equal, params, clones[0]))


@pytest.mark.filterwarnings("default")  # the compiler's own
@pytest.mark.parametrize("with_ema", [False, True])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_measuring_compiles_without_a_graph_break(compiler, with_ema):
    if compiler == "inductor" and shutil.which("c++") is None:
        pytest.skip("inductor needs a C++ compiler")
    grads, plan = bucket_of(5000, 17)

    def measure(grads, ema):
        return gk.measure_([g * 2 for g in grads], plan, ema=ema).sum(0)

    ours, expected = (torch.zeros(plan.numel) if with_ema else None for _ in range(2))
    total = measure(grads, expected)
    torch._dynamo.reset()
    found = torch.compile(measure, fullgraph=True, backend=compiler)(grads, ours)
    torch.testing.assert_close(found, total, rtol=1e-12, atol=0)
    assert total[0] > 0
    assert not with_ema or torch.equal(ours, expected)


def test_backends_say_why():
    found = gk.backends()
    assert [found[name] for name in ("reference", "cpu", "triton")] == [True, True, True]
    bare = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = "import grgauge_kernels as gk; print(gk.backends()['triton'])"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**bare, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout == "no CUDA device\n"


def test_a_backend_can_be_asked_for_by_name():
    grads, plan = bucket_of(100)
    assert torch.allclose(gk.measure_(grads, plan, backend="cpu"), gk.measure_(grads, plan, backend="reference"))
    with pytest.raises(ValueError, match="backend is 'cdua'; it must be one of reference, cpu, triton"):
        gk.measure_(grads, plan, backend="cdua")


def strided(t):
    return torch.stack([t, t], dim=1)[:, 0]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"grads": lambda g: g[:1]}, ValueError, "grads has 1 tensors, the plan 2 segments"),
        ({"grads": lambda g: [g[0], g[1][:5]]}, ValueError, r"grads\[1\] has 5 elements, segment 1 has 7"),
        ({"grads": lambda g: [g[0], g[1].double()]}, TypeError, "grads has dtype float32 or float64"),
        ({"grads": lambda g: [g[0].half(), g[1]]}, TypeError, "grads has dtype float16 or float32"),
        ({"grads": lambda g: [g[0], g[1].to("meta")]}, ValueError, r"grads\[1\] is on meta, the plan on cpu"),
        ({"grads": lambda g: [g[0], strided(g[1])]}, ValueError, r"grads\[1\] has shape \(7,\) .* with gaps"),
        ({"grads": lambda g: [g[0], g[1].to_sparse()]}, ValueError, r"grads\[1\] .* must be dense"),
        ({"ema": lambda e: e[:-1]}, ValueError, r"ema is torch.float32 \(106,\); it must be .* float32 \[107\]"),
        ({"ema": lambda e: e.double()}, ValueError, "ema is torch.float64"),
        ({"previous": lambda e: torch.zeros(107, 2)[:, 0]}, ValueError, "previous is"),
        ({"previous": lambda e: e.to("meta")}, ValueError, "previous is on meta"),
        ({"beta": lambda _: 1.0}, ValueError, "beta is 1.0; it must lie in"),
        ({"beta": lambda _: 0.0}, ValueError, "beta is 0.0; it must lie in"),
        ({"inv_scale": lambda _: torch.ones(2)}, ValueError, "inv_scale is torch.float32"),
        ({"inv_scale": lambda _: torch.ones(1, dtype=torch.float64)}, ValueError, "inv_scale is torch.float64"),
    ],
)
@pytest.mark.parametrize("op", ["measure_", "adamw_"])
def test_bad_input_is_named_and_changes_nothing(op, change, error, text):
    grads, plan = bucket_of(100, 7)
    params, first, second = ([torch.rand_like(g) for g in grads] for _ in range(3))
    arguments = {"grads": grads, "ema": torch.zeros(107), "previous": torch.zeros(107), "beta": 0.9}
    before = [t.clone() for t in (*grads, *params, *first, *second, arguments["ema"], arguments["previous"])]
    wrong = {**arguments, **{name: make(arguments.get(name)) for name, make in change.items()}}
    given = wrong.pop("grads")
    with pytest.raises(error, match=text):
        gk.measure_(given, plan, **wrong) if op == "measure_" else gk.adamw_(
            params, given, first, second, plan, **wrong, **PLAIN
        )
    after = [*grads, *params, *first, *second, arguments["ema"], arguments["previous"]]
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"exp_avgs": torch.float16},
            TypeError,
            "exp_avgs has dtype float16; it must be bfloat16 or float32, the same",
        ),
        ({"params": torch.float64}, TypeError, "params has dtype float64"),
        ({"betas": (1.0, 0.999)}, ValueError, "betas is"),
        ({"step": torch.ones(3)}, ValueError, r"step is torch.float32 \(3,\)"),
        ({"step": torch.ones(1, dtype=torch.int64)}, ValueError, "step is torch.int64"),
        ({"lr": torch.ones(2)}, ValueError, "lr is"),
        ({"found_inf": torch.ones(2)}, ValueError, "found_inf is"),
        ({"clip": torch.ones(1, dtype=torch.bfloat16)}, ValueError, "clip is"),
    ],
)
def test_bad_adamw_input_is_named(change, error, text):
    grads, plan = bucket_of(100, 7)
    streams = {name: [torch.rand_like(g) for g in grads] for name in ("params", "exp_avgs", "exp_avg_sqs")}
    options = dict(PLAIN)
    for name, value in change.items():
        if name in streams:
            streams[name] = [t.to(value) for t in streams[name]]
        else:
            options[name] = value
    with pytest.raises(error, match=text):
        gk.adamw_(streams["params"], grads, streams["exp_avgs"], streams["exp_avg_sqs"], plan, **options)


def test_streams_laid_out_differently_are_refused():
    rows, columns = torch.randn(4, 6), torch.randn(6, 4).t()
    plan = gk.Bucket([rows]).plan()
    states = [torch.zeros(4, 6)], [torch.zeros(4, 6)]
    with pytest.raises(ValueError, match=r"params\[0\] has strides .*; they must be equal"):
        gk.adamw_([rows], [columns], *states, plan, **PLAIN)
    with pytest.raises(ValueError, match=r"params\[0\] has strides .*; they must be equal"):
        gk.adamw_([columns], [rows], *states, plan, **PLAIN)


def test_a_flat_plan_takes_its_one_buffer():
    base = torch.randn(100)
    plan = gk.Bucket([base[:10], base[20:90]], base=base).plan()
    assert gk.measure_([base], plan)[1, 0] == pytest.approx(base[20:90].double().square().sum().item())
    with pytest.raises(ValueError, match="the one flat buffer of 90 elements"):
        gk.measure_([base[:80]], plan)
    with pytest.raises(ValueError, match="the one flat buffer of 90 elements"):
        gk.measure_([base[:10], base[20:90]], plan)
