"""PyTorch's own data base of optimizer options, and of errors, for AdamW."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

from grgauge import AdamW

(INFO,) = [info for info in optim_db if info.optim_cls is torch.optim.AdamW]
DTYPES = [torch.float32, torch.float64]
# Those for a GPU, too: on the CPU torch takes them as well, but for capturable, which it refuses in its step.
DEVICES = ["cpu", "cuda"]


def inputs(dtype):
    """(description, keywords) of every entry, and with each way of running a step that torch has here."""
    for device in DEVICES:
        for entry in INFO.optim_inputs_func(device=device, dtype=dtype):
            for way in ({}, {"foreach": True}, {"fused": True}, {"differentiable": True}):
                kwargs = {**entry.kwargs, **way}
                if device == "cuda":
                    kwargs.pop("capturable", None)
                yield pytest.param(dtype, kwargs, id=f"{dtype}-{device}-{entry.desc}-{'-'.join(way) or 'plain'}")


def trained(make, dtype, kwargs):
    """torch's example, a linear layer and what it makes of one batch, for twelve steps; saved and loaded in between."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)
    x = torch.linspace(-1, 1, 50, dtype=dtype).reshape(5, 10)
    optimizer = make(net.parameters(), **copy.deepcopy(kwargs))

    def closure():
        optimizer.zero_grad()
        loss = net(x).square().sum()
        loss.backward()
        return loss

    losses = []
    for t in range(12):
        losses.append(optimizer.step(closure).item())
        if t == 5:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    state = [optimizer.state[p] for p in net.parameters()]
    return [*net.parameters()], [dict(own) for own in state], losses


@pytest.mark.parametrize("flat", [False, True], ids=["loose", "flat"])
@pytest.mark.parametrize(("dtype", "kwargs"), [entry for dtype in DTYPES for entry in inputs(dtype)])
def test_every_option_trains_as_torchs_does(dtype, kwargs, flat):
    try:
        theirs = trained(torch.optim.AdamW, dtype, kwargs)
    except Exception as error:
        with pytest.raises(type(error)):
            trained(lambda p, **options: AdamW(p, flat=flat, **options), dtype, kwargs)
        return
    ours = trained(lambda p, **options: AdamW(p, flat=flat, **options), dtype, kwargs)
    for own, other in zip(ours[0], theirs[0], strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)
    for own, other in zip(ours[1], theirs[1], strict=True):
        assert own.keys() == other.keys()
        for name, value in other.items():
            torch.testing.assert_close(own[name].double(), value.double(), rtol=1e-4, atol=1e-7)
    assert ours[2] == pytest.approx(theirs[2], rel=1e-5)


@pytest.mark.parametrize(
    "entry", INFO.optim_error_inputs_func(device="cpu", dtype=torch.float32), ids=lambda entry: entry.error_regex
)
def test_every_error_is_torchs(entry):
    given, kwargs = entry.optimizer_error_input.params, entry.optimizer_error_input.kwargs
    params = given if given is not None else [nn.Parameter(torch.randn(2, 3))]
    if entry.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR:
        with pytest.raises(entry.error_type, match=entry.error_regex):
            AdamW(params, **kwargs)
    else:
        optimizer = AdamW(params, **kwargs)
        with pytest.raises(entry.error_type, match=entry.error_regex):
            optimizer.step()


def test_the_signature_begins_as_torchs_does():
    ours, theirs = (list(inspect.signature(c).parameters.values()) for c in (AdamW, torch.optim.AdamW))
    assert [(p.name, p.default, p.kind) for p in ours[: len(theirs)]] == [(p.name, p.default, p.kind) for p in theirs]
