"""What is known of tensors in a stream: the compiled library's answer against Python's own, and what does not stand."""

from __future__ import annotations

import itertools
import operator

import pytest
import torch
from torch import Tensor

import grgauge_kernels as gk

SHAPES = [(), (0,), (1,), (5,), (2, 3), (1, 3), (3, 1, 2), (2, 0, 4), (2, 3, 4, 5)]


def tensors() -> list[Tensor]:
    """One of each shape, dtype and memory order, views with an offset among them."""
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32)
    plain = [torch.zeros(shape, dtype=dtype) for shape in SHAPES for dtype in dtypes]
    turned = [torch.zeros(3, 4).t(), torch.zeros(4, 3), torch.zeros(2, 3, 4).permute(2, 0, 1), torch.zeros(6)[::2]]
    images = [torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last)]
    return [
        *plain,
        *turned,
        *images,
        torch.zeros(9)[4:],
        torch.nn.Parameter(torch.zeros(3)),
        torch.zeros(3).expand(2, 3),
    ]


def test_addresses_and_sizes_are_torchs(lookup: str) -> None:
    ts = tensors()
    seen = gk.Stream(ts)
    assert all(map(operator.is_, seen, ts))
    assert list(seen.addresses) == [t.data_ptr() for t in ts]
    assert list(seen.sizes) == [t.numel() for t in ts]


def test_in_order_is_all_alike_and_row_major(lookup: str) -> None:
    for one, other in itertools.product(tensors(), repeat=2):
        alike = one.dtype == other.dtype and one.is_contiguous() and other.is_contiguous()
        assert gk.Stream([one, other]).in_order == alike, (one.shape, one.stride(), other.shape, other.stride())
    assert gk.Stream([]).in_order


@pytest.mark.parametrize(
    "moved",
    [
        torch.zeros(4, 6),
        torch.zeros(6, 4).t(),
        torch.zeros(4, 6, dtype=torch.float16),
        torch.zeros(24),
        torch.zeros(4, 3),
        torch.zeros(4, 8)[:, :6],
    ],
    ids=["elsewhere", "transposed", "half", "flat", "smaller", "with gaps"],
)
def test_what_has_other_memory_does_not_stand(lookup: str, moved: Tensor) -> None:
    own = [torch.zeros(2), torch.zeros(4, 6)]
    seen = gk.Stream(own)
    assert seen.stands()
    assert seen.stands(list(own))
    own[1].add_(1)
    assert seen.stands()
    own[1].data = moved
    assert not seen.stands()


@pytest.mark.parametrize(
    "view", [lambda t: t.view(8, 3), lambda t: t.t(), lambda t: t.view(torch.int32), lambda t: t[:3]],
    ids=["shape", "strides", "dtype", "size"],
)  # fmt: skip
def test_the_same_address_is_not_enough(lookup: str, view) -> None:  # type: ignore[no-untyped-def]
    """All but another shape of the same row-major elements, which a kernel does not see, is told apart."""
    own = torch.zeros(4, 6)
    seen = gk.Stream([own])
    other = view(own.detach())
    assert other.data_ptr() == own.data_ptr()
    own.data = other
    assert seen.stands() == (other.is_contiguous() and other.dtype == torch.float32 and other.numel() == 24)


def test_sparse_tensors_have_no_address(lookup: str) -> None:
    with pytest.raises(RuntimeError):
        gk.Stream([torch.zeros(3).to_sparse()])


def test_a_device_that_dlpack_does_not_know(lookup: str) -> None:
    """Python's own answer is taken: a tensor without memory has address 0."""
    seen = gk.Stream([torch.zeros(3, 2, device="meta")])
    assert (list(seen.addresses), list(seen.sizes), seen.in_order) == ([0], [6], True)
    assert seen.stands()


def test_a_kept_stream_that_is_not_row_major_is_compared_with_the_gradients_of_each_call():
    """Kernels go through memory in order: other strides would update other elements."""
    params, exp_avgs, exp_avg_sqs = (gk.Stream([torch.zeros(3, 2).t()]) for _ in range(3))
    plan = gk.Bucket(params).plan()
    options = {"step": 1, "lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    for _ in range(2):
        gk.adamw_(params, [torch.ones(3, 2).t()], exp_avgs, exp_avg_sqs, plan, **options)
        with pytest.raises(ValueError, match=r"has strides .*; they must be equal"):
            gk.adamw_(params, [torch.ones(2, 3)], exp_avgs, exp_avg_sqs, plan, **options)
