"""Which elements a sampled gauge looks at: whole contiguous blocks, stratified by segment.

A block is taken by the rank of its hash within its segment, so the choice needs no generator state, is the same on
every rank and stays fixed for as long as the seed does. Small segments are taken whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

BLOCK = 1024
"""Elements in one block: 2 KiB of bf16, 4 KiB of fp32, far above the 512 B below which sectors are wasted."""

WHOLE = 8 * BLOCK
"""Segments up to this many elements are taken whole: sampling them saves nothing and costs their accuracy."""


def block_hash(seed: int, segment: int, blocks: int) -> npt.NDArray[np.uint64]:
    """SplitMix64 of (seed, segment, block), uint64 [blocks]."""
    with np.errstate(over="ignore"):
        x = np.arange(blocks, dtype=np.uint64)
        x += np.uint64(seed & 0xFFFFFFFFFFFFFFFF) * np.uint64(0xD1342543DE82EF95)
        x += np.uint64(segment) << np.uint64(40)
        x += np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def sampled_runs(sizes: Sequence[int], sample: int, seed: int) -> list[npt.NDArray[np.int64]]:
    """For each segment the sampled runs as int64 [runs, 2]: (offset in the segment, length).

    `sample` is the budget in elements over all segments. Whole segments come out of it first; the others get blocks
    in proportion to their size, at least one each, so the budget may be exceeded by up to one block a segment.
    """
    whole = sum(n for n in sizes if n <= WHOLE)
    rest = sum(sizes) - whole
    share = min(1.0, max(0.0, sample - whole) / rest) if rest else 1.0
    runs = []
    for segment, numel in enumerate(sizes):
        blocks = -(-numel // BLOCK)
        kept = max(1, round(share * blocks))
        if numel <= WHOLE or kept >= blocks:
            runs.append(np.array([(0, numel)] if numel else np.empty((0, 2)), dtype=np.int64))
            continue
        order = np.argsort(block_hash(seed, segment, blocks), kind="stable")
        runs.append(_joined(np.sort(order[:kept]), numel))
    return runs


def _joined(blocks: npt.NDArray[np.int64], numel: int) -> npt.NDArray[np.int64]:
    """Sorted block numbers -> runs, neighbouring blocks joined into one."""
    starts = np.flatnonzero(np.diff(blocks, prepend=-2) != 1)
    ends = np.append(starts[1:], len(blocks))
    begin = blocks[starts] * BLOCK
    end = np.minimum((blocks[ends - 1] + 1) * BLOCK, numel)
    return np.stack([begin, end - begin], axis=1).astype(np.int64)
