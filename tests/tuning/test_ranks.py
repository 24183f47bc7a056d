"""Several ranks: one policy, one study, the same weights; and no rank that waits for ever."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import signal

import optuna
import pytest
import torch
from torchrun import torchrun
from tuning import failing_ranks, ranks

from grgauge.tuning.data import Cuts, source


@pytest.fixture(scope="module")
def folder(tmp_path_factory, empty):
    folder = tmp_path_factory.mktemp("ranks")
    for name in ("kill", "raise", "whole", "straight", "halves", "one", "refused"):
        shutil.copy(empty, folder / f"{name}.db")
    return folder


@pytest.fixture(scope="module")
def ended(folder):
    """Exit status of both ranks, of all pairs at once."""
    context = multiprocessing.get_context("forkserver")  # one import of torch for all
    context.set_forkserver_preload(["grgauge", "optuna.storages"])
    pairs = {}
    for end in ("kill", "raise"):
        pairs[end] = [context.Process(target=failing_ranks.main, args=(rank, str(folder), end)) for rank in range(2)]
        for process in pairs[end]:
            process.start()
    try:
        for process in (p for pair in pairs.values() for p in pair):
            process.join(timeout=120)
        return {end: [process.exitcode for process in pair] for end, pair in pairs.items()}
    finally:
        for process in (p for pair in pairs.values() for p in pair):
            process.kill()
            process.join()


@pytest.fixture(scope="module")
def two(ended, folder):
    """What each of two ranks has saved; they go on where `ended` was killed, and where one process stopped."""
    assert ended["kill"] == [-signal.SIGKILL] * 2
    ranks.tuned(folder / "one.db", wrap=lambda model: model, scripted={}, budget=800)
    torchrun(2, ranks.__file__, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def trials(folder, name):
    study = optuna.load_study(study_name="grgauge", storage=f"sqlite:///{folder / name}.db")
    return study, [(t.number, t.state.name, t.params["lr"], t.params["batch_size"]) for t in study.trials]


@pytest.mark.parametrize("kind", ["autopilot", "sharded_autopilot"])
def test_an_autopilot_on_two_ranks_decides_alike_and_ends_in_the_same_bits(two, kind):
    one, other = (results[kind] for results in two)
    assert any("the learning rate is too low" in decision for decision in one["decisions"])
    assert one["config"].lr > 1e-4
    assert one["config"].batch_size % 2 == 0
    for name in ("decisions", "config", "readings", "losses"):
        assert one[name] == other[name]
    assert torch.equal(one["weights"], other["weights"])
    assert one["readings"]["gr_s"] is not None
    moves = [line for line in one["lines"] if "nothing was compared" not in line]
    assert len(moves) == len(one["decisions"])
    assert other["lines"] == []


def test_ranks_share_the_batches_that_one_process_would_take(two):
    one, other = (results["autopilot"]["rows"] for results in two)
    batches = {}
    for (at, size, rows), (also_at, also_size, others) in zip(one, other, strict=True):
        assert (at, size, len(rows)) == (also_at, also_size, len(others))
        assert len(rows) <= 20  # micro-batches
        batches.setdefault((at, size), [[], []])
        batches[at, size][0] += rows
        batches[at, size][1] += others
    alone = source(ranks.dataset(), 0)
    assert len({size for _, size in batches}) > 1
    for (at, size), (rows, others) in batches.items():
        ((_, drawn),) = alone.draw(at, 1, Cuts(size, None, 5, 1))
        expected = drawn[0][:, 0].tolist()
        assert [rows, others] == [expected[::2], expected[1::2]]


def test_other_kinds_of_data_are_shared_too(two):
    loaded = [results["loaders"]["DataLoader"] for results in two]
    assert sorted(loaded[0] + loaded[1]) == list(range(500))
    for results in two:
        assert results["loaders"]["asked"] == 25
        assert results["loaders"]["function"] == list(range(250))


def test_a_probe_is_made_by_all_ranks_and_judged_by_one(two):
    for take in (None, False, True):
        one, other = (results["probed"][take] for results in two)
        assert torch.equal(one["weights"], other["weights"])
        assert (one["config"], one["used"]) == (other["config"], other["used"])
        assert (one["judged"] is None, other["judged"]) == (take is None, None)
    plain, refused, taken = (two[0]["probed"][take] for take in (None, False, True))
    assert torch.equal(plain["weights"], refused["weights"])
    assert not torch.equal(plain["weights"], taken["weights"])
    assert refused["used"] == taken["used"] == (1600, 1600 + 96 + 2 * 4 * 16)
    assert refused["config"].lr == 1e-3
    assert taken["config"].lr == pytest.approx(3e-3)


def test_a_sharded_model_is_not_probed_and_says_so(two):
    for rank, results in enumerate(two):
        asked = results["sharded_probed"][True]
        assert asked["judged"] is None
        assert asked["config"].lr == 1e-3
        said = [line for line in asked["lines"] if "a sharded model has no averaged weights" in line]
        assert len(said) == (1 if rank == 0 else 0)


def test_rank_0_stops_all_of_them(two):
    for rank, results in enumerate(two):
        stopped = results["rank_0_stops"]
        assert stopped["used"] == 320
        assert [decision.reason for decision in stopped["decisions"]] == ["enough"]
        assert stopped["asked"] == (10 if rank == 0 else 0)


def test_an_advisor_says_the_same_on_all_ranks_and_prints_on_one(two):
    one, other = (results["advised"] for results in two)
    assert one["said"] == other["said"]
    assert "raise LR" in one["lines"][-1]
    assert (len(one["lines"]), other["lines"]) == (3, [])


def test_tune_on_two_ranks_is_one_study(two, folder):
    one, other = (results["undisturbed"] for results in two)
    assert torch.equal(one["weights"], other["weights"])
    assert not set(map(tuple, one["seen"])) & set(map(tuple, other["seen"]))
    for name in ("config", "used", "verdict", "loss", "trials", "losses"):
        assert one[name] == other[name]
    assert [(number, parent) for number, parent, *_ in one["trials"]] == [(0, None), (1, 0), (2, 0), (3, None), (4, 3)]
    study, stored = trials(folder, "whole")
    assert [(number, state, lr, batch) for number, _, state, lr, batch, *_ in one["trials"]] == stored
    assert study.user_attrs["used"] == one["used"]
    assert study.user_attrs["verdict"] == one["verdict"]


def test_killed_and_started_again_it_ends_as_if_undisturbed(two, folder):
    for rank, results in enumerate(two):
        again, whole = results["killed_before"], results["undisturbed"]
        assert 0 < len(again["seen"]) < len(whole["seen"])
        assert again["seen"] == whole["seen"][-len(again["seen"]) :], rank
        assert torch.equal(again["weights"], whole["weights"])
        for name in ("config", "used", "verdict", "trials", "losses"):
            assert again[name] == whole[name]
    assert trials(folder, "kill")[1] == trials(folder, "whole")[1]


def test_a_sharded_model_goes_back_and_on_in_the_same_bits(two):
    for results in two:
        straight, again = results["sharded"]["straight"], results["sharded"]["again"]
        assert torch.equal(straight["weights"], again["weights"])
        assert straight["config"] == again["config"]
        assert [parent for _, parent, *_ in straight["trials"]] == [None, 0, 0]
        # the reading of the step it stopped at comes one step late, as if nothing had happened
        assert [again["losses"][-1][0][0], straight["losses"][-1][0][0]] == [448, 448]


def test_two_ranks_go_on_where_one_process_stopped(two):
    for results in two:
        assert results["begun_by_one"]["used"] == 1600
        assert [(parent, samples) for _, parent, *_, samples in results["begun_by_one"]["trials"]] == [
            (None, 800),
            (0, 800),
        ]
    rows = [row for results in two for part in results["begun_by_one"]["seen"] for row in part]
    alone = source(ranks.dataset(), 0)
    cuts = Cuts(32, None, 5, 1)
    drawn = [batch for at in range(800, 1600, 32) for _, batch in alone.draw(at, 1, cuts)]
    expected = [row for rows, _ in drawn for row in rows[:, 0].tolist()]
    assert sorted(rows) == sorted(expected)


def test_an_exception_on_one_rank_ends_the_other(ended, folder):
    assert ended["raise"] == [1, 1]
    report = json.loads((folder / "raise.json").read_text("utf-8"))
    assert report["raised"].startswith("TrainingError: the training function raised RuntimeError")
    assert report["after"] < failing_ranks.TIMEOUT + 5.0
    study, stored = trials(folder, "raise")
    assert stored[-1][1] == "FAIL"
    assert study.user_attrs["used"] == failing_ranks.KILL_AT


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("plain module", "2 ranks would train apart: wrap the Sequential in DistributedDataParallel"),
        ("plain module to tune", "2 ranks would train apart"),
        ("odd batch", "batch_size must be a multiple of the 2 ranks, got 33"),
        ("a batch of 1", "batch_size must be a multiple of the 2 ranks, got 1"),
        ("odd retune", "batch 33 is no multiple of the 2 ranks"),
        ("odd start", "batch_size must be a multiple of the 2 ranks, got 33"),
        ("no even batch", r"space['batch_size'] must be around a multiple of the 2 ranks, got (9, 9)"),
        ("no storage", "storage nosuch://x cannot be opened"),
        ("out of memory", "with 16 samples in one backward pass: go on with micro_batch=8"),
    ],
)
def test_what_cannot_be_is_refused_on_all_ranks(two, name, complaint):
    for results in two:
        assert complaint in results["refusals"][name]
