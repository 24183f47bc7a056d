"""Ray Tune by gauges on a local cluster of two workers: a real small regression, changed, cloned, stopped, killed."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from grgauge import AdamW, Config, Gauge, Reading, suggest

os.environ["RAY_TRAIN_V2_ENABLED"] = "1"  # Ray before 2.51 asks for it when it is imported
ray = pytest.importorskip("ray")
from ray import cloudpickle, train, tune  # noqa: E402
from ray.train.torch import TorchConfig, TorchTrainer, prepare_model  # noqa: E402
from ray.tune.integration.ray_train import TuneReportCallback  # noqa: E402

from grgauge.integrations.ray import GaugeScheduler, GaugeSearch, metrics  # noqa: E402

pytestmark = [
    pytest.mark.engines,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
STEPS = 120
SPACE = {"lr": tune.loguniform(1e-6, 1e3), "batch_size": tune.randint(8, 65)}
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a file of tests


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """Two workers, and processors in name for Ray Train's own."""
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    context = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    yield context
    ray.shutdown()


def regression(config):
    """Reports each reading and a checkpoint; goes on from one."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    teacher, net = nn.Linear(16, 1), nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = AdamW(net.parameters(), lr=config["lr"])
    gauge = Gauge(optimizer, config["batch_size"])
    first, samples = 1, 0
    if checkpoint := tune.get_checkpoint():
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / "state.pt")
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        gauge.load_state_dict(state["gauge"])
        first, samples = state["step"] + 1, state["samples"]
        if state["config"] != config:
            optimizer.param_groups[0]["lr"] = config["lr"]
            gauge.batch_size = config["batch_size"]
            gauge.restart()
    for step in range(first, STEPS + 1):
        if config.get("meet") is not None and step == 5:
            (Path(config["meet"]) / str(config["lr"])).touch()
            while len(list(Path(config["meet"]).iterdir())) < 2:
                time.sleep(0.05)
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(config["batch_size"], 16, generator=generator)
        y = teacher(x).detach() + 0.1 * torch.randn(config["batch_size"], 1, generator=generator)
        optimizer.zero_grad()
        loss = gauge.split_backward(lambda b: (net(b[0]) - b[1]).square().mean(), (x, y))
        optimizer.step()
        samples += config["batch_size"]
        reading = gauge.reading()
        if reading is None or reading.step != step:
            continue
        with tempfile.TemporaryDirectory() as folder:
            state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "gauge": gauge.state_dict()}
            state.update(step=step, samples=samples, config=config)
            torch.save(state, Path(folder) / "state.pt")
            told = {**metrics(reading, float(loss), samples), "pid": os.getpid()}
            tune.report(told, checkpoint=tune.Checkpoint.from_directory(folder))
        if config.get("kill") and step == 60 and not Path(config["kill"]).exists():
            Path(config["kill"]).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if config.get("meet") is not None:
            time.sleep(0.2)  # so that neither is done before the other is judged


class Recorded(tune.Callback):
    """What trials reported. Ray's own logs lose lines where a trial goes on before they were copied to its storage."""

    def __init__(self):
        self.results = []

    def on_trial_result(self, iteration, trials, trial, result, **info):
        self.results.append(result)

    def readings(self):
        return [(r["reading"]["step"], r["reading"]["gr_t"], r["reading"]["gr_s"]) for r in self.results]


def fit(space, folder, trainable=regression, scheduler=None, search=None, samples=1, failures=0):
    recorded = Recorded()
    tuner = tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            scheduler=scheduler, search_alg=search, num_samples=samples, metric="loss", mode="min"
        ),
        run_config=tune.RunConfig(
            storage_path=str(folder),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=failures),
            callbacks=[recorded],
        ),
    )
    return tuner.fit(), recorded


def test_a_worker_killed_in_the_middle_goes_on_from_its_checkpoint(tmp_path):
    config, marker = {"lr": 1e-3, "batch_size": 32}, tmp_path / "marker"
    _, whole = fit(config, tmp_path / "whole", scheduler=GaugeScheduler())
    killing = {**config, "kill": str(marker)}
    (result,), killed = fit(killing, tmp_path / "killed", scheduler=GaugeScheduler(), failures=1)
    assert marker.exists()
    assert result.error is None
    assert len({r["pid"] for r in killed.results}) == 2
    assert dict.fromkeys(killed.readings()) == dict.fromkeys(whole.readings())
    assert [step for step, _, _ in whole.readings()] == list(range(5, STEPS + 1, 5))


def test_a_learning_rate_far_too_low_is_raised_in_the_running_trial(tmp_path):
    scheduler = GaugeScheduler(SPACE)
    _, recorded = fit({"lr": 1e-6, "batch_size": 32}, tmp_path, scheduler=scheduler)
    assert {what for _, what, _, _ in scheduler.changes} == {"change"}
    assert str(scheduler.changes[0][2]).startswith("far out: GR_T")
    rates = list(dict.fromkeys(r["config"]["lr"] for r in recorded.results))
    assert rates == [1e-6, *(config["lr"] for _, _, _, config in scheduler.changes)]
    assert rates == sorted(rates)
    # With the weights that it had: no step is made twice.
    assert [step for step, _, _ in recorded.readings()] == list(range(5, STEPS + 1, 5))
    samples = [r["samples"] for r in recorded.results]
    for before, after, r in zip(samples, samples[1:], recorded.results[1:], strict=False):
        assert after - before == 5 * r["config"]["batch_size"]
    assert scheduler.debug_string() == f"Gauges: {len(rates) - 1} changed, 0 cloned, 0 stopped"


