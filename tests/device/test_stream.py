"""What is known of CUDA tensors in a stream, and the address tables that kernels are given of loose ones."""

from __future__ import annotations

import operator

import pytest
import torch
from device.problem import Problem, same_bits
from torch import Tensor

import grgauge_kernels as gk

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32)
SHAPES = ((), (0,), (1,), (5,), (2, 3), (3, 1, 2), (2, 3, 4, 5))


def tensors() -> list[Tensor]:
    """One of each shape and dtype, other memory orders, a view with an offset, a parameter."""
    made = [torch.zeros(shape, dtype=dtype, device="cuda") for shape in SHAPES for dtype in DTYPES]
    turned = (
        torch.zeros(4, 3, device="cuda").t(),
        torch.zeros(2, 3, 4, 4, device="cuda").contiguous(memory_format=torch.channels_last),
    )
    return [*made, *turned, torch.zeros(9, device="cuda")[4:], torch.nn.Parameter(torch.zeros(3, device="cuda"))]


def test_addresses_and_sizes_are_torchs(lookup: str) -> None:
    ts = tensors()
    seen = gk.Stream(ts)
    assert all(map(operator.is_, seen, ts))
    assert list(seen.addresses) == [t.data_ptr() for t in ts]
    assert list(seen.sizes) == [t.numel() for t in ts]
    assert not seen.in_order


def test_another_device_is_not_in_order_and_does_not_stand(lookup: str) -> None:
    own = [torch.zeros(3, device="cuda"), torch.zeros(4, device="cuda")]
    assert gk.Stream(own).in_order
    assert not gk.Stream([own[0], torch.zeros(4)]).in_order
    seen = gk.Stream(own)
    assert seen.stands()
    assert not seen.stands([own[0], torch.zeros(4)])


@pytest.mark.parametrize(
    "moved", [lambda: torch.zeros(6), lambda: torch.zeros(6).half(), lambda: torch.zeros(5)],
    ids=["elsewhere", "dtype", "size"],
)  # fmt: skip
def test_what_has_other_memory_does_not_stand(lookup: str, moved) -> None:  # type: ignore[no-untyped-def]
    own = torch.zeros(6, device="cuda")
    seen = gk.Stream([own])
    own.add_(1)
    assert seen.stands()
    own.data = moved().cuda()
    assert not seen.stands()


def test_asking_does_not_wait_for_the_device(lookup: str) -> None:
    own = [torch.zeros(3, device="cuda") for _ in range(100)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert gk.Stream(own).stands()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("moment", [torch.float32, torch.bfloat16], ids=str)
def test_loose_tensors_are_updated_where_they_are_now(lookup: str, kernel: str, moment: torch.dtype) -> None:
    """Lists and streams alike; after tensors have moved, the new ones are, and the old ones stay as they are."""

    def made() -> tuple[Problem, list[list[Tensor]]]:
        p = Problem()
        streams = [p.params, p.grads, p.exp_avgs, p.exp_avg_sqs]
        return p, [*streams[:2], *([t.to(moment) for t in tensors] for tensors in streams[2:])]

    options = {"step": 2, "lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "backend": kernel}
    (p, listed), (_, streamed) = made(), made()
    first = gk.adamw_(*listed, p.plan, **options)
    assert torch.equal(gk.adamw_(*map(gk.Stream, streamed), p.plan, **options), first)
    assert all(map(same_bits, listed, streamed))

    elsewhere = [[t.clone() for t in tensors] for tensors in streamed]
    before = [[t.clone() for t in tensors] for tensors in streamed]
    again = gk.adamw_(*listed, p.plan, **options)
    assert torch.equal(gk.adamw_(*map(gk.Stream, elsewhere), p.plan, **options), again)
    assert all(map(same_bits, listed, elsewhere))
    assert all(map(same_bits, streamed, before))
