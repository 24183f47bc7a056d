"""Tuners on a table whose curves are a formula: what they spend, and what the judge makes of it."""

import math

import families
import numpy as np
import pandas as pd
import pytest
from judge.opponents import REPLAYED, calibrated, replayed, start_of, static
from judge.protocol import cost, targets
from judge.replay import FORWARD, Bench, Spent
from judge.table import BATCHES, BOUNDS, CHECKS, FRESH, LRS, SEEDS, Config, Family, grid, load, nearest

SAMPLES = 8000
HELD_OUT = 300
BEST = Config(LRS[5], 42)


def accuracy(config, share, seed):
    """Rises with training, the faster the nearer to BEST; a learning rate of 1 fails halfway."""
    if config.lr == LRS[-1] and share > 0.5:
        return math.nan
    away = abs(LRS.index(config.lr) - LRS.index(BEST.lr)) + abs(BATCHES.index(config.batch) - BATCHES.index(BEST.batch))
    noise = np.random.default_rng([LRS.index(config.lr), config.batch, seed, round(1000 * share)]).normal(0, 0.002)
    return 0.95 - 0.8 * math.exp(-6 * share / (1 + away)) + noise


def rows(higher=True):
    made = []
    runs = [(config, seed) for config in grid() for seed in SEEDS] + [(BEST, seed) for seed in FRESH]
    for config, seed in runs:
        for check in range(CHECKS):
            samples = config.batch * math.ceil(SAMPLES * (check + 1) / CHECKS / config.batch)
            value = accuracy(config, samples / SAMPLES, seed)
            value = value if higher else 1 - value
            made.append((config.lr, config.batch, seed, check, samples, samples * 1e-3, value, value))
            if math.isnan(value):
                break
    columns = ["lr", "batch", "seed", "check", "samples", "seconds_plain", "metric", "metric_averaged"]
    return pd.DataFrame(made, columns=columns).drop_duplicates(["lr", "batch", "seed", "samples"])


@pytest.fixture(scope="module", params=[True, False], ids=["accuracy", "loss"])
def family(request):
    return Family(rows(request.param), SAMPLES, request.param)


def test_the_table_knows_its_best_configuration(family):
    assert family.best == BEST


def test_a_failed_run_is_the_worst(family):
    assert family.loss(family.final(Config(LRS[-1], 42))) == math.inf


def test_nearest_is_nearest_in_logarithms():
    assert nearest(1.3e-5, 9) == Config(LRS[0], 8)
    assert nearest(0.2, 400) == Config(LRS[8], 512)
    assert all(nearest(config.lr, config.batch) == config for config in grid())


def target_of(family):
    fresh = [family.curves[BEST, seed] for seed in FRESH]
    return targets(fresh, "accuracy" if family.higher else "loss", family.higher)


def test_a_static_run_at_the_best_costs_one_of_itself(family):
    for target in target_of(family):
        runs = [replayed(static(family.best, seed), family, seed, HELD_OUT) for seed in FRESH]
        costs = [cost(run, target.value, family.higher) for run in runs]
        assert np.median([c.samples for c in costs]) / target.unit.samples == pytest.approx(1.0, abs=0.1)
        assert np.median([c.seconds for c in costs]) / target.unit.seconds == pytest.approx(1.0, abs=0.1)


def test_a_static_run_at_the_best_costs_one_of_itself_in_the_recorded_table():
    for name, recorded in load().items():
        kind = families.kind(name)
        table = Family(recorded, kind.samples, kind.higher)
        fresh = [table.curves[table.best, seed] for seed in FRESH]
        for target in targets(fresh, kind.metric, kind.higher):
            runs = [
                replayed(static(table.best, seed), table, seed, int(recorded["held_out"].iloc[0])) for seed in FRESH
            ]
            costs = [cost(run, target.value, kind.higher) for run in runs]
            assert np.median([c.samples for c in costs]) / target.unit.samples == pytest.approx(1.0, abs=0.1)
            assert np.median([c.seconds for c in costs]) / target.unit.seconds == pytest.approx(1.0, abs=0.1)


