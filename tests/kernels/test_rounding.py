"""Stochastic rounding: the definition, what it is good for, and every backend that runs on tensors here against it."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
import torch
from kernels import rounding

import grgauge_kernels as gk
from grgauge_kernels import CHUNK
from grgauge_kernels.backends import Update, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EVERY = torch.arange(2**16)  # all that 16 random bits can be


@pytest.mark.parametrize(
    "value",
    [1.0, 1.001, -1.0077, 3.14159, -2.71828e-20, 1.99999, 2.0**-126, 1.1e-38, 1e-39, -3.3e-41, 2.0**-149, 3.0e38],
)
def test_the_mean_over_all_random_bits_is_the_number_itself(value):
    x = torch.tensor(value)
    found = reference.rounded(x.expand(2**16), EVERY).double()
    assert float(found.mean()) == pytest.approx(float(x.double()), rel=1e-12, abs=0)
    low, high = found.min(), found.max()
    assert low <= x.double() <= high
    if low != high:
        # Neighbours, that is: nothing of bfloat16 lies between them.
        assert torch.nextafter(low.bfloat16(), torch.tensor(torch.inf).bfloat16()) == high.bfloat16()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.inf, torch.inf),
        (-torch.inf, -torch.inf),
        (torch.nan, torch.nan),
        (0.0, 0.0),
        (-1.5, -1.5),
        (3.39e38, reference.LARGEST_BFLOAT16),  # just beyond it
        (-3.4028234e38, -reference.LARGEST_BFLOAT16),  # float32's largest, which rounds to infinity in torch
    ],
)
def test_what_has_no_two_neighbours_is_never_drawn(value, expected):
    found = reference.rounded(torch.tensor(value).expand(2**16), EVERY)
    torch.testing.assert_close(found, torch.full_like(found, expected), rtol=0, atol=0, equal_nan=True)


def test_a_nan_with_the_least_of_payloads_stays_one():
    signalling = torch.tensor([0x7F800001, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    assert reference.rounded(signalling, torch.zeros(2, dtype=torch.int64)).isnan().all()


def test_a_million_draws_are_unbiased():
    """Of numbers of all sizes, against float64, in standard errors of the mean of the rounding errors."""
    n = 10**6
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(n, generator=generator) * torch.exp2(torch.randint(-140, 120, (n,), generator=generator).float())
    for random in reference.random_bits(3, 77, 2, torch.arange(n)):
        place = torch.exp2(torch.frexp(x).exponent.double().clamp(min=-125) - 8)  # of bfloat16, at the size of x
        error = (reference.rounded(x, random).double() - x.double()) / place
        assert abs(error.mean()) < 4 * error.std() / n**0.5
        assert error.abs().max() < 1
        assert 0.35 < error.std() < 0.45  # sqrt(1/6), as for a uniform fraction


def test_random_bits_are_uniform_and_go_their_own_ways():
    """Streams, neighbours, steps, segments and seeds: each bit is fair, and no two columns are correlated."""
    n = 200_000
    index = torch.arange(n)
    columns = [*reference.random_bits(0, 1, 0, index), *reference.random_bits(0, 2, 0, index)]
    columns += [*reference.random_bits(0, 1, 1, index), *reference.random_bits(1, 1, 0, index)]
    columns += [columns[1].roll(k) for k in (1, 2, 4096)]
    values = torch.stack(columns)
    assert values.min() == 0
    assert values.max() == 2**16 - 1
    fair = torch.stack([(values >> k & 1).double().mean(1) for k in range(16)])
    assert (fair - 0.5).abs().max() < 5 * 0.5 / n**0.5  # there are 240
    correlation = np.corrcoef(values.numpy())
    assert abs(correlation - np.eye(len(columns))).max() < 5 / n**0.5
    assert len({int(c[0]) << 16 | int(c[1]) for c in columns}) == len(columns)


def test_an_element_draws_anew_in_every_step():
    draws = np.array([[int(t) for t in reference.random_bits(0, t, 3, torch.tensor(7))] for t in range(1, 4001)])
    error = draws.std(0) / len(draws) ** 0.5
    assert (abs(draws.mean(0) - (2**16 - 1) / 2) < 4 * error).all()
    lagged = [np.corrcoef(draws[k:, i], draws[:-k, i])[0, 1] for k in (1, 2, 16) for i in range(3)]
    assert max(map(abs, lagged)) < 4 / len(draws) ** 0.5


@pytest.mark.parametrize(("grad", "param"), list(product(DTYPES, DTYPES)))
@pytest.mark.parametrize("flat", [False, True], ids=["loose", "flat"])
def test_moments_are_rounded_by_the_definition(backend, grad, param, flat):
    rounding.check_moments(backend, grad, param, flat)


@pytest.mark.parametrize(
    "options",
    [{"sums": False}, {"zero_grad": True}, {"ema": ...}, {"previous": ...}, {"clip": torch.tensor(1.0)}],
    ids=lambda options: next(iter(options)),
)
def test_no_option_changes_the_draw(backend, options):
    rounding.check_moments(backend, torch.bfloat16, torch.bfloat16, False, **options)


def test_subnormal_infinite_and_huge_moments(backend):
    rounding.check_edges(backend)


@pytest.mark.parametrize("moment", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", DTYPES)
def test_parameters_are_rounded_by_the_definition(backend, moment, grad):
    rounding.check_params(backend, moment, grad)


def test_chunks_and_threads_do_not_change_the_draw(backend):
    """Cut anywhere, in any number of chunks, on any number of threads."""
    n = 60_001
    cuts = [0, 5, 5 + CHUNK, 2 * CHUNK + 1, *range(3 * CHUNK, n, CHUNK), n]
    rows = torch.tensor([(0, a, b - a, a) for a, b in pairwise(cuts)])
    grads = rounding.draw([n], torch.float32)
    usual, found = torch.get_num_threads(), []
    try:
        for threads, table in ((1, None), (2, None), (3, None), (2, rows)):
            torch.set_num_threads(threads)
            found.append(torch.cat(rounding.updated_moments(backend, grads, rows=table)[1]))
    finally:
        torch.set_num_threads(usual)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_seeds_and_steps_round_differently(backend):
    grads = rounding.draw([1000], torch.float32)

    def moments(**options):
        return rounding.updated_moments(backend, grads, **options)[1][0]

    usual = moments()
    assert torch.equal(usual, moments())
    for options in ({"seed": 2**32 - 1}, {"seed": 0}, {"step": 42}):
        assert 200 < int((usual != moments(**options)).sum()) < 800, options


def test_the_plain_update_takes_the_moments_as_they_were_before_rounding(backend):
    """So a float32 parameter's first update is the one that float32 moments give it, bit by bit."""
    grads = rounding.draw([5000], torch.float32)
    ended = []
    for moment in (torch.float32, torch.bfloat16):
        param, m, v = torch.ones(5000), torch.zeros(5000, dtype=moment), torch.zeros(5000, dtype=moment)
        gk.adamw_([param], grads, [m], [v], gk.Bucket([param]).plan(), step=1, lr=1e-2, betas=(0.9, 0.999), eps=1e-8,
                  weight_decay=0.1, backend=backend)  # fmt: skip
        ended.append(param)
    assert torch.equal(*ended)


