"""FlatBuckets: gradients as views of one buffer, and the way back. Parameters stay where they are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import grgauge_kernels as gk
from grgauge_kernels.flat import ALIGNMENT


def model(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Embedding(11, 8), nn.Conv1d(5, 7, 3), nn.Linear(6, 8), nn.Linear(8, 11, bias=False))
    net[3].weight = net[0].weight  # tied as users tie: one Parameter, two names
    return net


def loss(net):
    return net(torch.arange(5)[None].expand(3, 5)).square().mean()


def test_values_names_and_ties_stay():
    net = model()
    before = copy.deepcopy(net.state_dict())
    names, ids = [n for n, _ in net.named_parameters()], [id(p) for p in net.parameters()]
    flat = gk.FlatBuckets(net.parameters())
    assert [n for n, _ in net.named_parameters()] == names
    assert [id(p) for p in net.parameters()] == ids
    assert net[3].weight is net[0].weight
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    (bucket,) = flat.buckets
    assert len({p.untyped_storage().data_ptr() for p in net.parameters()}) == len(ids)
    assert all(offset % ALIGNMENT == 0 for offset in bucket.bucket.offsets)


def test_gradients_equal_those_of_the_model_left_alone():
    plain, net = model(), model()
    flat = gk.FlatBuckets(net.parameters())
    for _ in range(2):  # the second backward accumulates in place, into the views
        loss(plain).backward()
        loss(net).backward()
        flat.attach()
    assert flat.intact()
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    total = sum(float(p.grad.double().square().sum()) for p in plain.parameters())
    (bucket,) = flat.buckets
    stats = gk.measure_([bucket.grad], bucket.bucket.plan())
    assert float(stats[:, 0].sum()) == pytest.approx(total, rel=1e-6)


def test_it_undoes_itself():
    net = model()
    loss(net).backward()
    before = [p.grad.clone() for p in net.parameters()]
    with gk.FlatBuckets(net.parameters()) as flat:
        shared = flat.buckets[0].grad
        assert {p.grad.untyped_storage().data_ptr() for p in net.parameters()} == {shared.data_ptr()}
    for p, grad in zip(net.parameters(), before, strict=True):
        assert torch.equal(p.grad, grad)
        assert p.grad.untyped_storage().nbytes() == p.numel() * p.element_size()


def test_what_moves_out_is_noticed_and_taken_back():
    net = model()
    loss(net).backward()
    flat = gk.FlatBuckets(net.parameters())
    assert flat.intact()
    net.zero_grad()
    assert flat.intact()  # there are none
    loss(net).backward()
    assert not flat.intact()
    grads = [p.grad.clone() for p in net.parameters()]
    flat.attach()
    assert flat.intact()
    assert all(map(torch.equal, (p.grad for p in net.parameters()), grads))
    net[2].weight.grad.data = torch.full_like(net[2].weight, 3.0)
    assert not flat.intact()
    flat.attach()
    assert flat.intact()
    assert (net[2].weight.grad == 3.0).all()
    assert float(flat.buckets[0].grad.max()) == 3.0


def test_load_state_dict_is_none_of_its_business():
    net = model()
    flat = gk.FlatBuckets(net.parameters())
    net.load_state_dict(model(seed=9).state_dict())
    assert flat.intact()
    assert all(map(torch.equal, net.state_dict().values(), model(seed=9).state_dict().values()))


def test_a_parameter_without_gradient_stays_without():
    net = model()
    net(torch.arange(5)[None])  # no backward
    flat = gk.FlatBuckets(net.parameters())
    assert all(p.grad is None for p in net.parameters())
    loss(net).backward()
    net[1].bias.grad = None
    flat.attach()
    assert net[1].bias.grad is None
    assert flat.intact()
    (bucket,) = flat.buckets
    assert [bucket.params[i] is net[1].bias for i in bucket.missing] == [True]


def test_zero_grad_keeps_views():
    net = model()
    loss(net).backward()
    flat = gk.FlatBuckets(net.parameters())
    flat.zero_grad()
    assert flat.intact()
    assert all((p.grad == 0).all() for p in net.parameters())


def test_one_buffer_per_dtype_and_frozen_parameters_left_alone():
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    frozen = nn.Parameter(torch.ones(5), requires_grad=False)
    place = frozen.data_ptr()
    flat = gk.FlatBuckets([a, b, frozen])
    assert [bucket.grad.dtype for bucket in flat.buckets] == [torch.float32, torch.bfloat16]
    assert frozen.data_ptr() == place


def test_channels_last_keeps_its_strides():
    p = nn.Parameter(torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last))
    value = p.detach().clone()
    gk.FlatBuckets([p])
    assert p.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(p, value)


def test_a_sparse_gradient_is_refused_before_anything_moves():
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))
    flat = gk.FlatBuckets([a, b])
    a.grad, b.grad = torch.ones(3), torch.eye(2).to_sparse()
    with pytest.raises(RuntimeError, match="parameter 1 is sparse"):
        flat.attach()
    assert (flat.buckets[0].grad == 0).all()