def test_a_tuner_that_never_moves_gets_its_static_cost(family):
    for config in (BEST, Config(LRS[4], 97), Config(LRS[0], 8)):
        own = replayed(static(config, SEEDS[0]), family, 7, HELD_OUT)
        recorded = family.curves[config, SEEDS[0]]
        for target in target_of(family):
            assert cost(own, target.value, family.higher) == cost(recorded, target.value, family.higher)


NAMES = [pytest.param(name, marks=pytest.mark.slow) if "SMAC3" in name else name for name in REPLAYED]


@pytest.mark.parametrize("name", NAMES)
def test_an_opponent_finds_the_target_and_spends_no_more_than_it_may(name, family):
    curve = replayed(REPLAYED[name], family, 3, HELD_OUT)
    assert (np.diff(curve.samples) > 0).all()
    assert (np.diff(curve.seconds) > 0).all()
    limit = 32 * SAMPLES
    assert limit - 512 - FORWARD * HELD_OUT <= curve.samples[-1] <= limit + 1024
    assert cost(curve, 0.8 if family.higher else 0.2, family.higher).reached  # a sixth of the plane does


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_makes_an_opponent_repeatable(name, family):
    one, same, other = (replayed(REPLAYED[name], family, seed, HELD_OUT, limit=6.0) for seed in (3, 3, 4))
    assert np.array_equal(one.values, same.values, equal_nan=True)
    assert not np.array_equal(one.values, other.values, equal_nan=True)


def test_early_stopping_sees_more_configurations_than_whole_runs(family):
    def started(name):
        curve = replayed(REPLAYED[name], family, 0, HELD_OUT)
        first = {seen.values[0] for seen in family.curves.values()}
        return sum(value in first for value in curve.values)

    whole = started("random search")
    assert whole == pytest.approx(32, abs=4)
    assert started("successive halving (Optuna)") > 2 * whole


def test_training_is_charged_by_the_sample_and_a_validation_by_its_forward_pass(family):
    bench = Bench(family, 0, HELD_OUT)
    run = bench.trial(BEST.lr, BEST.batch)
    run.train(10)
    trained = family.curves[BEST, run_seed(family, run)].samples[9]
    assert bench.samples == trained
    run.validate()
    assert bench.samples == pytest.approx(trained + HELD_OUT / 3)
    run.train(10)
    assert bench.samples == pytest.approx(trained + HELD_OUT / 3)


def run_seed(family, run):
    return next(seed for (config, seed), curve in family.curves.items() if curve is run.curve and config == run.config)


def test_a_failed_run_ends_early_and_validates_as_infinite(family):
    bench = Bench(family, 0, HELD_OUT)
    run = bench.trial(1.0, 42)
    run.train(CHECKS)
    assert bench.samples < 0.6 * SAMPLES
    assert run.validate() == math.inf


def test_the_budget_ends_a_tuner_in_the_middle(family):
    bench = Bench(family, 0, HELD_OUT, limit=0.5)
    with pytest.raises(Spent):
        bench.trial(BEST.lr, BEST.batch).train(CHECKS)
    assert bench.samples == pytest.approx(0.5 * SAMPLES, abs=BEST.batch)


def test_a_bench_that_trained_nothing_has_no_curve(family):
    with pytest.raises(ValueError, match="nothing was trained"):
        Bench(family, 0, HELD_OUT).curve()


def test_calibration_takes_what_is_good_elsewhere(family):
    assert calibrated([family, family]) == BEST
    with pytest.raises(ValueError, match="others is empty"):
        calibrated([])


def test_blind_starts_lie_in_the_plane_and_differ():
    starts = [start_of(seed) for seed in range(20)]
    assert len(set(starts)) == 20
    for start in starts:
        assert BOUNDS["lr"][0] <= start.lr <= BOUNDS["lr"][1]
        assert BOUNDS["batch"][0] <= start.batch <= BOUNDS["batch"][1]
    assert min(start.lr for start in starts) < 1e-4
    assert max(start.lr for start in starts) > 1e-1
