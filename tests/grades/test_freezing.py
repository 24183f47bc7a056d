"""GradES: a frozen matrix rests, whatever trains the rest."""

from __future__ import annotations

import math

import pytest
import torch
from blocks import (
    EVERY_OPTIMIZER,
    FREEZE_UP,
    MATRICES,
    OPTIMIZERS,
    backward_flops,
    grades_of,
    loss_of,
    network,
    snapshot,
    train,
    values_of,
)

from grgauge import AdamW, Gauge, GradES


@EVERY_OPTIMIZER
def test_a_frozen_matrix_does_not_move_by_a_bit(make):
    """Neither momentum nor weight decay moves it, and its neighbours move on."""
    net = network()
    grades, optimizer = grades_of(net, make, **FREEZE_UP)
    train(net, optimizer, 3)
    assert grades.frozen == {}
    before = snapshot(net)
    train(net, optimizer, 8, start=4)
    assert grades.frozen == {"blocks.0.up": 3, "blocks.1.up": 3}
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name]) == (name in ("blocks.0.up.weight", "blocks.1.up.weight")), name
        assert p.requires_grad != (name in ("blocks.0.up.weight", "blocks.1.up.weight"))


def test_the_product_for_the_weight_gradient_is_saved():
    net = network()
    grades, optimizer = grades_of(net, **FREEZE_UP)
    full = backward_flops(net)
    train(net, optimizer, 5)
    assert len(grades.frozen) == 2
    product = 2 * 32 * 8 * 16  # 4 x 8 tokens, 8 in, 16 out
    assert full - backward_flops(net) == 2 * product


def test_a_compiled_model_has_the_names_of_the_plain_one_and_saves_the_same():
    net = torch.compile(network(), backend="eager")
    grades, optimizer = grades_of(net, **FREEZE_UP)
    assert grades.matrices == ("blocks.0.up", "blocks.1.up")
    full = backward_flops(net)
    train(net, optimizer, 5)
    assert full - backward_flops(net) == 2 * 2 * 32 * 8 * 16


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant):
    ends = []
    for checkpointed in (None, reentrant):
        net = network(checkpointed=checkpointed)
        grades, optimizer = grades_of(net, **FREEZE_UP | {"metric": "delta", "every": 2})
        train(net, optimizer, 12)
        ends.append((snapshot(net), grades.frozen))
    assert ends[0][1] == ends[1][1] == {"blocks.0.up": 4, "blocks.1.up": 4}
    assert all(torch.equal(ends[0][0][name], p) for name, p in ends[1][0].items())


def test_a_tied_matrix_rests_in_all_its_places():
    net = network()
    net.blocks[1].up.weight = net.blocks[0].up.weight
    full = backward_flops(net)
    grades, optimizer = grades_of(net, **FREEZE_UP)
    train(net, optimizer, 3)
    before = net.blocks[1].up.weight.detach().clone()
    train(net, optimizer, 5, start=4)
    assert grades.frozen == {"blocks.0.up": 3}
    assert torch.equal(net.blocks[1].up.weight, before)
    assert full - backward_flops(net) == 2 * 2 * 32 * 8 * 16


@pytest.mark.parametrize("name", ["ours", "torch AdamW", "torch AdamW, fused"])
def test_grad_scaler(name):
    """Readings are of unscaled gradients; an overflow in either step of one voids it; frozen stays frozen."""
    net, plain = network(), network()
    options = {"metric": "delta", "every": 2, "modules": "up", "scale": "element", "tau": 1e9, "patience": 1}
    options |= {"alpha": 0.5, "total_steps": 16}
    grades, optimizer = grades_of(net, OPTIMIZERS[name], **options)
    reference, other = grades_of(plain, OPTIMIZERS[name], **options)
    train(plain, other, 7)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    before = None
    for t in range(1, 15):
        optimizer.zero_grad()
        loss = scaler.scale(loss_of(net, t))
        (loss * math.inf if t == 12 else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if len(grades.frozen) == 2 and before is None:
            before = net.blocks[0].up.weight.detach().clone()
    for t in (2, 4, 6):
        assert values_of(grades)[t] == pytest.approx(values_of(reference)[t], rel=1e-4)
    assert set(grades.frozen.values()) == {8}
    assert torch.equal(net.blocks[0].up.weight, before)


@pytest.mark.parametrize("name", ["ours", "torch AdamW, fused"])
def test_a_step_that_grad_scaler_skips_voids_the_reading(name):
    for overflow in (3, 4):
        net = network()
        grades, optimizer = grades_of(
            net, OPTIMIZERS[name], metric="delta", every=2, scale="element", tau=1e9, alpha=0.2, patience=1
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for t in range(1, 6):
            optimizer.zero_grad()
            loss = scaler.scale(loss_of(net, t))
            (loss * math.inf if t == overflow else loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert all(map(math.isnan, grades.history[1].values))
        assert grades.frozen == {}


class Twice(torch.optim.Optimizer):
    """Evaluates its closure twice a step, as sharpness-aware minimisation does."""

    def __init__(self, params, **options):
        super().__init__(params, options)

    def step(self, closure):
        with torch.enable_grad():
            closure()
            closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data.add_(p.grad, alpha=-group["lr"])


@pytest.mark.parametrize("kind", [torch.optim.SGD, Twice, AdamW])
def test_a_closure_is_read_once_and_cannot_move_a_frozen_matrix(kind):
    net = network()
    optimizer = kind(net.parameters(), lr=1e-2, weight_decay=0.1)
    grades = GradES(
        net, optimizer, tau=1e9, scale="element", total_steps=8, every=1, metric="norm", patience=1, alpha=0.0
    )

    def closure():
        optimizer.zero_grad()
        loss = loss_of(net, 0)
        loss.backward()
        for matrix in net.blocks[0].up, net.blocks[0].down:  # as DDP leaves one
            matrix.weight.grad = torch.ones_like(matrix.weight)
        return loss

    optimizer.step(closure)
    assert not grades.done
    before = snapshot(net)
    optimizer.step(closure)
    optimizer.step(closure)
    assert [reading.step for reading in grades.history] == [1]
    assert grades.done
    rest = {name for name, p in net.named_parameters() if torch.equal(p, before[name])}
    assert rest == {f"{name}.weight" for name in MATRICES}


def test_an_optimizer_that_moves_parameters_without_a_gradient_is_refused():
    net = network()
    with pytest.raises(TypeError, match="optimizer is LBFGS"):
        grades_of(net, torch.optim.LBFGS)


def test_a_gauge_on_the_same_optimizer_goes_on():
    net = network()
    grades, optimizer = grades_of(net, **FREEZE_UP)
    gauge = Gauge(optimizer, 4, every=2)
    train(net, optimizer, 30)
    assert len(grades.frozen) == 2
    assert gauge.reading().step == 30
    assert gauge.reading().gr_t > 0


def test_removed_it_lets_everything_train_again():
    net = network()
    grades, optimizer = grades_of(net, **FREEZE_UP)
    train(net, optimizer, 6)
    grades.remove()
    before = snapshot(net)
    train(net, optimizer, 2, start=7)
    assert not any(torch.equal(p, before[name]) for name, p in net.named_parameters())
    assert [reading.step for reading in grades.history] == [1, 2, 3]
