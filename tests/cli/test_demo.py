"""The demo's trainings, what it concludes from their readings, and the picture."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys

import matplotlib.figure
import matplotlib.image
import numpy as np
import pytest
import torch

from grgauge import Reading, Target
from grgauge.cli import char_transformer, plot, progress
from grgauge.policy import advise


@pytest.fixture(scope="module")
def text():
    return char_transformer.Text.manual()


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def runs(text):
    runs = [char_transformer.Run(lr, 45) for lr in char_transformer.LEARNING_RATES]
    progress.train_quietly(runs, text, seed=0)
    return runs


def reading(step, gr_t=20.0, gr_s=0.58, **other):
    known = {
        "batch_size": 24,
        "gr_t_error": None,
        "finite_time_factor": 1.0,
        "gr_s_error": None,
        "noise_scale": 30.0,
        "noise_scale_error": None,
        "grad_norm": 1.0,
        "nonfinite": 0,
        "ready": True,
    }
    return Reading(step=step, gr_t=gr_t, gr_s=gr_s, **{**known, **other})


# --- real trainings --------------------------------------------------------------------------------------------------


def test_the_gauges_tell_the_learning_rates_apart(runs):
    low, right, high = runs
    assert low.summary.gr_t < right.summary.gr_t < high.summary.gr_t
    below, near, above = (advise(run.readings).lr for run in runs)
    assert below.interval > near.interval > above.interval
    assert below.interval[1] > 10.0 > 3.0 > above.interval[1]
    assert (below.direction, above.direction) in itertools.product(("raise", "unknown"), ("lower", "unknown"))
    distance = [abs(math.log(run.summary.gr_t / 20.0)) for run in runs]
    assert distance[1] < 0.3 < 1.0 < min(distance[0], distance[2])
    assert right.loss == min(run.loss for run in runs)
    assert (
        char_transformer.conclusion(runs) == "The lowest loss and the GR_T nearest to 20 are the same run's: lr 2e-03."
    )


def test_runs_share_weights_and_batches(runs):
    assert len({run.losses[0] for run in runs}) == 1
    assert runs[0].losses[0] == pytest.approx(math.log(103), abs=0.5)  # a guess among about 103 characters


def test_readings_come_every_five_steps_and_know_both_gauges(runs):
    for run in runs:
        assert [reading.step for reading in run.readings] == list(range(5, 46, 5))
        assert all(reading.gr_t > 0.9 and 1 / 24 <= reading.gr_s <= 1.0 for reading in run.readings)
        assert run.readings[-1].ready


def test_a_seed_is_a_seed_and_the_global_generator_is_left_alone(text, runs):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    same, other = char_transformer.Run(2e-3, 5), char_transformer.Run(2e-3, 5)
    progress.train_quietly([same], text, seed=0)
    progress.train_quietly([other], text, seed=1)
    assert torch.rand(1) == expected
    assert same.losses == runs[1].losses[:5]
    assert other.losses != same.losses


def test_the_model_is_causal_and_of_the_size_it_says(text):
    model = char_transformer.CharTransformer(text.characters)
    assert sum(p.numel() for p in model.parameters()) > 200_000
    batch = next(text.batches(0))[:2, :-1]
    changed = batch.clone()
    changed[:, 40:] = (changed[:, 40:] + 1) % text.characters
    before, after = model(batch), model(changed)
    torch.testing.assert_close(before[:, :40], after[:, :40])
    assert not torch.allclose(before[:, 40:], after[:, 40:])


def test_json_is_one_document_with_a_picture_beside_it(tmp_path):
    out = tmp_path / "plane.png"
    command = [sys.executable, "-m", "grgauge.cli", "demo", "--json", "--steps", "12", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert document["picture"] == str(out)
    assert document["steps"] == 12
    assert [run["lr"] for run in document["runs"]] == list(char_transformer.LEARNING_RATES)
    for run in document["runs"]:
        assert len(run["losses"]) == 12
        assert run["loss"] == pytest.approx(np.mean(run["losses"]))
        assert [reading["step"] for reading in run["readings"]] == [5, 10]
        assert run["batch_size"] == char_transformer.BATCH_SIZE
        assert run["verdict"] == "LR and batch: cannot tell"  # too early
    picture = matplotlib.image.imread(out)
    assert min(picture.shape[:2]) > 500
    assert picture[..., :3].std() > 0.05


def test_lines_say_what_the_newest_reading_says_and_end_with_the_verdict(text, capsys):
    run = char_transformer.Run(2e-3, 20)
    progress.train_in_lines([run], text, seed=0)
    newest = run.readings[-1]
    line, last = capsys.readouterr().out.splitlines()
    assert last == str(run)
    assert (
        line.split()
        == (
            f"lr 2e-03 step 20 loss {run.loss:.2f} GR_T {newest.gr_t:.1f} GR_S {newest.gr_s:.2f} "
            f"noise scale {newest.noise_scale:.0f}"
        ).split()
    )


def test_the_live_table_ends_on_what_the_verdicts_rest_on(text, capsys):
    runs = [char_transformer.Run(1e-4, 10), char_transformer.Run(2e-3, 10)]
    progress.train_live(runs, text, seed=0)
    out = capsys.readouterr().out
    for run in runs:
        assert any(line.endswith(str(run)) for line in out.splitlines())  # behind codes that move the cursor, perhaps
        assert all(figure in out for figure in (f"{run.loss:.2f}", f"{run.summary.gr_t:.1f}"))


# --- what is made of readings ----------------------------------------------------------------------------------------


def test_the_verdict_rests_on_the_median_of_the_window():
    run = char_transformer.Run(1e-3, 160)
    assert (run.verdict, run.summary) == ("no reading yet", None)
    window = [19.0, 300.0, 20.0, 2.0, 21.0]
    run.readings = [reading(5 * i, gr_t=1.0) for i in range(1, 8)]
    run.readings += [reading(40 + 5 * i, gr_t=gr_t) for i, gr_t in enumerate(window)]
    run.readings += [reading(step, gr_t=24.0) for step in range(65, 161, 5)]
    assert run.summary.gr_t == 20.0
    assert run.summary.step == 60
    assert run.verdict == advise([reading(50, gr_t=20.0)]).short


def test_a_young_reading_counts_by_what_it_would_settle_to():
    run = char_transformer.Run(
        1e-3,
        10,
        readings=[reading(5, gr_t=5.0, finite_time_factor=0.25), reading(10, gr_t=10.0, finite_time_factor=0.5)],
    )
    assert run.summary.gr_t == pytest.approx(10.0)
    assert Target().lr_factor(run.summary) == 1.0


def test_quantities_that_nobody_knows_stay_unknown():
    run = char_transformer.Run(
        1e-3, 60, readings=[reading(50, gr_s=None, noise_scale=None), reading(55, gr_t=None, gr_s=None)]
    )
    assert (run.summary.gr_t, run.summary.gr_s, run.summary.noise_scale) == (20.0, None, 30.0)
    assert run.verdict.endswith("batch: cannot tell")
    assert plot.path(run.readings) == []


def test_the_conclusion_says_so_when_gauge_and_loss_disagree_or_cannot_be_asked():
    def run(lr, loss, gr_t, **other):
        return char_transformer.Run(lr, 1, [loss], [reading(50, gr_t, **other)])

    right = run(1e-3, 2.0, 20.0)
    assert "same run's: lr 1e-03" in char_transformer.conclusion([right, run(1e-2, 3.0, 100.0)])
    assert "loss is lr 1e-02's" in char_transformer.conclusion([right, run(1e-2, 1.0, 100.0)])
    assert "same run's: lr 1e-03" in char_transformer.conclusion([right, run(1e-2, math.nan, 100.0)])
    assert "Not every gauge was ready" in char_transformer.conclusion([right, run(1e-2, 3.0, 100.0, ready=False)])
    assert "Not every gauge was ready" in char_transformer.conclusion([right, run(1e-2, 3.0, None)])


# --- the plane -------------------------------------------------------------------------------------------------------


def test_a_path_is_the_ready_readings_or_all_of_a_run_too_short_for_them():
    readings = [reading(5, 2.0, ready=False), reading(10, 3.0, ready=False), reading(15, 4.0), reading(20, 5.0)]
    assert plot.path(readings) == [(4.0, 0.58), (5.0, 0.58)]
    assert plot.path(readings[:2]) == [(2.0, 0.58), (3.0, 0.58)]


def test_the_health_box_is_the_targets_and_every_point_is_in_sight():
    axes = matplotlib.figure.Figure().add_subplot()
    target = Target(gr_t=30.0, gr_t_zone=(25.0, 36.0), gr_s_zone=(0.4, 0.7))
    plot.draw_plane(axes, {"a": [(0.5, 0.1), (900.0, 0.9)], "b": [(3.0, 0.3)], "none": []}, target, {"a": (20.0, 0.5)})
    box = next(patch for patch in axes.patches if patch.get_label().startswith("healthy"))
    assert box.get_extents().transformed(axes.transData.inverted()).extents == pytest.approx([25.0, 0.4, 36.0, 0.7])
    left, right = axes.get_xlim()
    assert left < 0.5
    assert right > 900.0
    assert [entry.get_text() for entry in axes.get_legend().get_texts()][1:] == ["a", "b", "none"]


@pytest.mark.parametrize(("name", "start"), [("a", b"\x89PNG"), ("a.svg", b"<?xml")])
def test_the_suffix_chooses_the_format(name, start, tmp_path):
    plot.save_plane(tmp_path / name, {"a": [(2.0, 0.3), (5.0, 0.5)]}, title="a plane")
    assert (tmp_path / name).read_bytes().startswith(start)


def test_a_format_that_nobody_can_write_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"plane\.docx ends in \.docx"):
        plot.file_format(tmp_path / "plane.docx")
