"""Scenarios under FSDP2 and HSDP: what only sharded parameters have."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from distributed.training import STEPS, adamw, fsdp, gauged, last, mse, network, on, own_part, sgd, train, weights
from network import batch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict


@on(4)
def hsdp_reduced_over_replicas_last():
    model = fsdp(2, 2)
    optimizer, gauge = gauged(model)
    for t in range(STEPS):
        optimizer.zero_grad()
        for k in range(2):
            model.set_requires_all_reduce(k == 1)
            (mse(model, own_part(t, k, 2)) / 2).backward()
        optimizer.step()
    return last(gauge)


@on(2, 4)
def clipping():
    """Clipping inside our step, and by torch in front of it."""
    results = {}
    shape = () if dist.get_world_size() == 2 else (2, 2)
    for most in (0.3, 1e3):
        ours, theirs = fsdp(*shape), fsdp(*shape)
        inside, outside = adamw(ours.parameters(), max_grad_norm=most), adamw(theirs.parameters())
        norms = []
        for t in range(STEPS):
            for model, optimizer in ((ours, inside), (theirs, outside)):
                optimizer.zero_grad()
                mse(model, own_part(t)).backward()
            norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), most).full_tensor()
            inside.step()
            outside.step()
            norms.append((float(inside.grad_norm), float(norm)))
        results[most] = {"norms": norms, "ours": weights(ours), "theirs": weights(theirs)}
    return results


@on(4)
def replicated_only():
    with pytest.raises(ValueError, match="replicated only") as caught:
        gauged(fsdp(4, 1))
    return str(caught.value)


@on(2)
def refusals():
    messages = {}
    model = fsdp()
    optimizer = adamw(model.parameters(), flat=True)
    mse(model, own_part(0)).backward()
    with pytest.raises(ValueError, match="flat=True needs parameters in one piece") as caught:
        optimizer.step()
    messages["flat"] = str(caught.value)
    for make in (adamw, sgd):
        model = fsdp()
        optimizer, _ = gauged(model, make, attach=False)
        mse(model, own_part(0)).backward()
        with pytest.raises(RuntimeError, match=r"call gauge\.attach\(module\)") as caught:
            optimizer.step()
        messages[make.__name__] = str(caught.value)
    model = fsdp()
    gauged(model)
    for module in (model, *model.layers):
        module.set_gradient_divide_factor(3.0)
    with pytest.raises(RuntimeError, match="GR_S needs gradients reduced by AVG or SUM") as caught:
        mse(model, own_part(0)).backward()
    messages["divide factor"] = str(caught.value)
    return messages


@on(2, 4)
def rounded():
    """Weights and moments rounded stochastically, sharded and whole; every rank sees the whole batch."""
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        for kind in ("whole", "sharded"):
            net = network().to(dtype)
            model = net if kind == "whole" else fsdp(*((2, 2) if dist.get_world_size() == 4 else ()), net=net)
            optimizer = adamw(model.parameters(), state_dtype=torch.bfloat16, stochastic_rounding=True)
            for t in range(STEPS):
                optimizer.zero_grad()
                mse(model, [rows.to(dtype) for rows in batch(t, 0, 1)]).backward()
                optimizer.step()
            results[dtype, kind] = weights(model)
    return results


@on(2)
def checkpointed_optimizer():
    """grgauge.AdamW through torch.distributed.checkpoint's state_dicts, and on to torch.optim.AdamW's."""
    model = fsdp()
    optimizer = adamw(model.parameters())
    train(model, optimizer, steps=5)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    results = {"names": sorted(saved["state"])}
    at = copy.deepcopy(model.state_dict())
    train(model, optimizer, start=5, steps=5)
    results["straight"] = weights(model)
    for name, make in (("ours", adamw), ("torch's", lambda p: torch.optim.AdamW(p, lr=1e-3))):
        model = fsdp()
        model.load_state_dict(at)
        optimizer = make(model.parameters())
        set_optimizer_state_dict(model, optimizer, copy.deepcopy(saved))
        train(model, optimizer, start=5, steps=5)
        results[name] = weights(model)
    return results
