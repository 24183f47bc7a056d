"""adamw_ on every backend that runs on tensors here: update and sums against float64."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
import truth

import grgauge_kernels as gk
from grgauge_kernels import CHUNK

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SIZES = [0, 1, 17, CHUNK - 1, CHUNK + 1, 2 * CHUNK + 333]
PLAIN = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


class Problem:
    """A bucket's tensors, and their float64 twins."""

    def __init__(self, sizes=SIZES, grad=torch.float32, param=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def draw(n):
            return torch.randn(n, generator=generator)

        self.params = [draw(n).to(param) for n in sizes]
        self.grads = [draw(n).to(grad) for n in sizes]
        self.exp_avgs = [draw(n) * 0.1 for n in sizes]
        self.exp_avg_sqs = [draw(n).square() * 0.01 for n in sizes]
        self.plan = gk.Bucket(self.params).plan()
        self.before = [(p.double(), m.double(), v.double()) for p, m, v in self.states()]

    def states(self):
        return zip(self.params, self.exp_avgs, self.exp_avg_sqs, strict=True)

    def run(self, **options):
        arguments = {"step": 3, **PLAIN, **options}
        return gk.adamw_(self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, self.plan, **arguments)

    def clones(self):
        return [t.clone() for streams in (self.params, self.grads, self.exp_avgs, self.exp_avg_sqs) for t in streams]


@pytest.mark.parametrize(("grad", "param"), list(product(DTYPES, DTYPES)))
def test_update_and_sums_match_float64(backend, grad, param):
    problem = Problem(grad=grad, param=param)
    stats = problem.run(backend=backend)
    for i, (p, m, v) in enumerate(problem.states()):
        twin = truth.Adamw(*problem.before[i])
        twin.step(problem.grads[i], 3, **PLAIN)
        assert truth.relative(m, twin.exp_avg) < 2 * EPS[torch.float32]
        assert truth.relative(v, twin.exp_avg_sq) < 3 * EPS[torch.float32]
        # One rounding to the parameter's dtype, and a few in float32 before it.
        assert truth.relative(p, twin.param) < EPS[param] + 5 * EPS[torch.float32]
        g = problem.grads[i].double()
        torch.testing.assert_close(stats[i], truth.sums(g, m, None, truth.finite(g)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("zero_grad", [False, True])
@pytest.mark.parametrize("with_states", [False, True])
def test_options_change_what_they_say_and_nothing_else(backend, maximize, zero_grad, with_states):
    problem = Problem()
    n = problem.plan.numel
    ema, previous = (torch.randn(n), torch.randn(n)) if with_states else (None, None)
    ema_before, previous_before = (ema.clone(), previous.clone()) if with_states else (None, None)
    grads = [g.clone() for g in problem.grads]
    scale, clip = torch.tensor(0.25), torch.tensor([0.3])
    lr, steps = torch.tensor(3e-3), torch.arange(2.0, 2 + len(SIZES))
    stats = problem.run(
        backend=backend, ema=ema, previous=previous, maximize=maximize, zero_grad=zero_grad, inv_scale=scale, clip=clip,
        lr=lr, step=steps,
    )  # fmt: skip
    seen = [g * scale for g in grads]
    for i, (p, m, v) in enumerate(problem.states()):
        twin = truth.Adamw(*problem.before[i])
        twin.step(seen[i] * clip, float(steps[i]), **{**PLAIN, "lr": float(lr)}, maximize=maximize)
        for ours, exact in ((p, twin.param), (m, twin.exp_avg), (v, twin.exp_avg_sq)):
            assert truth.relative(ours, exact) < 4e-7
        assert torch.equal(problem.grads[i], torch.zeros_like(grads[i]) if zero_grad else grads[i])
    flat = torch.cat(seen)
    torch.testing.assert_close(stats[:, 0].sum(), flat.double().square().sum(), rtol=1e-6, atol=0)
    if with_states:
        error = (ema - (0.9 * ema_before.double() + 0.1 * flat.double())).abs()
        assert (error <= 1.5e-7 * (0.9 * ema_before.abs() + 0.1 * flat.abs())).all()
        assert torch.equal(previous, flat)
        delta = (flat - previous_before).double()
        torch.testing.assert_close(stats[:, 1].sum(), ema.double().square().sum(), rtol=1e-6, atol=0)
        torch.testing.assert_close(stats[:, 3].sum(), delta.square().sum(), rtol=1e-6, atol=0)


def test_found_inf_leaves_everything_as_it_was(backend):
    problem = Problem()
    n = problem.plan.numel
    ema, previous = torch.randn(n), torch.randn(n)
    before = [*problem.clones(), ema.clone(), previous.clone()]
    stats = problem.run(backend=backend, ema=ema, previous=previous, found_inf=torch.tensor(1.0), zero_grad=True)
    assert stats.isnan().all()
    assert all(map(torch.equal, [*problem.clones(), ema, previous], before))
    assert not problem.run(backend=backend, found_inf=torch.tensor(0.0)).isnan().any()


def test_nonfinite_gradients_reach_the_update_as_in_torch_but_no_sum(backend):
    problem = Problem(sizes=[2 * CHUNK + 1])
    problem.grads[0][CHUNK] = float("nan")
    problem.grads[0][3] = float("inf")
    stats = problem.run(backend=backend)
    assert stats.isfinite().all()
    assert stats[0, 5] == 2
    assert problem.params[0].isnan().nonzero().flatten().tolist() == [3, CHUNK]
    assert problem.exp_avgs[0][3] == float("inf")
    # From now on exp_avg itself is broken at these two places, and they stay out of its sum.
    problem.grads[0].fill_(1.0)
    again = problem.run(backend=backend)
    assert again[0, 5] == 0
    whole = problem.exp_avgs[0][problem.exp_avgs[0].isfinite()]
    torch.testing.assert_close(again[0, 1], whole.double().square().sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("grad", "param"), [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_sums_and_states_never_change_a_bit_of_the_update(backend, grad, param):
    plain, gauged = Problem(grad=grad, param=param), Problem(grad=grad, param=param)
    assert plain.run(backend=backend, sums=False).shape == (0, 6)
    n = gauged.plan.numel
    gauged.run(backend=backend, ema=torch.randn(n), previous=torch.randn(n))
    assert all(map(torch.equal, plain.clones(), gauged.clones()))


def test_alignment_and_chunking_never_change_a_bit_of_the_update(backend):
    """An element's update does not depend on where in a vector or chunk it sits."""
    n = 3 * CHUNK
    whole, parts = Problem(sizes=[n]), Problem(sizes=[n])
    cuts = [0, 5, 5 + CHUNK, 2 * CHUNK + 1, n]
    cut = [[t[0][a:b] for a, b in pairwise(cuts)] for t in
           (parts.params, parts.grads, parts.exp_avgs, parts.exp_avg_sqs)]  # fmt: skip
    whole.run(backend=backend)
    gk.adamw_(*cut, gk.Bucket(cut[0]).plan(), step=3, backend=backend, **PLAIN)
    assert all(map(torch.equal, whole.clones(), parts.clones()))


def test_same_bits_for_every_number_of_threads():
    usual, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            problem = Problem(sizes=[100_003, 50_000])
            results.append([problem.run(backend="cpu"), *problem.clones()])
    finally:
        torch.set_num_threads(usual)
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_round_as_torch_rounds(backend, dtype):
    """Every value of the dtype, the midpoint above each, NaN, infinities and what overflows: to the same bits."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    above = torch.arange(1, 2**16 + 1, dtype=torch.int32).to(torch.int16).view(dtype).float()
    target = torch.cat([every, (every + above) / 2, torch.randn(999) * 1e-6, torch.tensor([65519.9, 65520.0, 3.4e38])])
    param, grad = torch.zeros(len(target), dtype=dtype), torch.zeros(len(target))
    exp_avg, exp_avg_sq = -2 * target, torch.zeros(len(target))
    exp_avg[(target.abs() > 1e38)] = float("nan")  # where doubling the target would itself overflow
    # With no gradient, eps = lr = 1 and betas of 1/2 the step is half of exp_avg, exactly.
    gk.adamw_([param], [grad], [exp_avg], [exp_avg_sq], gk.Bucket([param]).plan(), step=2000, lr=1.0, betas=(0.5, 0.5),
              eps=1.0, weight_decay=0.0, backend=backend)  # fmt: skip
    expected = torch.where(target.abs() > 1e38, torch.nan, target).to(dtype)
    torch.testing.assert_close(param, expected, rtol=0, atol=0, equal_nan=True)


def test_empty_bucket_plans_do_nothing(backend):
    problem = Problem(sizes=[0])
    assert torch.equal(problem.run(backend=backend), torch.zeros(1, 6, dtype=torch.float64))
    problem = Problem(sizes=[10, 20])
    problem.plan = gk.Bucket(problem.params).plan(skip=(0, 1))
    before = problem.clones()
    assert torch.equal(problem.run(backend=backend), torch.zeros(2, 6, dtype=torch.float64))
    assert all(map(torch.equal, problem.clones(), before))