@pytest.mark.parametrize("start", [1.0, 0.0])
def test_no_second_moment_is_stuck_over_a_hundred_thousand_steps(start):
    """0.999 v + 0.001 g^2 moves v by less than half a place of bfloat16: rounding to nearest would keep it for ever."""
    n, g, beta2 = 256, 0.55, 0.999  # g^2 is no bfloat16: on one, all would settle
    nearest = torch.tensor(start).bfloat16()
    for _ in range(20_000):
        nearest = (beta2 * nearest.float() + (1 - beta2) * g * g).bfloat16()
    assert abs(float(nearest) / g**2 - 1) > 0.4
    param, grad = torch.zeros(n), torch.full((n,), g)
    m, v = torch.zeros(n, dtype=torch.bfloat16), torch.full((n,), start, dtype=torch.bfloat16)
    streams, step = ((param,), (grad,), (m,), (v,)), torch.zeros(())
    plan = gk.Bucket([param]).plan()
    for _ in range(100_000):
        step += 1
        gk.adamw_(*streams, plan, step=step, lr=0.0, betas=(0.9, beta2), eps=1e-8, weight_decay=0.0, sums=False)
    # A rounding adds at most 2^-16 v^2 to the variance, and in the long run 1 / (1 - beta2^2) of them are in it.
    error = g * g * (2**-16 / (1 - beta2**2) / n) ** 0.5
    assert abs(float(v.double().mean()) - g * g) < 4 * error
    assert abs(float(m.double().mean()) - g) < 4 * g * (2**-16 / (1 - 0.9**2) / n) ** 0.5
    assert v.unique().numel() > 1  # each element goes its own way


