"""measure_ and adamw_ on the GPU, every backend against float64."""

from __future__ import annotations

import pytest
import torch
import truth
from device.problem import LAYOUTS, PLAIN, SIZES, Problem, same_bits, scalar

import grgauge_kernels as gk
from grgauge_kernels import CHUNK

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
PAIRS = [(d, d) for d in DTYPES] + [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)]
MANY_CHUNKS = 20_000_003
"""Elements of a bucket whose sums are added up in more than two stages."""


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_and_states_match_float64(backend, dtype, layout):
    p = Problem(grad=dtype, layout=layout)
    ema_before, previous_before = p.ema.cpu().split(SIZES), p.previous.cpu().split(SIZES)
    stats = p.measure(backend, states=True, beta=0.9, inv_scale=scalar(0.25)).cpu()
    assert stats.shape == (len(SIZES), 6)
    assert stats.dtype == torch.float64
    states = (ema_before, previous_before, p.ema.cpu().split(SIZES), p.previous.cpu().split(SIZES))
    for row, g, m_old, g_old, m, kept in zip(stats, p.grads, *states, strict=True):
        g = g.cpu().float() * 0.25
        # Two terms, each rounded: the error is relative to them, not to what may cancel between them.
        error = (m - (0.9 * m_old.double() + 0.1 * g.double())).abs()
        assert (error <= 1.5e-7 * (0.9 * m_old.abs() + 0.1 * g.abs())).all()
        assert torch.equal(kept, g)
        # The sums are judged on the float32 states and differences that they are sums of.
        expected = truth.sums(g.double(), m, (g - g_old).double(), truth.finite(g))
        torch.testing.assert_close(row, expected, rtol=1e-6, atol=0)


def assert_updated(before, grad, after, t, eps, **options):
    """One segment's (param, exp_avg, exp_avg_sq) as float64 AdamW leaves them, all on the host.

    Errors are judged against the terms that were added, not against what may be left when they cancel.
    """
    options = {**PLAIN, **options}
    twin = truth.Adamw(*(s.double() for s in before))
    twin.step(grad, t, **options)
    param, exp_avg, exp_avg_sq = (s.double() for s in after)
    terms = 0.9 * before[1].double().abs() + 0.1 * grad.double().abs()
    assert ((exp_avg - twin.exp_avg).abs() <= 3 * EPS[torch.float32] * terms).all()
    assert ((exp_avg_sq - twin.exp_avg_sq).abs() <= 4 * EPS[torch.float32] * twin.exp_avg_sq).all()
    largest = options["lr"] / (1 - 0.9**t) * terms / ((twin.exp_avg_sq / (1 - 0.999**t)).sqrt() + options["eps"])
    # One rounding to the parameter's dtype, and a few in float32 before it; the root and the quotient are fast ones.
    bound = (eps + 10 * EPS[torch.float32]) * (before[0].double().abs() + largest) + 2.0**-24 * (eps > 1e-4)
    assert ((param - twin.param).abs() <= bound).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("grad", "param"), PAIRS, ids=str)
