"""What a step is refused for leaves every parameter and state as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from optim.stepping import FLAT, advance, parameters, two_dtypes
from torch import nn

from grgauge import AdamW
from grgauge_kernels.backends import native


@FLAT
def test_sparse_gradients_are_refused_before_anything_changes(flat):
    net = nn.Sequential(nn.Linear(3, 4), nn.Embedding(5, 3, sparse=True))
    optimizer = AdamW(net.parameters(), flat=flat)
    net[0](net[1](torch.tensor([1, 2]))).sum().backward()
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert all(map(torch.equal, net.parameters(), before))


def test_moments_of_another_shape_are_refused_before_anything_changes():
    params = parameters()
    optimizer = AdamW(params)
    advance(optimizer, params, 2)
    before = [p.detach().clone() for p in params]
    optimizer.state[params[0]]["exp_avg"] = torch.zeros(3)
    with pytest.raises(
        ValueError, match=r"state\[p\]\['exp_avg'\] has shape \(3,\) for a parameter of shape \(64, 33\)"
    ):
        optimizer.step()
    assert all(map(torch.equal, params, before))
    assert float(optimizer.state[params[1]]["step"]) == 2.0


@FLAT
@pytest.mark.parametrize("bucket", [0, 1])
def test_out_of_memory_for_any_bucket_leaves_all_of_them_as_they_were(flat, bucket, monkeypatch):
    """Memory for all buckets is taken before the first of them changes."""
    params = parameters()
    optimizer = AdamW([{"params": params[:1]}, {"params": params[1:], "lr": 1e-4}], flat=flat)
    advance(optimizer, params, 2)
    before = copy.deepcopy(optimizer.state_dict()["state"]), [p.detach().clone() for p in params]
    prepare, calls = native.Pass.from_buffer_copy, []

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) > bucket:
            raise torch.OutOfMemoryError("out of memory")
        return prepare(*args, **kwargs)

    monkeypatch.setattr(native.Pass, "from_buffer_copy", fail)  # it comes where memory for the sums is taken
    with pytest.raises(torch.OutOfMemoryError, match="adamw_: out of memory"):
        optimizer.step()
    monkeypatch.undo()
    assert all(map(torch.equal, params, before[1]))
    for i, kept in before[0].items():
        assert all(torch.equal(value, optimizer.state_dict()["state"][i][key]) for key, value in kept.items())


REFUSED = {
    "betas": lambda group: group.update(betas=(1.0, 0.999)),
    "lr of integers": lambda group: group.update(lr=torch.tensor(1)),
    "another size": lambda group: setattr(group["params"][0], "data", torch.zeros(3, dtype=torch.bfloat16)),
    "no dense gradient": lambda group: setattr(group["params"][1], "grad", torch.zeros(33).bfloat16().to_sparse()),
}


@pytest.mark.parametrize("spoil", REFUSED.values(), ids=REFUSED.keys())
def test_what_a_later_group_is_refused_for_leaves_all_groups_as_they_were(spoil):
    params, groups = two_dtypes()
    optimizer = AdamW(groups)
    seen = []
    advance(optimizer, params, 2)
    optimizer.observe(seen.append)
    states = [{name: value.clone() for name, value in optimizer.state[p].items()} for p in params]
    values = [p.detach().clone() for p in params]
    spoil(optimizer.param_groups[1])
    with pytest.raises((ValueError, RuntimeError)):
        optimizer.step()
    assert all(map(torch.equal, params[:6], values))
    for p, state in zip(params, states, strict=True):
        assert all(torch.equal(value, optimizer.state[p][name]) for name, value in state.items())
    assert {float(s["step"]) for s in optimizer.state.values()} == {2.0}
    assert seen == []