def test_a_trial_that_diverges_is_cloned_from_the_better_one(tmp_path):
    meet = tmp_path / "meet"
    meet.mkdir()
    scheduler = GaugeScheduler(SPACE, seed=0)
    space = {"lr": tune.grid_search([3e-3, 1e3]), "batch_size": 32, "meet": str(meet)}
    results, recorded = fit(space, tmp_path, scheduler=scheduler)
    name, what, evidence, config = scheduler.changes[0]
    assert (what, evidence.rule) == ("clone", "diverged")
    assert 1e-4 < config["lr"] < 1e-1
    assert all(result.error is None for result in results)
    losses = [r["loss"] for r in recorded.results if r["trial_id"] == name]
    cloned = [r["loss"] for r in recorded.results if r["trial_id"] == name and r["config"]["lr"] != 1e3]
    assert max(losses) > 1e3
    assert max(cloned) < 10.0  # from the first reading on: the weights are the better one's


def test_alone_a_trial_that_diverges_is_stopped(tmp_path):
    scheduler = GaugeScheduler()
    _, recorded = fit({"lr": 1e3, "batch_size": 8}, tmp_path, scheduler=scheduler)
    assert [(what, evidence.rule) for _, what, evidence, _ in scheduler.changes] == [("stop", "diverged")]
    assert recorded.readings()[-1][0] == scheduler.changes[0][2].step < STEPS


def test_the_search_climbs_from_far_below_and_goes_on_after_it_was_saved(tmp_path):
    space = {"lr": tune.loguniform(1e-6, 2e-6), "batch_size": tune.randint(8, 65), "width": tune.choice([8, 16])}
    assert GaugeSearch(space, seed=3).suggest("a") == GaugeSearch(space, seed=3).suggest("b")
    search = GaugeSearch(space, seed=0)
    _, recorded = fit({}, tmp_path, search=search, samples=1)
    tried = recorded.results[0]["config"]
    assert 1e-6 <= tried["lr"] <= 2e-6
    saved, wide = tmp_path / "search", GaugeSearch({**SPACE, "width": tune.choice([8, 16])})
    search.save(str(saved))
    wide.restore(str(saved))
    chosen = search.suggest("next")
    assert chosen["lr"] == 2e-6  # the end of the range
    assert wide.suggest("next") == chosen
    assert chosen["width"] in (8, 16)


def test_what_a_trial_reports_leads_to_the_same_suggestion(tmp_path):
    """The search's next configuration is what `grgauge.suggest` says of the readings."""
    search = GaugeSearch(SPACE, seed=0)
    _, recorded = fit({}, tmp_path, search=search, samples=1)
    config = recorded.results[0]["config"]
    read = [Reading.from_dict(r["reading"]) for r in recorded.results]
    expected = suggest(read, Config(config["lr"], config["batch_size"]))
    assert expected.lr != config["lr"]
    chosen = search.suggest("next")
    assert chosen["lr"] == pytest.approx(min(max(expected.lr, 1e-6), 1e3))
    assert chosen["batch_size"] == min(max(expected.batch_size, 8), 64)


def test_a_trial_without_readings_is_named(tmp_path):
    with pytest.warns(UserWarning, match="has reported no reading; it must report grgauge"):
        fit({}, tmp_path, lambda config: tune.report({"loss": 1.0}), scheduler=GaugeScheduler())


def ddp(config):
    """A Ray Train run inside a Ray Tune trial: ranks are the groups of GR_S."""

    def loop():
        torch.manual_seed(0)
        net = prepare_model(nn.Linear(8, 1))
        optimizer = AdamW(net.parameters(), lr=config["lr"])
        gauge = Gauge(optimizer, 32)
        gauge.attach(net)
        rank, reported = train.get_context().get_world_rank(), 0
        for step in range(1, 24):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(32, 8, generator=generator)[rank::2]
            optimizer.zero_grad()
            loss = (net(x) - x.sum(1, keepdim=True)).square().mean()
            loss.backward()
            optimizer.step()
            reading = gauge.reading()
            if reading is not None and reading.step > reported:  # ranks exchange their sums while training goes on
                reported = reading.step
                train.report({**metrics(reading, float(loss)), "ranks": torch.distributed.get_world_size()})

    TorchTrainer(
        loop,
        torch_config=TorchConfig("gloo"),
        scaling_config=train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5}),
        run_config=train.RunConfig(storage_path=config["folder"], callbacks=[TuneReportCallback()]),
    ).fit()


def test_ranks_of_a_ray_train_run_inside_a_trial_are_the_groups(tmp_path):
    config = {"lr": 1e-3, "folder": str(tmp_path / "train")}
    trainable = tune.with_resources(ddp, {"CPU": 0.5})
    (result,), recorded = fit(config, tmp_path, trainable, scheduler=GaugeScheduler())
    assert result.error is None
    assert {r["ranks"] for r in recorded.results} == {2}
    assert [step for step, _, _ in recorded.readings()] == [5, 10, 15, 20]
    assert all(0.0 < gr_s <= 1.0 for _, _, gr_s in recorded.readings())


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, r"space\['lr'\] must be a range of floats, such as loguniform, got None"),
        ({**SPACE, "batch_size": tune.uniform(1, 2)}, r"space\['batch_size'\] must be a range of integers"),
        ({**SPACE, "depth": tune.grid_search([1, 2])}, r"space\['depth'\] must be a value or a domain"),
    ],
)
def test_a_space_that_cannot_be_searched(space, message):
    with pytest.raises(ValueError, match=message):
        GaugeSearch(space)


@pytest.mark.parametrize("make", [GaugeScheduler, GaugeSearch])
def test_numbers_out_of_range(make):
    with pytest.raises(ValueError, match=r"max_lr_factor must be at least 1, got 0\.5"):
        make(max_lr_factor=0.5)
    with pytest.raises(ValueError, match="max_changes must be a whole number of at least 0, got -1"):
        GaugeScheduler(max_changes=-1)
