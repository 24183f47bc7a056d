"""Segments, chunks and plans; which elements a sample takes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import grgauge_kernels as gk
from grgauge_kernels import CHUNK
from grgauge_kernels.sampling import BLOCK, WHOLE, sampled_runs

SIZES = st.lists(st.integers(0, 5 * CHUNK), min_size=1, max_size=8)


@given(sizes=SIZES, data=st.data())
def test_a_plan_visits_each_element_of_each_segment_once(sizes, data):
    skip = data.draw(st.sets(st.integers(0, len(sizes) - 1)))
    plan = gk.Bucket([torch.empty(n) for n in sizes]).plan(skip=skip)
    at = dict.fromkeys(range(len(sizes)), 0)
    state = 0
    for segment, offset, length, state_offset in plan.rows.tolist():
        assert 0 < length <= CHUNK
        assert offset == at[segment]
        assert state_offset == state
        at[segment] += length
        state += length
    assert [at[i] for i in range(len(sizes))] == [0 if i in skip else n for i, n in enumerate(sizes)]
    assert plan.numel == state
    assert plan.visited.tolist() == [at[i] for i in range(len(sizes))]
    assert plan.scale.tolist() == [0.0 if i in skip or not n else 1.0 for i, n in enumerate(sizes)]


@given(sizes=SIZES, sample=st.none() | st.integers(1, 6 * CHUNK), replicates=st.sampled_from([0, 16]))
def test_aligned_states_lie_apart_and_change_nothing_else(sizes, sample, replicates):
    bucket = gk.Bucket([torch.empty(n) for n in sizes])
    packed = bucket.plan(sample, replicates=replicates)
    plan = bucket.plan(sample, replicates=replicates, align=8)
    assert torch.equal(plan.rows[:, :3], packed.rows[:, :3])
    end = 0
    for _, _, length, state in plan.rows.tolist():
        assert state % 8 == 0
        assert end <= state < end + 8
        end = state + length
    assert plan.states == end
    assert (plan.numel, packed.states) == (packed.numel, packed.numel)
    views = plan.packed(torch.arange(plan.states))
    assert torch.cat(views).tolist() == [i for *_, n, s in plan.rows.tolist() for i in range(s, s + n)]


def test_align_must_be_positive():
    with pytest.raises(ValueError, match="align is 0"):
        gk.Bucket([torch.empty(10)]).plan(align=0)


@given(sizes=SIZES, sample=st.integers(1, 6 * CHUNK), seed=st.integers(0, 2**64 - 1))
def test_a_sample_is_stratified_blocks_without_overlap(sizes, sample, seed):
    plan = gk.Bucket([torch.empty(n) for n in sizes]).plan(sample=sample, seed=seed)
    for i, n in enumerate(sizes):
        rows = [row for row in plan.rows.tolist() if row[0] == i]
        end = 0
        for _, offset, length, _ in rows:
            assert offset >= end  # in order, no overlap
            assert offset % BLOCK == 0
            end = offset + length
        assert end <= n
        assert (plan.visited[i] > 0) == (n > 0)
        if n <= WHOLE:
            assert plan.visited[i] == n
    # Every segment has a block at least, and is rounded to whole blocks.
    assert plan.numel <= sample + sum(min(n, WHOLE) + BLOCK for n in sizes)


def test_the_choice_is_a_function_of_seed_and_place_alone():
    sizes = [200_000, 5, 90_000]
    first, again, other = (sampled_runs(sizes, 60_000, seed) for seed in (7, 7, 8))
    assert all(map(np.array_equal, first, again))
    assert not all(map(np.array_equal, first, other))
    # A segment's blocks do not hang on what its neighbours hold, given the same share.
    assert np.array_equal(
        sampled_runs([200_000, 200_000], 80_000, 7)[0], sampled_runs([200_000, 200_000], 80_000, 7)[0]
    )


def test_every_block_is_as_likely_as_any_other():
    """Inclusion counts over seeds are binomial: none further than 5 standard deviations from its mean."""
    blocks, seeds, share = 100, 2000, 0.25
    counts = np.zeros(blocks)
    for seed in range(seeds):
        for begin, length in sampled_runs([blocks * BLOCK], int(share * blocks * BLOCK), seed)[0]:
            counts[begin // BLOCK : (begin + length) // BLOCK] += 1
    assert counts.sum() == share * blocks * seeds
    assert (np.abs(counts - share * seeds) < 5 * np.sqrt(seeds * share * (1 - share))).all()


def test_scaled_sums_of_samples_are_unbiased():
    g = torch.randn(50 * BLOCK).cumsum(0)  # neighbours alike, as the worst case for blocks
    bucket = gk.Bucket([g])
    truth = float(g.double().square().sum())
    estimates = []
    for seed in range(400):
        plan = bucket.plan(sample=10 * BLOCK, seed=seed)
        estimates.append(float(gk.measure_([g], plan)[0, 0]) * plan.scale[0])
    error = np.std(estimates) / np.sqrt(len(estimates))
    assert abs(np.mean(estimates) - truth) < 4 * error
    assert error > 0


def test_a_sample_as_large_as_the_bucket_is_all_of_it():
    bucket = gk.Bucket([torch.empty(100_000)])
    assert bucket.plan(sample=100_000).numel == 100_000
    assert bucket.plan(sample=99_999).numel <= 100_000


@pytest.mark.parametrize("sample", [0, -5])
def test_sample_must_be_positive(sample):
    with pytest.raises(ValueError, match=f"sample is {sample}"):
        gk.Bucket([torch.empty(10)]).plan(sample=sample)


@pytest.mark.parametrize(
    ("tensors", "error", "text"),
    [
        ([], ValueError, "at least one tensor"),
        ([torch.empty(2, dtype=torch.float64)], TypeError, r"tensors\[0\] has dtype torch.float64"),
        ([torch.empty(2), torch.empty(2, dtype=torch.bfloat16)], ValueError, r"tensors\[1\] has dtype torch.bfloat16"),
        ([torch.empty(2), torch.empty(2, device="meta")], ValueError, r"tensors\[1\] is on meta"),
        ([torch.eye(3).to_sparse()], ValueError, "must be dense"),
        ([torch.empty(4, 4)[:, ::2]], ValueError, "with gaps"),
        ([torch.empty(1, 4).expand(3, 4)], ValueError, "with gaps"),
    ],
)
def test_a_bucket_refuses_what_a_kernel_cannot_walk(tensors, error, text):
    with pytest.raises(error, match=text):
        gk.Bucket(tensors)


def test_views_must_lie_in_their_base():
    base = torch.empty(100)
    assert gk.Bucket([base[10:20], base[40:90]], base=base).offsets == [10, 40]
    with pytest.raises(ValueError, match=r"tensors\[1\] is no view of base"):
        gk.Bucket([base[:5], torch.empty(5)], base=base)
    with pytest.raises(ValueError, match=r"tensors\[0\] is no view of base"):
        gk.Bucket([base[:20]], base=base[10:50])


@pytest.mark.parametrize("skip", [(2,), (-1,), (0, 9)])
def test_skip_must_name_segments(skip):
    with pytest.raises(ValueError, match="skip is"):
        gk.Bucket([torch.empty(2), torch.empty(3)]).plan(skip=skip)


def test_offsets_stay_exact_beyond_32_bits():
    """2.2e9 elements, by their plan alone: tensors of the meta device have no memory."""
    tensors = [torch.empty(n, dtype=torch.bfloat16, device="meta") for n in (2_200_000_000, 5)]
    rows = gk.Bucket(tensors).plan_rows()
    assert rows[-1].tolist() == [1, 0, 5, 2_200_000_000]
    assert rows[-2].tolist() == [0, 2_199_998_464, 1536, 2_199_998_464]
