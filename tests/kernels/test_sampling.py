"""What a sample takes, and what it says of the whole: shares, hashes, unbiased sums, honest standard errors."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import grgauge_kernels as gk
from grgauge_kernels.sampling import (
    BLOCK,
    CERTAIN_SHARE,
    FEWEST,
    MOST,
    WHOLE,
    WHOLE_SHARE,
    block_hash,
    choose,
    chosen_blocks,
    dealt,
    joined,
    kept_blocks,
    sampled_ratio,
    sampled_sums,
)

SIZES = st.lists(st.one_of(st.integers(0, WHOLE), st.integers(0, 60 * BLOCK)), min_size=1, max_size=6)
SEEDS = st.integers(0, 2**64 - 1)


# The choice


@given(seed=SEEDS, blocks=st.integers(1, 10**9), data=st.data())
def test_chosen_blocks_are_different_ascending_and_in_range(seed, blocks, data):
    kept = data.draw(st.integers(1, min(blocks, 300)))
    chosen = chosen_blocks(seed, 3, blocks, kept)
    assert len(chosen) == kept
    assert (np.diff(chosen) > 0).all()
    assert chosen[0] >= 0
    assert chosen[-1] < blocks
    # One an interval: no gap is longer than two intervals, going round.
    gaps = np.diff(np.append(chosen, chosen[0] + blocks))
    assert gaps.max() < 2 * (blocks // kept + 1)


@pytest.mark.parametrize(("blocks", "kept"), [(100, 40), (97, 31), (12, 11), (1000, 7)])
def test_every_block_is_as_likely_as_any_other(blocks, kept):
    """Inclusion counts over seeds are binomial: chi-square of the counts within 5 standard deviations of its mean."""
    seeds = 2000
    counts = np.bincount(np.concatenate([chosen_blocks(s, 0, blocks, kept) for s in range(seeds)]), minlength=blocks)
    p = kept / blocks
    chi_square = np.sum((counts - seeds * p) ** 2) / (seeds * p * (1 - p))
    assert counts.sum() == seeds * kept
    assert abs(chi_square - blocks) < 5 * np.sqrt(2 * blocks)


def test_each_bit_of_seed_segment_and_number_flips_each_bit_of_the_hash_half_the_time():
    def bits(values):
        return np.unpackbits(np.ascontiguousarray(values).view(np.uint8).reshape(len(values), 8), axis=1)

    rng = np.random.default_rng(0)
    seeds, segments = rng.integers(0, 2**63, 200).tolist(), rng.integers(0, 2**40, 200).tolist()
    base = bits(np.array([block_hash(a, b, 1)[0] for a, b in zip(seeds, segments, strict=True)]))
    for bit in (0, 1, 7, 20, 39):
        for flip in ((1 << bit, 0), (0, 1 << bit)):
            other = [block_hash(a ^ flip[0], b ^ flip[1], 1)[0] for a, b in zip(seeds, segments, strict=True)]
            flipped = (base ^ bits(np.array(other))).mean(axis=0)  # of 200: standard deviation 0.035
            assert flipped.min() > 0.5 - 5 * 0.036
            assert flipped.max() < 0.5 + 5 * 0.036
    stream = bits(block_hash(0, 0, 20_000))
    assert np.abs(stream.mean(axis=0) - 0.5).max() < 5 * 0.5 / np.sqrt(20_000)
    assert np.abs(np.corrcoef(stream.T) - np.eye(64)).max() < 6 / np.sqrt(20_000)
    assert len(np.unique(block_hash(0, 0, 20_000))) == 20_000


def test_segments_and_seeds_choose_independently():
    """Two choices of a quarter share a quarter: what one takes says nothing of what another does."""
    blocks, kept, pairs = 400, 100, 300
    for other in (lambda s: (s, 1), lambda s: (s + 1, 0), lambda s: (s, -1)):
        common = [
            len(np.intersect1d(chosen_blocks(s, 0, blocks, kept), chosen_blocks(*other(s), blocks, kept)))
            for s in range(pairs)
        ]
        assert abs(np.mean(common) - kept**2 / blocks) < 5 * np.std(common) / np.sqrt(pairs)


@given(seed=SEEDS, kept=st.integers(1, 500), replicates=st.integers(1, MOST))
def test_any_run_of_blocks_is_dealt_to_as_many_replicates(seed, kept, replicates):
    replicate = dealt(seed, 0, kept, replicates)
    assert len(replicate) == kept
    for start in range(0, kept, replicates):
        run = replicate[start : start + replicates]
        assert len(set(run.tolist())) == len(run)
        assert run.max() < replicates


@given(sizes=SIZES, sample=st.integers(1, 200 * BLOCK), fewest=st.sampled_from([1, FEWEST]))
@example(sizes=[31 * BLOCK + 1], sample=7565, fewest=1)  # a last block of one element counts as one element
def test_the_budget_is_met_within_rounding(sizes, sample, fewest):
    kept = kept_blocks(sizes, sample, fewest=fewest)
    blocks = -(-np.array(sizes) // BLOCK)
    small = np.array(sizes) <= WHOLE
    assert (kept[small] == blocks[small]).all()
    assert (kept >= np.minimum(blocks, fewest)).all()
    assert (kept <= blocks).all()
    visited = sum(min(k * BLOCK, n) for k, n in zip(kept.tolist(), sizes, strict=True))
    exempt = sum(n for n in sizes if n <= WHOLE)
    assert visited <= max(sample, exempt) + fewest * BLOCK * int((~small).sum())
    if sample >= sum(sizes):
        assert visited == sum(sizes)
    elif exempt <= sample:
        assert visited >= sample - BLOCK * len(sizes)


def test_shares_follow_sizes_and_equal_segments_are_treated_alike():
    sizes = [400 * BLOCK, 100 * BLOCK, 100 * BLOCK, 5]
    kept = kept_blocks(sizes, 60 * BLOCK)
    assert kept.tolist() == [40, 10, 10, 1]
    # A quarter of the budget buys one segment of 100 blocks, but not both: neither is taken whole.
    assert kept_blocks([4000 * BLOCK, 100 * BLOCK, 100 * BLOCK], 500 * BLOCK)[1:].tolist() == [12, 12]
    assert (
        kept_blocks([4000 * BLOCK, 100 * BLOCK, 100 * BLOCK], round(200 * BLOCK / WHOLE_SHARE)).tolist()[1:]
        == [100] * 2
    )


def test_only_errors_ask_for_more_than_a_block_of_each():
    bucket = gk.Bucket([torch.empty(64 * BLOCK), torch.empty(64 * BLOCK)])
    assert bucket.plan(sample=1).numel == 2 * BLOCK
    assert bucket.plan(sample=1, replicates=8).numel == 2 * FEWEST * BLOCK


@given(sizes=SIZES, sample=st.integers(1, 100 * BLOCK), seed=SEEDS, replicates=st.integers(0, 100), data=st.data())
def test_parts_make_up_a_sample_whatever_they_are(sizes, sample, seed, replicates, data):
    bucket = gk.Bucket([torch.empty(n) for n in sizes])
    kept = kept_blocks(sizes, sample)
    certain = []
    for n, k in zip(sizes, kept.tolist(), strict=True):
        blocks = -(-n // BLOCK)
        most = max(0, min(int(CERTAIN_SHARE * k), k - FEWEST)) if k < blocks else 0
        certain.append(
            np.array(sorted(data.draw(st.sets(st.integers(0, max(0, blocks - 1)), max_size=most))), dtype=int)
        )
    plan = bucket.plan(sample=sample, seed=seed, replicates=replicates, certain=certain)
    if sample >= bucket.numel:
        assert plan.complete
        return
    rows = plan.rows.numpy()
    assert (np.diff(rows[:, 0]) >= 0).all()  # ordered by segment, as kernels want them
    assert rows[:, 2].sum() == plan.numel == plan.visited.sum()
    for i, n in enumerate(sizes):
        own = np.flatnonzero(plan.tensor == i)
        assert 1 <= len(own) <= MOST + 1
        taken = [np.arange(o, o + length) for s, o, length, _ in rows.tolist() if s in own]
        elements = np.concatenate([np.empty(0, dtype=int), *taken])
        assert len(np.unique(elements)) == len(elements)
        assert elements.max(initial=-1) < n
        assert len(np.unique(elements // BLOCK)) == kept[i]
        assert np.isin(certain[i], elements // BLOCK).all()
        np.testing.assert_allclose(plan.scale[own] @ plan.visited[own], n)
        if not replicates:
            assert len(own) == 1 + bool(len(certain[i]))


def test_a_choice_is_the_same_in_every_process():
    code = (
        "from grgauge_kernels.sampling import choose; c = choose([90_000, 7, 3_000_000], 40_000, 5, 64);"
        "print([*c.stratum.tolist(), *(block for part in c.blocks for block in part.tolist())])"
    )
    environment = {"PYTHONHASHSEED": "7", "RANK": "3", "OMP_NUM_THREADS": "1"}
    other = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    own = choose([90_000, 7, 3_000_000], 40_000, 5, 64)
    assert other.stdout.strip() == str([*own.stratum.tolist(), *np.concatenate(own.blocks).tolist()])


def test_a_choice_is_the_same_in_every_release():
    """A resumed run must find the blocks that its EMA is of."""
    assert chosen_blocks(5, 1, 1000, 8).tolist() == [39, 133, 211, 396, 576, 636, 736, 853]
    assert dealt(5, 1, 8, 4).tolist() == [3, 1, 2, 0, 3, 1, 0, 2]


def test_planning_costs_what_the_sample_does_not_what_the_model_does():
    """Llama-2-7B: 6.7e9 parameters in 291 tensors, none of which has memory."""
    d, f = 4096, 11008
    layer = [(d, d)] * 4 + [(f, d)] * 2 + [(d, f), (d,), (d,)]
    shapes = [(32000, d), *layer * 32, (d,), (32000, d)]
    bucket = gk.Bucket([torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes])
    sample = 50_000_000
    tracemalloc.start()
    rows = bucket.plan_rows(sample)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert abs(rows[:, 2].sum() / sample - 1) < 1e-3
    assert peak < 128 * sample / BLOCK  # bytes; a bit a block of the model would be more
    # Twice the model, the same budget: the same work.
    choice = choose([2 * n for n in bucket.sizes], sample, 0)
    assert sum(map(len, choice.blocks)) < 1.01 * sample / BLOCK
    assert bucket.plan(sample, replicates=512).segments < 4 * len(shapes)


# What it says of the whole


def heavy_tailed(blocks: int, sigma: float = 1.0) -> torch.Tensor:
    """Gradients whose size differs from block to block as exp(normal), with a shorter block at the end."""
    generator = torch.Generator().manual_seed(1)
    size = (sigma * torch.randn(blocks, generator=generator)).exp().repeat_interleave(BLOCK)
    return (size * torch.randn(blocks * BLOCK, generator=generator))[: -BLOCK // 3]


def test_sums_of_samples_are_unbiased_and_their_errors_true():
    """Over seeds: mean of the estimates, their standard deviation against the reported one, coverage of 90 %."""
    tensors = [heavy_tailed(400, 0.7), heavy_tailed(150, 0.5), torch.randn(700)]
    truth = np.array([[float(t.double().square().sum()), float(t.double().abs().sum())] for t in tensors])
    bucket = gk.Bucket(tensors)
    sums, covariances = [], []
    for seed in range(300):
        plan = bucket.plan(sample=BLOCK * 150, seed=seed, replicates=64)
        stats = gk.measure_(plan.spread(tensors), plan).numpy()[:, [0, 2]]
        np.testing.assert_allclose((stats * plan.scale[:, None]).sum(0), sampled_sums(stats, plan)[0].sum(0))
        a, b = sampled_sums(stats, plan)
        sums.append(a)
        covariances.append(b)
    sums, covariances = np.array(sums), np.array(covariances)
    errors = np.sqrt(covariances.diagonal(axis1=-2, axis2=-1))
    assert (errors[:, 2] == 0).all()
    np.testing.assert_allclose(sums[:, 2], np.broadcast_to(truth[2], sums[:, 2].shape), rtol=1e-5)
    spread = sums[:, :2].std(axis=0)
    assert (np.abs(sums[:, :2].mean(axis=0) - truth[:2]) < 4 * spread / np.sqrt(300)).all()
    np.testing.assert_allclose(np.sqrt((errors[:, :2] ** 2).mean(axis=0)), spread, rtol=0.2)
    ratio, error = sampled_ratio(sums.sum(axis=1), covariances.sum(axis=1))
    total = sums.sum(axis=1)
    total_error = np.sqrt(covariances.sum(axis=1).diagonal(axis1=-2, axis2=-1))
    for off, reported in (
        (total - truth.sum(axis=0), total_error),
        (ratio - truth[:, 0].sum() / truth[:, 1].sum(), error),
    ):
        covered = (np.abs(off) < 1.645 * reported).mean(axis=0)
        assert (covered > 0.83).all()  # 90 %, less what 15 degrees of freedom and long tails cost, less 3 deviations
        assert (covered < 0.96).all()


def test_certain_blocks_keep_estimates_unbiased_and_errors_small():
    """A tenth of a percent of the blocks holds most of the sum, as in an embedding."""
    g = heavy_tailed(500)
    g[: 5 * BLOCK] = 100 * torch.randn(5 * BLOCK, generator=torch.Generator().manual_seed(2))
    bucket = gk.Bucket([g])
    truth = float(g.double().square().sum())
    certain = bucket.heavy_blocks([g], sample=60 * BLOCK)
    assert set(range(5)) <= set(certain[0].tolist())
    found = {}
    for name, sure in (("hash", None), ("certain", certain)):
        estimates = []
        for seed in range(200):
            plan = bucket.plan(60 * BLOCK, seed, replicates=16, certain=sure)
            stats = gk.measure_(plan.spread([g]), plan).numpy()[:, :1]
            estimates.append(sampled_sums(stats, plan)[0][0, 0] / truth - 1)
        found[name] = np.array(estimates)
    assert found["certain"].std() < found["hash"].std() / 30
    for off in found.values():
        assert abs(off.mean()) < 4 * off.std() / np.sqrt(200)


def test_heavy_blocks_leave_out_zeros_and_what_is_not_finite():
    g = torch.zeros(100 * BLOCK + 7)
    g[3 * BLOCK], g[50 * BLOCK], g[-1], g[9 * BLOCK] = 1.0, -2.0, 3.0, float("inf")
    bucket = gk.Bucket([g, torch.ones(10)])
    first, second = bucket.heavy_blocks([g, torch.ones(10)], sample=20 * BLOCK)
    assert first.tolist() == [3, 50, 100]
    assert second.tolist() == []
    plan = bucket.plan(20 * BLOCK, certain=[first, second])
    stats = gk.measure_(plan.spread([torch.nan_to_num(g, posinf=0.0), torch.ones(10)]), plan).numpy()
    assert sampled_sums(stats, plan)[0][:, 0].tolist() == [14.0, 10.0]
    channels_last = torch.randn(64, 64, 3, 3).to(memory_format=torch.channels_last)
    inside = gk.Bucket([channels_last]).heavy_blocks([channels_last], sample=20 * BLOCK)[0]
    memory = channels_last.permute(0, 2, 3, 1).reshape(-1, BLOCK).square().sum(1)
    assert inside.tolist() == sorted(memory.argsort(descending=True)[: len(inside)].tolist())


@pytest.mark.parametrize("flat", [False, True])
def test_parts_measure_what_a_tensor_does(flat):
    tensors = [heavy_tailed(80), torch.randn(300), heavy_tailed(40)]
    base = torch.cat(tensors)
    bucket = gk.Bucket(list(base.split([len(t) for t in tensors])), base=base) if flat else gk.Bucket(tensors)
    given_ = [base] if flat else tensors
    whole, parts = bucket.plan(30 * BLOCK, 1), bucket.plan(30 * BLOCK, 1, replicates=32)
    assert whole.spread(given_) is given_
    assert parts.numel == whole.numel
    assert parts.segments > 8
    ema = torch.zeros(parts.numel)
    for _ in range(2):
        stats = gk.measure_(parts.spread(given_), parts, ema=ema, beta=0.9).numpy()
    expected = torch.zeros(whole.numel)
    for _ in range(2):
        reference = gk.measure_(whole.spread(given_), whole, ema=expected, beta=0.9).numpy()
    np.testing.assert_allclose(sampled_sums(stats, parts)[0], reference * whole.scale[:, None], rtol=1e-6)
    assert np.isnan(sampled_sums(reference, whole)[1][0]).all()  # one replicate: no error is known
    assert (sampled_sums(reference, whole)[1][1] == 0).all()


def test_a_mislaid_tensor_is_named_by_its_segment():
    g = heavy_tailed(80)
    plan = gk.Bucket([g]).plan(30 * BLOCK, replicates=4)
    with pytest.raises(ValueError, match=r"grads\[1\] has 5 elements, segment 1 has"):
        gk.measure_([g, torch.empty(5), *[g] * (plan.segments - 2)], plan)


def test_skipped_and_empty_tensors_count_nothing():
    tensors = [heavy_tailed(60), torch.empty(0), heavy_tailed(50)]
    bucket = gk.Bucket(tensors)
    plan = bucket.plan(25 * BLOCK, skip=[2], replicates=32)
    sums, covariance = sampled_sums(gk.measure_(plan.spread(tensors), plan).numpy(), plan)
    assert sums.shape == (3, 6)
    assert sums[0, 0] > 0
    assert covariance[0, 0, 0] > 0
    assert not sums[1:].any()
    assert not covariance[1:].any()


def test_one_tensor_and_passes_stacked():
    g = heavy_tailed(100)
    bucket = gk.Bucket([g])
    whole = bucket.plan(len(g), replicates=8)
    assert whole.complete
    assert whole.segments == 1
    plan = bucket.plan(30 * BLOCK, replicates=8)
    stats = gk.measure_(plan.spread([g]), plan).numpy()
    sums, covariance = sampled_sums(np.stack([stats, 2 * stats]), plan)
    assert sums.shape == (2, 1, 6)
    np.testing.assert_allclose(sums[1], 2 * sums[0])
    np.testing.assert_allclose(covariance[1], 4 * covariance[0])
    assert np.isnan(sampled_sums(np.full_like(stats, np.nan), plan)[0]).all()  # a skipped step


def test_a_ratio_of_proportional_sums_has_no_error():
    plan = gk.Bucket([heavy_tailed(100)]).plan(30 * BLOCK, replicates=8)
    y = np.random.default_rng(0).random(plan.segments)
    sums, covariance = sampled_sums(np.stack([y, 3 * y], axis=1), plan)
    ratio, error = sampled_ratio(sums[0], covariance[0])
    assert ratio == pytest.approx(1 / 3)
    assert error < 1e-6
    assert np.isnan(sampled_ratio([1.0, 0.0], np.zeros((2, 2)))).all()


def test_joined_runs_end_where_the_segment_does():
    assert joined(np.array([0, 1, 3]), 3 * BLOCK + 5).tolist() == [[0, 2 * BLOCK], [3 * BLOCK, 5]]
    assert joined(np.empty(0, dtype=np.int64), 0).tolist() == []


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda b: b.plan(100, replicates=-1), "replicates is -1"),
        (lambda b: b.plan(5000, certain=[]), "certain has 0 lists"),
        (
            lambda b: b.plan(5000, certain=[np.array([1, 1])]),
            r"certain\[0\] is 2 blocks from 1 to 1; it must be at most",
        ),
        (lambda b: b.plan(5000, certain=[np.array([400])]), r"certain\[0\] is 1 blocks from 400 to 400"),
        (lambda b: b.plan(5000, certain=[np.arange(50)]), r"certain\[0\] is 50 blocks"),
        (lambda b: b.heavy_blocks([torch.empty(3)], 5000), "tensors must be the 1 segments"),
        (lambda b: b.heavy_blocks([torch.empty(3)], 0), "sample is 0"),
        (lambda b: sampled_sums(np.zeros((3, 6)), b.plan(5000)), r"stats has shape \(3, 6\)"),
    ],
)
def test_bad_input_is_named(call, text):
    with pytest.raises(ValueError, match=text):
        call(gk.Bucket([torch.empty(100 * BLOCK)]))
