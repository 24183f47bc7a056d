"""Which elements a sampled gauge looks at, and how far its sums may be off: plain numbers, no torch.

    choose         the choice: whole contiguous blocks, stratified by segment and within it, small segments whole
    sampled_sums   sums over the visited elements -> sums over everything, with their covariance
    sampled_ratio  two sums -> their ratio, with its standard error

A choice is a function of sizes, budget and seed alone (and of the blocks a caller is certain about), so it needs no
generator state, is the same on every rank and after a resume, and stays fixed for as long as the EMA lives. Its cost is
proportional to the budget, whatever the model's size: a segment of N blocks of which k are wanted is cut into k equal
intervals, at a random place to begin, and a hash takes one block from each. So every block is taken with probability
k / N, the chosen blocks are spread evenly, and nothing of length N is ever made.

Gradients of embeddings have rows a thousand times heavier than the rest, and a sample cannot know that it has missed
them. So blocks that were heavy once (`Bucket.heavy_blocks`) can be taken for certain, as a stratum of their own.
Estimates stay unbiased even if these blocks become light later. On a word model, from its first step's gradients, that
divides the error of GR_T by 10 to 17 and of GR_S by 14 to 30 (bench/results/sampling.png).

Standard errors come from random groups (Wolter, "Introduction to Variance Estimation", 2nd ed., ch. 2): the blocks of
a segment are dealt into replicates, each of which is a small sample of its own, and their spread is the error. A kernel
returns sums for each segment of its plan anyway; if a plan has a segment for each (tensor, replicate), the error costs
no extra pass and no extra kernel. See `Bucket.plan(replicates=...)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

BLOCK = 256
"""Elements in one block: 1 KiB of fp32, 512 B of bf16, below which memory sectors are wasted.

By bench/sampling.py (geometric mean over two models, both gauges and budgets of 1/4 to 1/64 of the parameters), blocks
of 1024 elements have 1.7 times the error and cost 0.54 times the time an element, on a CPU; 4096: 2.1 times and 0.35
times; 128: 0.73 times and 2.6 times. As the error falls with the 0.7th power of the budget, 256 is the best for a given
time, and for a given memory the best that is wide enough for bf16.
"""

WHOLE = 8 * BLOCK
"""Segments up to this many elements are taken whole: sampling them saves nothing and costs their accuracy."""

WHOLE_SHARE = 0.25
"""Share of the budget for taking larger segments whole as well, the smallest of them first.

A small layer often holds most of a gradient: in bench/sampling.py's convolutional network the head does, with 0.2 % of
the parameters. At a quarter of them that takes the error of GR_T from 17 % to 0.04 %.
"""

REPLICATES = 512
"""About how many replicates there are in all. Segments get them in proportion to what is visited, within the bounds
below: so the error of one segment that holds most of the sample is known well, and a thousand segments do not need
thousands."""

FEWEST, MOST = 4, 32
"""Replicates of one sampled segment. With FEWEST the spread has three degrees of freedom, and those of many segments
add up. A segment gets at least as many blocks; one block where no errors are wanted."""

CERTAIN_SHARE = 0.5
"""The largest share of a sampled segment's blocks that is taken for certain."""

_MASK = 2**64 - 1


class Replicated(Protocol):
    """What the estimators must know about a plan.

    tensor   int64 [segments], ascending from 0: the tensor that a segment of the plan is (part) of
    stratum  int64 [segments], ascending from 0: segments of one stratum are samples of the same blocks of a tensor
    visited  int64 [segments], visited elements
    scale    float64 [segments], elements of the stratum / visited elements of it; 0 where nothing is visited
    """

    @property
    def tensor(self) -> Ints: ...
    @property
    def stratum(self) -> Ints: ...
    @property
    def visited(self) -> Ints: ...
    @property
    def scale(self) -> Floats: ...


class Choice(NamedTuple):
    """Blocks to visit, in parts; `tensor` and `stratum` of each are as in `Replicated`.

    population  int64 [parts], elements of the part's stratum, visited or not
    blocks      of each part the block numbers in its tensor, int64 [any], ascending
    """

    tensor: Ints
    stratum: Ints
    population: Ints
    blocks: list[Ints]


