"""Trajectory invariance: regimes, equivalent runs, collapse of curves, and a search along one dimension."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grgauge.invariance import (
    Curve,
    Line,
    Regime,
    Space,
    collapse_error,
    decay_after,
    equivalent,
    gamma,
    regime,
    time_scale,
)
from grgauge.policy import Config

LR, GAMMA, BOTH = (Regime(salient, 1.0, "") for salient in ("lr", "gamma", "both"))


def test_short_fine_tuning_is_recognised_and_gamma_not_used_there():
    """lr 2e-5, wd 0.01: a time scale of 5e6 iterations."""
    g = gamma(2e-5, 0.01)
    assert time_scale(g) == pytest.approx(5e6)
    for steps in (1, 1000, 30_000):
        assert regime(steps, g).salient == "lr"
    assert "weight decay is negligible" in regime(3000, g).reason
    assert "5e+06" in regime(3000, g).reason


@pytest.mark.parametrize(
    ("steps", "g", "salient"),
    [
        (50_000, 3e-4 * 0.1, "gamma"),
        (10_000, 3e-4 * 0.1, "both"),
        (1_000, 3e-4 * 0.1, "lr"),
        (199, 0.1, "lr"),
        (200, 0.1, "gamma"),
        (10**9, 0.0, "lr"),
        (0, 0.1, "lr"),
    ],
)
def test_regimes(steps, g, salient):
    found = regime(steps, g)
    assert found.salient == salient
    assert found.age == steps * g


@given(st.floats(0, 1e7), st.floats(0, 1e7), st.floats(0, 1))
def test_a_run_goes_from_lr_to_gamma_and_never_back(one, other, g):
    order = {"lr": 0, "both": 1, "gamma": 2}
    sooner, later = (regime(step, g).salient for step in sorted((one, other)))
    assert order[sooner] <= order[later]


def test_equivalent_runs():
    a = Config(1e-3, 32, 0.1)
    same_gamma, same_lr = Config(2e-3, 32, 0.05), Config(1e-3, 32, 0.5)
    assert [equivalent(a, same_gamma, r) for r in (LR, GAMMA, BOTH)] == [False, True, False]
    assert [equivalent(a, same_lr, r) for r in (LR, GAMMA, BOTH)] == [True, False, False]
    assert all(equivalent(a, Config(1.01e-3, 32, 0.1), r) for r in (LR, GAMMA, BOTH))
    assert not any(equivalent(a, Config(1e-3, 64, 0.1), r) for r in (LR, GAMMA, BOTH))
    assert not equivalent(a, Config(1.1e-3, 32, 0.1), LR)
    assert equivalent(a, Config(1.1e-3, 32, 0.1), LR, tolerance=0.1)


@given(st.floats(1e-6, 1), st.floats(1e-6, 1), st.floats(0, 1), st.floats(0, 1), st.sampled_from([LR, GAMMA, BOTH]))
def test_equivalence_does_not_depend_on_the_order(lr, other_lr, decay, other_decay, r):
    a, b = Config(lr, 8, decay), Config(other_lr, 8, other_decay)
    assert equivalent(a, b, r) == equivalent(b, a, r)
    assert equivalent(a, a, r)


def test_a_config_that_leaves_weight_decay_as_it_is_cannot_be_compared():
    with pytest.raises(ValueError, match=r"b.weight_decay must be a number, got None"):
        equivalent(Config(1e-3, 8, 0.1), Config(1e-3, 8), LR)


# --- collapse ---------------------------------------------------------------------------------------------------------


def curve(group, factor, steps=(0, 10, 20)):
    return Curve(group, steps, [factor * math.exp(-step / 10) for step in steps])


def test_the_error_is_the_ratio_of_relative_differences():
    """Curves apart by constant factors: within a group by 1.1, between the two by 2 and thereabouts."""
    runs = [curve("a", 1.0), curve("a", 1.1), curve("b", 2.0), curve("b", 2.2)]
    found = collapse_error(runs)
    assert found.within == pytest.approx(math.log(1.1))
    squares = [math.log(x / y) ** 2 for x in (1.0, 1.1) for y in (2.0, 2.2)]
    assert found.between == pytest.approx(math.sqrt(sum(squares) / 4))
    assert found.error == found.within / found.between


def test_groups_that_are_a_curve_each_have_error_0_and_a_meaningless_grouping_about_1():
    rng = np.random.default_rng(0)
    assert collapse_error([curve(g, g) for g in (1.0, 1.0, 3.0, 3.0)]).error == 0.0
    steps = np.arange(50)
    runs = [Curve(i % 4, steps, np.exp(rng.standard_normal(50).cumsum() / 9)) for i in range(40)]
    assert collapse_error(runs).error == pytest.approx(1.0, abs=0.1)
    assert math.isnan(collapse_error([curve(g, 1.0) for g in "aab"]).error)
    assert collapse_error([curve("a", 1.0), curve("a", 1.0), curve("b", 1.0), curve("a", 2.0)]).error > 0.5


def test_axes_may_differ():
    """An exponential is a straight line in logarithms: interpolation is exact, whatever the steps."""
    runs = [curve("a", 1.0, np.arange(0, 100, 7)), curve("a", 1.0, np.arange(3, 90)), curve("b", 2.0, (0, 50, 200))]
    assert collapse_error(runs).within == pytest.approx(0.0, abs=1e-12)
    assert collapse_error(runs).between == pytest.approx(math.log(2))


@given(st.floats(1e-3, 1e3), st.integers(2, 300))
def test_units_and_the_number_of_points_do_not_matter(unit, points):
    runs = [curve("a", 1.0), curve("a", 1.5), curve("b", 3.0)]
    scaled = [Curve(run.group, run.steps, [unit * v for v in run.values]) for run in runs]
    assert collapse_error(scaled, points=points).error == pytest.approx(collapse_error(runs).error)


def test_the_early_phase_can_be_looked_at_alone():
    """Curves that follow the learning rate up to step 100, and gamma from there on."""
    steps = np.arange(0, 301, 5)

    def run(lr, g, by):
        late = np.clip((steps - 100) / 100, 0, 1)
        return Curve(lr if by == "lr" else g, steps, np.exp((1 - late) * lr + late * g))

    grid = [(lr, g) for lr in (1.0, 2.0, 3.0) for g in (1.0, 2.0, 3.0)]
    assert collapse_error([run(*at, "lr") for at in grid], before=100).error == pytest.approx(0.0)
    assert collapse_error([run(*at, "gamma") for at in grid], after=200).error == pytest.approx(0.0)
    assert collapse_error([run(*at, "gamma") for at in grid], before=100).error > 1
    assert collapse_error([run(*at, "lr") for at in grid], after=200).error > 1


def test_nan_is_left_out():
    whole = [curve("a", 1.0, range(9)), curve("a", 1.2, range(9)), curve("b", 2.0, range(9))]
    values = list(whole[0].values)
    values[4] = math.nan
    holed = [Curve("a", range(9), values), *whole[1:]]
    assert collapse_error(holed).within == pytest.approx(collapse_error(whole).within)


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        ([], "runs must be of at least 2 groups"),
        ([curve("a", 1.0), curve("a", 1.0)], "at least 2 groups"),
        ([curve("a", 1.0), curve("b", 1.0)], "at least 2 in some group"),
        ([curve("a", 1.0), curve("a", -1.0), curve("b", 1.0)], r"runs\[1\].values must be finite and above 0"),
        ([curve("a", 1.0), Curve("a", (0, 2, 1), (1, 1, 1)), curve("b", 1.0)], r"runs\[1\].steps must be ascending"),
        ([curve("a", 1.0), Curve("a", (0, 1), (1, 1, 1)), curve("b", 1.0)], r"runs\[1\].values must be as long"),
        ([curve("a", 1.0), Curve("a", (0, 1), (1, math.nan)), curve("b", 1.0)], "known at 2 steps at least"),
        ([curve("a", 1.0), curve("a", 1.0), curve("b", 1.0, (50, 60))], "over a common range"),
    ],
)
def test_curves_that_cannot_be_compared_are_named(runs, words):
    with pytest.raises(ValueError, match=words):
        collapse_error(runs)


# --- one dimension ----------------------------------------------------------------------------------------------------

PRETRAINING = Space(lr=(1e-4, 1e-2), weight_decay=(0.01, 1.0), batch_size=(8, 512))


def test_a_space_has_the_regime_that_its_runs_share():
    assert Space(lr=(1e-5, 5e-5), weight_decay=(0.0001, 0.1)).regime(3000).salient == "lr"
    assert PRETRAINING.regime(2_000_000).salient == "gamma"
    mixed = PRETRAINING.regime(5000)
    assert mixed.salient == "both"
    assert "from" in mixed.reason
    assert "; to" in mixed.reason
    with pytest.raises(ValueError, match="with 'both' nothing can be fixed"):
        PRETRAINING.reduced(mixed)


@given(st.floats(0, 1))
def test_along_gamma_every_gamma_of_the_space_is_met_inside_the_space(u):
    line = PRETRAINING.reduced(PRETRAINING.regime(2_000_000))
    low, high = line.ends
    assert (low, high) == PRETRAINING.gamma
    config = line.config(low * (high / low) ** u, 64)
    assert line.value(config) == pytest.approx(low * (high / low) ** u)
    assert 1e-4 <= config.lr <= 1e-2
    assert 0.01 * (1 - 1e-9) <= config.weight_decay <= 1.0 + 1e-9
    if 1e-4 < config.lr < 1e-2:
        assert config.weight_decay == pytest.approx(0.1)


@given(st.floats(1e-5, 5e-5))
def test_along_lr_weight_decay_is_fixed(lr):
    space = Space(lr=(1e-5, 5e-5), weight_decay=(0.0001, 0.01))
    line = space.reduced(space.regime(3000))
    config = line.config(lr, 32)
    assert (config.lr, config.batch_size) == (lr, 32)
    assert config.weight_decay == pytest.approx(0.001)
    assert line.value(Config(lr, 32, 0.005)) == lr


def test_a_fixed_number_is_a_range_of_itself():
    space = Space(lr=(1e-4, 1e-3), weight_decay=0.0)
    assert space.gamma == (0.0, 0.0)
    assert space.reduced(space.regime(10**6)).config(5e-4, 32) == Config(5e-4, 32, 0.0)
    with pytest.raises(ValueError, match=r"space\.weight_decay must be above 0"):
        Line(space, "gamma")


def test_off_the_line_is_an_error():
    line = Line(PRETRAINING, "lr")
    with pytest.raises(ValueError, match=r"value must be a lr between 0\.0001 and 0\.01, got 0\.1"):
        line.config(0.1, 64)
    with pytest.raises(ValueError, match="batch_size must be between 8 and 512, got 4"):
        line.config(1e-3, 4)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"lr": 0.0}, "lr must be above 0"),
        ({"lr": (1e-3, 1e-4)}, "lr must be above 0, a number or"),
        ({"lr": 1e-3, "weight_decay": (0.0, 0.1)}, "weight_decay must be above 0"),
        ({"lr": 1e-3, "weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"lr": 1e-3, "batch_size": (0, 8)}, "batch_size must be at least 1"),
        ({"lr": (1e-3, math.inf)}, "lr must be"),
        ({"lr": math.nan}, "lr must be"),
    ],
    ids=str,
)
def test_ranges_that_are_none_are_named(given, words):
    with pytest.raises(ValueError, match=words):
        Space(**given)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: gamma(-1.0, 0.1), "lr must be finite and above 0"),
        (lambda: gamma(1e-3, math.nan), "weight_decay must be finite"),
        (lambda: time_scale(-1.0), "gamma must be"),
        (lambda: regime(-1, 0.1), "step must be"),
        (lambda: regime(1, math.inf), "gamma must be"),
        (lambda: regime(1, 0.1, early=-1), "early must be"),
        (lambda: regime(1, 0.1, settled=0.0), "settled must be"),
        (lambda: equivalent(Config(1e-3, 8, 0.1), Config(1e-3, 8, 0.1), LR, 1.0), "tolerance must be"),
        (lambda: collapse_error([curve("a", 1.0)] * 3, points=1), "points must be"),
    ],
)
def test_bad_numbers_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# --- weight decay -----------------------------------------------------------------------------------------------------

BEFORE = Config(1e-3, 32, 0.1)


@pytest.mark.parametrize(
    ("rule", "expected", "words"),
    [
        ("decay", 0.1, "Weight decay is kept"),
        ("gamma", 0.05, "as many iterations as before"),
        ("gamma per batch", 0.2, "as many samples as before"),
    ],
)
def test_what_happens_to_weight_decay_is_said(rule, expected, words):
    decay, said = decay_after(BEFORE, 2e-3, 128, rule)
    assert decay == pytest.approx(expected)
    assert words in said
    assert f"weight decay 0.1 -> {expected:.3g}, gamma 0.0001 -> {2e-3 * expected:.3g}" in said


@given(st.floats(1e-6, 1.0), st.integers(1, 4096))
def test_what_each_rule_keeps(lr, batch):
    old = gamma(BEFORE.lr, 0.1)
    kept = {rule: gamma(lr, decay_after(BEFORE, lr, batch, rule)[0]) for rule in ("decay", "gamma", "gamma per batch")}
    assert kept["decay"] == pytest.approx(lr * 0.1)
    assert kept["gamma"] == pytest.approx(old)
    assert time_scale(kept["gamma per batch"]) * batch == pytest.approx(time_scale(old) * 32)


def test_no_change_changes_nothing():
    for rule in ("decay", "gamma", "gamma per batch"):
        assert decay_after(BEFORE, 1e-3, 32, rule)[0] == pytest.approx(0.1)


def test_an_unknown_rule_is_named():
    with pytest.raises(ValueError, match="rule must be 'decay', 'gamma' or 'gamma per batch', got 'keep'"):
        decay_after(BEFORE, 1e-3, 32, "keep")
