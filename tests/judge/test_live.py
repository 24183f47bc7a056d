"""Opponents and ablations that train, on a family small enough to know."""

import sys

import numpy as np
import pytest
import torch
from judge import live, reuse
from judge.apart import apart, by_chance, guided
from judge.devices import Placed, placed, require
from judge.opponents import start_of
from judge.table import BOUNDS, Config
from judge.training import recorded
from line import Line

from grgauge.policy import Progress, Pruning
from grgauge.reading import Reading

NEVER = {False: -1.0, True: -1.0}


@pytest.fixture(scope="module")
def line():
    return Line()


def reading(gr_t, gr_s, batch):
    fields = {"step": 50, "batch_size": batch, "gr_t": gr_t, "gr_s": gr_s, "finite_time_factor": 1.0, "ready": True}
    return Reading(**{**dict.fromkeys(Reading.__dataclass_fields__), **fields})


def test_the_next_trial_is_where_the_gauges_point_and_within_the_plane():
    low = guided([Progress(reading(1.5, 0.58, 32), 1.0)], Config(1e-3, 32))
    assert low.lr == pytest.approx(1e-2)
    assert low.batch == 32
    large = guided([Progress(reading(20.0, 0.9, 400), 1.0)], Config(1e-3, 400))
    assert large.batch == BOUNDS["batch"][1]
    assert guided([Progress(reading(1.5, 0.58, 32), 1.0)], Config(0.9, 32)).lr == BOUNDS["lr"][1]
    assert guided([], Config(1e-3, 32)) == Config(1e-3, 32)


def test_chance_is_the_same_for_the_same_seed():
    one, same, other = (by_chance(seed) for seed in (0, 0, 1))
    assert [one([], Config(1e-3, 8)) for _ in range(3)] == [same([], Config(1e-3, 8)) for _ in range(3)]
    assert one([], Config(1e-3, 8)) != other([], Config(1e-3, 8))


def test_trials_apart_begin_untrained_and_spend_the_limit(line):
    looks = apart(line, Config(0.03, 50), 0, NEVER, lambda trial, config: config, None)
    values = looks.curves()[False].values
    assert looks.spent == live.LIMIT * line.samples
    begun = values[:: len(values) // 4][:4]
    assert (begun > 5 * values[len(values) // 4 - 1]).all()  # each of four whole runs begins where the first did


def test_pruning_ends_trials_that_are_hopeless(line):
    started = []

    def next_of(trial, config):
        started.append(config)
        return config

    apart(line, Config(1e-5, 8), 0, NEVER, next_of, Pruning(warm_up=10, far=(2.0, 3.0), zone=(2.0, 2.5)))
    pruned, started[:] = len(started), []
    apart(line, Config(1e-5, 8), 0, NEVER, next_of, None)
    assert len(started) == live.LIMIT
    assert pruned > len(started)


def test_who_arrives_stops_apart_too(line):
    looks = apart(line, Config(0.03, 10), 0, {False: 1.0, True: 2.0}, by_chance(0), Pruning())
    assert looks.arrived
    assert looks.spent < live.LIMIT * line.samples


def test_reused_weights_are_compared_at_equal_samples(line):
    row = reuse.pair(line, start_of(1), 1)
    assert reuse.BUDGET * line.samples * 0.2 < row["samples"] <= reuse.BUDGET * line.samples + BOUNDS["batch"][1]
    for name in ("reused", "from_scratch"):
        assert 0.0 < float(row[name]) < 20.0


def test_weights_from_scratch_learn_with_samples(line):
    from grgauge import Config as Found

    few, many = (reuse.from_scratch(line, Found(0.03, 10, 0.01), samples, 0) for samples in (50, 2000))
    assert many < 0.2 * few


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_lr_find_is_charged_for_what_it_tries(line):
    pytest.importorskip("lightning")
    from judge.lr_range import TRIED, lr_find

    looks = lr_find(line, 10, 0, NEVER)
    samples = looks.curves()[False].samples
    assert TRIED * 10 // 2 <= samples[0] <= (TRIED + 2) * 10 + line.samples / 20
    assert samples[-1] == pytest.approx(live.LIMIT * line.samples, abs=20)
    assert np.isfinite(looks.curves()[False].values).all()


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_a_range_test_at_the_largest_batch_may_spend_the_limit(line):
    pytest.importorskip("lightning")
    from judge.lr_range import lr_find

    looks = lr_find(line, None, 0, NEVER)  # 300 samples a batch, all that there are: 100 steps are 15 static runs
    assert looks.spent > live.LIMIT * line.samples
    assert np.isnan(looks.curves()[False].values).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray leaves sockets open
def test_a_population_is_charged_for_all_members(line):
    ray = pytest.importorskip("ray")
    ray.cloudpickle.register_pickle_by_value(sys.modules["line"])
    from judge.population import MEMBERS, pbt
    from judge.replay import FORWARD

    looks = pbt(line, 0, NEVER)
    samples = looks.curves()[False].samples
    assert live.LIMIT * line.samples <= samples[-1] <= live.LIMIT * line.samples + 1024
    assert (np.diff(samples) >= line.samples / 20 + FORWARD * len(line.held_out)).all()
    assert len(samples) >= MEMBERS
    values = looks.curves()[False].values
    assert np.nanmin(values) < 0.8 * values[0]


def test_a_family_on_a_device_trains_as_it_does_by_itself(line):
    on = Placed(Line(), torch.device("cpu"))
    names = "metric", "metric_averaged", "loss", "gr_t", "gr_s"
    for own, other in zip(recorded(line, Config(0.03, 50), 0), recorded(on, Config(0.03, 50), 0), strict=True):
        assert [own[name] for name in names] == [other[name] for name in names]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_family_on_a_gpu_learns():
    rows = recorded(placed(Line(), torch.device("cuda")), Config(0.03, 10), 0)
    assert rows[-1]["metric"] < 0.2 * rows[0]["metric"]


def test_a_device_that_is_none_is_refused(line):
    assert placed(line, require("cpu")) is line
    with pytest.raises(ValueError, match="device is 'gpus'; it must be"):
        require("gpus")
