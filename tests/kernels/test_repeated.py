"""An update of kept streams is prepared once, and whatever is changed between two of them takes effect."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import grgauge_kernels as gk

SHAPES = [(7,), (3, 5), (4096,), (2, 2300)]
USUAL = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
CHANGES = {
    "lr": [0.01, 1],
    "betas": [(0.8, 0.99), (0.9, 0.9)],
    "eps": [1e-3],
    "weight_decay": [0.0],
    "maximize": [True],
    "sums": [False],
    "zero_grad": [True],
    "clip": [torch.tensor(0.5)],
    "inv_scale": [torch.tensor(0.25)],
    "found_inf": [torch.tensor(1.0), torch.tensor(0.0)],
    "lr of a tensor": [torch.tensor(0.02)],
    "step": [7],
    "backend": ["reference"],
}
changes = st.sampled_from([(name, value) for name, values in CHANGES.items() for value in values])
others = st.sets(st.sampled_from(["bfloat16", "kept"]))


def streams(seed):
    generator = torch.Generator().manual_seed(seed)
    values = [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(3)]
    return [values[0], values[1], [v.square() for v in values[2]]]


@given(st.lists(st.tuples(st.lists(changes, max_size=2), others), min_size=2, max_size=8))
def test_each_call_is_that_of_streams_that_are_not_kept(calls):
    kept, new = streams(0), streams(0)
    plan = gk.Bucket(kept[0]).plan()
    kept = [gk.Stream(tensors) for tensors in kept]
    count = torch.zeros(len(SHAPES))
    for i, (changed, are) in enumerate(calls):
        options = {**USUAL, "step": count, **{name.split()[0]: value for name, value in changed}}
        dtype = torch.bfloat16 if "bfloat16" in are else torch.float32
        grads = [torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(dtype) for shape in SHAPES]
        given_as = gk.Stream if "kept" in are else list
        count += 1
        mine, theirs = [g.clone() for g in grads], [g.clone() for g in grads]
        stats = gk.adamw_(kept[0], given_as(mine), *kept[1:], plan, **options)
        expected = gk.adamw_(new[0], theirs, *new[1:], gk.Bucket(new[0]).plan(), **options)
        torch.testing.assert_close(stats, expected, rtol=0.0, atol=0.0, equal_nan=True)
        for own, other in zip([mine, *kept], [theirs, *new], strict=True):
            assert all(map(torch.equal, own, other))


def test_gradients_are_not_kept_after_the_call():
    kept = [gk.Stream(tensors) for tensors in streams(1)]
    plan, count = gk.Bucket(kept[0]).plan(), torch.ones(())
    grads = gk.Stream([torch.ones(shape) for shape in SHAPES])
    for _ in range(2):
        gk.adamw_(kept[0], grads, *kept[1:], plan, step=count, **USUAL)
    gone = weakref.ref(grads[0])
    del grads
    gc.collect()
    assert gone() is None


def test_a_step_count_that_has_moved_is_read_where_it_is():
    kept, new = [gk.Stream(tensors) for tensors in streams(2)], streams(2)
    plan, count = gk.Bucket(kept[0]).plan(), torch.ones(())
    for step in (1.0, 5.0):
        count.data = torch.tensor(step)
        grads = [torch.ones(shape) for shape in SHAPES]
        gk.adamw_(kept[0], grads, *kept[1:], plan, step=count, **USUAL)
        gk.adamw_(new[0], grads, *new[1:], plan, step=torch.tensor(step), **USUAL)
    assert all(map(torch.equal, kept[0], new[0]))


def test_a_second_call_with_the_wrong_gradients_is_refused_before_anything_changes():
    kept = [gk.Stream(tensors) for tensors in streams(3)]
    plan, count = gk.Bucket(kept[0]).plan(), torch.ones(())
    grads = [torch.ones(shape) for shape in SHAPES]
    gk.adamw_(kept[0], grads, *kept[1:], plan, step=count, **USUAL)
    before = [p.clone() for p in kept[0]]
    for wrong in (grads[:-1], [*grads[:-1], torch.ones(3)], [g.double() for g in grads]):
        with pytest.raises((ValueError, TypeError), match="grads"):
            gk.adamw_(kept[0], wrong, *kept[1:], plan, step=count, **USUAL)
    assert all(map(torch.equal, kept[0], before))
