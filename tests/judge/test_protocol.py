"""The judge's arithmetic, and what it must say of tuners whose worth is known."""

import math

import numpy as np
import pytest
from judge.protocol import (
    MISS,
    Cost,
    Curve,
    compared,
    cost,
    medians,
    paired,
    profile,
    ratio,
    regret,
    score,
    targets,
    winner,
)


def curve(values, samples=None, seconds=None):
    samples = np.arange(1, len(values) + 1) * 100.0 if samples is None else np.asarray(samples, float)
    return Curve(samples, samples / 50 if seconds is None else np.asarray(seconds, float), np.asarray(values, float))


def learning(seed, rate=0.3, top=0.95, checks=20):
    """An accuracy that approaches `top`, with noise."""
    noise = np.random.default_rng(seed).normal(0, 0.002, checks)
    return curve(top - 0.8 * np.exp(-rate * np.arange(1, checks + 1)) + noise)


def test_a_cost_is_that_of_the_first_check_that_meets_the_target():
    run = curve([0.2, 0.6, 0.5, 0.9])
    assert cost(run, 0.6, higher=True) == Cost(200.0, 4.0)
    assert cost(run, 0.5, higher=False) == Cost(100.0, 2.0)


def test_a_miss_costs_infinity():
    assert cost(curve([0.2, 0.6]), 0.7, higher=True) == MISS
    assert cost(curve([math.nan, math.nan]), 0.7, higher=False) == MISS
    assert not MISS.reached


@pytest.mark.parametrize("higher", [True, False])
def test_infinite_values_meet_nothing(higher):
    assert cost(curve([math.inf, -math.inf]), 0.0, higher) == MISS


def test_a_curve_of_unequal_lengths_is_refused():
    with pytest.raises(ValueError, match="lengths"):
        Curve(np.ones(3), np.ones(3), np.ones(2))


def test_targets_are_the_median_at_the_end_and_a_looser_one():
    runs = [curve([0.1, end]) for end in (0.90, 0.92, 0.91, 0.80, 0.99)]
    best, looser = targets(runs, "accuracy", higher=True)
    assert best.value == 0.91
    assert looser.value == pytest.approx(0.90)
    losses = targets([curve([3.0, end]) for end in (1.0, 1.2, 1.1)], "loss", higher=False)
    assert [target.value for target in losses] == pytest.approx([1.1, 1.21])


def test_targets_need_runs_that_train():
    with pytest.raises(ValueError, match="must train"):
        targets([curve([0.1, math.nan])] * 3, "loss", higher=False)


def test_the_best_configuration_costs_one_of_itself():
    for target in targets([learning(seed) for seed in range(5)], "accuracy", higher=True):
        again = [cost(learning(seed), target.value, higher=True) for seed in range(100, 140)]
        for quantity in ("samples", "seconds"):
            own = np.median([getattr(c, quantity) for c in again]) / getattr(target.unit, quantity)
            assert own == pytest.approx(1.0, abs=0.1)


def test_a_slower_configuration_costs_more():
    target = targets([learning(seed) for seed in range(5)], "accuracy", higher=True)[1]
    slow = np.median([cost(learning(seed, rate=0.2), target.value, True).samples for seed in range(20)])
    assert slow > 1.2 * target.unit.samples


def test_two_misses_are_alike():
    assert ratio(math.inf, math.inf) == 1.0
    assert ratio(2.0, math.inf) == 0.0
    assert ratio(math.inf, 2.0) == math.inf


def test_a_profile_counts_problems_within_tau_of_the_cheapest():
    costs = {"a": {"x": 1.0, "y": 4.0, "z": math.inf}, "b": {"x": 2.0, "y": 1.0, "z": math.inf}}
    assert profile(costs, [1.0, 2.0, 4.0]) == {"a": [1 / 3, 1 / 3, 2 / 3], "b": [1 / 3, 2 / 3, 2 / 3]}


def test_a_score_is_the_integral_of_the_profile():
    generator = np.random.default_rng(0)
    costs = {name: dict(enumerate(generator.lognormal(size=30))) for name in "abc"}
    costs["a"][3] = math.inf
    taus = np.linspace(1, 4, 30_001)
    areas = {name: np.trapezoid(shares, taus) / 3 for name, shares in profile(costs, taus).items()}
    assert score(costs) == pytest.approx(areas, abs=1e-3)