def block_hash(seed: int, segment: int, blocks: int) -> npt.NDArray[np.uint64]:
    """The first `blocks` numbers of the SplitMix64 generator that (seed, segment) starts, uint64 [blocks].

    (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.) Both are taken modulo 2^64.
    """
    with np.errstate(over="ignore"):
        start = _mixed(_mixed(np.array([seed & _MASK], np.uint64)) ^ np.uint64(segment & _MASK))
        return _mixed(start + np.arange(1, blocks + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def kept_blocks(
    sizes: Sequence[int] | Ints,
    sample: int,
    block: int = BLOCK,
    whole_share: float = WHOLE_SHARE,
    fewest: int = FEWEST,
) -> Ints:
    """How many blocks of each segment a budget of `sample` elements buys, int64 [segments].

    Segments of up to 8 blocks are taken whole, and so are larger ones, the smallest first, for `whole_share` of the
    budget. The rest of it goes to the others in proportion to their size, at least `fewest` blocks each. Rounding and
    that minimum may exceed the budget by `fewest` blocks for each segment, small segments by their size.
    """
    numel = np.asarray(sizes, dtype=np.int64)
    blocks = -(-numel // block)
    ascending = np.sort(numel)
    # Segments of one size are taken together or not at all: their order must not matter.
    cost = np.cumsum(ascending)[np.searchsorted(ascending, ascending, side="right") - 1]
    largest = ascending[cost <= whole_share * sample].max(initial=WHOLE // BLOCK * block)
    whole = numel <= largest
    left, others = max(0, sample - int(numel[whole].sum())), int(numel[~whole].sum())
    if others <= left:
        return blocks
    kept = np.rint(left / others * numel / block).astype(np.int64)  # of elements: a segment's last block may be short
    return np.where(whole, blocks, np.clip(kept, fewest, blocks))


def chosen_blocks(seed: int, segment: int, blocks: int, kept: int) -> Ints:
    """`kept` different ones of `blocks` block numbers, ascending; each is taken with probability kept / blocks.

    One from each of `kept` intervals, whose lengths differ by at most one. The first interval begins at a random block
    and the last wraps around, so all blocks are equally likely.
    """
    hashes = block_hash(seed, segment, kept + 1)
    edges = np.arange(kept + 1, dtype=np.int64) * blocks // kept
    within = (hashes[:-1] % np.diff(edges).astype(np.uint64)).astype(np.int64)
    return np.sort((edges[:-1] + within + int(hashes[-1] % np.uint64(blocks))) % blocks)


def dealt(seed: int, segment: int, kept: int, replicates: int) -> Ints:
    """The replicate of each of `kept` blocks in ascending order, int64 [kept].

    Counted from the first, each run of `replicates` blocks goes to as many replicates, one block to each, so that every
    replicate is spread over the segment as the sample is. Each run is dealt in a random order of its own: a fixed order
    could coincide with a period in the tensor's layout.
    """
    hashes = block_hash(seed, -1 - segment, -(-kept // replicates) * replicates)
    return np.argsort(hashes.reshape(-1, replicates), axis=1).ravel()[:kept]


def choose(
    sizes: Sequence[int] | Ints,
    sample: int,
    seed: int,
    replicates: int = 0,
    certain: Sequence[Ints] | None = None,
    *,
    block: int = BLOCK,
    whole_share: float = WHOLE_SHARE,
) -> Choice:
    """The blocks to visit.

    sizes       elements of each segment
    sample      budget in elements for all segments, see `kept_blocks`
    replicates  about how many to make in all; 0: one for each segment. A segment that is taken whole has one: no error
    certain     of each segment ascending block numbers, at most `most_certain` of them, to be taken in any case. They
                are a part and a stratum of their own, before the replicates

    Memory and time are proportional to the number of blocks chosen. Raises ValueError if `certain` names other segments
    or more blocks.
    """
    numel = np.asarray(sizes, dtype=np.int64)
    fewest = FEWEST if replicates or certain is not None else 1
    blocks, kept = -(-numel // block), kept_blocks(numel, sample, block, whole_share, fewest)
    most = most_certain(blocks, kept)
    if certain is not None and len(certain) != len(numel):
        raise ValueError(
            f"certain has {len(certain)} lists of blocks; it must have one for each of {len(numel)} segments"
        )
    part = kept < blocks
    shares = replicates * kept / max(1, int(kept[part].sum()))
    counts = np.where(part & (replicates > 0), np.rint(shares).clip(FEWEST, MOST), 1).astype(np.int64)
    found: list[tuple[int, int, int, Ints]] = []
    strata = 0
    for i, (n, k, r) in enumerate(zip(blocks.tolist(), kept.tolist(), counts.tolist(), strict=True)):
        size, sure = int(numel[i]), np.empty(0, dtype=np.int64) if certain is None else certain[i]
        if len(sure):
            if len(sure) > most[i] or sure[0] < 0 or sure[-1] >= n or (np.diff(sure) < 1).any():
                raise ValueError(
                    f"certain[{i}] is {len(sure)} blocks from {sure.min()} to {sure.max()}; it must be at most "
                    f"{most[i]} different ones from 0 to {n - 1}, ascending"
                )
            inside = min(block * len(sure), block * len(sure) + size - block * (int(sure[-1]) + 1))
            found.append((i, strata, inside, sure))
            strata, size = strata + 1, size - inside
        if k == n:
            parts = [np.arange(n, dtype=np.int64)]
        else:
            taken = chosen_blocks(seed, i, n - len(sure), k - len(sure))
            taken += np.searchsorted(sure - np.arange(len(sure)), taken, side="right")  # skips the certain blocks
            replicate = dealt(seed, i, len(taken), min(r, len(taken)))
            order = np.argsort(replicate, kind="stable")
            parts = np.split(taken[order], np.cumsum(np.bincount(replicate))[:-1])
        found += [(i, strata, size, part) for part in parts]
        strata += 1
    tensor, stratum, population = np.array([part[:3] for part in found], dtype=np.int64).reshape(-1, 3).T
    return Choice(tensor, stratum, population, [part[3] for part in found])


def most_certain(blocks: Ints, kept: Ints) -> Ints:
    """How many blocks of each segment may be taken for certain, int64 [segments]; FEWEST are left to chance."""
    few = np.minimum((CERTAIN_SHARE * kept).astype(np.int64), kept - FEWEST)
    return np.where(kept < blocks, few.clip(0), 0)


def joined(blocks: Ints, numel: int) -> Ints:
    """Ascending block numbers -> runs int64 [runs, 2]: (offset in the segment, length), neighbouring blocks joined."""
    starts = np.flatnonzero(np.diff(blocks, prepend=-2) != 1)
    ends = np.append(starts[1:], len(blocks)) if len(starts) else starts
    begin = blocks[starts] * BLOCK
    end = np.minimum((blocks[ends - 1] + 1) * BLOCK, numel)
    return np.stack([begin, end - begin], axis=1)


def sampled_runs(sizes: Sequence[int], sample: int, seed: int) -> list[Ints]:
    """For each segment the sampled runs as int64 [runs, 2]: (offset in the segment, length)."""
    blocks = choose(sizes, sample, seed).blocks
    return [joined(taken, numel) for taken, numel in zip(blocks, sizes, strict=True)]


def sampled_sums(stats: npt.ArrayLike, plan: Replicated) -> tuple[Floats, Floats]:
    """Sums over the visited elements -> estimates of the sums over each whole tensor, and their covariance.

    stats   float [..., segments, k]: k sums over each segment of the plan, as from `measure_`, or anything linear in
            such (an EMA of them over steps)

    Returns (sums [..., tensors, k], covariance [..., tensors, k, k]). Tensors are sampled independently: for the sums
    over all of them, add up both. The square roots of a covariance's diagonal are the standard errors. A tensor that is
    visited whole has covariance 0; one that is sampled without replicates has nan: its error is not known.

    The estimate is Horvitz and Thompson's, with the number of visited elements in place of its expectation (Hajek): the
    two differ by a segment's last, shorter block. In a stratum of N elements and R replicates, with y_r the sums over
    the v_r elements of replicate r, v = sum v_r and d_r = y_r - v_r / v sum y_r, the covariance is

        (N / v)^2 (1 - v / N) v / (R - 1) sum_r d_r d_r^T / v_r

    unbiased if blocks are exchangeable (Wolter, Eq. 2.4.3, for equal v_r), and too large rather than too small if
    neighbouring blocks resemble each other, since an evenly spread sample gains from that. No formula knows what the
    sample has not seen: if half of a sum sits in one of a thousand blocks, most samples miss it and report an error
    that is too small. In bench/sampling.py, at budgets of 1/4 to 1/64, intervals of 90 % hold GR_T in 71 to 100 % of
    samples, and GR_S in 74 to 100 %; on the word model without certain blocks in 39 to 88 % and 27 to 47 %.

    Raises ValueError unless stats has a row for each segment.
    """
    y = np.asarray(stats, dtype=np.float64)
    if y.ndim < 2 or y.shape[-2] != len(plan.tensor):
        raise ValueError(f"stats has shape {y.shape}; it must be [..., {len(plan.tensor)} segments, k]")
    first = np.flatnonzero(np.diff(plan.stratum, prepend=-1))
    count = np.diff(first, append=len(plan.stratum))
    scale = plan.scale[first]
    v = np.maximum(plan.visited, 1).astype(np.float64)
    total_v, total_y = np.add.reduceat(v, first), np.add.reduceat(y, first, axis=-2)
    d = y - v[:, None] * (total_y / total_v[:, None])[..., plan.stratum, :]
    spread = np.add.reduceat(d[..., :, None] * d[..., None, :] / v[:, None, None], first, axis=-3)
    factor = scale * (scale - 1.0) * total_v / np.maximum(count - 1, 1)
    factor = np.where(scale <= 1.0, 0.0, np.where(count > 1, factor, np.nan))
    strata = np.flatnonzero(np.diff(plan.tensor[first], prepend=-1))
    sums = np.add.reduceat(total_y * scale[:, None], strata, axis=-2)
    return sums, np.add.reduceat(spread * factor[:, None, None], strata, axis=-3)


def sampled_ratio(sums: npt.ArrayLike, covariance: npt.ArrayLike) -> tuple[Floats, Floats]:
    """Two sums [..., 2] and their covariance [..., 2, 2] -> (sums[0] / sums[1], its standard error), each [...].

    By the delta method: the variance of (x - ratio y) / y. The error is far smaller than that of either sum, as blocks
    with much of one have much of the other. nan where the second sum is 0.
    """
    x, c = np.asarray(sums, dtype=np.float64), np.asarray(covariance, dtype=np.float64)
    below = np.where(x[..., 1] == 0.0, np.nan, x[..., 1])
    ratio = x[..., 0] / below
    variance = c[..., 0, 0] - 2.0 * ratio * c[..., 0, 1] + ratio**2 * c[..., 1, 1]
    return ratio, np.sqrt(np.maximum(variance, 0.0)) / np.abs(below)


def _mixed(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finalizer: every bit of x changes each bit of the result with probability 1/2."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