def test_update_and_sums_match_float64(backend, grad, param, layout):
    p = Problem(grad=grad, param=param, layout=layout)
    before = p.states()
    stats = p.adamw(backend).cpu()
    for row, g, was, now in zip(stats, p.grads, before, p.states(), strict=True):
        g = g.cpu().float()
        assert_updated(was, g, now, 3, EPS[param])
        torch.testing.assert_close(row, truth.sums(g.double(), now[1], None, truth.finite(g)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", ["loose", "flat"])
@pytest.mark.parametrize("states", [False, True])
def test_options_change_what_they_say_and_nothing_else(backend, states, layout):
    p = Problem(layout=layout)
    before, grads = p.states(), [g.cpu() for g in p.grads]
    steps = torch.arange(2.0, 2 + len(SIZES))
    stats = p.adamw(
        backend, states, lr=scalar(3e-3, torch.float64), step=steps.cuda(), inv_scale=scalar(0.25), clip=scalar(0.3),
        zero_grad=True, maximize=True,
    ).cpu()  # fmt: skip
    clip = torch.tensor(0.3)
    for g, gone, was, now, t in zip(grads, p.grads, before, p.states(), steps.tolist(), strict=True):
        assert_updated(was, g * 0.25 * clip, now, t, EPS[torch.float32], lr=3e-3, maximize=True)
        assert (gone == 0).all()
    seen = torch.cat(grads).double() * 0.25
    torch.testing.assert_close(stats[:, 0].sum(), seen.square().sum(), rtol=1e-6, atol=0)
    if states:
        assert torch.equal(p.previous.cpu().double(), seen)


def test_nonfinite_elements_are_counted_and_harm_nothing(backend):
    n = 2 * CHUNK + 1
    p = Problem([n, 5])
    bad = {0: "nan", 15: "inf", 16: "-inf", CHUNK - 1: "3e16", CHUNK: "nan", 2 * CHUNK: "inf"}
    for where, value in bad.items():
        p.grads[0][where] = float(value)
    places = torch.tensor(list(bad)).cuda()
    ema, previous = p.ema[places], p.previous[places]
    stats = p.measure(backend, states=True)
    assert stats[:, 5].tolist() == [len(bad), 0]
    assert stats.isfinite().all()
    assert torch.equal(p.ema[places], ema)
    assert torch.equal(p.previous[places], previous)
    whole = p.grads[0][truth.finite(p.grads[0])].double()
    torch.testing.assert_close(stats[0, 0], whole.square().sum(), rtol=1e-6, atol=0)

    stats = p.adamw(backend)  # which treats them as torch does: they reach the parameter
    assert stats[:, 5].tolist() == [len(bad), 0]
    assert stats.isfinite().all()
    broken = ~p.params[0].isfinite()
    assert set(broken.nonzero().flatten().tolist()) == {0, 15, 16, CHUNK, 2 * CHUNK}


def test_found_inf_leaves_everything_as_it_was(backend):
    p = Problem()
    before = [t.clone() for t in p.everything()]
    stats = p.adamw(backend, states=True, found_inf=scalar(1.0), zero_grad=True)
    assert stats.isnan().all()
    assert same_bits(p.everything(), before)
    assert not p.adamw(backend, found_inf=scalar(0.0)).isnan().any()


@pytest.mark.parametrize("layout", ["loose", "flat"])
def test_a_sampled_plan_reads_only_its_elements(backend, layout):
    p = Problem([50_000, 100, 30_000], torch.bfloat16, layout=layout, sample=20_000, seed=3)
    before, ema = [g.clone() for g in p.params], p.ema.clone()
    stats = p.adamw(backend, states=True)
    visited = [torch.zeros(n, dtype=torch.bool) for n in p.sizes]
    for segment, offset, length, _ in p.plan.rows.tolist():
        begin = offset - p.plan.bucket.offsets[segment]
        visited[segment][begin : begin + length] = True
    assert 0 < sum(int(mask.sum()) for mask in visited) < sum(p.sizes)
    picked = []
    for row, g, now, was, mask in zip(stats, p.grads, p.params, before, visited, strict=True):
        mask = mask.cuda()
        picked.append(g[mask].float())
        assert torch.equal(now[~mask], was[~mask])
        torch.testing.assert_close(row[0], g[mask].double().square().sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(p.ema, 0.9 * ema + 0.1 * torch.cat(picked), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_chunks_add_up_and_give_the_same_bits_every_time(backend, dtype):
    g = torch.randn(MANY_CHUNKS, device="cuda").to(dtype)
    cut = [g[: CHUNK * 999 + 7], g[CHUNK * 999 + 7 :], torch.ones(3, device="cuda", dtype=dtype)]
    plan = gk.Bucket(cut).plan()
    results = [gk.measure_(cut, plan, ema=torch.ones(plan.numel, device="cuda"), backend=backend) for _ in range(4)]
    for part, row in zip(cut, results[0], strict=True):
        torch.testing.assert_close(row[0], part.double().square().sum(), rtol=1e-6, atol=0)
        torch.testing.assert_close(row[2], part.double().abs().sum(), rtol=1e-6, atol=0)
    assert all(torch.equal(stats, results[0]) for stats in results)


@pytest.mark.parametrize("layout", ["loose", "flat"])
def test_an_update_gives_the_same_bits_every_time(kernel, layout):
    results = []
    for _ in range(3):
        p = Problem([300_001, 17, 5000], torch.bfloat16, torch.bfloat16, layout)
        results.append([p.adamw(kernel, states=True), *p.everything()])
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


@pytest.mark.parametrize(("grad", "param"), PAIRS, ids=str)
def test_sums_and_states_never_change_a_bit_of_the_update(backend, grad, param):
    plain, gauged, stateful = (Problem(grad=grad, param=param) for _ in range(3))
    assert plain.adamw(backend, sums=False).shape == (0, 6)
    gauged.adamw(backend)
    stateful.adamw(backend, states=True)
    assert same_bits(plain.everything(), gauged.everything())
    assert same_bits(plain.everything()[:-2], stateful.everything()[:-2])


def test_layout_never_changes_a_bit_of_the_update(backend):
    """An element's update does not depend on where in a vector or chunk it sits."""
    loose, misaligned, flat = (Problem(layout=layout) for layout in LAYOUTS)
    for p in (loose, misaligned, flat):
        p.adamw(backend)
    for name in ("params", "exp_avgs", "exp_avg_sqs"):
        assert same_bits(getattr(loose, name), getattr(misaligned, name))
        assert same_bits(getattr(loose, name), getattr(flat, name))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backends_agree(kernel, dtype):
    one, other = Problem(grad=dtype), Problem(grad=dtype)
    # What is absolute is for segments of one element, whose new moment may be all but zero.
    torch.testing.assert_close(one.adamw(kernel), other.adamw("reference"), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(
        one.measure(kernel, states=True), other.measure("reference", states=True), rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parameters_round_as_torch_rounds(backend, dtype):
    """Every value of the dtype, the midpoint above each, NaN, infinities and what overflows: to the same bits."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    above = torch.arange(1, 2**16 + 1, dtype=torch.int32).to(torch.int16).view(dtype).float()
    target = torch.cat([every, (every + above) / 2, torch.randn(999) * 1e-6, torch.tensor([65519.9, 65520.0, 3.4e38])])
    # A GPU's fast quotient may flush the smallest numbers to zero.
    target = target[~((target.abs() < 1e-30) & (target != 0))].cuda()
    huge = target.abs() > 1e38  # where doubling the target would itself overflow
    param, grad = torch.zeros(len(target), dtype=dtype, device="cuda"), torch.zeros(len(target), device="cuda")
    exp_avg, exp_avg_sq = torch.where(huge, torch.nan, -2 * target), torch.zeros(len(target), device="cuda")
    # With no gradient, eps = lr = 1 and betas of 1/2 the step is half of exp_avg, exactly.
    gk.adamw_([param], [grad], [exp_avg], [exp_avg_sq], gk.Bucket([param]).plan(), step=2000, lr=1.0, betas=(0.5, 0.5),
              eps=1.0, weight_decay=0.0, backend=backend)  # fmt: skip
    expected = torch.where(huge, torch.nan, target).to(dtype)
    torch.testing.assert_close(param, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", ["loose", "flat"])
def test_work_goes_to_the_current_stream(kernel, layout):
    """An op on a side stream comes behind what that stream does, and what waits for the stream sees its result."""
    side, p, expected = torch.cuda.Stream(), Problem(layout=layout), Problem(layout=layout)
    for stream in expected.grad_stream:
        stream.mul_(2)
    expected_stats = expected.adamw(kernel)
    p.adamw(kernel, found_inf=scalar(1.0))  # changes nothing; the addresses are uploaded on another stream than used on
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # ~50 ms: whoever does not wait reads the old gradients
        for stream in p.grad_stream:
            stream.mul_(2)
        stats = p.adamw(kernel)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(stats, expected_stats)
    assert same_bits(p.everything(), expected.everything())


def test_no_segment_or_nothing_to_visit(backend):
    p = Problem([0])
    assert torch.equal(p.adamw(backend), torch.zeros(1, 6, dtype=torch.float64, device="cuda"))
    p = Problem([10, 20])
    p.plan = gk.Bucket(p.params).plan(skip=(0, 1))
    before = [t.clone() for t in p.everything()]
    assert torch.equal(p.adamw(backend), torch.zeros(2, 6, dtype=torch.float64, device="cuda"))
    assert same_bits(p.everything(), before)


def test_compiles_without_a_graph_break(kernel):
    p, q = Problem([5000, 17]), Problem([5000, 17])
    plan, step = p.plan, scalar(1.0)

    def train(params, grads, exp_avgs, exp_avg_sqs):
        doubled = [g * 2 for g in grads]
        stats = gk.adamw_(params, doubled, exp_avgs, exp_avg_sqs, plan, step=step, backend=kernel, **PLAIN)
        return stats.sum(0)

    expected = train(q.params, q.grads, q.exp_avgs, q.exp_avg_sqs)
    torch._dynamo.reset()
    compiled = torch.compile(train, fullgraph=True)
    torch.testing.assert_close(compiled(p.params, p.grads, p.exp_avgs, p.exp_avg_sqs), expected, rtol=1e-12, atol=0)
    assert same_bits(p.everything(), q.everything())