def test_profiles_need_the_same_problems():
    with pytest.raises(ValueError, match="same"):
        profile({"a": {"x": 1.0}, "b": {"y": 1.0}}, [1.0])


def tuner(seed, scale, misses=0):
    generator = np.random.default_rng(seed)
    made = {family: (scale * generator.lognormal(0.0, 0.3, 20)).tolist() for family in ("p", "q", "r")}
    for values in made.values():
        values[:misses] = [math.inf] * misses
    return made


def test_a_median_with_misses_is_infinite_from_half_of_them_on():
    assert medians({"p": [1.0, 2.0, math.inf]}) == {"p": 2.0}
    assert medians({"p": [1.0, math.inf, math.inf]}) == {"p": math.inf}


def test_a_clear_difference_is_carried_by_its_interval():
    outcome = compared(tuner(0, 1.0), tuner(1, 3.0))
    assert outcome.low <= outcome.value <= outcome.high
    assert outcome.value == pytest.approx(1 / 3, rel=0.2)
    assert outcome.verdict == "cheaper"
    assert compared(tuner(1, 3.0), tuner(0, 1.0)).verdict == "dearer"


def test_equal_tuners_are_undecided():
    assert compared(tuner(0, 1.0), tuner(1, 1.0)).verdict == "undecided"


def test_too_few_starts_decide_nothing():
    own, other = ({"p": [cost] * 4, "q": [cost] * 20} for cost in (1.0, 3.0))
    assert compared(own, other).high < 1.0
    assert compared(own, other).verdict == "undecided"
    assert compared({"p": [1.0] * 5}, {"p": [3.0] * 5}).verdict == "cheaper"


def test_missing_is_worse_than_any_cost():
    missing = {family: [math.inf] * 20 for family in ("p", "q", "r")}
    assert compared(missing, tuner(0, 1000.0)).verdict == "dearer"
    assert compared(missing, missing).verdict == "undecided"


def test_misses_on_different_families_cancel():
    one = {"p": [math.inf] * 20, "q": [1.0] * 20}
    other = {"p": [1.0] * 20, "q": [math.inf] * 20}
    assert compared(one, other).verdict == "undecided"


def test_the_cheapest_tuner_wins_and_shuffled_labels_give_no_winner():
    costs = {"a": tuner(0, 1.0), "b": tuner(1, 3.0), "c": tuner(2, 4.0, misses=5)}
    assert winner(costs) == "a"
    for seed in range(5):
        generator = np.random.default_rng(seed)
        shuffled = {name: {} for name in costs}
        for family in ("p", "q", "r"):
            pooled = generator.permutation(np.concatenate([own[family] for own in costs.values()]))
            for name, values in zip(costs, pooled.reshape(3, -1), strict=True):
                shuffled[name][family] = values.tolist()
        assert winner(shuffled) is None


def test_pairs_that_differ_by_one_sign_have_an_interval_without_zero():
    mean, low, high = paired([0.1, 0.2, 0.15, 0.12, 0.18])
    assert mean == pytest.approx(0.15)
    assert 0.1 <= low < mean < high <= 0.2
    _, low, high = paired([-0.2, 0.2, -0.1, 0.1])
    assert low < 0.0 < high
    with pytest.raises(ValueError, match="one pair at least"):
        paired([])


def test_comparing_needs_the_same_families():
    with pytest.raises(ValueError, match="same"):
        compared({"p": [1.0]}, {"q": [1.0]})


def test_regret_falls_from_one_to_zero_with_the_best_so_far():
    run = curve([0.2, 0.6, 0.4, 1.0])
    assert regret(run, 1.0, 0.2, [50, 100, 250, 300, 400, 900], higher=True) == pytest.approx([1, 1, 0.5, 0.5, 0, 0])
    losses = curve([3.0, math.nan, 2.0])
    assert regret(losses, 1.0, 3.0, [100, 200, 300], higher=False) == pytest.approx([1.0, 1.0, 0.5])
    with pytest.raises(ValueError, match="differ"):
        regret(run, 1.0, 1.0, [100], higher=True)