def test_the_sum_of_squares_is_too_large_by_what_the_docstring_says():
    """Against an EMA in float64: r beta^2 / (1 - beta^2), r the mean square of a rounding in units of m^2."""
    n, beta, steps, cold = 10**6, 0.9, 100, 40
    generator = torch.Generator().manual_seed(0)
    param, m, v = torch.zeros(n), torch.zeros(n, dtype=torch.bfloat16), torch.zeros(n, dtype=torch.bfloat16)
    exact = torch.zeros(n, dtype=torch.float64)
    plan = gk.Bucket([param]).plan()
    off, stored = [], []
    for t in range(1, steps + 1):
        grad = torch.randn(n, generator=generator)
        exact = beta * exact + (1 - beta) * grad.double()
        stats = gk.adamw_([param], [grad], [m], [v], plan, step=t, lr=0.0, betas=(beta, 0.999), eps=1e-8,
                          weight_decay=0.0)  # fmt: skip
        if t > cold:
            off.append(float(stats[0, 1] / exact.square().sum()) - 1)
            stored.append(float(m.double().square().sum() / exact.square().sum()) - 1)
    grown = beta**2 / (1 - beta**2)
    # The sum of 2 m (m - exact) is noise: 2 sqrt(r grown / n) at a step, over the ten or so steps that forget it.
    error = 2 * (5.5e-6 * grown / n) ** 0.5 * ((1 + beta) / (1 - beta) / len(off)) ** 0.5
    assert np.mean(off) == pytest.approx(5.5e-6 * grown, abs=4 * error)
    assert np.mean(off) < 2**-16 * grown
    assert 1.0 < np.mean(stored) / np.mean(off) < 1.6  # 1 / beta^2, were the sum over the rounded ones


def test_the_record_is_the_op_s_schema():
    schema = torch.ops.grgauge.adamw_.default._schema
    assert [a.name for a in schema.arguments] == list(Update._fields)
    assert {a.name: a.default_value for a in schema.arguments if a.has_default_value()} == Update._field_defaults


@pytest.mark.parametrize("stochastic_rounding", [False, True])
def test_opcheck_with_bfloat16_moments(stochastic_rounding):
    grads = [torch.randn(5000).bfloat16(), torch.randn(17).bfloat16()]
    params, first, second = ([torch.rand_like(g) for g in grads] for _ in range(3))
    plan = gk.Bucket(grads).plan()
    args = (params, grads, first, second, plan.rows, plan.segments, torch.tensor(1.0), 1e-3, None, 0.9, 0.999, 1e-8)
    tail = (0.1, None, None, 0.9, None, None, None, False, False, True)
    torch.library.opcheck(
        torch.ops.grgauge.adamw_.default, (*args, *tail), {"seed": 3, "stochastic_rounding": stochastic_rounding}
    )


def test_compiles_without_a_graph_break():
    base = torch.randn(6000).bfloat16()
    plan = gk.Bucket([base[10:5000], base[5001:]], base=base).plan()
    options = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "seed": 9}

    def step(param, grad, first, second):
        stats = gk.adamw_(
            [param], [grad * 2], [first], [second], plan, step=torch.tensor(1.0), stochastic_rounding=True, **options
        )
        return stats.sum(0)

    streams = [torch.rand_like(base) for _ in range(3)]
    streams.insert(1, base)
    clones = [t.clone() for t in streams]
    expected = step(*clones)
    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(*streams), expected)
    assert all(map(torch.equal, streams, clones))
    assert not torch.equal(streams[2], torch.rand_like(base))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"seed": -1}, ValueError, r"seed is -1; it must be an int in \[0, 2\*\*32\)"),
        ({"seed": 2**32}, ValueError, "seed is 4294967296"),
        ({"seed": 0.5}, ValueError, "seed is 0.5"),
        ({"stochastic_rounding": True}, TypeError, "params has dtype float32; with stochastic_rounding=True it must"),
        ({"exp_avg_sqs": torch.float32}, TypeError, "exp_avg_sqs has dtype float32; it must be exp_avgs' bfloat16"),
        ({"exp_avgs": torch.float32}, TypeError, "exp_avg_sqs has dtype bfloat16; it must be exp_avgs' float32"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(change, error, text):
    grads = [torch.randn(100), torch.randn(7)]
    dtypes = {"exp_avgs": torch.bfloat16, "exp_avg_sqs": torch.bfloat16}
    dtypes |= {name: value for name, value in change.items() if name in dtypes}
    options = {name: value for name, value in change.items() if name not in dtypes}
    params = [torch.randn_like(g) for g in grads]
    first, second = ([torch.rand_like(g, dtype=dtype) for g in grads] for dtype in dtypes.values())
    before = [t.clone() for t in (*params, *first, *second)]
    with pytest.raises(error, match=text):
        gk.adamw_(params, grads, first, second, gk.Bucket(params).plan(), step=1, lr=1e-3, betas=(0.9, 0.999),
                  eps=1e-8, weight_decay=0.01, **options)  # fmt: skip
    assert all(map(torch.equal, before, [*params, *first, *second]))
