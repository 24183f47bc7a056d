"""GradES: what follows from readings of "delta" and "norm"."""

from __future__ import annotations

import math

import pytest
import torch
from blocks import MATRICES, OPTIMIZERS, drive, grades_of, network, snapshot, train, values_of
from llamas import PEFT, lora

import grgauge_kernels as gk
from grgauge import GradES
from grgauge.grades.matrix import LEVEL_READINGS


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"metric": "l2"}, "metric is 'l2'; it must be one of 'delta', 'norm'"),
        ({"scale": "layer"}, "scale is 'layer'"),
        ({"tau": 0.0}, "tau is 0.0; it must be above 0"),
        ({"tau": math.nan}, "tau is nan"),
        ({"alpha": 1.5}, r"alpha is 1.5; it must lie in \[0, 1\]"),
        ({"total_steps": 0}, "total_steps is 0; it must be at least 1"),
        ({"patience": 0}, "patience is 0"),
        ({"warmup": -1}, "warmup is -1"),
        ({"every": 1, "metric": "delta"}, "every is 1; it must be at least 2"),
        ({"sample": 0}, "sample is 0"),
        ({"tau": None}, "tau is None; metric 'norm' needs a threshold"),
        ({"metric": "signal", "tau": None, "every": 1}, "every is 1; it must be at least 2"),
        ({"metric": "signal", "tau": None, "epsilon": 0.0}, r"epsilon is 0\.0; it must lie inside \(0, 1\)"),
        ({"metric": "signal", "tau": 0.5}, "tau is 0.5; metric 'signal' has no threshold: it must be None"),
        ({"metric": "signal", "tau": None, "thaw": 2.0}, "thaw is 2.0; metric 'signal' has no threshold"),
        ({"thaw": 0.5}, "thaw is 0.5; it must be above tau = 0.5"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(given, words):
    with pytest.raises(ValueError, match=words):
        grades_of(network(), **given)


def test_a_matrix_freezes_when_it_reads_less_than_tau_of_its_own_level():
    """Four matrices on four scales; two of them fall below half of what they were."""
    net = network()
    grades, optimizer = grades_of(net, alpha=0.5, total_steps=20)
    early = dict(zip(MATRICES, (1.0, 2.0, 30.0, 4e-3), strict=True))
    late = dict(zip(MATRICES, (0.51, 0.98, 16.0, 1e-3), strict=True))
    drive(net, optimizer, [early] * 10 + [late] * 2)
    assert grades.levels == pytest.approx(early)
    assert grades.frozen == {"blocks.0.down": 11, "blocks.1.down": 11}
    assert [r.froze for r in grades.history if r.froze] == [("blocks.0.down", "blocks.1.down")]
    assert not grades.done


@pytest.mark.parametrize(("scale", "tau"), [("element", 0.5), ("matrix", 64.0)])
def test_tau_can_be_absolute(scale, tau):
    """The sum over the 128 elements of a matrix is what the paper compares."""
    net = network()
    grades, optimizer = grades_of(net, scale=scale, tau=tau, alpha=0.0)
    drive(net, optimizer, [{"blocks.0.up": 0.49, "blocks.1.up": 0.51}] * 2)
    assert grades.frozen == {"blocks.0.up": 1}


def test_no_freezing_in_the_grace_period_or_before_the_level_is_known():
    net = network()
    grades, optimizer = grades_of(net, scale="element", tau=9.0, alpha=0.5, total_steps=9)
    drive(net, optimizer, [1.0] * 5)
    assert grades.frozen == {}
    drive(net, optimizer, [1.0])
    assert set(grades.frozen.values()) == {5}  # ceil(0.5 * 9)
    net = network()
    grades, optimizer = grades_of(net, alpha=0.0, warmup=4, tau=0.5)
    drive(net, optimizer, [1.0] * 4 + [0.1] * LEVEL_READINGS)
    assert set(grades.levels.values()) == {None}
    drive(net, optimizer, [0.01] * 2)
    assert grades.levels == pytest.approx(dict.fromkeys(MATRICES, 0.1))
    assert set(grades.frozen.values()) == {5 + LEVEL_READINGS}


def test_patience_counts_readings_in_a_row():
    net = network()
    grades, optimizer = grades_of(net, scale="element", alpha=0.0, patience=3)
    drive(net, optimizer, [0.1, 0.1, 0.9, 0.1, 0.1, 0.1, 0.1])
    assert set(grades.frozen.values()) == {6}


def test_the_first_reading_freezes_nothing():
    """Not even one made at the very first step, where released code finds a difference of 0."""
    net = network()
    grades, optimizer = grades_of(net, metric="delta", every=2, scale="element", tau=1e9, alpha=0.0)
    state = grades.state_dict() | {"step": 1}  # a run whose first step here is one to be read
    grades.load_state_dict(state)
    drive(net, optimizer, [1.0] * 2)
    assert all(map(math.isnan, grades.history[0].values))
    assert grades.frozen == {}
    drive(net, optimizer, [1.0] * 2)
    assert set(grades.frozen.values()) == {4}


@pytest.mark.parametrize("bad", [math.nan, math.inf, None, 0.0], ids=["NaN", "infinite", "missing", "zero"])
@pytest.mark.parametrize("metric", ["delta", "norm"])
def test_a_gradient_that_says_nothing_freezes_nothing(metric, bad):
    """Nor does it break the row that patience counts. With delta this holds for both steps of a reading."""
    quiet, loud, none = {"blocks.0.up": 0.01}, {"blocks.0.up": 0.02}, {"blocks.0.up": bad}
    for at in (0, 1) if metric == "delta" and bad != 0.0 else (1,):
        net = network()
        grades, optimizer = grades_of(
            net, OPTIMIZERS["torch AdamW"], metric=metric, every=2, scale="element", alpha=0.0, patience=2
        )
        pair = [quiet, loud]
        pair[at] = none
        drive(net, optimizer, [*pair, *pair, quiet, loud, *pair, quiet])
        assert "blocks.0.up" not in grades.frozen
        assert [math.isnan(values["blocks.0.up"]) for values in values_of(grades).values()] == [1, 1, 0, 1]
        drive(net, optimizer, [loud, quiet])
        assert grades.frozen["blocks.0.up"] == 10


def test_all_frozen_is_the_signal_to_stop_and_then_nothing_is_measured(monkeypatch):
    net = network()
    grades, optimizer = grades_of(net, OPTIMIZERS["torch AdamW"], scale="element", tau=9.0, alpha=0.0)
    train(net, optimizer, 1)
    assert not grades.done
    train(net, optimizer, 1, start=2)
    assert grades.done
    assert set(grades.frozen) == set(MATRICES)
    monkeypatch.setattr(gk, "measure_", lambda *args, **kwargs: pytest.fail("measured"))
    before = snapshot(net)
    train(net, optimizer, 3, start=3)
    rest = {name for name, p in net.named_parameters() if torch.equal(p, before[name])}
    assert rest == {f"{name}.weight" for name in MATRICES}
    assert [reading.step for reading in grades.history] == [1]


@PEFT
def test_training_goes_on_where_freezing_leaves_nothing_to_train():
    model = lora()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    grades = GradES(
        model, optimizer, tau=1e9, scale="element", total_steps=9, metric="norm", every=1, patience=1, alpha=0.0
    )
    tokens = torch.randint(32, (2, 8))
    for t in range(4):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        if t == 1:
            assert grades.done
            before = snapshot(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_frozen_matrix_takes_part_again_when_its_gradient_rises():
    """It is looked at in every fourth reading, and at no other time is its gradient computed."""
    net = network()
    grades, optimizer = grades_of(net, scale="element", alpha=0.0, every=2, tau=0.5, thaw=2.0, metric="delta")
    weight = net.blocks[0].up.weight
    wanted = []
    for t in range(1, 22):
        wanted.append(weight.requires_grad)
        sign = (-1.0) ** t
        drive(net, optimizer, [dict.fromkeys(MATRICES, sign) | {"blocks.0.up": sign * (0.1 if t <= 8 else 4.0)}])
        if t == 12:
            still = weight.detach().clone()
    # read at 2, frozen in 3; looked at for the reading of 8 (0.2: rests) and that of 16 (8: thawed in 17)
    expected = [t <= 3 or t in (7, 8, 15, 16) or t >= 18 for t in range(1, 22)]
    assert wanted == expected
    assert [(r.step, r.thawed) for r in grades.history if r.thawed] == [(16, ("blocks.0.up",))]
    assert values_of(grades)[8]["blocks.0.up"] == pytest.approx(0.2)
    assert math.isnan(values_of(grades)[10]["blocks.0.up"])
    assert "blocks.0.up" not in grades.frozen
    assert not torch.equal(weight, still)


def test_it_says_what_it_does():
    assert repr(grades_of(network(), metric="delta", every=2)[0]) == (
        "GradES(0 of 4 matrices frozen; mean |g_t - g_(t-1)| < 0.5 of its own early level, from step 10 on)"
    )
