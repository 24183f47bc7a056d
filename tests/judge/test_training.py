"""Recorded runs, shards and live tuners, on a family small enough to know."""

import math

import pytest
import torch
from families import kind
from families.fetch import matches
from judge import live
from judge.record import record, shard
from judge.table import CHECKS, Config
from judge.training import HORIZON, averaged, batches, marks, recorded, validated
from line import Line
from torch import nn


@pytest.fixture(scope="module")
def line():
    return Line()


def test_a_run_has_a_row_at_every_mark_and_learns(line):
    rows = recorded(line, Config(0.03, 10), 0)
    assert [row["samples"] for row in rows] == marks(line.samples)
    assert [row["check"] for row in rows] == list(range(CHECKS))
    assert rows[-1]["metric"] < 0.2 * rows[0]["metric"]
    assert rows[-1]["metric_averaged"] < 0.2 * rows[0]["metric"]
    assert rows[-1]["read_at"] == rows[-1]["step"] == 200
    read = [row for row in rows if row["ready"]]
    assert read
    assert all(0 < row["gr_s"] <= 1 <= row["gr_t"] for row in read)


def test_a_large_batch_spans_several_marks(line):
    rows = recorded(line, Config(0.03, 512), 0)
    assert [row["samples"] for row in rows] == [512, 1024, 1536, 2048]
    assert [row["check"] for row in rows] == [0, 5, 10, 15]


def test_a_seed_makes_a_run_repeatable(line):
    one, same, other = (recorded(line, Config(0.03, 50), seed)[-1]["metric"] for seed in (0, 0, 1))
    assert one == same != other


def test_a_run_that_fails_ends_with_a_row_that_says_so(line):
    rows = recorded(line, Config(1e25, 50), 0)
    assert len(rows) < CHECKS
    assert math.isnan(rows[-1]["metric"])
    assert math.isnan(rows[-1]["metric_averaged"])


def test_an_epoch_has_every_sample_once(line):
    drawn = batches(line, 50, seed=0)
    for _ in range(2):
        epoch = torch.cat([next(drawn)[0] for _ in range(6)])
        assert torch.equal(epoch[epoch[:, 0].argsort()], line.data.tensors[0][line.data.tensors[0][:, 0].argsort()])


def test_averaged_weights_are_a_mean_over_the_last_tenth(line):
    model = nn.Linear(1, 1, bias=False).double()
    average, weights, steps = averaged(model), torch.zeros(1000, dtype=torch.float64), 1000
    for t in range(1, steps + 1):
        with torch.no_grad():
            model.weight.fill_(float(t))
        average.update_parameters(model)
        share = HORIZON / (t + HORIZON - 1)
        weights = weights * (1 - share)
        weights[t - 1] = share
    values = torch.arange(1, steps + 1, dtype=torch.float64)
    assert average.module.weight.item() == pytest.approx(float(weights @ values))
    assert float(weights.sum()) == pytest.approx(1.0)
    assert 0.55 < float(weights[-100:].sum()) < 0.75


def test_averaged_weights_get_statistics_of_their_own(line):
    model = line.model()
    average = averaged(model)
    average.update_parameters(model)
    validated(line, average)
    expected = line.data.tensors[0][:256].mean(0)
    assert torch.allclose(average.module[0].running_mean, expected, atol=1e-5)
    assert torch.equal(model[0].running_mean, torch.zeros(4))


def test_validation_leaves_training_alone(line):
    model = line.model()
    before, states = torch.get_rng_state(), [tensor.clone() for tensor in model.state_dict().values()]
    line.validate(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(states, model.state_dict().values(), strict=True))


def test_every_parameter_is_in_one_group_and_matrices_decay(line):
    model = line.model()
    groups = line.param_groups(model, 0.1)
    assert {id(p): group["weight_decay"] for group in groups for p in group["params"]} == {
        id(p): 0.1 if p.dim() > 1 else 0.0 for p in model.parameters()
    }


def test_a_shard_is_recorded_once_and_half_a_one_does_not_count(line, tmp_path):
    config = Config(0.03, 512)
    shard(tmp_path, config, 0).with_suffix(".part").write_bytes(b"killed in the middle")
    path = record(line, config, 0, tmp_path)
    assert path == shard(tmp_path, config, 0)
    content, when = path.read_bytes(), path.stat().st_mtime_ns
    assert record(line, config, 0, tmp_path) == path
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (content, when)
    assert list(tmp_path.iterdir()) == [path]


def test_another_family_is_refused():
    with pytest.raises(ValueError, match="family is 'music'; it must be one of images"):
        kind("music")


def test_a_file_of_another_hash_does_not_match(tmp_path):
    path = tmp_path / "wheel"
    assert not matches(path, "0" * 64)
    path.write_bytes(b"abc")
    assert matches(path, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    assert not matches(path, "0" * 64)


NEVER = {False: -1.0, True: -1.0}


@pytest.mark.parametrize("optimizer", [live.adamw(0.03), live.schedule_free, live.prodigy])
def test_an_optimizer_trains_to_its_limit_where_it_does_not_arrive(line, optimizer):
    curve = live.trained(line, optimizer, 50, 0, NEVER).curves()[False]
    assert curve.samples[-1] == live.LIMIT * line.samples
    assert len(curve.samples) == live.LIMIT * CHECKS
    assert curve.values[-1] < curve.values[0]


def test_who_arrives_stops(line):
    curves = live.trained(line, live.adamw(0.03), 10, 0, {False: 1.0, True: 2.0}).curves()
    assert curves[False].samples[-1] < live.LIMIT * line.samples
    assert curves[False].values.min() <= 1.0
    assert curves[True].values.min() <= 2.0


def test_gr_gauge_trains_to_its_limit_or_arrives(line):
    never = live.gr_gauge(line, None, 0, NEVER).curves()
    assert never[False].samples[-1] == pytest.approx(live.LIMIT * line.samples, abs=512)
    assert (never[True].seconds > 0).all()
    goals = {False: float(never[False].values[10]), True: float(never[True].values[10])}
    arrived = live.gr_gauge(line, None, 0, goals).curves()
    assert len(arrived[False].samples) <= 11
